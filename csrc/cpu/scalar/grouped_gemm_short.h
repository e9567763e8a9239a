// A contraction of one block, as the gradients of the weights of a few rows have it: a lane is a handful of steps, so
// the tree that sums the lanes costs as much as a few of them and must not go through memory twice.
//
// Zen 4, gradients of [2816, 2048] from 48 rows an expert, one core, GFLOP/s: 98 with AVX-512, 75 with AVX2; totals of
// +0 added lane by lane and the tree's squares in L1: 76 and 55; on two cores, where stores that first read their lines
// are bound by memory, 195 against 128. Lost with AVX2: the tree in registers of 2 x 16 tiles (50), in what GCC 12
// makes of 6 x 16 (53, it spills sums inside the loops), lanes in a loop over a table (71).
#pragma once

#include "cpu/scalar/grouped_gemm_fetch.h"
#include "cpu/scalar/grouped_gemm_write.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

// Four sets of sums are alive in the tree: 6 x 16 are 24 AVX-512 registers. With AVX2 one set takes 12 of 16 and the
// others lie in L1.
constexpr int short_rows = 6;

struct ShortTile {
    const float *x, *y; // lane 0
    int64_t x_lane, y_lane;
    const float *x_scales, *y_scales;
    int length;
};

template <int rows> PYROUTE_INLINE void add(Sums<rows> &to, const Sums<rows> &from) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j)
            to[i][j] += from[i][j];
}

// Steps of zeros at a lane's end are left out, and so is the addition of an unscaled sum to a total of +0: they change
// nothing but the sign of a zero, which the last addition of short_sums settles.
template <int rows, PanelScales scales>
PYROUTE_INLINE void short_lane(const ShortTile &t, int lane, Sums<rows> &total) {
    const float *const x = t.x + lane * t.x_lane, *const y = t.y + lane * t.y_lane;
    const int steps = (t.length + panel_lanes - 1 - lane) / panel_lanes;
    each<rows>(total, [](Wide &v, int) __attribute__((always_inline)) { v = Wide{}; });
    if constexpr (scales == PanelScales::none)
        return add_steps<rows, 1>(x, y, steps, total);
    Sums<rows> partial;
    each<rows>(partial, [](Wide &v, int) __attribute__((always_inline)) { v = Wide{}; });
    add_steps<rows, 1>(x, y, steps, partial);
    add_partial<rows, scales>(t.x_scales, t.y_scales, partial, total);
}

#if defined(__AVX512F__)
template <int rows, PanelScales scales>
PYROUTE_INLINE void short_siblings(const ShortTile &t, int lane, Sums<rows> &sum) {
    Sums<rows> other;
    short_lane<rows, scales>(t, lane, sum);
    short_lane<rows, scales>(t, lane + 4, other);
    add<rows>(sum, other);
}
template <int rows, PanelScales scales> PYROUTE_INLINE void short_tree(const ShortTile &t, Sums<rows> &sum) {
    Sums<rows> left, right;
    short_siblings<rows, scales>(t, 0, sum);
    short_siblings<rows, scales>(t, 2, left);
    add<rows>(sum, left);
    short_siblings<rows, scales>(t, 1, left);
    short_siblings<rows, scales>(t, 3, right);
    add<rows>(left, right);
    add<rows>(sum, left);
}
#else
template <int rows, PanelScales scales> PYROUTE_INLINE void short_tree(const ShortTile &t, Sums<rows> &sum) {
    Tree tree;
#pragma GCC unroll 8
    for (int i = 0; i < panel_lanes; ++i) {
        short_lane<rows, scales>(t, lane_order[i], sum);
        join<rows>(sum, lane_order[i], 0, tree);
        asm volatile("" : : "r"(&tree) : "memory"); // GCC 12 would keep the tree in registers and spill the sums
    }
    each<rows>(sum, [&](Wide &v, int at) __attribute__((always_inline)) { v = load<Wide>(tree.a[0] + at); });
}
#endif

template <PanelScales scales> void multiply_short(const PanelProduct &p) {
    const PackedShape x_shape = packed_shape(p.length, group_rows), y_shape = packed_shape(p.length, strip_cols);
    const int64_t groups = divide_up(p.num_rows, group_rows), strips = divide_up(p.num_cols, strip_cols);
    Fetch fetch(p.next, groups * strips);
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t strip = 0; strip < strips; ++strip) {
            const float *const x = p.x + group * x_shape.floats, *const y = p.y + strip * y_shape.floats;
            ShortTile t = {x,
                           y,
                           x_shape.lane_floats,
                           y_shape.lane_floats,
                           x + panel_lanes * x_shape.lane_floats,
                           y + panel_lanes * y_shape.lane_floats,
                           static_cast<int>(p.length)};
            const int64_t first_row = group * group_rows, left = p.num_rows - first_row;
            const int num_rows = left < group_rows ? static_cast<int>(left) : group_rows;
            fetch();
            fetch_out(p, first_row, num_rows, strip * strip_cols);
            for (int row = 0; row < num_rows; row += short_rows, t.x += short_rows, t.x_scales += short_rows) {
                Sums<short_rows> sums;
                short_tree<short_rows, scales>(t, sums);
                each<short_rows>(sums, [](Wide &v, int) __attribute__((always_inline)) { v += Wide{}; });
                write<short_rows>(p, first_row + row, num_rows - row, strip * strip_cols, sums);
            }
        }
}

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
