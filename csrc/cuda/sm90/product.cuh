// out[rows of e] = a[rows of e] b[e]^T on Hopper: FP8 with block scales, or bfloat16.
//
// A block takes tiles of 128 x 128 (64 x 128, 128 x 192) of the result one after another. One thread of the loading
// warpgroup asks the copy engine for 128 bytes of depth at a time of a's rows and b's columns, `stages` of them ahead;
// each math warpgroup multiplies 64 rows with wgmma as they arrive. The tensor cores keep fewer bits than a float32 sum
// has, so every 128 elements of depth their sums are added to float32 totals, which is where FP8's scales come in.
//
// One block per SM, 384 threads (160): 240 registers for those that multiply, 24 for those that load. Memory per tile:
// (rows + cols) * depth bytes from the second-level cache, rows * cols * 2 (4) to memory. Scales: a quad of lanes holds
// those of 4 blocks of depth of its two rows and of b, each load four blocks early, and shuffles hand the products
// round: no place in the ring, no pass that transposes, and any alignment will do.
//
// Between the end of one stage's products and the start of the next a math warpgroup leaves the tensor cores to the
// other one, 256 cycles at 128 columns: what is done there is the additions, and little else. So what is the same for a
// warp is in uniform registers, from which descriptors are read, and whether the next stage is there is asked before
// the additions. What the instructions allow: docs/ops/grouped_gemm.md.
#pragma once

#include "cuda/sm90/result.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace pyroute::cuda::sm90 {

// The scales of one tile as the lanes of a math warp hold them: of block 4i + q of depth in lane q of each quad, for
// the quad's two rows (`row` and row + 8). The products of a row's scale and b's are made by that lane and handed
// round, two shuffles for a block; what the next four blocks need is on its way meanwhile. Tiles of 192 columns have
// two blocks of b's: from an even block on 128 and 64 columns, from an odd one (which starts in its middle) 64 and 128.
template <uint32_t Cols> struct BlockScales {
    static constexpr uint32_t chunks = Cols / 64, b_blocks = Cols / 128 + (Cols % 128 ? 1 : 0);
    const ProductArgs &args;
    uint32_t low_at, high_at, b_at[b_blocks]; // in a_scales and b_scales: places take half the registers of addresses
    uint32_t last;                            // block of depth
    bool starts_inside;
    FloatPair now[b_blocks];                     // products
    float low_next, high_next, b_next[b_blocks]; // scales

    PYROUTE_DEVICE explicit BlockScales(const ProductArgs &product)
        : args(product), last(static_cast<uint32_t>(divide_up(product.depth, scale_block) - 1)) {}
    // Another tile, columns from `col`; `row`: this lane's first.
    PYROUTE_DEVICE void start(const RowTile &tile, int32_t col, int32_t row) {
        const int32_t last_row = args.rows - 1, last_col = (args.cols - 1) / scale_block;
        low_at = static_cast<uint32_t>(min_of(tile.row + row, last_row)) * (last + 1);
        high_at = static_cast<uint32_t>(min_of(tile.row + row + 8, last_row)) * (last + 1);
        starts_inside = col % scale_block != 0;
        for (uint32_t i = 0; i < b_blocks; ++i) {
            const int32_t block = min_of(col / scale_block + static_cast<int32_t>(i), last_col);
            b_at[i] = static_cast<uint32_t>(max_of(tile.expert, 0)) * args.b_scale_expert +
                      static_cast<uint32_t>(block) * args.b_scale_col;
        }
        load(0);
    }
    // Before the factors of blocks 4i to 4i + 3, for every i in turn: `following` is 4i + 4.
    PYROUTE_DEVICE void take(uint32_t following) {
        for (uint32_t i = 0; i < b_blocks; ++i)
            now[i] = {low_next * b_next[i], high_next * b_next[i]};
        load(following);
    }
    // The factors of block 4i + j for rows `row` and row + 8 in every 64 columns.
    PYROUTE_DEVICE void factors(uint32_t j, FloatPair (&of)[chunks]) const {
        of[0] = of[1] = {shuffle_quad(now[0].x, j), shuffle_quad(now[0].y, j)};
        if constexpr (b_blocks > 1) {
            of[2] = {shuffle_quad(now[1].x, j), shuffle_quad(now[1].y, j)};
            if (starts_inside)
                of[1] = of[2];
        }
    }

  private:
    PYROUTE_DEVICE void load(uint32_t d) {
        const uint32_t block = min_of(d + (lane_id() & 3), last);
        low_next = args.a_scales[low_at + block];
        high_next = args.a_scales[high_at + block];
        for (uint32_t i = 0; i < b_blocks; ++i)
            b_next[i] = args.b_scales[b_at[i] + block * args.b_scale_depth];
    }
};

template <const ProductShape &S> PYROUTE_DEVICE Schedule schedule_of(const ProductArgs &args, int32_t num_tiles) {
    const int32_t cols = divide_up(args.cols, static_cast<int32_t>(S.cols * S.cluster));
    return Schedule(args.tiles, num_tiles, cols, args.raster_group, static_cast<int32_t>(blockIdx.x / S.cluster),
                    static_cast<int32_t>(gridDim.x / S.cluster));
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
    Schedule schedule = schedule_of<S>(args, static_cast<int32_t>(*args.num_tiles));
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

// Where a warpgroup's products find a stage: descriptors of stage 0, to which one addition leads to the others.
struct StageOperands {
    uint64_t a, b;
};
template <bool TransposedB> PYROUTE_DEVICE StageOperands operands_at(SharedAddress a, SharedAddress b) {
    return {matrix_descriptor(a, 16), matrix_descriptor(b, TransposedB ? panel_bytes : 16)};
}
template <const ProductShape &S> PYROUTE_DEVICE StageOperands operands_of(const StageOperands &first, uint32_t stage) {
    constexpr SharedPlan plan = S.shared();
    return {descriptor_at(first.a, stage * plan.a_bytes), descriptor_at(first.b, stage * plan.b_bytes)};
}

// A stage's four products of a warpgroup, 128 bytes of depth, as one group that runs until a matrix_wait.
template <Element Type, bool TransposedB, bool B_e5m2, int Sums>
PYROUTE_DEVICE void start_stage(float (&sums)[Sums], const StageOperands &stage, bool add) {
    constexpr uint32_t b_step = TransposedB ? 2 * group_bytes : step_bytes; // 16 rows of depth, or 32 bytes
    matrix_fence();
    PYROUTE_UNROLL
    for (uint32_t k = 0; k < 4; ++k) {
        const uint64_t a = descriptor_at(stage.a, k * step_bytes), b = descriptor_at(stage.b, k * b_step);
        if constexpr (Type != Element::bfloat16)
            multiply_fp8<Type == Element::e5m2, B_e5m2>(sums, a, b, add || k > 0);
        else
            multiply_bf16<false, TransposedB>(sums, a, b, add || k > 0);
    }
    matrix_commit();
}

template <Element Type, bool TransposedB, bool B_e5m2, int Sums>
PYROUTE_DEVICE void multiply_stage(float (&sums)[Sums], SharedAddress a, SharedAddress b, bool add) {
    start_stage<Type, TransposedB, B_e5m2>(sums, operands_at<TransposedB>(a, b), add);
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

// The stages of one tile as a math warp goes through them.
template <const ProductShape &S> struct Stages {
    static constexpr SharedPlan plan = S.shared();
    Ring &ring;
    SharedAddress shared;
    StageOperands first;
    int32_t left;                   // to be started
    SharedAddress newest, previous; // empty barriers of what was started last, and before that
    bool ready;                     // the next one, as far as is known

    PYROUTE_DEVICE Stages(Ring &of, SharedAddress base, const StageOperands &operands, int32_t steps)
        : ring(of), shared(base), first(operands), left(steps), newest(0), previous(0), ready(false) {}
    // The products of the next stage, as soon as it is there.
    template <int Sums> PYROUTE_DEVICE void start(float (&sums)[Sums], bool add) {
        if (!ready)
            ring.wait(full(), ring.phase, Waits::for_full);
        start_stage<S.element, S.transposed_b, S.b_e5m2>(sums, operands_of<S>(first, ring.stage), add);
        previous = newest;
        newest = shared + plan.empty(0) + ring.stage * 8;
        ring.template advance<S.stages>();
        --left;
    }
    // Asks whether the next stage is there: the answer is on its way while the sums are added. After the last of a tile
    // there need not be another, and the question is one whose answer comes at once.
    PYROUTE_DEVICE void look() {
        ready = barrier_try_wait(left > 0 ? full() : shared + plan.idle(), left > 0 ? ring.phase : 1);
    }

  private:
    PYROUTE_DEVICE SharedAddress full() const { return shared + plan.full(0) + ring.stage * 8; }
};

// totals += sums of a block of depth, scaled.
template <int Sums>
PYROUTE_DEVICE void add_block(const FloatPair (&factors)[Sums / 32], const float (&sums)[Sums], float (&totals)[Sums]) {
    PYROUTE_UNROLL
    for (int s = 0; s < Sums; ++s)
        totals[s] = fmaf(s & 2 ? factors[s / 32].y : factors[s / 32].x, sums[s], totals[s]);
}

// bfloat16: two stages are a block of 128.
template <const ProductShape &S, int Sums>
PYROUTE_DEVICE void multiply_bf16_stages(Stages<S> &stages, float (&totals)[Sums]) {
    float sums[Sums];
    for (uint32_t i = 0; stages.left > 0; ++i) {
        stages.start(sums, i & 1);
        matrix_wait<0>();
        pin_sums(sums);
        release_stage<S>(stages.newest);
        stages.look();
        if ((i & 1) || stages.left == 0) {
            PYROUTE_UNROLL
            for (int s = 0; s < Sums; ++s)
                totals[s] += sums[s];
        }
    }
}

// FP8: a stage is a block, and one is started after the other was added. Four to a turn of the loop, as scales
// come.
template <const ProductShape &S, int Sums>
PYROUTE_DEVICE void multiply_in_turn(Stages<S> &stages, BlockScales<S.cols> &scales, float (&totals)[Sums]) {
    float sums[Sums];
    for (uint32_t following = 4;; following += 4) {
        PYROUTE_UNROLL
        for (uint32_t j = 0; j < 4; ++j) {
            stages.start(sums, false);
            if (j == 0)
                scales.take(following);
            FloatPair factors[S.cols / 64];
            scales.factors(j, factors);
            matrix_wait<0>();
            pin_sums(sums);
            release_stage<S>(stages.newest);
            stages.look();
            add_block(factors, sums, totals);
            if (stages.left == 0)
                return;
        }
    }
}

// Each stage is started before the one before it is added: the tensor cores are not idle meanwhile. The sets of
// sums are named, not indexed: registers have no addresses.
template <const ProductShape &S, int Sums>
PYROUTE_DEVICE void multiply_overlapping(Stages<S> &stages, BlockScales<S.cols> &scales, float (&totals)[Sums]) {
    float even[Sums], odd[Sums];
    FloatPair factors[S.cols / 64];
    const auto start = [&](float (&sums)[Sums]) { stages.start(sums, false); };
    // adds block j of four, once its products are done
    const auto add = [&](float (&sums)[Sums], SharedAddress empty) {
        pin_sums(sums);
        release_stage<S>(empty);
        stages.look();
        add_block(factors, sums, totals);
    };
    // the same, the next block's products running
    const auto step = [&](float (&sums)[Sums], float (&others)[Sums], uint32_t j) {
        start(others);
        scales.factors(j, factors);
        matrix_wait<1>();
        add(sums, stages.previous);
    };
    const auto finish = [&](float (&sums)[Sums], uint32_t j) {
        scales.factors(j, factors);
        matrix_wait<0>();
        add(sums, stages.newest);
    };
    start(even);
    stages.look();
    uint32_t d = 0;
    const auto take = [&] {
        if (d % 4 == 0)
            scales.take(d + 4);
    };
    for (; stages.left >= 2; d += 2) {
        take();
        step(even, odd, d % 4);
        step(odd, even, d % 4 + 1);
    }
    take();
    if (stages.left == 1) {
        step(even, odd, d % 4);
        finish(odd, d % 4 + 1);
    } else {
        finish(even, d % 4);
    }
}

// Nothing to hold for operands without scales.
struct NoScales {
    PYROUTE_DEVICE explicit NoScales(const ProductArgs &) {}
    PYROUTE_DEVICE void start(const RowTile &, int32_t, int32_t) {}
};

template <bool Condition, class A, class B> struct Choice {
    using Type = A;
};
template <class A, class B> struct Choice<false, A, B> {
    using Type = B;
};

// The math warpgroup `group`: rows 64 group.. of every tile. The next tile's scales are on their way while one is
// stored.
template <const ProductShape &S>
PYROUTE_DEVICE void multiply_tiles(const ProductArgs &args, SharedAddress shared, uint32_t group) {
    constexpr SharedPlan plan = S.shared();
    const StageOperands first =
        operands_at<S.transposed_b>(shared + plan.a(0) + group * panel_bytes, shared + plan.b(0));
    const auto first_row = static_cast<int32_t>(group * panel_rows);
    const int32_t row = first_row + static_cast<int32_t>(sum_row(warp_id() & 3, lane_id(), 0));
    Ring ring(shared, args);
    Schedule schedule = schedule_of<S>(args, uniform(static_cast<int32_t>(*args.num_tiles)));
    typename Choice<S.fp8(), BlockScales<S.cols>, NoScales>::Type scales(args);
    const auto start_next = [&] { scales.start(schedule.next, first_col<S>(schedule.next_place), row); };
    start_next();
    while (schedule.take()) {
        ring.at(schedule.place);
        const RowTile tile = {uniform(schedule.tile.expert), uniform(schedule.tile.row), uniform(schedule.tile.rows)};
        const int32_t col = uniform(first_col<S>(schedule.place)), steps = steps_of<S>(args, tile);
        const int32_t valid = tile.rows - first_row;
        if (valid <= 0) { // the other warpgroup's rows are all there are
            for (int32_t i = 0; i < steps; ++i) {
                ring.wait(shared + plan.full(0) + ring.stage * 8, ring.phase, Waits::for_full);
                sync_warp(); // no lane is laps behind, where the parity is right again (products do this too)
                release_stage<S>(shared + plan.empty(0) + ring.stage * 8);
                ring.advance<S.stages>();
            }
            start_next();
            continue;
        }
        float totals[S.cols / 2];
        PYROUTE_UNROLL
        for (float &total : totals)
            total = 0.0f;
        if (steps > 0) {
            Stages<S> stages(ring, shared, first, steps);
            if constexpr (!S.fp8())
                multiply_bf16_stages<S>(stages, totals);
            else if constexpr (S.overlaps)
                multiply_overlapping<S>(stages, scales, totals);
            else
                multiply_in_turn<S>(stages, scales, totals);
        }
        start_next();
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
    const uint32_t group = uniform(threadIdx.x / warpgroup);
    if (group == S.math()) {
        if constexpr (S.math() > 1)
            give_registers<loader_registers>();
        if (warp_id() == 4 * S.math() && elect_lane())
            load_operands<S>(args, shared);
    } else {
        if constexpr (S.math() > 1)
            take_registers<math_registers>();
        multiply_tiles<S>(args, uniform(shared), group);
    }
}

} // namespace pyroute::cuda::sm90
