// out[rows of e] = a[rows of e] b[e]^T on Hopper: FP8 with block scales, or bfloat16.
//
// A block takes tiles of 128 x 128 (64 x 128, 128 x 192) of the result one after another. One thread of the loading
// warpgroup asks the copy engine for 128 bytes of depth at a time of a's rows and b's columns, `stages` of them ahead;
// each math warpgroup multiplies 64 rows with wgmma as they arrive. The tensor cores keep fewer bits than a float32 sum
// has, so every 128 elements of depth their sums are added to float32 totals, which is where FP8's scales come in.
//
// One block per SM, 384 threads (160): 240 registers for those that multiply, 24 for those that load. Memory per tile:
// (rows + cols) * depth bytes from the second-level cache, rows * cols * 2 (4) to memory. Scales: a quad of lanes holds
// those of 4 blocks of depth of its two rows, a warp those of 32 blocks of b's; each load is one block early, shuffles
// hand them out: two words per block from the cache instead of a place in the ring, a pass that transposes and 512
// bytes per stage, and any alignment will do.
#pragma once

#include "cuda/sm90/result.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace pyroute::cuda::sm90 {

// The scales of one tile, as the lanes of a math warp hold them: block of depth d of row `row` (and row + 8) in lane
// d % 4 of the quad that owns the row, those of b in lane d % 32. Tiles of 192 columns have two blocks of b's: from an
// even block on 128 and 64 columns, from an odd one (which starts in its middle) 64 and 128.
template <uint32_t Cols> struct BlockScales {
    static constexpr uint32_t chunks = Cols / 64, b_blocks = Cols / 128 + (Cols % 128 ? 1 : 0);
    const ProductArgs &args;
    uint32_t low_at, high_at, b_at[b_blocks]; // in a_scales and b_scales: places take half the registers of addresses
    uint32_t last;                            // block of depth
    bool starts_inside;
    float low_now, high_now, low_next, high_next, b_now[b_blocks], b_next[b_blocks];

    PYROUTE_DEVICE BlockScales(const ProductArgs &product, const RowTile &tile, int32_t col, int32_t row)
        : args(product) {
        const int32_t blocks = divide_up(args.depth, scale_block), last_col = (args.cols - 1) / scale_block;
        last = static_cast<uint32_t>(blocks - 1);
        low_at = static_cast<uint32_t>(min_of(tile.row + row, args.rows - 1)) * static_cast<uint32_t>(blocks);
        high_at = static_cast<uint32_t>(min_of(tile.row + row + 8, args.rows - 1)) * static_cast<uint32_t>(blocks);
        starts_inside = col % scale_block != 0;
        for (uint32_t i = 0; i < b_blocks; ++i) {
            const int32_t block = min_of(col / scale_block + static_cast<int32_t>(i), last_col);
            b_at[i] = static_cast<uint32_t>(tile.expert) * args.b_scale_expert +
                      static_cast<uint32_t>(block) * args.b_scale_col;
        }
        load_rows(0);
        load_cols(0);
        take_rows(4);
        take_cols(32);
    }
    // The factors of block d for rows `row` and row + 8 in every 64 columns; called for every d in turn.
    PYROUTE_DEVICE void factors(uint32_t d, FloatPair (&of)[chunks]) {
        const uint32_t lane = (lane_id() & 28) | (d & 3);
        const FloatPair rows = {shuffle(low_now, lane), shuffle(high_now, lane)};
        float cols[chunks];
        cols[0] = cols[1] = shuffle(b_now[0], d & 31);
        if constexpr (b_blocks > 1) {
            cols[2] = shuffle(b_now[1], d & 31);
            cols[1] = starts_inside ? cols[2] : cols[0];
        }
        PYROUTE_UNROLL
        for (uint32_t c = 0; c < chunks; ++c)
            of[c] = {rows.x * cols[c], rows.y * cols[c]};
        if ((d & 3) == 3) {
            take_rows(d + 5);
            if ((d & 31) == 31)
                take_cols(d + 33);
        }
    }

  private:
    PYROUTE_DEVICE void load_rows(uint32_t d) {
        const uint32_t block = min_of(d + (lane_id() & 3), last);
        low_next = args.a_scales[low_at + block];
        high_next = args.a_scales[high_at + block];
    }
    PYROUTE_DEVICE void load_cols(uint32_t d) {
        for (uint32_t i = 0; i < b_blocks; ++i)
            b_next[i] = args.b_scales[b_at[i] + min_of(d + lane_id(), last) * args.b_scale_depth];
    }
    PYROUTE_DEVICE void take_rows(uint32_t following) {
        low_now = low_next;
        high_now = high_next;
        load_rows(following);
    }
    PYROUTE_DEVICE void take_cols(uint32_t following) {
        for (uint32_t i = 0; i < b_blocks; ++i)
            b_now[i] = b_next[i];
        load_cols(following);
    }
};

// Nothing to hold for operands without scales.
struct NoScales {
    PYROUTE_DEVICE NoScales(const ProductArgs &, const RowTile &, int32_t, int32_t) {}
};

template <bool Condition, class A, class B> struct Choice {
    using Type = A;
};
template <class A, class B> struct Choice<false, A, B> {
    using Type = B;
};

template <const ProductShape &S> PYROUTE_DEVICE Schedule schedule_of(const ProductArgs &args) {
    const int32_t cols = divide_up(args.cols, static_cast<int32_t>(S.cols * S.cluster));
    return Schedule(args.tiles, static_cast<int32_t>(*args.num_tiles), cols, args.raster_group,
                    static_cast<int32_t>(blockIdx.x / S.cluster), static_cast<int32_t>(gridDim.x / S.cluster));
}

template <const ProductShape &S> PYROUTE_DEVICE int32_t first_col(const TilePlace &place) {
    const int32_t n =
        S.cluster == 1 ? place.n : place.n * static_cast<int32_t>(S.cluster) + static_cast<int32_t>(cluster_rank());
    return n * static_cast<int32_t>(S.cols);
}

template <const ProductShape &S> PYROUTE_DEVICE int32_t steps_of(const ProductArgs &args, const RowTile &tile) {
    return tile.expert < 0 ? 0 : divide_up(args.depth, S.stage_depth());
}

// One thread: everything that the block's tiles need, in order.
template <const ProductShape &S> PYROUTE_DEVICE void load_operands(const ProductArgs &args, SharedAddress shared) {
    constexpr SharedPlan plan = S.shared();
    prefetch_map(&args.a);
    prefetch_map(&args.b);
    Ring ring(shared, args);
    Schedule schedule = schedule_of<S>(args);
    while (schedule.take()) {
        ring.at(schedule.place);
        const RowTile &tile = schedule.tile;
        const int32_t col = first_col<S>(schedule.place), steps = steps_of<S>(args, tile);
        // a panel of a without a row of the tile is not loaded: 64 rows cost no more than in a tile of 64
        const uint32_t panels = S.cluster > 1 ? S.math() : static_cast<uint32_t>(divide_up(tile.rows, 64));
        for (int32_t i = 0; i < steps; ++i) {
            const SharedAddress full = shared + plan.full(0) + ring.stage * 8;
            const SharedAddress a = shared + plan.a(0) + ring.stage * plan.a_bytes;
            const SharedAddress b = shared + plan.b(0) + ring.stage * plan.b_bytes;
            const int32_t d = i * S.stage_depth();
            ring.wait(shared + plan.empty(0) + ring.stage * 8, ring.phase ^ 1, Waits::for_empty);
            barrier_arrive_expecting(full, panels * panel_bytes + plan.b_bytes);
            if constexpr (S.cluster == 1) {
                for (uint32_t p = 0; p < panels; ++p)
                    load_tile(a + p * panel_bytes, &args.a, d, tile.row + static_cast<int32_t>(p * panel_rows), full);
            } else { // each block its share of the rows, to all of them
                const uint32_t share = S.rows / S.cluster * cluster_rank();
                load_tile_to(a + share * row_bytes, &args.a, d, tile.row + static_cast<int32_t>(share), full,
                             (1u << S.cluster) - 1);
            }
            if constexpr (S.transposed_b) {
                for (uint32_t p = 0; p < S.cols / 64; ++p)
                    load_tile(b + p * panel_bytes, &args.b, col + static_cast<int32_t>(p * 64),
                              tile.expert * args.b_rows + d, full);
            } else {
                load_tile(b, &args.b, d, tile.expert * args.b_rows + col, full);
            }
            ring.advance<S.stages>();
        }
    }
    if constexpr (S.cluster > 1) // no block ends while its neighbour still signals into it
        for (uint32_t i = 0; i < S.stages; ++i) {
            ring.wait(shared + plan.empty(0) + ring.stage * 8, ring.phase ^ 1, Waits::for_empty);
            ring.advance<S.stages>();
        }
}

// The compiler moves no use of the sums before this: what it knows of a product is that it has written them.
template <int Sums> PYROUTE_DEVICE void pin_sums(float (&sums)[Sums]) {
    PYROUTE_UNROLL
    for (int i = 0; i < Sums; ++i)
        pin(sums[i]);
}

// A stage's four products of a warpgroup, 128 bytes of depth, as one group that runs until a matrix_wait.
template <Element Type, bool TransposedB, bool B_e5m2, int Sums>
PYROUTE_DEVICE void start_stage(float (&sums)[Sums], SharedAddress a, SharedAddress b, bool add) {
    const uint64_t a_start = matrix_descriptor(a, 16);
    const uint64_t b_start = matrix_descriptor(b, TransposedB ? panel_bytes : 16);
    constexpr uint32_t b_step = TransposedB ? 2 * group_bytes : step_bytes; // 16 rows of depth, or 32 bytes
    matrix_fence();
    PYROUTE_UNROLL
    for (uint32_t k = 0; k < 4; ++k) {
        const uint64_t a_now = descriptor_at(a_start, k * step_bytes), b_now = descriptor_at(b_start, k * b_step);
        if constexpr (Type != Element::bfloat16)
            multiply_fp8<Type == Element::e5m2, B_e5m2>(sums, a_now, b_now, add || k > 0);
        else
            multiply_bf16<false, TransposedB>(sums, a_now, b_now, add || k > 0);
    }
    matrix_commit();
}

template <Element Type, bool TransposedB, bool B_e5m2, int Sums>
PYROUTE_DEVICE void multiply_stage(float (&sums)[Sums], SharedAddress a, SharedAddress b, bool add) {
    start_stage<Type, TransposedB, B_e5m2>(sums, a, b, add);
    matrix_wait<0>();
    pin_sums(sums);
}

template <const ProductShape &S> PYROUTE_DEVICE void release_stage(SharedAddress empty) {
    if constexpr (S.cluster == 1) {
        if (lane_id() == 0)
            barrier_arrive(empty);
    } else {
        if (lane_id() < S.cluster)
            barrier_arrive_at(empty, lane_id());
    }
}

// totals += sums of block d of depth, scaled.
template <const ProductShape &S, int Sums>
PYROUTE_DEVICE void add_block(BlockScales<S.cols> &scales, int32_t d, const float (&sums)[Sums],
                              float (&totals)[Sums]) {
    FloatPair factors[S.cols / 64];
    scales.factors(static_cast<uint32_t>(d), factors);
    PYROUTE_UNROLL
    for (int s = 0; s < Sums; ++s)
        totals[s] = fmaf(s & 2 ? factors[s / 32].y : factors[s / 32].x, sums[s], totals[s]);
}

// All stages of a tile, one after another.
template <const ProductShape &S, class Scales, int Sums>
PYROUTE_DEVICE void multiply_in_turn(Ring &ring, SharedAddress shared, uint32_t group, int32_t steps, Scales &scales,
                                     float (&totals)[Sums]) {
    constexpr SharedPlan plan = S.shared();
    float sums[Sums];
    for (int32_t i = 0; i < steps; ++i) {
        ring.wait(shared + plan.full(0) + ring.stage * 8, ring.phase, Waits::for_full);
        multiply_stage<S.element, S.transposed_b, S.b_e5m2>(
            sums, shared + plan.a(0) + ring.stage * plan.a_bytes + group * panel_bytes,
            shared + plan.b(0) + ring.stage * plan.b_bytes, !S.fp8() && (i & 1));
        release_stage<S>(shared + plan.empty(0) + ring.stage * 8);
        if constexpr (S.fp8()) {
            add_block<S>(scales, i, sums, totals);
        } else if ((i & 1) || i + 1 == steps) {
            PYROUTE_UNROLL
            for (int s = 0; s < Sums; ++s)
                totals[s] += sums[s];
        }
        ring.template advance<S.stages>();
    }
}

// All stages of a tile, each started before the one before it is added: the tensor cores are not idle meanwhile. The
// sets of sums are named, not indexed: registers have no addresses.
template <const ProductShape &S, int Sums>
PYROUTE_DEVICE void multiply_overlapping(Ring &ring, SharedAddress shared, uint32_t group, int32_t steps,
                                         BlockScales<S.cols> &scales, float (&totals)[Sums]) {
    constexpr SharedPlan plan = S.shared();
    float even[Sums], odd[Sums];
    Ring oldest = ring; // stage that is not released
    const auto start = [&](float (&sums)[Sums]) {
        ring.wait(shared + plan.full(0) + ring.stage * 8, ring.phase, Waits::for_full);
        start_stage<S.element, S.transposed_b, S.b_e5m2>(
            sums, shared + plan.a(0) + ring.stage * plan.a_bytes + group * panel_bytes,
            shared + plan.b(0) + ring.stage * plan.b_bytes, false);
        ring.template advance<S.stages>();
    };
    const auto add = [&](float (&sums)[Sums], int32_t d) {
        pin_sums(sums);
        release_stage<S>(shared + plan.empty(0) + oldest.stage * 8);
        oldest.template advance<S.stages>();
        add_block<S>(scales, d, sums, totals);
    };
    start(even);
    int32_t d = 0;
    for (; d + 2 < steps; d += 2) {
        start(odd);
        matrix_wait<1>();
        add(even, d);
        start(even);
        matrix_wait<1>();
        add(odd, d + 1);
    }
    if (d + 1 < steps) {
        start(odd);
        matrix_wait<1>();
        add(even, d++);
        matrix_wait<0>();
        add(odd, d);
    } else {
        matrix_wait<0>();
        add(even, d);
    }
}

// The math warpgroup `group`: rows 64 group.. of every tile.
template <const ProductShape &S>
PYROUTE_DEVICE void multiply_tiles(const ProductArgs &args, SharedAddress shared, uint32_t group) {
    constexpr SharedPlan plan = S.shared();
    constexpr bool scaled = S.fp8();
    constexpr int num_sums = S.cols / 2;
    const int32_t row = static_cast<int32_t>(group * panel_rows + sum_row(warp_id() & 3, lane_id(), 0));
    Ring ring(shared, args);
    Schedule schedule = schedule_of<S>(args);
    while (schedule.take()) {
        ring.at(schedule.place);
        const RowTile &tile = schedule.tile;
        const int32_t col = first_col<S>(schedule.place), steps = steps_of<S>(args, tile);
        const int32_t valid = tile.rows - static_cast<int32_t>(group * panel_rows);
        if (valid <= 0) { // the other warpgroup's rows are all there are
            for (int32_t i = 0; i < steps; ++i) {
                ring.wait(shared + plan.full(0) + ring.stage * 8, ring.phase, Waits::for_full);
                sync_warp(); // no lane is laps behind, where the parity is right again (products do this too)
                release_stage<S>(shared + plan.empty(0) + ring.stage * 8);
                ring.advance<S.stages>();
            }
            continue;
        }
        float totals[num_sums];
        PYROUTE_UNROLL
        for (int i = 0; i < num_sums; ++i)
            totals[i] = 0.0f;
        if (steps > 0) {
            typename Choice<scaled, BlockScales<S.cols>, NoScales>::Type scales(args, tile, col, row);
            if constexpr (S.overlaps)
                multiply_overlapping<S>(ring, shared, group, steps, scales, totals);
            else
                multiply_in_turn<S>(ring, shared, group, steps, scales, totals);
        }
        if constexpr (S.result == Result::bfloat16)
            store_bf16(args, shared + group * panel_rows * S.cols * 2, group, totals, tile.row, valid, col);
        else
            store_f32(static_cast<float *>(args.out_data) + int64_t{tile.row + row} * args.cols, totals,
                      valid - (row & 63), args.cols, col, false);
    }
    if (S.result == Result::bfloat16 && threadIdx.x % warpgroup == 0)
        wait_stores();
}

template <const ProductShape &S> PYROUTE_DEVICE void multiply_product(const ProductArgs &args) {
    PYROUTE_DYNAMIC_SHARED(memory);
    const SharedAddress shared = shared_address(memory);
    if (threadIdx.x == 0) {
        if (shared % group_bytes != 0)
            stop_kernel();
        init_ring(shared, S.stages, S.shared(), 4 * S.math() * S.cluster);
    }
    if constexpr (S.cluster == 1)
        sync_block();
    else
        sync_cluster();
    const uint32_t group = threadIdx.x / warpgroup;
    if (group == S.math()) {
        if constexpr (S.math() > 1)
            give_registers<loader_registers>();
        if (warp_id() == 4 * S.math() && elect_lane())
            load_operands<S>(args, shared);
    } else {
        if constexpr (S.math() > 1)
            take_registers<math_registers>();
        multiply_tiles<S>(args, shared, group);
    }
}

} // namespace pyroute::cuda::sm90
