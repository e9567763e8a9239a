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
// Zen 4, one core of 117 GFLOP/s peak, float32, 8 x 512 rows, K 2048, N 1408: 103 GFLOP/s; 64 x 48 rows: 77. Rejected:
// eight lanes of a column in a register (tiles of 3 x 4: 84; the totals, 12 x 12 x 8, go through memory 8 times as
// often as here), 12 x 32 sums with totals in memory (80: totals, rows and strips of a block are more than L1).
#include "cpu/grouped_gemm.h"

#include "cpu/scalar/grouped_gemm_fetch.h"
#include "cpu/scalar/grouped_gemm_pack.h"

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
constexpr int strips_at_once = 4; // that a lane of a group stays in L1 for

using Square = float[group_rows][strip_cols];
template <int rows> using Sums = Wide[rows][vectors];

// The lanes in an order in which three squares are enough for the tree ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), whose
// root ends in the first one.
constexpr int lane_order[panel_lanes] = {0, 4, 2, 6, 1, 5, 3, 7};
struct alignas(64) Tree {
    Square a, b, c;
};

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
        for (int i = 0; i < rows; i += width) // no further: x_scales may begin at row 6 of its 16
            store(of_row + i, load<Wide>(x_scales + i) * (y_scales[0] - Wide{}));
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

// A contraction of one block: two lanes whose totals are siblings in the tree are summed in registers.
template <int rows, PanelScales scales>
PYROUTE_INLINE void multiply_rows_of_one_block(const PackedShape &x_shape, const float *x, const PackedShape &y_shape,
                                               const float *y, int first_row, Tree &tree) {
    const float *x_scales = x + panel_lanes * x_shape.lane_floats + first_row;
    const float *y_scales = y + panel_lanes * y_shape.lane_floats;
    const int steps = static_cast<int>(x_shape.steps);
    float *const a = tree.a[first_row], *const b = tree.b[first_row];
    for (int pair = 0; pair < 4; ++pair) {
        const int lane = lane_order[2 * pair];
        Sums<rows> total[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            Sums<rows> partial;
            each<rows>(partial, [](Wide &t, int) __attribute__((always_inline)) { t = Wide{}; });
            each<rows>(total[half], [](Wide &t, int) __attribute__((always_inline)) { t = Wide{}; });
            const int64_t at = lane + 4 * half;
            add_steps<rows, 1>(x + at * x_shape.lane_floats + first_row, y + at * y_shape.lane_floats, steps, partial);
            add_partial<rows, scales>(x_scales, y_scales, partial, total[half]);
        }
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < vectors; ++j)
                total[0][i][j] += total[1][i][j];
        if (lane == 0 || lane == 1) {
            float *const to = lane == 0 ? a : b;
            each<rows>(total[0], [&](const Wide &t, int at) __attribute__((always_inline)) { store(to + at, t); });
        } else if (lane == 2)
            each<rows>(total[0], [&](const Wide &t, int at)
                                     __attribute__((always_inline)) { store(a + at, load<Wide>(a + at) + t); });
        else
            each<rows>(total[0], [&](const Wide &t, int at) __attribute__((always_inline)) {
                store(a + at, load<Wide>(a + at) + (load<Wide>(b + at) + t));
            });
    }
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

template <PanelScales scales>
void multiply_one_block(const PackedShape &x_shape, const float *x, int num_rows, const PackedShape &y_shape,
                        const float *y, Tree &tree) {
    each_tile(num_rows, [&](auto rows, int row) __attribute__((always_inline)) {
        multiply_rows_of_one_block<decltype(rows)::count, scales>(x_shape, x, y_shape, y, row, tree);
    });
}

// The lines of out that will be written, on their way while the sums are computed.
void fetch_out(const PanelProduct &p, int64_t row, int num_rows, int64_t col) {
    const int64_t item = p.out_type == ElementType::float32 ? 4 : 2;
    const char *out = static_cast<const char *>(p.out) + (row * p.out_stride + col) * item;
    for (int i = 0; i < num_rows; ++i)
        __builtin_prefetch(out + i * p.out_stride * item, 1);
}

void write_sums(const PanelProduct &p, int64_t row, int num_rows, int64_t col, int num_cols, const Square &sums) {
    for (int i = 0; i < num_rows; ++i)
        for (int j = 0; j < num_cols; j += 8) {
            const int count = smaller(num_cols - j, 8);
            const int64_t at = (row + i) * p.out_stride + col + j;
            f32x8 value = load<f32x8>(&sums[i][j]);
            if (p.out_type == ElementType::bfloat16) {
                store_elements<Bfloat16>(static_cast<uint16_t *>(p.out) + at, value, count);
                continue;
            }
            float *out = static_cast<float *>(p.out) + at;
            if (count < 8) {
                if (p.accumulate)
                    value = load_elements<Float32>(out, count) + value;
                store_elements<Float32>(out, value, count);
                continue;
            }
            if (p.accumulate)
                value = load<f32x8>(out) + value;
            store_elements<Float32>(out, value);
        }
}

template <PanelScales scales> void multiply_panels(const PanelProduct &p) {
    const PackedShape x_shape = packed_shape(p.length, group_rows), y_shape = packed_shape(p.length, strip_cols);
    const int64_t groups = divide_up(p.num_rows, group_rows);
    const int64_t strips = divide_up(p.num_cols, strip_cols);
    Fetch fetch(p.next, groups * strips * panel_lanes * x_shape.blocks + 1); // no block: no call
    Tree trees[strips_at_once];
    for (int64_t group = 0; group < groups; ++group) {
        const int num_rows = smaller(p.num_rows - group * group_rows, group_rows);
        const float *x = p.x + group * x_shape.floats;
        for (int64_t first = 0; first < strips; first += strips_at_once) {
            const int count = smaller(strips - first, strips_at_once);
            for (int i = 0; i < count && x_shape.blocks == 1; ++i) {
                fetch();
                fetch_out(p, group * group_rows, num_rows, (first + i) * strip_cols);
                multiply_one_block<scales>(x_shape, x, num_rows, y_shape, p.y + (first + i) * y_shape.floats, trees[i]);
            }
            for (int lane : lane_order)
                for (int i = 0; i < count && x_shape.blocks != 1; ++i)
                    multiply_lane<scales>(x_shape, x, num_rows, y_shape, p.y + (first + i) * y_shape.floats, lane,
                                          trees[i], fetch);
            for (int i = 0; i < count; ++i) {
                const int64_t col = (first + i) * strip_cols;
                write_sums(p, group * group_rows, num_rows, col, smaller(p.num_cols - col, strip_cols), trees[i].a);
            }
        }
    }
}

void multiply(const PanelProduct &p) {
    switch (p.scales) {
    case PanelScales::none:
        return multiply_panels<PanelScales::none>(p);
    case PanelScales::per_row:
        return multiply_panels<PanelScales::per_row>(p);
    default:
        return multiply_panels<PanelScales::per_element>(p);
    }
}

} // namespace

const GroupedGemmKernels grouped_gemm_kernels = {pack_panels<group_rows>, pack_panels<strip_cols>, multiply};

} // namespace pyroute::cpu::PYROUTE_ISA
