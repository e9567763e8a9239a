// out = X Y^T over packed panels.
//
// Contract: the contraction goes in blocks of 128. Inside a block eight lanes run, lane l taking elements l, l + 8, ...
// with fused multiply-adds from +0; then total[l] = fma(partial[l], scale, total[l]); at the end the totals are summed
// 4, 2, 1 apart. The same per element for every tile, so no byte depends on how the work was cut.
//
// Plan: the contract's lanes are not the lanes of a register but are computed one after another, each as a sum of outer
// products: 16 columns in registers times one element of a row broadcast. A lane of a group of 12 rows and a strip of
// 16 columns keeps 12 x 16 partial sums and as many totals in 24 AVX-512 registers over the whole contraction, or 6 x
// 16 partial sums in 12 AVX2 registers with the totals in L1. Nothing is summed across a register. A lane of the group
// (12 KiB at 2048 elements) stays in L1 for four strips, whose lanes stream from L2 at 5 bytes a cycle.
//
// Zen 4, one core of 117 GFLOP/s peak, float32, 8 x 512 rows, K 2048, N 1408: 103 GFLOP/s; 64 x 48 rows: 84, their
// gradients of the weights: 98 (grouped_gemm_short.h). Rejected:
// eight lanes of a column in a register (tiles of 3 x 4: 84; the totals, 12 x 12 x 8, go through memory 8 times as
// often as here), 12 x 32 sums with totals in memory (80: totals, rows and strips of a block are more than L1).
#include "cpu/grouped_gemm.h"

#include "cpu/scalar/grouped_gemm_fetch.h"
#include "cpu/scalar/grouped_gemm_pack.h"
#include "cpu/scalar/grouped_gemm_short.h"
#include "cpu/scalar/grouped_gemm_tile.h"
#include "cpu/scalar/grouped_gemm_write.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

constexpr int strips_at_once = 4; // that a lane of a group stays in L1 for

// One lane of some rows of a group and a strip, the whole contraction.
template <int rows, PanelScales scales>
PYROUTE_INLINE void multiply_rows(const PackedShape &x_shape, const float *x, const PackedShape &y_shape,
                                  const float *y, int lane, int first_row, Tree &tree, Fetch &fetch) {
    const float *x_scales = x + panel_lanes * x_shape.lane_floats + first_row;
    const float *y_scales = y + panel_lanes * y_shape.lane_floats;
    x += lane * x_shape.lane_floats + first_row;
    y += lane * y_shape.lane_floats;
    constexpr int block_steps = panel_depth / panel_lanes;
    Sums<rows> total;
    each<rows>(total, [](Wide &t, int) __attribute__((always_inline)) { t = Wide{}; });
    for (int64_t step = 0; step < x_shape.steps; step += block_steps) {
        fetch();
        Sums<rows> partial;
        each<rows>(partial, [](Wide &t, int) __attribute__((always_inline)) { t = Wide{}; });
        if (step + block_steps <= x_shape.steps)
            add_steps<rows, steps_at_once>(x, y, block_steps, partial);
        else
            add_steps<rows, 1>(x, y, static_cast<int>(x_shape.steps - step), partial);
        add_partial<rows, scales>(x_scales, y_scales, partial, total);
        x += block_steps * group_rows;
        y += block_steps * strip_cols;
        x_scales += 16;
        y_scales += 16;
    }
    join<rows>(total, lane, first_row, tree);
}

// function(rows of a tile, its first row) for a group. Rows past the last are zeros; they are computed by fours.
template <int rows> struct Rows {
    static constexpr int count = rows;
};
template <class Function> PYROUTE_INLINE void each_tile(int num_rows, const Function &function) {
    if (num_rows <= 4)
        return function(Rows<4>{}, 0);
    if (num_rows > 8) {
        for (int row = 0; row < group_rows; row += most_tile_rows)
            function(Rows<most_tile_rows>{}, row);
        return;
    }
    constexpr int part = most_tile_rows > 8 ? 8 : 4;
    for (int row = 0; row < 8; row += part)
        function(Rows<part>{}, row);
}

template <PanelScales scales>
void multiply_lane(const PackedShape &x_shape, const float *x, int num_rows, const PackedShape &y_shape, const float *y,
                   int lane, Tree &tree, Fetch &fetch) {
    each_tile(num_rows, [&](auto rows, int row) __attribute__((always_inline)) {
        multiply_rows<decltype(rows)::count, scales>(x_shape, x, y_shape, y, lane, row, tree, fetch);
    });
}

template <PanelScales scales> void multiply_panels(const PanelProduct &p) {
    const PackedShape x_shape = packed_shape(p.length, group_rows), y_shape = packed_shape(p.length, strip_cols);
    const int64_t groups = divide_up(p.num_rows, group_rows);
    const int64_t strips = divide_up(p.num_cols, strip_cols);
    if (x_shape.blocks == 1)
        return multiply_short<scales>(p);
    Fetch fetch(p.next, groups * strips * panel_lanes * x_shape.blocks + 1); // no block: no call
    Tree trees[strips_at_once];
    for (int64_t group = 0; group < groups; ++group) {
        const int num_rows = smaller(p.num_rows - group * group_rows, group_rows);
        const float *x = p.x + group * x_shape.floats;
        for (int64_t first = 0; first < strips; first += strips_at_once) {
            const int count = smaller(strips - first, strips_at_once);
            for (int lane : lane_order)
                for (int i = 0; i < count; ++i)
                    multiply_lane<scales>(x_shape, x, num_rows, y_shape, p.y + (first + i) * y_shape.floats, lane,
                                          trees[i], fetch);
            for (int i = 0; i < count; ++i) {
                Sums<group_rows> sums;
                memcpy(sums, trees[i].a, sizeof(sums));
                write<group_rows>(p, group * group_rows, num_rows, (first + i) * strip_cols, sums);
            }
        }
    }
}

void multiply(const PanelProduct &p) {
    switch (p.scales) {
    case PanelScales::none:
        multiply_panels<PanelScales::none>(p);
        break;
    case PanelScales::per_row:
        multiply_panels<PanelScales::per_row>(p);
        break;
    default:
        multiply_panels<PanelScales::per_element>(p);
    }
    finish_streaming(p.streams);
}

} // namespace

const GroupedGemmKernels grouped_gemm_kernels = {pack_panels<group_rows>, pack_panels<strip_cols>, multiply};

} // namespace pyroute::cpu::PYROUTE_ISA
