// Arguments of the whole MoE layer: what moe_forward and moe_backward compose of the other rooms.
#pragma once

#include "float_type.h"
#include "grouped_gemm.h"
#include "moe.h"
#include "permutation.h"

namespace pyroute {

enum class WeightOn : int32_t { output, pre_down, input };

// Sizes: T tokens, k slots, R rows, E experts, H hidden, I intermediate, P pre-activations per row (2I, or I ungated).
struct MoeLayer {
    RouteMaps maps;                // T, k, R; row_to_token names rows of x
    int64_t x_rows;                // of x, and of the gradient of y: T, unless tokens share rows
    const int64_t *expert_offsets; // [E + 1], from 0 to R
    int64_t num_experts, hidden, intermediate, pre_activations;
    FloatType row_type;            // of x and of the rows between the steps: float32 or bfloat16
    const void *x;                 // [x_rows, H]
    const float *topk_weights;     // [T, k]
    GemmOperand w_gate_up, w_down; // [E, P, H], [E, H, I]
    ExpertBias b_gate_up, b_down;  // [E, P], [E, H]
    ActivationProgram program;
    WeightOn weight_on;
    bool quantize, power_of_two; // x and hidden rows to e4m3 before each GEMM; scales as powers of two
    int64_t part_bytes;          // of the widest rows that are worked on at once
};

struct MoeForwardArgs {
    MoeLayer layer;
    void *gate_up; // [R, P] for the backward pass, or null
    void *y;       // [T, H]
};

struct MoeBackwardArgs {
    MoeLayer layer;
    const void *gate_up; // [R, P]
    const void *grad_y;  // [x_rows, H]
    bool accumulate;     // gradients of weights and biases are added to what is there
    void *x;             // [T, H]; this and every one below may be null: not wanted
    float *topk_weights; // [T, k]
    float *w_gate_up, *w_down, *b_gate_up, *b_down;
};

} // namespace pyroute
