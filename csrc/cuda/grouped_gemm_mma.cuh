// Grouped GEMM on tensor cores by mma.sync, for every card from sm_80 on: bfloat16, FP8 with block scales, FP8 weights
// beside bfloat16 rows; forward, dgrad and wgrad.
//
// Plan: a block of 8 warps computes 128 x 128 sums of X Y^T, a warp 32 x 64 of them, or 16 x 128 where experts have few
// rows (a warp 16 x 16). A ring of stages, each 128 bytes of the contraction of both sides and the scales of its
// block, is filled by cp.async; one barrier per stage. Every 128 elements the tensor cores' sums, which they may round
// more coarsely than float32, are multiplied by the block's two scales and added to totals in float32 registers.
// A sum's steps depend on its row, its column and the contraction alone, so that its bits are the same in both tiles.
//
// Registers: 64 sums, 64 totals and at most 40 of fragments a thread; 1 block on an SM (ring of 99 KiB, what the
// smallest cards have), of the low tile two or more. Bytes: X once per 128 columns and Y once per row tile, from L2
// where the raster (place_of) keeps them.
//
// Needs rows of both matrices to be multiples of 16 bytes long and 16-byte aligned, and scales that fit the blocks of
// 128 (serves in csrc/cuda/grouped_gemm.cpp). Tails along the contraction, rows and columns are zeros of cp.async.
#pragma once

#include "cuda/grouped_gemm_fragments.cuh"
#include "cuda/grouped_gemm_operands.cuh"

namespace pyroute::cuda {

constexpr int mma_threads = 256;

// One side's part of the stage that begins at `depth`.
template <class P>
PYROUTE_DEVICE void copy_panel(const GemmSide &s, uint32_t first, int count, int64_t length, int64_t depth, char *to) {
    constexpr int rows_at_once = mma_threads / P::chunks, per_chunk = 16 / P::item;
    const int row = static_cast<int>(threadIdx.x) / P::chunks, chunk = static_cast<int>(threadIdx.x) % P::chunks;
    const int left = static_cast<int>(min_of<int64_t>(length - depth, P::depth)); // of the contraction
    const int64_t row_bytes = s.stride * P::item;
    const char *from = static_cast<const char *>(s.data) + chunk * 16;
    from += P::across ? (depth + row) * row_bytes + int64_t{first} * P::item
                      : (int64_t{first} + row) * row_bytes + depth * P::item;
    const bool chunk_exists = chunk * per_chunk < (P::across ? count : left);
    const int rows = P::across ? left : count;
    char *const place = to + P::place(row, chunk);
    PYROUTE_UNROLL
    for (int i = 0; i < divide_up(P::rows, rows_at_once); ++i) // the permutation repeats every 16 rows
        if (P::rows % rows_at_once == 0 || row + i * rows_at_once < P::rows)
            copy_async_16(place + i * rows_at_once * P::row_bytes, from + i * rows_at_once * row_bytes,
                          chunk_exists && row + i * rows_at_once < rows);
}

// One thread's part of the scales: of a row or of a column of the tile.
template <class C> struct ScaleOfThread {
    const float *scales;   // of its row or column; null: none
    uint32_t block;        // elements of the contraction that have one scale
    int64_t from_block_on; // to the next one
    int place;             // in a stage, in bytes
    bool exists;

    PYROUTE_DEVICE explicit ScaleOfThread(const ProductTile &t, char *ring) {
        const int i = static_cast<int>(threadIdx.x);
        place = C::scales_at + i * 4;
        if (i < C::rows)
            take<typename C::A>(t.x, t.x_row, i, t.rows);
        else
            take<typename C::B>(t.y, t.y_row, i - C::rows, t.cols);
        if (i >= C::rows + C::cols)
            scales = nullptr;
        else if (!scales) // products without scales have ones, once for all
            for (int stage = 0; stage < C::stages; ++stage)
                *reinterpret_cast<float *>(ring + stage * C::stage_bytes + place) = 1.0f;
    }
    PYROUTE_DEVICE void copy(int64_t depth, char *stage) const {
        if (scales)
            copy_async_4(stage + place, scales + static_cast<uint32_t>(depth) / block * from_block_on, exists);
    }

  private:
    template <class P> PYROUTE_DEVICE void take(const GemmSide &s, uint32_t first, int row, int count) {
        exists = row < count;
        scales = s.scales ? s.scales + s.of_row(first + static_cast<uint32_t>(row)) : nullptr;
        block = P::across ? s.block_rows : s.block_cols;
        from_block_on = P::across ? s.scale_stride : 1;
    }
};

template <class C> PYROUTE_DEVICE void zero(Sums<C> &sum) {
    PYROUTE_UNROLL
    for (int i = 0; i < C::row_parts; ++i)
        PYROUTE_UNROLL
    for (int j = 0; j < C::col_parts; ++j)
        PYROUTE_UNROLL
    for (int k = 0; k < 4; ++k)
        sum[i][j][k] = 0.0f;
}

// total += sum * scales, and sum = 0.
template <class C>
PYROUTE_DEVICE void promote(const char *stage, int warp_row, int warp_col, Sums<C> &sum, Sums<C> &total) {
    const float *const scales = reinterpret_cast<const float *>(stage + C::scales_at);
    float of_row[C::row_parts][2];
    PYROUTE_UNROLL
    for (int i = 0; i < C::row_parts; ++i)
        PYROUTE_UNROLL
    for (int half = 0; half < 2; ++half)
        of_row[i][half] = scales[warp_row + C::row_of(i, half)];
    PYROUTE_UNROLL
    for (int j = 0; j < C::col_parts; ++j)
        PYROUTE_UNROLL
    for (int k = 0; k < 2; ++k) {
        const float of_col = scales[C::rows + warp_col + C::col_of(j, k)];
        PYROUTE_UNROLL
        for (int i = 0; i < C::row_parts; ++i)
            PYROUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
            float part = sum[i][j][2 * half + k];
            if (C::kind == Kind::fp8 && !native_fp8() && !converts_fp8())
                part *= unscaled<C>();
            total[i][j][2 * half + k] = fmaf(part, of_row[i][half] * of_col, total[i][j][2 * half + k]);
        }
    }
    zero<C>(sum);
}

template <class C> PYROUTE_DEVICE void multiply_stage(const char *stage, int warp_row, int warp_col, Sums<C> &sum) {
    PYROUTE_UNROLL
    for (int step = 0; step < C::depth / C::step; ++step) {
        Fragments<C> f;
        load_a<C>(stage, warp_row, step, f);
        load_b<C>(stage + C::A::bytes, warp_col, step, f);
        if constexpr (C::kind == Kind::fp8) {
            if (!native_fp8()) {
                multiply_as_f16<C>(f, sum);
                continue;
            }
        }
        multiply<C>(f, sum);
    }
}

// Two neighbours of a row of the result.
PYROUTE_DEVICE void write_pair(const ProductTile &t, int row, int col, float first, float second, bool together) {
    const int64_t at = row * t.out_stride + col;
    const bool both = col + 1 < t.cols;
    if (t.out_type == ElementType::bfloat16) {
        auto *const out = static_cast<uint16_t *>(t.out) + at;
        const uint32_t pair = narrow_bf16x2(first, second);
        if (together && both) {
            *reinterpret_cast<uint32_t *>(out) = pair;
            return;
        }
        out[0] = static_cast<uint16_t>(pair);
        if (both)
            out[1] = static_cast<uint16_t>(pair >> 16);
        return;
    }
    auto *const out = static_cast<float *>(t.out) + at;
    if (together && both) {
        auto *const pair = reinterpret_cast<Float2 *>(out);
        const Float2 old = t.accumulate ? *pair : Float2{};
        *pair = t.accumulate ? Float2{canonical(old.x + first), canonical(old.y + second)}
                             : Float2{canonical(first), canonical(second)};
        return;
    }
    out[0] = canonical(t.accumulate ? out[0] + first : first);
    if (both)
        out[1] = canonical(t.accumulate ? out[1] + second : second);
}

template <class C> PYROUTE_DEVICE void write_tile(const ProductTile &t, int warp_row, int warp_col, Sums<C> &total) {
    const uint64_t pair_bytes = t.out_type == ElementType::bfloat16 ? 4 : 8;
    const bool together = t.out_stride % 2 == 0 && reinterpret_cast<uint64_t>(t.out) % pair_bytes == 0;
    PYROUTE_UNROLL
    for (int i = 0; i < C::row_parts; ++i)
        PYROUTE_UNROLL
    for (int half = 0; half < 2; ++half)
        PYROUTE_UNROLL
    for (int v = 0; v < C::col_parts; ++v) {
        // of an FP8 panel across, neighbours are of the even and of the odd part
        const int j = C::B::pairs ? v / 2 * 2 : v, k = C::B::pairs ? v % 2 : 0;
        const float first = total[i][j][2 * half + k];
        const float second = C::B::pairs ? total[i][j + 1][2 * half + k] : total[i][j][2 * half + 1];
        const int row = warp_row + C::row_of(i, half), col = warp_col + C::col_of(j, k);
        if (row < t.rows && col < t.cols)
            write_pair(t, row, col, first, second, together);
    }
}

template <class C> PYROUTE_DEVICE void multiply_tile(const ProductTile &t, char *ring) {
    constexpr int stages_per_block = block_depth / C::depth;
    const int num_stages = static_cast<int>(divide_up<int64_t>(t.length, C::depth));
    const int warp = static_cast<int>(warp_id());
    const int warp_row = warp / C::warps_across * C::warp_rows, warp_col = warp % C::warps_across * C::warp_cols;
    const ScaleOfThread<C> scale(t, ring);
    const auto copy_stage = [&](int number, int slot) {
        if (number < num_stages) {
            const int64_t depth = int64_t{number} * C::depth;
            char *const stage = ring + slot * C::stage_bytes;
            copy_panel<typename C::A>(t.x, t.x_row, t.rows, t.length, depth, stage);
            copy_panel<typename C::B>(t.y, t.y_row, t.cols, t.length, depth, stage + C::A::bytes);
            scale.copy(depth, stage);
        }
        end_copies(); // one group per number, so that counting them counts stages
    };
    for (int number = 0; number < C::stages - 1; ++number)
        copy_stage(number, number);

    Sums<C> sum, total;
    zero<C>(sum);
    zero<C>(total);
    int slot = 0, free = C::stages - 1;
    for (int number = 0; number < num_stages; ++number) {
        wait_copies<C::stages - 2>();
        sync_block(); // the stage is there for all, and all are done with the one before it
        copy_stage(number + C::stages - 1, free);
        free = slot;
        const char *const stage = ring + slot * C::stage_bytes;
        multiply_stage<C>(stage, warp_row, warp_col, sum);
        if ((number + 1) % stages_per_block == 0 || number + 1 == num_stages)
            promote<C>(stage, warp_row, warp_col, sum, total);
        if (++slot == C::stages)
            slot = 0;
    }
    write_tile<C>(t, warp_row, warp_col, total);
}

template <class C, class Args> PYROUTE_DEVICE void grouped_gemm_mma(const Args &args) {
    PYROUTE_DYNAMIC_SHARED(ring);
    ProductTile tile;
    if (find_tile<C::rows, C::cols>(args, tile))
        multiply_tile<C>(tile, ring);
}

} // namespace pyroute::cuda
