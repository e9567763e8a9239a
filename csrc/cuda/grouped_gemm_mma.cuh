// Grouped GEMM on tensor cores by mma.sync, for every card from sm_80 on: bfloat16, FP8 with block scales, FP8 weights
// beside bfloat16 rows; forward, dgrad and wgrad.
//
// Plan: a block of 8 warps computes 128 x 128 sums of X Y^T, a warp 32 x 64 of them (64 x 32 where FP8 is widened to
// bfloat16), or 16 x 128 where experts have few rows (a warp 16 x 16). A ring of stages, each 128 bytes of the
// contraction of both sides and the scales of its block, is filled by cp.async; one barrier per stage. Every 128
// elements the tensor cores' sums, which they may round more coarsely than float32, are multiplied by the block's two
// scales and added to totals in float32 registers. A sum's steps depend on its row, its column and the contraction
// alone, so that its bits are the same in both tiles.
//
// Registers: 64 sums, 64 totals and at most 40 of fragments a thread; 1 block on an SM (ring of 99 KiB, what the
// smallest cards have), of the low tile two or more. Bytes: X once per 128 columns and Y once per row tile, from L2
// where the raster (place_of) keeps them.
//
// Needs rows of both matrices to be multiples of 16 bytes long and 16-byte aligned, and scales that fit the blocks of
// 128 (suits_mma in csrc/cuda/grouped_gemm.cpp). Tails along the contraction, rows and columns are zeros of cp.async.
#pragma once

#include "cuda/grouped_gemm_fragments.cuh"
#include "cuda/grouped_gemm_operands.cuh"

namespace pyroute::cuda {

constexpr int mma_threads = 256;

// A thread's part of the copies of one side, stage by stage along the contraction.
template <class P> class PanelCopies {
  public:
    PYROUTE_DEVICE PanelCopies(const GemmSide &s, uint32_t first, int count, int64_t length)
        : left_(static_cast<int>(length)), count_(count) {
        const int64_t row_bytes = s.stride * P::item;
        from_ = static_cast<const char *>(s.data) + int64_t{first} * (P::across ? P::item : row_bytes) +
                row() * row_bytes + chunk() * 16;
        next_part_ = rows_at_once * row_bytes;
        next_stage_ = P::across ? P::depth * row_bytes : P::depth * P::item;
    }
    PYROUTE_DEVICE void copy(char *panel) {
        const bool exists = chunk() * per_chunk < (P::across ? count_ : left_);
        const int rows = exists ? (P::across ? left_ : count_) - row() : 0;
        char *const to = panel + P::place(row(), chunk()); // the permutation repeats every 16 rows
        const char *from = from_;
        PYROUTE_UNROLL
        for (int i = 0; i < parts; ++i, from += next_part_)
            if (P::rows % rows_at_once == 0 || row() < P::rows)
                copy_async_16(to + i * rows_at_once * P::row_bytes, from, i * rows_at_once < rows);
        from_ += next_stage_;
        left_ -= P::depth;
    }

  private:
    static constexpr int rows_at_once = mma_threads / P::chunks, per_chunk = 16 / P::item;
    static constexpr int parts = (P::rows + rows_at_once - 1) / rows_at_once;
    static_assert(rows_at_once % 16 == 0 && (parts == 1 || P::rows % rows_at_once == 0),
                  "threads share a panel evenly");
    static PYROUTE_DEVICE int row() { return static_cast<int>(threadIdx.x) / P::chunks; }
    static PYROUTE_DEVICE int chunk() { return static_cast<int>(threadIdx.x) % P::chunks; }

    const char *from_;
    int64_t next_part_, next_stage_;
    int left_, count_; // of the contraction; of the side's rows
};

// A thread's part of the scales: those of one row or one column of the tile.
template <class C> class ScaleCopies {
  public:
    PYROUTE_DEVICE ScaleCopies(const ProductTile &t, char *ring) {
        const int i = static_cast<int>(threadIdx.x);
        const bool of_row = i < C::rows;
        if (of_row)
            take<typename C::A>(t.x, t.x_row, i, t.rows);
        else
            take<typename C::B>(t.y, t.y_row, i - C::rows, t.cols);
        const bool wanted = of_row ? C::row_scales : C::col_scales && i < C::rows + C::cols;
        if (wanted && !scales_) // FP8 without scales: ones, once for all
            for (int stage = 0; stage < C::stages; ++stage)
                *reinterpret_cast<float *>(ring + stage * C::stage_bytes + C::scales_at + i * 4) = 1.0f;
        if (!wanted)
            scales_ = nullptr;
    }
    PYROUTE_DEVICE void copy(char *stage) {
        if (!scales_)
            return;
        copy_async_4(stage + C::scales_at + static_cast<int>(threadIdx.x) * 4, scales_, exists_);
        left_ -= C::depth;
        if (left_ == 0) {
            left_ = block_;
            scales_ += next_;
        }
    }

  private:
    template <class P> PYROUTE_DEVICE void take(const GemmSide &s, uint32_t first, int row, int count) {
        exists_ = row < count;
        scales_ = s.scales ? s.scales + s.of_row(first + static_cast<uint32_t>(exists_ ? row : 0)) : nullptr;
        block_ = left_ = P::across ? s.block_rows : s.block_cols;
        next_ = P::across ? s.scale_stride : 1;
    }

    const float *scales_;   // of the row or column at this block; null: nothing to copy
    uint32_t block_, left_; // elements of the contraction that have one scale; to its end
    int64_t next_;          // from one block's to the next one's
    bool exists_;
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
        of_row[i][half] = C::row_scales ? scales[warp_row + C::row_of(i, half)] : 1.0f;
    PYROUTE_UNROLL
    for (int j = 0; j < C::col_parts; ++j)
        PYROUTE_UNROLL
    for (int k = 0; k < 2; ++k) {
        const float of_col = C::col_scales ? scales[C::rows + warp_col + C::col_of(j, k)] : 1.0f;
        PYROUTE_UNROLL
        for (int i = 0; i < C::row_parts; ++i)
            PYROUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
            float part = sum[i][j][2 * half + k];
            if (C::kind == Kind::fp8 && !native_fp8() && !converts_fp8())
                part *= unscaled<C>();
            const float scale = C::row_scales ? of_row[i][half] * of_col : of_col;
            float &of_total = total[i][j][2 * half + k];
            of_total = C::col_scales ? fmaf(part, scale, of_total) : of_total + part;
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
    PanelCopies<typename C::A> a(t.x, t.x_row, t.rows, t.length);
    PanelCopies<typename C::B> b(t.y, t.y_row, t.cols, t.length);
    ScaleCopies<C> scales(t, ring);
    const auto copy_stage = [&](int number, int slot) {
        if (number < num_stages) {
            char *const stage = ring + slot * C::stage_bytes;
            a.copy(stage);
            b.copy(stage + C::A::bytes);
            scales.copy(stage);
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
