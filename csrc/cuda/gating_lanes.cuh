// A token's experts over `lanes` lanes, `items` to a lane, in registers: which lane holds which, loads, what all lanes
// of a token do together, and sums over experts.
//
// A lane holds a run of consecutive experts. So runs are loaded 16 bytes at once, a group of experts is a few whole
// lanes, and of equal keys the lowest lane has the lowest expert. The sums of the contract go by experts l, l + 32, ...
// instead: their terms take the way of a row in shared memory, where the chosen experts' scores are wanted anyway.
#pragma once

#include "cuda/gating_args.h"
#include "cuda/gating_scores.cuh"

namespace pyroute::cuda {

// Where a lane stands.
struct Share {
    uint32_t index;  // among its token's lanes
    uint32_t token;  // among its warp's tokens
    uint32_t before; // the lanes of the token before this one, a bit each
    int32_t first;   // of its run; a lane without experts stands at the last one
    int32_t count;   // experts in its run
    int32_t nearest; // the last position that can be read: count - 1, or 0
};

template <int lanes> PYROUTE_DEVICE Share share_of(const GatingLaunch &launch) {
    const int32_t size = launch.group_size;
    Share mine;
    mine.index = lane_id() % lanes;
    mine.token = lane_id() / lanes;
    mine.before = ((1u << mine.index) - 1) << (mine.token * lanes);
    const auto group = static_cast<int32_t>(mine.index >> launch.group_shift);
    const auto part = static_cast<int32_t>(mine.index & ((1u << launch.group_shift) - 1));
    const int32_t begin = part * launch.experts_per_lane;
    const bool is_group = group * size < launch.num_experts;
    mine.count = is_group ? max_of(min_of(size - begin, launch.experts_per_lane), 0) : 0;
    mine.first = mine.count ? group * size + begin : launch.num_experts - 1;
    mine.nearest = max_of(mine.count - 1, 0);
    return mine;
}

// --- loads --------------------------------------------------------------------------------------------------------

struct alignas(8) HalfWords {
    uint32_t w[2];
};

// Four numbers from an address that is a multiple of four of them.
PYROUTE_DEVICE void load_four(const float *from, float *x) {
    const Words words = load_words(from);
    for (int i = 0; i < 4; ++i)
        x[i] = float_of(words.w[i]);
}
template <class Type> PYROUTE_DEVICE void load_four_halves(const uint16_t *from, float *x) {
    const HalfWords words = *reinterpret_cast<const HalfWords *>(from);
    PYROUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
        x[2 * i] = Type::widen(static_cast<uint16_t>(words.w[i]));
        x[2 * i + 1] = Type::widen(static_cast<uint16_t>(words.w[i] >> 16));
    }
}

// The numbers of a lane's run; past its end, some of the run's.
template <class Type, int items>
PYROUTE_DEVICE void load_run(const void *data, int64_t row, const Share &mine, bool vectors, float (&x)[items]) {
    const auto *from = static_cast<const typename Type::Storage *>(data) + row + mine.first;
    if constexpr (items >= 4)
        if (vectors) {
            from -= mine.count ? 0 : 3; // the last expert's four
            PYROUTE_UNROLL
            for (int i = 0; i < items; i += 4) {
                const int32_t at = min_of(i, max_of(mine.count - 4, 0));
                if constexpr (sizeof(*from) == 4)
                    load_four(from + at, x + i);
                else
                    load_four_halves<Type>(from + at, x + i);
            }
            return;
        }
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        x[i] = Type::widen(from[min_of(i, mine.nearest)]);
}

template <int items>
PYROUTE_DEVICE void load_logits(const GatingLaunch &launch, int64_t token, const Share &mine, float (&z)[items]) {
    const Logits &logits = launch.args.logits;
    const int64_t row = token * logits.num_experts;
    if (logits.type == FloatType::float32)
        load_run<Float32>(logits.data, row, mine, launch.vectors, z);
    else if (logits.type == FloatType::bfloat16)
        load_run<Bfloat16>(logits.data, row, mine, launch.vectors, z);
    else
        load_run<Float16>(logits.data, row, mine, launch.vectors, z);
}

// A lane's run into its token's row.
template <int items>
PYROUTE_DEVICE void store_run(const GatingLaunch &launch, const Share &mine, const float (&x)[items], float *row) {
    if constexpr (items >= 4) {
        const auto store_four = [&](int i) {
            store_words(row + mine.first + i,
                        {{bits_of(x[i]), bits_of(x[i + 1]), bits_of(x[i + 2]), bits_of(x[i + 3])}});
        };
        if (launch.full) { // apart: under a condition compilers store four times 4 bytes, which share banks
            PYROUTE_UNROLL
            for (int i = 0; i < items; i += 4)
                store_four(i);
            return;
        }
        if (launch.vectors) {
            PYROUTE_UNROLL
            for (int i = 0; i < items; i += 4)
                if (i < mine.count)
                    store_four(i);
            return;
        }
    }
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        if (i < mine.count)
            row[mine.first + i] = x[i];
}

// --- all lanes of a token -----------------------------------------------------------------------------------------

template <int lanes> PYROUTE_DEVICE uint32_t token_lanes(const Share &mine) {
    return (all_lanes >> (32 - lanes)) << (mine.token * lanes);
}

template <int lanes> PYROUTE_DEVICE uint32_t max_over_lanes(uint32_t x) {
    if constexpr (lanes == 32) {
        return reduce_max(x);
    } else {
        PYROUTE_UNROLL
        for (uint32_t distance = lanes / 2; distance; distance /= 2)
            x = max_of(x, shuffle_xor(x, distance));
        return x;
    }
}

template <int lanes, int items> constexpr int row_words = lanes * items; // the end of a row stays zero

// The sum of a row in the order of the contract: lane l adds l, l + 32, ..., then the tree 16, 8, 4, 2, 1.
template <int lanes, int items> PYROUTE_DEVICE float sum_of_row(const Share &mine, const float *row) {
    constexpr int sums = 32 / lanes;
    float sum[sums] = {};
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        sum[i % sums] += row[mine.index + lanes * static_cast<uint32_t>(i)];
    PYROUTE_UNROLL
    for (int half = sums / 2; half; half /= 2)
        for (int i = 0; i < half; ++i)
            sum[i] += sum[i + half];
    PYROUTE_UNROLL
    for (uint32_t distance = lanes / 2; distance; distance /= 2)
        sum[0] += shuffle_xor(sum[0], distance);
    return sum[0];
}

} // namespace pyroute::cuda
