// The plan of a grouped GEMM, made on the device from expert_offsets or tokens_per_expert: safe segments, the scale
// rows where each begins, and the table of row tiles.
//
// One block. Experts go by in runs of 256, a thread each: a running maximum makes the offsets safe, running sums place
// tiles and scale rows; then all threads fill the table, each entry by a binary search for its expert.
#pragma once

#include "cuda/device.cuh"
#include "cuda/grouped_gemm_arguments.h"

namespace pyroute::cuda {

constexpr int plan_threads = 256;

struct PlanScan {
    int64_t of_warp[plan_threads / 32];
};

struct Larger {
    static PYROUTE_DEVICE int64_t join(int64_t a, int64_t b) { return max_of(a, b); }
};
struct Sum {
    static PYROUTE_DEVICE int64_t join(int64_t a, int64_t b) { return a + b; }
};

// The join of `carry` and the values of all threads up to this one; 0 is neutral. The carry becomes the whole join.
template <class Op> PYROUTE_DEVICE int64_t scan_block(int64_t value, int64_t &carry, PlanScan &scan) {
    PYROUTE_UNROLL
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const int64_t before = shuffle_up(value, distance);
        if (lane_id() >= distance)
            value = Op::join(value, before);
    }
    if (lane_id() == 31)
        scan.of_warp[warp_id()] = value;
    sync_block();
    int64_t joined = carry;
    for (uint32_t warp = 0; warp < plan_threads / 32; ++warp) {
        if (warp == warp_id())
            value = Op::join(value, joined);
        joined = Op::join(joined, scan.of_warp[warp]);
    }
    sync_block(); // the slots are free again
    carry = joined;
    return value;
}

// Of expert e in the masked layout, whatever the caller says.
PYROUTE_DEVICE int64_t masked_rows(const GemmRows &rows, int64_t e) {
    return max_of<int64_t>(min_of<int64_t>(rows.tokens_per_expert[e], rows.rows_per_expert), 0);
}

PYROUTE_DEVICE void plan_segments(const GemmPlanArgs &args, PlanScan &scan) {
    const GemmPlan &plan = args.plan;
    if (threadIdx.x == 0) {
        plan.offsets[0] = plan.tile_starts[0] = 0;
        for (int64_t *starts : plan.block_starts)
            if (starts)
                starts[0] = 0;
    }
    int64_t offset = 0, tile = 0, block[2] = {0, 0};
    const GemmRows &given = args.rows;
    const bool masked = given.tokens_per_expert;
    for (int64_t first = 0; first < given.num_experts; first += plan_threads) {
        const int64_t e = first + threadIdx.x;
        const bool real = e < given.num_experts;
        const int64_t ends = !real ? 0 : masked ? (e + 1) * given.rows_per_expert : given.expert_offsets[e + 1];
        const int64_t end = scan_block<Larger>(max_of<int64_t>(min_of(ends, given.num_rows), 0), offset, scan);
        if (real)
            plan.offsets[e + 1] = end;
        sync_block();
        const int64_t rows = real ? end - plan.offsets[e] : 0, used = real && masked ? masked_rows(given, e) : rows;
        const int64_t tile_end = scan_block<Sum>(divide_up(used, args.tile_rows), tile, scan);
        if (real)
            plan.tile_starts[e + 1] = tile_end;
        for (int i = 0; i < 2; ++i) {
            if (!plan.block_starts[i])
                continue;
            const int64_t block_end = scan_block<Sum>(divide_up(rows, args.block_rows[i]), block[i], scan);
            if (real)
                plan.block_starts[i][e + 1] = block_end;
        }
    }
    sync_block();
}

PYROUTE_DEVICE GemmTile tile_of(const GemmPlanArgs &args, int64_t tile, int64_t of_experts) {
    const GemmPlan &plan = args.plan;
    const GemmRows &given = args.rows;
    int64_t low = given.num_experts, row = plan.offsets[low] + (tile - of_experts) * args.tile_rows;
    int64_t end = given.num_rows;
    if (tile < of_experts) { // the last expert that begins at or before the tile; it has rows
        low = 0;
        for (int64_t high = given.num_experts; high - low > 1;) {
            const int64_t middle = (low + high) / 2;
            (plan.tile_starts[middle] <= tile ? low : high) = middle;
        }
        row = plan.offsets[low] + (tile - plan.tile_starts[low]) * args.tile_rows;
        end = given.tokens_per_expert ? plan.offsets[low] + masked_rows(given, low) : plan.offsets[low + 1];
    }
    return {tile < of_experts ? static_cast<int32_t>(low) : -1, static_cast<int32_t>(min_of(end - row, args.tile_rows)),
            row};
}

PYROUTE_DEVICE void plan_grouped_gemm(const GemmPlanArgs &args) {
    PYROUTE_SHARED(PlanScan, scan);
    plan_segments(args, scan);
    if (!args.plan.tiles)
        return;
    const int64_t experts = args.rows.num_experts, of_experts = args.plan.tile_starts[experts];
    // past the last segment; none in the masked layout
    const int64_t rest = args.rows.segments_only ? 0 : args.rows.num_rows - args.plan.offsets[experts];
    const int64_t num_tiles = of_experts + divide_up(rest, args.tile_rows);
    if (threadIdx.x == 0)
        *args.plan.num_tiles = num_tiles;
    for (int64_t tile = threadIdx.x; tile < num_tiles; tile += plan_threads)
        args.plan.tiles[tile] = tile_of(args, tile, of_experts);
}

} // namespace pyroute::cuda
