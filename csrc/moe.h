// Arguments of the MoE layer's own kernels: the activation between the two GEMMs, forward and backward, and the
// experts' biases. The layer itself is a composition of rooms and lives in pyroute/moe.py.
//
// Row is float, or uint16_t holding bfloat16 bits; arithmetic is float32 in both cases. Sizes: R rows in expert order,
// E experts, I intermediate, P pre-activations per row (2I: gate first, then up; I without a gate), N columns. On a GPU
// rows behind the last segment are not written, padding or not.
#pragma once

#include <stdint.h>

namespace pyroute {

struct ActivationProgram {
    enum Kind : int32_t {
        swish_gate, // a * sigmoid(alpha * a) * (b + up_offset), a = min(gate, limit), b = clamp(up, -limit, limit)
        gelu_gate,  // gelu(gate) * up, the tanh form
        relu2,      // max(z, 0)^2, no gate
    };
    Kind kind;
    float alpha, limit, up_offset;
};

struct ExpertBias { // either pointer, or neither
    const float *f32;
    const uint16_t *bf16;
};

struct ExpertRows {
    const int64_t *expert_offsets; // [E + 1]
    const int32_t *row_to_token;   // [R], negative on padding rows
    int64_t num_rows, num_experts;
};

template <class Row> struct ActivationArgs {
    const Row *gate_up;       // [R, P]
    ExpertBias bias;          // [E, P]
    const float *row_weights; // [R] or null: factor of the hidden row
    Row *hidden;              // [R, I]; zero on padding rows
    int64_t intermediate;
    ActivationProgram program;
};

template <class Row> struct ActivationBackwardArgs {
    ActivationArgs<Row> forward; // hidden is written again, with the bytes of the forward pass
    const Row *grad_hidden;      // [R, I], with respect to the hidden row after its weight
    Row *grad_gate_up;           // [R, P]; zero on padding rows
    float *grad_row_weights;     // [R] or null: <grad_hidden, hidden before its weight>; zero on padding rows
};

template <class Row> struct AddBiasArgs {
    Row *rows;                // [R, N], in place: rows[r] + row_weights[r] * bias[e]; padding rows untouched
    ExpertBias bias;          // [E, N]
    const float *row_weights; // [R] or null
    int64_t columns;
};

template <class Row> struct BiasDotArgs {
    const Row *rows; // [R, N]
    ExpertBias bias; // [E, N]
    float *dots;     // [R], in place: dots[r] + <rows[r], bias[e]>; padding rows untouched
    int64_t columns;
};

template <class Row> struct BiasGradArgs {
    const Row *rows;          // [R, N]
    const float *row_weights; // [R] or null
    float *grad_bias; // [E, N]: sum over the expert's rows of row_weights[r] * rows[r]; zero for an empty expert
    int64_t columns;
    bool accumulate; // add to grad_bias, where an empty expert keeps its bytes
};

} // namespace pyroute
