// Grouped GEMM for operands of every type, shape, alignment and scale block, with the CPU floor's bytes.
//
// Contract (csrc/cpu/scalar/grouped_gemm.cpp): blocks of 128 along the contraction; in a block eight lanes, lane l
// adding the products of elements l, l + 8, ... by fused multiply-adds from +0; total[l] = fma(partial[l], scale,
// total[l]); at the end the totals are summed 4, 2, 1 apart.
//
// Plan: a block of threads computes a tile of 64 x 32 sums, each thread 4 x 4 of them with eight totals each, 128
// registers. Per 128 of the contraction both sides go to shared memory as float32 (48 KiB), k by k; then lane by lane
// sixteen outer products of 4 x 4 (two 16-byte loads for 16 fused multiply-adds) make a partial sum. Two blocks on an
// SM: one loads while the other computes. Few rows an expert: 8 x 64 sums, 1 x 4 a thread, 36 KiB, three blocks on an
// SM or more, so that as much of the weights is on its way as memory needs; each weight is read once.
#pragma once

#include "cuda/grouped_gemm_operands.cuh"
#include "cuda/grouped_gemm_panels.h"

namespace pyroute::cuda {

constexpr int general_threads = 128;
constexpr int sum_lanes = 8;

template <class Type, bool multiply_scales>
PYROUTE_DEVICE float element(const GemmSide &s, uint32_t row, uint32_t depth) {
    const float value = Type::widen(static_cast<const typename Type::Storage *>(s.data)[s.at(row, depth)]);
    return multiply_scales ? value * s.scales[s.of_row(row) + s.of_depth(depth)] : value;
}

// Rows [first, first + width) of a side, `count` of them real, in [depth, depth + 128): zeros for what does not exist.
template <class Type, bool multiply_scales, int width>
PYROUTE_DEVICE void fill_side(const GemmSide &s, uint32_t first, int count, uint32_t depth, int length, float *to) {
    constexpr int per_thread = width * block_depth / general_threads;
    PYROUTE_UNROLL_BY(4)
    for (int i = 0; i < per_thread; ++i) {
        const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(warp_id());
        int row, k;
        if (s.columns) { // 32 rows, or as many as there are, of one k
            constexpr int run = width < 32 ? width : 32;
            const int part = (i * (general_threads / 32) + warp) * (32 / run) + lane / run;
            row = part % (width / run) * run + lane % run;
            k = part / (width / run);
        } else { // four rows of eight k, the next i eight k further
            constexpr int steps = block_depth / 8;
            const int part = warp * per_thread + i;
            row = part / steps * 4 + lane / 8;
            k = part % steps * 8 + lane % 8;
        }
        float value = 0.0f;
        if (row < count && k < length)
            value =
                element<Type, multiply_scales>(s, first + static_cast<uint32_t>(row), depth + static_cast<uint32_t>(k));
        to[place_in_side<width>(row, k)] = value;
    }
}

template <int width>
PYROUTE_DEVICE void fill_side(const GemmSide &s, uint32_t first, int count, uint32_t depth, int length, float *to) {
    const bool multiply_scales = s.scales && !s.keeps_scales;
    switch (s.type) {
    case ElementType::float32:
        return fill_side<Float32, false, width>(s, first, count, depth, length, to);
    case ElementType::bfloat16:
        return fill_side<Bfloat16, false, width>(s, first, count, depth, length, to);
    case ElementType::e4m3:
        return multiply_scales ? fill_side<Fp8<E4m3>, true, width>(s, first, count, depth, length, to)
                               : fill_side<Fp8<E4m3>, false, width>(s, first, count, depth, length, to);
    default:
        return multiply_scales ? fill_side<Fp8<E5m2>, true, width>(s, first, count, depth, length, to)
                               : fill_side<Fp8<E5m2>, false, width>(s, first, count, depth, length, to);
    }
}

// `count` floats at a multiple of as many.
template <int count> PYROUTE_DEVICE void load_floats(const float *from, float (&to)[count]) {
    if constexpr (count == 4) {
        const Words words = load_words(from);
        PYROUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            to[i] = float_of(words.w[i]);
    } else {
        PYROUTE_UNROLL
        for (int i = 0; i < count; ++i)
            to[i] = from[i];
    }
}

template <int rows> struct SideScales { // of the rows of one thread
    int64_t at[rows];

    PYROUTE_DEVICE SideScales(const GemmSide &s, uint32_t first, int from, int count) {
        PYROUTE_UNROLL
        for (int i = 0; i < rows; ++i) // rows that do not exist have a scale of those that do
            at[i] =
                s.keeps_scales && count > 0 ? s.of_row(first + static_cast<uint32_t>(min_of(from + i, count - 1))) : 0;
    }
    PYROUTE_DEVICE void load(const GemmSide &s, uint32_t depth, float (&to)[rows]) const {
        const float *scales = s.keeps_scales ? s.scales + s.of_depth(depth) : nullptr;
        PYROUTE_UNROLL
        for (int i = 0; i < rows; ++i)
            to[i] = scales ? scales[at[i]] : 1.0f;
    }
};

PYROUTE_DEVICE float sum_of_lanes(const float (&t)[sum_lanes]) {
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

PYROUTE_DEVICE void write_sum(const ProductTile &t, int row, int col, float sum) {
    const int64_t at = row * t.out_stride + col;
    if (t.out_type == ElementType::bfloat16) {
        static_cast<uint16_t *>(t.out)[at] = Bfloat16::narrow(sum);
        return;
    }
    float *const out = static_cast<float *>(t.out) + at;
    *out = canonical(t.accumulate ? *out + sum : sum);
}

template <int tile_rows, int tile_cols, int thread_rows, int thread_cols>
PYROUTE_DEVICE void multiply_tile(const ProductTile &t, char *shared) {
    constexpr int threads_across = tile_cols / thread_cols;
    static_assert(threads_across * (tile_rows / thread_rows) == general_threads, "each thread has sums");
    float *const x = reinterpret_cast<float *>(shared), *const y = x + tile_rows * block_depth;
    const int col = static_cast<int>(threadIdx.x) % threads_across * thread_cols;
    const int row = static_cast<int>(threadIdx.x) / threads_across * thread_rows;
    const SideScales<thread_rows> x_scales(t.x, t.x_row, row, t.rows);
    const SideScales<thread_cols> y_scales(t.y, t.y_row, col, t.cols);

    float total[thread_rows][thread_cols][sum_lanes] = {};
    for (int64_t depth = 0; depth < t.length; depth += block_depth) {
        const int length = static_cast<int>(min_of<int64_t>(t.length - depth, block_depth));
        fill_side<tile_rows>(t.x, t.x_row, t.rows, static_cast<uint32_t>(depth), length, x);
        fill_side<tile_cols>(t.y, t.y_row, t.cols, static_cast<uint32_t>(depth), length, y);
        float of_x[thread_rows], of_y[thread_cols];
        x_scales.load(t.x, static_cast<uint32_t>(depth), of_x);
        y_scales.load(t.y, static_cast<uint32_t>(depth), of_y);
        sync_block();
        const int end = divide_up(length, sum_lanes) * sum_lanes;
        PYROUTE_UNROLL
        for (int lane = 0; lane < sum_lanes; ++lane) {
            float partial[thread_rows][thread_cols] = {};
            PYROUTE_UNROLL_BY(4)
            for (int k = lane; k < end; k += sum_lanes) {
                float of_row[thread_rows], of_col[thread_cols];
                load_floats(x + place_in_side<tile_rows>(row, k), of_row);
                load_floats(y + place_in_side<tile_cols>(col, k), of_col);
                PYROUTE_UNROLL
                for (int i = 0; i < thread_rows; ++i)
                    PYROUTE_UNROLL
                for (int j = 0; j < thread_cols; ++j)
                    partial[i][j] = fmaf(of_row[i], of_col[j], partial[i][j]);
            }
            PYROUTE_UNROLL
            for (int i = 0; i < thread_rows; ++i)
                PYROUTE_UNROLL
            for (int j = 0; j < thread_cols; ++j)
                total[i][j][lane] = fmaf(partial[i][j], of_x[i] * of_y[j], total[i][j][lane]);
        }
        sync_block(); // both sides are free again
    }
    PYROUTE_UNROLL
    for (int i = 0; i < thread_rows; ++i)
        PYROUTE_UNROLL
    for (int j = 0; j < thread_cols; ++j)
        if (row + i < t.rows && col + j < t.cols)
            write_sum(t, row + i, col + j, sum_of_lanes(total[i][j]));
}

template <int tile_rows, int tile_cols, int thread_rows, int thread_cols>
PYROUTE_DEVICE void grouped_gemm_general(const RowsProductArgs &args) {
    PYROUTE_DYNAMIC_SHARED(shared);
    ProductTile tile;
    if (find_tile<tile_rows, tile_cols>(args, tile))
        multiply_tile<tile_rows, tile_cols, thread_rows, thread_cols>(tile, shared);
}

template <int tile_rows, int tile_cols, int thread_rows, int thread_cols>
PYROUTE_DEVICE void grouped_gemm_wgrad_general(const WgradProductArgs &args) {
    PYROUTE_DYNAMIC_SHARED(shared);
    ProductTile tile;
    if (find_tile<tile_rows, tile_cols>(args, tile))
        multiply_tile<tile_rows, tile_cols, thread_rows, thread_cols>(tile, shared);
}

} // namespace pyroute::cuda
