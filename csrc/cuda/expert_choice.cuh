// Expert choice: every expert's best tokens, by a radix sort of its tokens' scores.
//
//   keys   a warp takes a token: softmax over its experts, as integer keys, complemented: the best is the smallest; a
//          masked token has the largest key of all, below NaN
//   sort   a block takes an expert: passes over 8 bits, from the lowest; a pass keeps the order of equal digits
//   write  the first `capacity` of the sorted tokens
//
// Bytes: E logits a token and (8 or 16) E of keys, then per pass keys and positions read twice and written once.
// Source: this project.
#pragma once

#include "cuda/gating_args.h"
#include "cuda/gating_row.cuh"

namespace pyroute::cuda {

template <class Scalar> PYROUTE_DEVICE void expert_choice_keys(const ExpertChoiceLaunch &args) {
    using Key = typename OrderKey<Scalar>::Key;
    const int64_t warps = blockDim.x / 32, num_tokens = args.logits.num_tokens;
    for (int64_t token = blockIdx.x * warps + warp_id(); token < num_tokens; token += gridDim.x * warps) {
        const bool real = !args.token_mask || args.token_mask[token];
        MemoryRow<Scalar> row(args.logits, token);
        row.softmax();
        row.each([&](int i, int64_t e) {
            const Key key = real ? key_of(row.p(i, e)) : 0;
            static_cast<Key *>(args.keys[0])[e * num_tokens + token] = static_cast<Key>(~key);
            args.positions[0][e * num_tokens + token] = static_cast<int32_t>(token);
        });
    }
}

constexpr uint32_t sort_threads = 256, digits = 256;

struct SortShared {
    uint32_t starts[digits];                     // where the next token with this digit goes
    uint32_t by_warp[sort_threads / 32][digits]; // of a tile of tokens, how many a warp has, then where they go
};

// starts[d] = how many of the keys have a smaller digit. Thread d has digit d.
template <class Key> PYROUTE_DEVICE void find_starts(const Key *keys, int64_t count, int shift, SortShared &shared) {
    shared.starts[threadIdx.x] = 0;
    sync_block();
    for (int64_t i = threadIdx.x; i < count; i += sort_threads)
        atomic_add(shared.starts + (keys[i] >> shift & (digits - 1)), 1u);
    sync_block();
    uint32_t before = 0;
    for (uint32_t d = 0; d < threadIdx.x; ++d)
        before += shared.starts[d];
    sync_block();
    shared.starts[threadIdx.x] = before;
    sync_block();
}

template <class Key>
PYROUTE_DEVICE void sort_pass(const Key *keys, const int32_t *positions, Key *to_keys, int32_t *to_positions,
                              int64_t count, int shift, SortShared &shared) {
    find_starts(keys, count, shift, shared);
    for (int64_t tile = 0; tile < count; tile += sort_threads) {
        const int64_t i = tile + threadIdx.x;
        const uint32_t digit = i < count ? static_cast<uint32_t>(keys[i] >> shift) & (digits - 1) : digits;
        for (uint32_t warp = 0; warp < sort_threads / 32; ++warp)
            shared.by_warp[warp][threadIdx.x] = 0;
        sync_block();
        const uint32_t equal = match_any(digit);
        const uint32_t rank = count_bits(equal & ((1u << lane_id()) - 1));
        if (rank == 0 && digit < digits)
            shared.by_warp[warp_id()][digit] = count_bits(equal);
        sync_block();
        uint32_t next = shared.starts[threadIdx.x];
        for (uint32_t warp = 0; warp < sort_threads / 32; ++warp) {
            const uint32_t here = shared.by_warp[warp][threadIdx.x];
            shared.by_warp[warp][threadIdx.x] = next;
            next += here;
        }
        shared.starts[threadIdx.x] = next;
        sync_block();
        if (i < count) {
            const uint32_t to = shared.by_warp[warp_id()][digit] + rank;
            to_keys[to] = keys[i];
            to_positions[to] = positions[i];
        }
        sync_block();
    }
}

template <class Scalar> PYROUTE_DEVICE void expert_choice_sort(const ExpertChoiceLaunch &args) {
    using Key = typename OrderKey<Scalar>::Key;
    PYROUTE_SHARED(SortShared, shared);
    const int64_t count = args.logits.num_tokens;
    for (int64_t e = blockIdx.x; e < args.logits.num_experts; e += gridDim.x) {
        Key *keys = static_cast<Key *>(args.keys[0]) + e * count,
            *to_keys = static_cast<Key *>(args.keys[1]) + e * count;
        int32_t *positions = args.positions[0] + e * count, *to_positions = args.positions[1] + e * count;
        for (int byte = 0; byte < static_cast<int>(sizeof(Key)); byte += 2) { // they end where they began
            sort_pass(keys, positions, to_keys, to_positions, count, 8 * byte, shared);
            sort_pass(to_keys, to_positions, keys, positions, count, 8 * byte + 8, shared);
        }
        for (int64_t j = threadIdx.x; j < args.capacity; j += sort_threads) {
            const Key key = j < count ? static_cast<Key>(~keys[j]) : 0;
            args.token_idx[e * args.capacity + j] = key ? positions[j] : -1;
            static_cast<Scalar *>(args.token_weights)[e * args.capacity + j] = key ? value_of_key(key) : Scalar(0);
        }
        sync_block();
    }
}

} // namespace pyroute::cuda
