// The activation of eight elements: its value, both partial derivatives, and where the clip makes them zero.
//
// csrc/cpu/scalar/moe.cpp is the same program over lanes and pyroute/_array/moe.py in array code, operation by
// operation, so that the bytes agree. An element costs 57 instructions forward, 89 with its derivatives (docs/cuda.md).
#pragma once

#include "../moe.h"
#include "cuda/elementary.cuh"
#include "cuda/float_rows.cuh"

namespace pyroute::cuda {

// What is compiled: a clamp that is infinite clamps nothing and is left out.
enum class Form { swish, clamped_swish, gelu, relu2 };

struct Points {
    float hidden[8], d_gate[8], d_up[8];
    bool gate_clipped[8], up_clipped[8];
};

// a > b ? a : b and a < b ? a : b: b where one of them is NaN.
PYROUTE_DEVICE float larger(float a, float b) { return a > b ? a : b; }
PYROUTE_DEVICE float smaller(float a, float b) { return a < b ? a : b; }

// exp(-|v|) of eight numbers: all but extreme ones need no care for subnormal results.
PYROUTE_DEVICE void exp_of_negative(const float (&v)[8], float (&e)[8]) {
    bool ordinary = true;
    PYROUTE_UNROLL
    for (int i = 0; i < 8; ++i)
        ordinary = ordinary && fabsf(v[i]) <= 87.0f; // false of NaN
    if (ordinary) {
        PYROUTE_UNROLL
        for (int i = 0; i < 8; ++i)
            e[i] = exp_in_range(-fabsf(v[i]));
    } else {
        PYROUTE_UNROLL
        for (int i = 0; i < 8; ++i)
            e[i] = exp_of(-fabsf(v[i]));
    }
}

template <Form form>
PYROUTE_DEVICE void evaluate_gated(const ActivationProgram &program, float (&gate)[8], float (&up)[8], Points &p) {
    float v[8], gate_slope[8], e[8]; // gate_slope: gate * dv/dgate
    PYROUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
        if constexpr (form == Form::gelu) {
            const float square = gate[i] * gate[i];
            v[i] = gate[i] * (square * 0.0713548162726f + 1.5957691216057308f);
            gate_slope[i] = gate[i] * (square * (3.0f * 0.0713548162726f) + 1.5957691216057308f);
        } else {
            if constexpr (form == Form::clamped_swish) {
                p.gate_clipped[i] = program.limit < gate[i];
                p.up_clipped[i] = program.limit < up[i] || up[i] < -program.limit;
                gate[i] = smaller(program.limit, gate[i]);
                up[i] = larger(-program.limit, smaller(program.limit, up[i]));
            }
            v[i] = gate[i] * program.alpha;
            gate_slope[i] = v[i];
        }
    }
    exp_of_negative(v, e);
    PYROUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const bool negative = (bits_of(v[i]) >> 31) != 0;
        const float reciprocal = divide_in_range(1.0f, e[i] + 1.0f);
        const float sigmoid = (negative ? e[i] : 1.0f) * reciprocal;
        const float slope = sigmoid * ((negative ? 1.0f : e[i]) * reciprocal); // sigmoid (1 - sigmoid)
        // beyond 1000 the slope is exactly 0, and inf * 0 would be NaN
        const float bounded = larger(-1e3f, smaller(1e3f, gate_slope[i]));
        const float factor = up[i] + program.up_offset, activated = gate[i] * sigmoid;
        p.hidden[i] = activated * factor;
        p.d_gate[i] = factor * (bounded * slope + sigmoid);
        p.d_up[i] = activated;
    }
}

template <Form form>
PYROUTE_DEVICE void evaluate(const ActivationProgram &program, float (&gate)[8], float (&up)[8], Points &p) {
    if constexpr (form != Form::relu2) {
        evaluate_gated<form>(program, gate, up, p);
    } else {
        PYROUTE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const float positive = larger(0.0f, gate[i]); // NaN stays, and so does -0
            p.hidden[i] = positive * positive;
            p.d_gate[i] = positive + positive;
        }
    }
}

// The first `count` of eight neighbours, the others zero; all eight at once where `whole_words`.
template <class Type>
PYROUTE_DEVICE void load_eight(const typename Type::Storage *from, int64_t count, bool whole_words, float (&x)[8]) {
    whole_words ? load_elements<Type>(from, x) : load_elements<Type>(from, count, x);
}
template <class Type>
PYROUTE_DEVICE void store_eight(typename Type::Storage *to, int64_t count, bool whole_words, const float (&x)[8]) {
    whole_words ? store_elements<Type>(to, x) : store_elements<Type>(to, count, x);
}

PYROUTE_DEVICE bool has_bias(const ExpertBias &bias) { return bias.f32 || bias.bf16; }
PYROUTE_DEVICE float bias_at(const ExpertBias &bias, int64_t at) {
    return bias.f32 ? bias.f32[at] : bf16_to_f32(bias.bf16[at]);
}

// Rows up to the end of the last segment. Behind it lie as many more as other ids could have needed, which nobody
// reads: they are not written.
PYROUTE_DEVICE int64_t used_rows(const ExpertRows &experts) {
    return min_of(experts.expert_offsets[experts.num_experts], experts.num_rows);
}

// The expert of one of those, or any where it is not `needed`; -1 on padding rows. Offsets that do not ascend give some
// expert, or -1.
PYROUTE_DEVICE int64_t expert_of(const ExpertRows &experts, int64_t row, bool needed) {
    if (experts.row_to_token[row] < 0)
        return -1;
    if (!needed)
        return 0;
    int64_t low = 0, high = experts.num_experts; // the first expert whose segment ends after the row
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (experts.expert_offsets[middle + 1] > row)
            high = middle;
        else
            low = middle + 1;
    }
    return low < experts.num_experts ? low : -1;
}

// The point at eight pre-activations of a row, from column `column` of the gate on.
template <class Type, Form form>
PYROUTE_DEVICE void point(const ActivationArgs<typename Type::Storage> &args, int64_t row, int64_t expert,
                          int64_t column, bool whole_words, Points &p) {
    constexpr bool gated = form != Form::relu2;
    const int64_t inner = args.intermediate, width = gated ? 2 * inner : inner, count = inner - column;
    float gate[8], up[8] = {};
    load_eight<Type>(args.gate_up + row * width + column, count, whole_words, gate);
    if constexpr (gated)
        load_eight<Type>(args.gate_up + row * width + inner + column, count, whole_words, up);
    if (has_bias(args.bias)) {
        PYROUTE_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (i >= count)
                continue;
            gate[i] += bias_at(args.bias, expert * width + column + i);
            if constexpr (gated)
                up[i] += bias_at(args.bias, expert * width + inner + column + i);
        }
    }
    evaluate<form>(args.program, gate, up, p);
}

} // namespace pyroute::cuda
