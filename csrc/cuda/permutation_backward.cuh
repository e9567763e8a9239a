// The gradients of the weighted sum: weight * grad_y for the row of every slot, and the dot product <grad_y, row>.
//
// The dot product is 32 partial sums, column c to the one numbered c mod 32 in order, and the tree 16, 8, 4, 2, 1. So a
// slot is for as many lanes as 32 columns have 16-byte pieces (4 for bfloat16, 8 for float32), each of which adds up
// the partial sums of its piece: no lane ever waits for another one, and the eight slots of a token, in one warp, read
// its grad_y together. Four pieces of both operands are in flight per thread: 48 KiB per SM with 3 blocks of 256
// threads, not counting grad_y. Other blocks write the zeros of padding rows. Bytes: 2 k + 1 rows per token, 12 per
// slot.
#pragma once

#include "cuda/permutation_sum.cuh"

namespace pyroute::cuda {

constexpr int pieces_at_once = 4;

template <class Type, int N> struct BackwardSlot {
    const typename Type::Storage *grad_y, *row; // [hidden]
    typename Type::Storage *grad_row;           // [hidden]
    typename Type::Wide weight;
};

// The partial sums of columns first + n, first + n + 32, ..., which are also those of grad_row that are written.
template <class Type, int N>
PYROUTE_DEVICE void backward_columns(const BackwardSlot<Type, N> &slot, int64_t first, int64_t hidden,
                                     typename Type::Wide (&sums)[N]) {
    using Wide = typename Type::Wide;
    for (int64_t base = first; base < hidden; base += 32 * pieces_at_once) {
        RawElements<Type, N> grad[pieces_at_once], row[pieces_at_once];
        PYROUTE_UNROLL
        for (int i = 0; i < pieces_at_once; ++i)
            if (base + 32 * i < hidden) {
                row[i].load(slot.row + base + 32 * i);
                grad[i].load(slot.grad_y + base + 32 * i);
            }
        PYROUTE_UNROLL
        for (int i = 0; i < pieces_at_once; ++i) {
            if (base + 32 * i >= hidden)
                break;
            Wide scaled[N];
            PYROUTE_UNROLL
            for (int n = 0; n < N; ++n) {
                const Wide product = grad[i][n] * row[i][n];
                sums[n] = sums[n] + product;
                scaled[n] = slot.weight * grad[i][n];
            }
            RawElements<Type, N>::narrowed(scaled).store(slot.grad_row + base + 32 * i);
        }
    }
}

// The sum of 32 numbers, of which each of 32 / N neighbouring lanes has N: the tree 16, 8, 4, 2, 1.
template <class Wide, int N> PYROUTE_DEVICE Wide tree_sum(Wide (&sums)[N]) {
    PYROUTE_UNROLL
    for (uint32_t distance = 16 / N; distance > 0; distance /= 2)
        PYROUTE_UNROLL
    for (int n = 0; n < N; ++n)
        sums[n] = sums[n] + shuffle_xor(sums[n], distance);
    PYROUTE_UNROLL
    for (int distance = N / 2; distance > 0; distance /= 2)
        PYROUTE_UNROLL
    for (int n = 0; n < distance; ++n)
        sums[n] = sums[n] + sums[n + distance];
    return sums[0];
}

template <class Type, int N> PYROUTE_DEVICE void zero_padding(const SumBackwardArgs &args) {
    const UnpermuteBackwardArgs &sum = args.sum;
    const uint32_t block = blockIdx.x - args.token_blocks, blocks = gridDim.x - args.token_blocks;
    for_each_padding_row(sum.maps, args.rows_end, block, blocks, [&](int64_t row) {
        auto *to = static_cast<typename Type::Storage *>(sum.grad_rows) + row * sum.hidden;
        for (int64_t column = lane_id() * N; column < sum.hidden; column += 32 * N)
            RawElements<Type, N>{}.store(to + column);
    });
}

template <class Type, int N> PYROUTE_DEVICE void unpermute_backward(const SumBackwardArgs &args) {
    if (blockIdx.x >= args.token_blocks)
        return zero_padding<Type, N>(args);
    using Storage = typename Type::Storage;
    using Wide = typename Type::Wide;
    constexpr uint32_t lanes = 32 / N; // of a slot
    const UnpermuteBackwardArgs &sum = args.sum;
    const int64_t slots = sum.maps.num_tokens * sum.maps.top_k;
    const int64_t step = static_cast<int64_t>(args.token_blocks) * (blockDim.x / lanes);
    // the lanes of a warp stay together, for the shuffles
    for (int64_t base = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x - lane_id()) / lanes; base < slots;
         base += step) {
        const int64_t slot = base + lane_id() / lanes;
        int64_t row = slot < slots ? sum.maps.token_to_row[slot] : -1;
        row = row < sum.maps.num_rows ? row : -1;
        Wide sums[N] = {};
        if (row >= 0) {
            const int64_t token = quotient(slot, sum.maps.top_k);
            const BackwardSlot<Type, N> of_slot = {static_cast<const Storage *>(sum.grad_y) + token * sum.hidden,
                                                   static_cast<const Storage *>(sum.rows) + row * sum.hidden,
                                                   static_cast<Storage *>(sum.grad_rows) + row * sum.hidden,
                                                   static_cast<const Wide *>(sum.topk_weights)[slot]};
            backward_columns(of_slot, static_cast<int64_t>(lane_id() % lanes) * N, sum.hidden, sums);
        }
        const Wide dot = tree_sum(sums);
        if (slot < slots && lane_id() % lanes == 0)
            static_cast<Wide *>(sum.grad_topk_weights)[slot] = canonical(dot); // +0 where nothing is routed
    }
}

} // namespace pyroute::cuda
