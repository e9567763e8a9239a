// The activation between the two GEMMs, forward and backward, and the experts' biases.
//
//   activate            a thread takes 8 elements of a row: one read of [R, P], one write of [R, I]
//   activate_quantize   16 elements, 8 lanes a block of 128: rows are rounded to their type and then quantised, so that
//                       codes and scales are those of the two ops; [R, I] is written as codes alone
//   activate_backward   a warp takes a row, 256 elements at a time
//   add_bias, bias_dot  likewise
//   bias_grad           a thread takes a column of an expert: float64 sums in row order
//
// Dots of a row have the CPU floor's order: eight sums, of the elements l, l + 8, ..., then the tree 4, 2, 1. A warp's
// products pass through shared memory, from where eight lanes add them up: an eighth of the instructions of backward.
// Bytes per row, bfloat16: forward 6 I, quantised 5.03 I, backward 12 I.
#pragma once

#include "cuda/fp8.cuh"
#include "cuda/moe_activation.cuh"
#include "cuda/moe_args.h"

namespace pyroute::cuda {

template <class Type, Form form> PYROUTE_DEVICE void activate(const ActivateLaunch<typename Type::Storage> &args) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t row = thread / args.row_threads, column = thread % args.row_threads * 8;
    if (row >= used_rows(args.experts))
        return;
    const int64_t expert = expert_of(args.experts, row, has_bias(args.op.bias));
    float hidden[8] = {};
    if (expert >= 0) {
        Points p;
        point<Type, form>(args.op, row, expert, column, args.whole_words, p);
        const float weight = args.op.row_weights ? args.op.row_weights[row] : 1.0f;
        PYROUTE_UNROLL
        for (int i = 0; i < 8; ++i)
            hidden[i] = p.hidden[i] * weight;
    }
    const int64_t inner = args.op.intermediate;
    store_eight<Type>(args.op.hidden + row * inner + column, inner - column, args.whole_words, hidden);
}

template <class Type, Form form>
PYROUTE_DEVICE void activate_quantize(const ActivateLaunch<typename Type::Storage> &args) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t row = thread / args.row_threads, column = thread % args.row_threads * 16;
    if (row >= used_rows(args.experts)) // whole blocks: row_threads is a multiple of 8
        return;
    const int64_t inner = args.op.intermediate, expert = expert_of(args.experts, row, has_bias(args.op.bias));
    float hidden[16] = {};
    if (expert >= 0 && column < inner) {
        const float weight = args.op.row_weights ? args.op.row_weights[row] : 1.0f;
        PYROUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
            Points p;
            point<Type, form>(args.op, row, expert, column + 8 * half, true, p);
            PYROUTE_UNROLL
            for (int i = 0; i < 8; ++i)
                hidden[8 * half + i] = Type::widen(Type::narrow(p.hidden[i] * weight));
        }
    }
    const BlockScale block = block_scale<E4m3, 8>(hidden, args.power_of_two);
    Words codes;
    encode<E4m3>(hidden, block, codes.w);
    if (column < inner)
        store_words(args.codes + row * inner + column, codes);
    if (threadIdx.x % 8 == 0)
        args.scales[thread / 8] = block.scale;
}

// The row of this thread's warp.
PYROUTE_DEVICE int64_t row_of_warp() { return static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp_id(); }

// A dot of a row, 256 products at a time: lane i of the warp brings those of elements 8 i to 8 i + 7. Every lane calls
// add and finish; finish gives lane 0 the dot.
class RowDot {
  public:
    PYROUTE_DEVICE void add(const float (&products)[8]) {
        PYROUTE_SHARED(Products, shared);
        float (&mine)[32][8] = shared.of[warp_id()];
        sync_warp(); // the products before these have been read
        store_words(&mine[lane_id()][0], words_of<Raw>(products));
        store_words(&mine[lane_id()][4], words_of<Raw>(products + 4));
        sync_warp();
        if (lane_id() < 8)
            for (int i = 0; i < 32; ++i)
                sum_ = sum_ + mine[i][lane_id()];
    }
    PYROUTE_DEVICE float finish() const {
        float sum = lane_id() < 8 ? sum_ : 0.0f;
        PYROUTE_UNROLL
        for (uint32_t distance = 4; distance > 0; distance /= 2)
            sum = sum + shuffle_xor(sum, distance);
        return sum;
    }

  private:
    struct Raw { // bits as they are
        using Storage = float;
        PYROUTE_DEVICE static float narrow(float x) { return x; }
    };
    struct Products {
        alignas(16) float of[8][32][8]; // by warp
    };
    float sum_ = 0.0f; // lanes 0 to 7
};

template <class Type, Form form>
PYROUTE_DEVICE void activate_backward(const ActivateBackwardLaunch<typename Type::Storage> &args) {
    constexpr bool gated = form != Form::relu2;
    const auto &forward = args.op.forward;
    const int64_t row = row_of_warp(), inner = forward.intermediate, width = gated ? 2 * inner : inner;
    if (row >= used_rows(args.experts))
        return;
    const int64_t expert = expert_of(args.experts, row, has_bias(forward.bias));
    const float weight = forward.row_weights ? forward.row_weights[row] : 1.0f;
    RowDot dot;
    for (int64_t begin = 0; begin < inner; begin += 256) {
        const int64_t column = begin + 8 * lane_id();
        const auto count = static_cast<int32_t>(min_of<int64_t>(inner - column, 8)); // a register less than the extent
        float hidden[8] = {}, by_gate[8] = {}, by_up[8] = {}, products[8] = {};
        if (expert >= 0 && count > 0) {
            Points p;
            float grad[8];
            load_eight<Type>(args.op.grad_hidden + row * inner + column, count, args.whole_words, grad);
            point<Type, form>(forward, row, expert, column, args.whole_words, p);
            PYROUTE_UNROLL
            for (int i = 0; i < 8; ++i) {
                const float weighted = grad[i] * weight;
                products[i] = grad[i] * p.hidden[i];
                hidden[i] = p.hidden[i] * weight;
                by_gate[i] = weighted * p.d_gate[i];
                if constexpr (gated)
                    by_up[i] = weighted * p.d_up[i];
                if constexpr (form == Form::clamped_swish) {
                    by_gate[i] = p.gate_clipped[i] ? 0.0f : by_gate[i];
                    by_up[i] = p.up_clipped[i] ? 0.0f : by_up[i];
                }
            }
        }
        if (args.op.grad_row_weights)
            dot.add(products);
        if (count <= 0)
            continue;
        store_eight<Type>(forward.hidden + row * inner + column, count, args.whole_words, hidden);
        store_eight<Type>(args.op.grad_gate_up + row * width + column, count, args.whole_words, by_gate);
        if constexpr (gated)
            store_eight<Type>(args.op.grad_gate_up + row * width + inner + column, count, args.whole_words, by_up);
    }
    if (args.op.grad_row_weights) {
        const float sum = dot.finish();
        if (lane_id() == 0)
            args.op.grad_row_weights[row] = canonical(sum);
    }
}

template <class Type> PYROUTE_DEVICE void add_bias(const AddBiasLaunch<typename Type::Storage> &args) {
    const int64_t row = row_of_warp(), columns = args.op.columns;
    const int64_t expert = row < used_rows(args.experts) ? expert_of(args.experts, row, true) : -1;
    if (expert < 0)
        return;
    const float weight = args.op.row_weights ? args.op.row_weights[row] : 1.0f;
    auto *const to = args.op.rows + row * columns;
    for (int64_t column = lane_id(); column < columns; column += 32)
        to[column] = Type::narrow(Type::widen(to[column]) + bias_at(args.op.bias, expert * columns + column) * weight);
}

template <class Type> PYROUTE_DEVICE void bias_dot(const BiasDotLaunch<typename Type::Storage> &args) {
    const int64_t row = row_of_warp(), columns = args.op.columns;
    const int64_t expert = row < used_rows(args.experts) ? expert_of(args.experts, row, true) : -1;
    if (expert < 0) // all lanes
        return;
    RowDot dot;
    for (int64_t begin = 0; begin < columns; begin += 256) {
        float products[8] = {};
        PYROUTE_UNROLL
        for (int i = 0; i < 8; ++i)
            if (const int64_t column = begin + 8 * lane_id() + i; column < columns)
                products[i] = Type::widen(args.op.rows[row * columns + column]) *
                              bias_at(args.op.bias, expert * columns + column);
        dot.add(products);
    }
    const float sum = dot.finish();
    if (lane_id() == 0)
        args.op.dots[row] = canonical(args.op.dots[row] + sum);
}

template <class Type> PYROUTE_DEVICE void bias_grad(const BiasGradLaunch<typename Type::Storage> &args) {
    const int64_t expert = blockIdx.x / args.column_parts, columns = args.op.columns;
    const int64_t column = static_cast<int64_t>(blockIdx.x % args.column_parts) * blockDim.x + threadIdx.x;
    const auto clamped = [&](int64_t offset) { return max_of<int64_t>(0, min_of(offset, args.experts.num_rows)); };
    const int64_t begin = clamped(args.experts.expert_offsets[expert]);
    const int64_t end = clamped(args.experts.expert_offsets[expert + 1]);
    if (column >= columns || (args.op.accumulate && begin >= end))
        return;
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
        const double weight = args.op.row_weights ? static_cast<double>(args.op.row_weights[row]) : 1.0;
        sum = sum + weight * static_cast<double>(Type::widen(args.op.rows[row * columns + column]));
    }
    float *const to = args.op.grad_bias + expert * columns + column;
    const float rounded = static_cast<float>(sum);
    *to = canonical(args.op.accumulate ? *to + rounded : rounded);
}

PYROUTE_DEVICE void row_values(const SlotValuesLaunch &args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= args.maps.num_rows)
        return;
    const int64_t token = args.maps.row_to_token[row];
    float value = 0;
    if (token >= 0 && token < args.maps.num_tokens)
        for (int64_t slot = token * args.maps.top_k; slot < (token + 1) * args.maps.top_k; ++slot)
            value = args.maps.token_to_row[slot] == row ? args.from[slot] : value;
    args.to[row] = value;
}

PYROUTE_DEVICE void slot_values(const SlotValuesLaunch &args) {
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot >= args.maps.num_tokens * args.maps.top_k)
        return;
    const int64_t row = args.maps.token_to_row[slot];
    args.to[slot] = row >= 0 && row < args.maps.num_rows ? args.from[row] : 0.0f;
}

} // namespace pyroute::cuda
