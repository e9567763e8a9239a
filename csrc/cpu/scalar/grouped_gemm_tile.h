// A tile of grouped GEMM: outer products of some rows of a group and a strip's 16 columns, one lane at a time, and the
// tree that sums the lanes.
#pragma once

#include "cpu/grouped_gemm.h"
#include "cpu/lanes.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

#if defined(__AVX512F__)
using Wide = float __attribute__((vector_size(64)));
constexpr int most_tile_rows = 12, steps_at_once = 4;
PYROUTE_INLINE Wide multiply_add(const Wide &a, const Wide &b, const Wide &c) {
    return bit_cast<Wide>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
}
#else
using Wide = f32x8;
constexpr int most_tile_rows = 6, steps_at_once = 1; // four: GCC 12 spills sums inside the loop
PYROUTE_INLINE Wide multiply_add(const Wide &a, const Wide &b, const Wide &c) { return fma(a, b, c); }
#endif
constexpr int width = sizeof(Wide) / sizeof(float), vectors = strip_cols / width;

using Square = float[group_rows][strip_cols];
template <int rows> using Sums = Wide[rows][vectors];

// The lanes in an order in which three squares are enough for the tree ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), whose
// root ends in the first one.
constexpr int lane_order[panel_lanes] = {0, 4, 2, 6, 1, 5, 3, 7};
struct alignas(64) Tree {
    Square a, b, c;
};

// function(sums, place in a square)
template <int rows, class Function> PYROUTE_INLINE void each(Sums<rows> &sums, const Function &function) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j)
            function(sums[i][j], i * strip_cols + j * width);
}

// Some steps of one lane.
template <int rows, int unroll>
PYROUTE_INLINE void add_steps(const float *x, const float *y, int steps, Sums<rows> &partial) {
    for (int step = 0; step < steps; step += unroll)
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u, x += group_rows, y += strip_cols) {
            Wide y_wide[vectors];
#pragma GCC unroll 2
            for (int j = 0; j < vectors; ++j)
                y_wide[j] = load<Wide>(y + j * width);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i) {
                const Wide x_wide = x[i] - Wide{};
#pragma GCC unroll 2
                for (int j = 0; j < vectors; ++j)
                    partial[i][j] = multiply_add(x_wide, y_wide[j], partial[i][j]);
            }
        }
}

// total = fma(partial, scale of x times scale of y, total), for one block.
template <int rows, PanelScales scales>
PYROUTE_INLINE void add_partial(const float *x_scales, const float *y_scales, Sums<rows> &partial, Sums<rows> &total) {
    alignas(64) float of_row[16];
    if constexpr (scales == PanelScales::per_row)
        for (int i = 0; i < rows; i += 8) // no further: x_scales may begin at row 6 of its 16
            store(of_row + i, load<f32x8>(x_scales + i) * broadcast<f32x8>(y_scales[0]));
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j)
            if constexpr (scales == PanelScales::none) // a scale of 1 gives the bytes of the plain addition
                total[i][j] += partial[i][j];
            else if constexpr (scales == PanelScales::per_row)
                total[i][j] = multiply_add(partial[i][j], of_row[i] - Wide{}, total[i][j]);
            else
                total[i][j] =
                    multiply_add(partial[i][j], load<Wide>(y_scales + j * width) * (x_scales[i] - Wide{}), total[i][j]);
}

// Puts the totals of one lane where the tree needs them.
template <int rows> PYROUTE_INLINE void join(Sums<rows> &total, int lane, int first_row, Tree &tree) {
    float *const a = tree.a[first_row], *const b = tree.b[first_row], *const c = tree.c[first_row];
    if (lane < 4) {
        float *const to = lane == 0 ? a : lane == 3 ? c : b;
        each<rows>(total, [&](const Wide &t, int at) __attribute__((always_inline)) { store(to + at, t); });
    } else if (lane < 6) {
        float *const to = lane == 4 ? a : b;
        each<rows>(total, [&](const Wide &t, int at)
                              __attribute__((always_inline)) { store(to + at, load<Wide>(to + at) + t); });
    } else if (lane == 6)
        each<rows>(total, [&](const Wide &t, int at) __attribute__((always_inline)) {
            store(a + at, load<Wide>(a + at) + (load<Wide>(b + at) + t));
        });
    else
        each<rows>(total, [&](const Wide &t, int at) __attribute__((always_inline)) {
            store(a + at, load<Wide>(a + at) + (load<Wide>(b + at) + (load<Wide>(c + at) + t)));
        });
}

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
