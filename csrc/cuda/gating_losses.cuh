// What the losses need of the assignments, on the device: loads, token counts, fractions and scales; sums over tokens;
// the bias rule. All counts are integers, so that atomics in any order give the same ones.
//
// Sequences may have any ids. A token finds its sequence in a table of tokens, open addressing: the sequence's number
// is the token that came first to its place. Which one that is differs from run to run and shows in no result.
//
// Reads 4 k bytes a token. Source: this project.
#pragma once

#include "cuda/gating_args.h"
#include "cuda/gating_scores.cuh"

namespace pyroute::cuda {

PYROUTE_DEVICE bool is_real(const uint8_t *token_mask, int64_t token) { return !token_mask || token_mask[token]; }

// An integer of 1, 2, 4 or 8 bytes; whether it has a sign does not matter where only equality is asked for.
PYROUTE_DEVICE uint64_t integer_at(const void *data, int64_t item_size, int64_t i) {
    switch (item_size) {
    case 1:
        return static_cast<const uint8_t *>(data)[i];
    case 2:
        return static_cast<const uint16_t *>(data)[i];
    case 4:
        return static_cast<const uint32_t *>(data)[i];
    default:
        return static_cast<const uint64_t *>(data)[i];
    }
}

// --- loads --------------------------------------------------------------------------------------------------------

// The number of a token's sequence, entered into the table if it is the first.
PYROUTE_DEVICE int32_t find_sequence(const BalanceCounts &args, int64_t token) {
    const uint64_t id = integer_at(args.sequence_ids, args.sequence_item_size, token);
    uint64_t hash = id * 0x9e3779b97f4a7c15ull;
    for (uint64_t place = hash >> args.table_shift;; place = (place + 1) & (args.table_size - 1)) {
        const auto mine = static_cast<int32_t>(token);
        const int32_t owner = atomic_compare_swap(args.table + place, -1, mine);
        if (owner == -1) {
            atomic_add(&args.totals->num_sequences, 1);
            return mine;
        }
        if (integer_at(args.sequence_ids, args.sequence_item_size, owner) == id)
            return owner;
    }
}

// A thread to a token: its sequence, the sequence's tokens and the loads of its experts. Where all tokens are one
// sequence, a block counts in shared memory first: thousands of additions to one address wait for each other.
PYROUTE_DEVICE void count_assignments(const BalanceCounts &args) {
    PYROUTE_DYNAMIC_SHARED(memory);
    auto *block_loads = reinterpret_cast<int32_t *>(memory);
    const bool together = args.loads && args.counts_in_block;
    for (int64_t e = threadIdx.x; together && e < args.num_experts; e += blockDim.x)
        block_loads[e] = 0;
    sync_block();
    const int64_t step = int64_t{gridDim.x} * blockDim.x, first = int64_t{blockIdx.x} * blockDim.x;
    for (int64_t begin = first; begin < args.num_tokens; begin += step) {
        const int64_t token = begin + threadIdx.x;
        const bool real = token < args.num_tokens && is_real(args.token_mask, token);
        int32_t sequence = 0;
        if (real && args.sequence_ids)
            sequence = find_sequence(args, token);
        if (args.sequence && token < args.num_tokens)
            args.sequence[token] = sequence;
        const uint32_t warp_tokens = ballot(real);
        if (args.tokens && args.sequence_ids && real)
            atomic_add(args.tokens + sequence, 1);
        else if (args.tokens && !args.sequence_ids && lane_id() == 0)
            atomic_add(args.tokens, static_cast<int32_t>(count_bits(warp_tokens)));
        int32_t *loads = together ? block_loads : args.loads + sequence * args.num_experts;
        for (int64_t j = 0; real && args.loads && j < args.top_k; ++j) {
            const int32_t id = args.topk_idx[token * args.top_k + j];
            if (is_expert(id, args.num_experts))
                atomic_add(loads + id, 1);
        }
    }
    sync_block();
    for (int64_t e = threadIdx.x; together && e < args.num_experts; e += blockDim.x)
        if (block_loads[e])
            atomic_add(args.loads + e, block_loads[e]);
}

// --- fractions ----------------------------------------------------------------------------------------------------

// f_e = E count / (k tokens) and weight 1 / (sequences tokens) of every sequence, in double; scales are coef * weight.
template <class Scalar> PYROUTE_DEVICE void balance_terms(const BalanceFractions &args) {
    const int64_t num_sequences = args.totals ? max_of(args.totals->num_sequences, 1) : 1;
    const int64_t stride = int64_t{gridDim.x} * blockDim.x, end = args.num_rows * args.num_experts;
    for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < end; at += stride) {
        const int64_t row = at / args.num_experts;
        const int64_t given = args.total_tokens >= 0 ? args.total_tokens : args.tokens[row];
        if (!given && row)
            continue; // no sequence has this number
        const int64_t tokens = max_of<int64_t>(given, 1);
        const int64_t load = args.wide_loads ? args.wide_loads[at] : args.loads[at];
        const double share = static_cast<double>(args.num_experts * load) / static_cast<double>(args.top_k * tokens);
        static_cast<Scalar *>(args.fractions)[at] = static_cast<Scalar>(share);
        if (at == row * args.num_experts) {
            const double weight = 1.0 / static_cast<double>(num_sequences * tokens);
            args.weights[row] = weight;
            const double coef = args.factor ? args.coef * *args.factor : args.coef;
            static_cast<Scalar *>(args.scales)[row] = static_cast<Scalar>(coef * weight);
        }
    }
}

// --- sums over tokens ---------------------------------------------------------------------------------------------

constexpr int token_chunk = 64; // tokens in order, then chunks in order: the contract's sum over tokens

// One block.
PYROUTE_DEVICE void sum_tokens(const TokenSum &args) {
    const int64_t chunks = divide_up<int64_t>(args.num_tokens, token_chunk);
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        double sum = 0.0;
        const int64_t end = min_of<int64_t>((chunk + 1) * token_chunk, args.num_tokens);
        for (int64_t token = chunk * token_chunk; token < end; ++token) {
            const double weight = args.weights ? args.weights[args.sequence[token]] : 1.0;
            sum += is_real(args.token_mask, token) ? args.terms[token] * weight : 0.0;
        }
        args.chunk_sums[chunk] = sum;
    }
    sync_block();
    if (threadIdx.x)
        return;
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += args.chunk_sums[chunk];
    if (!args.weights) { // the mean over real tokens
        const int64_t real = args.num_real ? *args.num_real : args.num_tokens;
        total = total / static_cast<double>(max_of<int64_t>(real, 1));
    }
    *args.sum = total;
}

// numerator * factor / the number of real tokens.
PYROUTE_DEVICE void share_among_tokens(const TokenShare &args) {
    const int64_t real = args.num_real ? *args.num_real : args.num_tokens;
    const double numerator = args.factor ? args.numerator * *args.factor : args.numerator;
    *args.share = numerator / static_cast<double>(max_of<int64_t>(real, 1));
}

// --- bias ---------------------------------------------------------------------------------------------------------

struct WarpSums {
    int64_t of[32];
};

// bias + rate * sign(mean load - load), compared exactly. One block.
template <class Scalar> PYROUTE_DEVICE void update_bias(const BiasUpdate &args) {
    PYROUTE_SHARED(WarpSums, sums);
    int64_t sum = 0;
    for (int64_t e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        sum += args.loads[e];
    PYROUTE_UNROLL
    for (uint32_t distance = 16; distance; distance /= 2)
        sum += shuffle_xor(sum, distance);
    if (lane_id() == 0)
        sums.of[warp_id()] = sum;
    sync_block();
    sum = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp)
        sum += sums.of[warp];
    const auto rate = static_cast<Scalar>(args.rate);
    for (int64_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
        const int64_t apart = sum - args.num_experts * args.loads[e];
        const Scalar sign = apart > 0 ? Scalar(1) : apart < 0 ? Scalar(-1) : Scalar(0);
        static_cast<Scalar *>(args.updated)[e] = static_cast<const Scalar *>(args.bias)[e] + rate * sign;
    }
}

// --- ids ----------------------------------------------------------------------------------------------------------

// Integers of any type as int32 ids, those outside [0, num_experts) as -1, or as int64 loads.
PYROUTE_DEVICE int64_t signed_integer_at(const IntegerCopy &args, int64_t i) {
    const uint64_t bits = integer_at(args.from, args.item_size, i);
    const auto unused = static_cast<uint32_t>(64 - 8 * args.item_size);
    return args.is_signed ? static_cast<int64_t>(bits << unused) >> unused : static_cast<int64_t>(bits);
}

PYROUTE_DEVICE void copy_integers(const IntegerCopy &args) {
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.count; i += stride) {
        const int64_t value = signed_integer_at(args, i);
        if (args.loads)
            args.loads[i] = value;
        else
            args.ids[i] = value >= 0 && value < args.num_experts ? static_cast<int32_t>(value) : -1;
    }
}

} // namespace pyroute::cuda
