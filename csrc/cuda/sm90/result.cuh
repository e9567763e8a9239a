// From the registers of a math warpgroup to memory.
//
// bfloat16: 64 full rows go through shared memory (stmatrix, conflict-free in swizzled panels of 64 columns) and out by
// the copy engine while the next tile is multiplied. Fewer rows are stored one by one, so that the next expert's stay
// as they are. float32: from the registers, a quad of lanes writes 32 bytes of a row at a time, which are whole
// sectors, so staging would gain nothing but a delay; adding to memory is a load, one rounding and a store, because the
// memory's own additions flush subnormal numbers.
#pragma once

#include "cuda/sm90/arguments.h"
#include "cuda/sm90/ptx.cuh"

namespace pyroute::cuda::sm90 {

// bf16_pair and tensor cores make 0x7fff and 0x7fffffff of NaN; results have the canonical quiet NaN.
PYROUTE_DEVICE bool is_nan_pair(uint32_t pair) { return (pair & 0x7fff) == 0x7fff || (pair >> 16 & 0x7fff) == 0x7fff; }
PYROUTE_DEVICE uint32_t canonical_pair(uint32_t pair) {
    const uint32_t low = (pair & 0x7fff) == 0x7fff ? 0x7fc0 : pair & 0xffff;
    const uint32_t high = (pair >> 16 & 0x7fff) == 0x7fff ? 0x7fc0 : pair >> 16;
    return low | high << 16;
}

template <int Sums> PYROUTE_DEVICE void round_to_bf16(uint32_t (&pairs)[Sums / 2], const float (&totals)[Sums]) {
    uint32_t largest = 0;
    PYROUTE_UNROLL
    for (int i = 0; i < Sums / 2; ++i) {
        pairs[i] = bf16_pair(totals[2 * i], totals[2 * i + 1]);
        largest = bf16_pair_max_nan(largest, pairs[i]);
    }
    if (is_nan_pair(largest)) {
        PYROUTE_UNROLL
        for (int i = 0; i < Sums / 2; ++i)
            pairs[i] = canonical_pair(pairs[i]);
    }
}

// 64 rows of warpgroup `group`, those before `valid` of a tile that starts at `tile_row`, columns from `col`.
// `staging` is the warpgroup's own.
template <int Sums>
PYROUTE_DEVICE void store_bf16(const ProductArgs &args, SharedAddress staging, uint32_t group,
                               const float (&totals)[Sums], int32_t tile_row, int32_t valid, int32_t col) {
    uint32_t pairs[Sums / 2];
    round_to_bf16(pairs, totals);
    const uint32_t warp = warp_id() & 3, lane = lane_id();
    const bool asks = threadIdx.x % warpgroup == 0;
    const int32_t first_row = tile_row + static_cast<int32_t>(group * panel_rows);
    if (valid >= static_cast<int32_t>(panel_rows)) {
        if (asks)
            wait_stores_read(); // of the tile before
        sync_threads(1 + group, warpgroup);
        PYROUTE_UNROLL
        for (uint32_t j = 0; j < Sums / 4; j += 2)
            store_matrices(staging + staged_row(warp, lane, j), pairs[2 * j], pairs[2 * j + 1], pairs[2 * j + 2],
                           pairs[2 * j + 3]);
        fence_shared_for_copies();
        sync_threads(1 + group, warpgroup);
        if (asks) {
            for (int32_t p = 0; p < Sums / 32 && col + p * 64 < args.cols; ++p)
                store_tile(&args.out, col + p * 64, first_row, staging + static_cast<uint32_t>(p) * panel_bytes);
            commit_stores();
        }
        return;
    }
    const int32_t row = static_cast<int32_t>(sum_row(warp, lane, 0));
    auto *const out = static_cast<uint16_t *>(args.out_data) + int64_t{first_row + row} * args.cols;
    PYROUTE_UNROLL
    for (uint32_t i = 0; i < Sums / 2; ++i) {
        const int32_t at = col + static_cast<int32_t>(sum_col(lane, 2 * i)), below = i & 1 ? 8 : 0;
        if (row + below < valid && at < args.cols) // columns come in multiples of 8
            *reinterpret_cast<uint32_t *>(out + int64_t{below} * args.cols + at) = pairs[i];
    }
}

// Rows 0 and 8 of `out` as far as they are valid, row-major with `cols` columns, a multiple of 2.
template <int Sums>
PYROUTE_DEVICE void store_f32(float *out, const float (&totals)[Sums], int32_t valid, int32_t cols, int32_t col,
                              bool accumulate) {
    const auto first = col + static_cast<int32_t>(sum_col(lane_id(), 0));
    const auto at = [&](int i) {
        return reinterpret_cast<FloatPair *>(out + int64_t{i & 1 ? 8 : 0} * cols + first + i / 2 * 8);
    };
    const auto inside = [&](int i) { return (i & 1 ? 8 : 0) < valid && first + i / 2 * 8 < cols; };
    FloatPair values[Sums / 2];
    PYROUTE_UNROLL
    for (int i = 0; i < Sums / 2; ++i)
        values[i] = {totals[2 * i], totals[2 * i + 1]};
    if (accumulate) {
        FloatPair old[Sums / 2]; // all on their way before the first is used
        PYROUTE_UNROLL
        for (int i = 0; i < Sums / 2; ++i)
            old[i] = inside(i) ? *at(i) : FloatPair{0.0f, 0.0f};
        PYROUTE_UNROLL
        for (int i = 0; i < Sums / 2; ++i)
            values[i] = {old[i].x + values[i].x, old[i].y + values[i].y};
    }
    PYROUTE_UNROLL
    for (int i = 0; i < Sums / 2; ++i) {
        const FloatPair v = values[i];
        if (inside(i))
            *at(i) = {v.x == v.x ? v.x : nan_f32(), v.y == v.y ? v.y : nan_f32()};
    }
}

} // namespace pyroute::cuda::sm90
