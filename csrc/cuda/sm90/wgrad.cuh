// out[e] = grad_out[rows of e]^T a[rows of e] on Hopper: FP8 with a scale for 128 rows of a column, or bfloat16.
//
// The ring and the warpgroups are product.cuh's; the contraction runs over an expert's rows, and each block owns a tile
// of 128 x 128 of one expert's gradient, so that adding to memory is deterministic.
//
// FP8: the operands have been transposed (transpose.cuh), each segment on its own multiple of 128, and zeros fill it
// up. A stage holds 128 rows and both operands' scales, 4 bytes for each of the tile's rows and columns. bfloat16: the
// tensor cores read operands whose rows run along the depth as they lie; a stage holds 64 rows. The rows of the next
// expert in a segment's last stage are set to zero in shared memory by those who multiply.
#pragma once

#include "cuda/sm90/product.cuh"

namespace pyroute::cuda::sm90 {

// The blocks of the persistent loop: experts outermost, so that those whose operands share rows run together.
struct GradientTile {
    int32_t expert, m, n;
    int32_t row, rows; // of the expert's segment
    int32_t steps;     // stages
};

template <const WgradShape &S> PYROUTE_DEVICE GradientTile gradient_tile(const WgradArgs &args, int32_t item) {
    const int32_t num_m = divide_up(args.n, 128), num_n = divide_up(args.k, 128);
    const int32_t expert = item / (num_m * num_n);
    const TilePlace place = place_of(item % (num_m * num_n), num_m, num_n, args.raster_group);
    const auto between = [&](const int64_t *starts) {
        return TilePlace{static_cast<int32_t>(starts[expert]), static_cast<int32_t>(starts[expert + 1])};
    };
    if constexpr (S.fp8()) {
        const auto [first, last] = between(args.tile_starts);
        return {expert, place.m * 128, place.n * 128, first * 128, (last - first) * 128, last - first};
    } else {
        const auto [first, last] = between(args.offsets);
        return {expert, place.m * 128, place.n * 128, first, last - first, divide_up(last - first, 64)};
    }
}

PYROUTE_DEVICE int32_t gradient_tiles(const WgradArgs &args) {
    return args.experts * divide_up(args.n, 128) * divide_up(args.k, 128);
}

template <const WgradShape &S> PYROUTE_DEVICE void load_gradients(const WgradArgs &args, SharedAddress shared) {
    constexpr SharedPlan plan = S.shared();
    prefetch_map(&args.grad_out);
    prefetch_map(&args.a);
    Ring ring(shared, args);
    const int32_t tiles = gradient_tiles(args);
    for (auto item = static_cast<int32_t>(blockIdx.x); item < tiles; item += static_cast<int32_t>(gridDim.x)) {
        const GradientTile tile = gradient_tile<S>(args, item);
        ring.at({tile.m, tile.n});
        for (int32_t i = 0; i < tile.steps; ++i) {
            const SharedAddress full = shared + plan.full(0) + ring.stage * 8;
            const SharedAddress a = shared + plan.a(0) + ring.stage * plan.a_bytes;
            const SharedAddress b = shared + plan.b(0) + ring.stage * plan.b_bytes;
            ring.wait(shared + plan.empty(0) + ring.stage * 8, ring.phase ^ 1, Waits::for_empty);
            barrier_arrive_expecting(full, plan.a_bytes + plan.b_bytes + plan.scale_bytes);
            if constexpr (S.fp8()) {
                const SharedAddress scales = shared + plan.scales(0) + ring.stage * plan.scale_bytes;
                load_tile(a, &args.grad_out, tile.row + i * 128, tile.m, full);
                load_tile(b, &args.a, tile.row + i * 128, tile.n, full);
                load_tile(scales, &args.grad_out_scales, tile.m, tile.row / 128 + i, full);
                load_tile(scales + 512, &args.a_scales, tile.n, tile.row / 128 + i, full);
            } else {
                for (int32_t p = 0; p < 2; ++p) {
                    const auto panel = static_cast<uint32_t>(p) * panel_bytes;
                    load_tile(a + panel, &args.grad_out, tile.m + p * 64, tile.row + i * 64, full);
                    load_tile(b + panel, &args.a, tile.n + p * 64, tile.row + i * 64, full);
                }
            }
            ring.advance<S.stages>();
        }
    }
}

// Rows `valid` to 63 of a stage's four panels, by all math threads.
PYROUTE_DEVICE void clear_rows(SharedAddress a, SharedAddress b, uint32_t valid) {
    for (uint32_t i = threadIdx.x; i < (64 - valid) * 32; i += 2 * warpgroup)
        for (uint32_t p = 0; p < 2; ++p) { // the swizzle stays within a row
            set_shared_u32(a + p * panel_bytes + valid * row_bytes + i * 4, 0);
            set_shared_u32(b + p * panel_bytes + valid * row_bytes + i * 4, 0);
        }
    fence_shared_for_copies();
    sync_threads(1, 2 * warpgroup);
}

// A stage of bfloat16, both operands with their rows along the depth: four products, 16 rows each.
PYROUTE_DEVICE void multiply_along_rows(float (&sums)[64], SharedAddress a, SharedAddress b, bool add) {
    constexpr uint32_t step = 2 * group_bytes; // 16 rows
    const uint64_t a_start = matrix_descriptor(a, panel_bytes), b_start = matrix_descriptor(b, panel_bytes);
    matrix_fence();
    PYROUTE_UNROLL
    for (uint32_t k = 0; k < 4; ++k)
        multiply_bf16<true, true>(sums, descriptor_at(a_start, k * step), descriptor_at(b_start, k * step),
                                  add || k > 0);
    matrix_commit();
    matrix_wait<0>();
    pin_sums(sums);
}

// One stage of FP8: its sums are scaled by row and column and added.
PYROUTE_DEVICE void add_scaled(float (&totals)[64], const float (&sums)[64], float low, float high,
                               SharedAddress col_scales) {
    PYROUTE_UNROLL
    for (uint32_t j = 0; j < 16; ++j) {
        const FloatPair scale = shared_f32_pair(col_scales + sum_col(lane_id(), 4 * j) * 4);
        totals[4 * j] = fmaf(low * scale.x, sums[4 * j], totals[4 * j]);
        totals[4 * j + 1] = fmaf(low * scale.y, sums[4 * j + 1], totals[4 * j + 1]);
        totals[4 * j + 2] = fmaf(high * scale.x, sums[4 * j + 2], totals[4 * j + 2]);
        totals[4 * j + 3] = fmaf(high * scale.y, sums[4 * j + 3], totals[4 * j + 3]);
    }
}

template <const WgradShape &S>
PYROUTE_DEVICE void multiply_gradients(const WgradArgs &args, SharedAddress shared, uint32_t group) {
    constexpr SharedPlan plan = S.shared();
    const uint32_t row = group * panel_rows + sum_row(warp_id() & 3, lane_id(), 0);
    Ring ring(shared, args);
    const int32_t tiles = gradient_tiles(args);
    for (auto item = static_cast<int32_t>(blockIdx.x); item < tiles; item += static_cast<int32_t>(gridDim.x)) {
        const GradientTile tile = gradient_tile<S>(args, item);
        ring.at({tile.m, tile.n});
        float totals[64], sums[64];
        PYROUTE_UNROLL
        for (int i = 0; i < 64; ++i)
            totals[i] = 0.0f;
        for (int32_t i = 0; i < tile.steps; ++i) {
            const SharedAddress a = shared + plan.a(0) + ring.stage * plan.a_bytes;
            const SharedAddress b = shared + plan.b(0) + ring.stage * plan.b_bytes;
            const SharedAddress empty = shared + plan.empty(0) + ring.stage * 8;
            ring.wait(shared + plan.full(0) + ring.stage * 8, ring.phase, Waits::for_full);
            if constexpr (S.fp8()) {
                const SharedAddress scales = shared + plan.scales(0) + ring.stage * plan.scale_bytes;
                multiply_stage<S.element, false, S.b_e5m2>(sums, a + group * panel_bytes, b, false);
                add_scaled(totals, sums, shared_f32(scales + row * 4), shared_f32(scales + row * 4 + 32), scales + 512);
                sync_warp(); // every lane has read its scales
                release_stage<fp8_128>(empty);
            } else {
                if (tile.rows - i * 64 < 64)
                    clear_rows(a, b, static_cast<uint32_t>(tile.rows - i * 64));
                multiply_along_rows(sums, a + group * panel_bytes, b, i & 1);
                release_stage<fp8_128>(empty);
                if ((i & 1) || i + 1 == tile.steps) {
                    PYROUTE_UNROLL
                    for (int s = 0; s < 64; ++s)
                        totals[s] += sums[s];
                }
            }
            ring.advance<S.stages>();
        }
        const int32_t out_row = tile.m + static_cast<int32_t>(row);
        if (tile.steps > 0 || !args.accumulate)
            store_f32(args.out + (int64_t{tile.expert} * args.n + out_row) * args.k, totals, args.n - out_row, args.k,
                      tile.n, args.accumulate);
    }
}

template <const WgradShape &S> PYROUTE_DEVICE void multiply_wgrad(const WgradArgs &args) {
    PYROUTE_DYNAMIC_SHARED(memory);
    const SharedAddress shared = shared_address(memory);
    if (threadIdx.x == 0) {
        if (shared % group_bytes != 0)
            stop_kernel();
        init_ring(shared, S.stages, S.shared(), 8);
    }
    sync_block();
    const uint32_t group = threadIdx.x / warpgroup;
    if (group == 2) {
        give_registers<loader_registers>();
        if (warp_id() == 8 && elect_lane())
            load_gradients<S>(args, shared);
    } else {
        take_registers<math_registers>();
        multiply_gradients<S>(args, shared, group);
    }
}

} // namespace pyroute::cuda::sm90
