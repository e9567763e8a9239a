// out = X Y^T by dot products over packed panels.
//
// Contract: the contraction goes in blocks of 128. Inside a block eight lanes run, lane l taking elements l, l + 8, ...
// with fused multiply-adds from +0; then total[l] = fma(partial[l], scale, total[l]); at the end the totals are summed
// 4, 2, 1 apart. The same per element for every tile, so no byte depends on how the work was cut.
//
// Plan: a tile of 3 rows x 4 columns keeps 12 accumulators, 3 rows and 1 column in 16 registers; per step of 8 elements
// it loads 7 vectors for 12 multiply-adds. Groups of 12 x 12 keep one block of both operands and the totals in L1
// (6 + 6 + 5 KiB); the panels stream from L2 at 11 bytes a cycle. Measured on one Zen 4 core, 117 GFLOP/s peak, 504
// rows x 48 columns x 2048: 110 GFLOP/s, with scales 98. Rejected: tiles of 2 x 6 (108), 4 x 3 (110 with 32 registers,
// 72 with 16), 4 x 6 (104).
#include "cpu/grouped_gemm.h"

#include "cpu/scalar/grouped_gemm_pack.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

constexpr int lanes = 8;
constexpr int tile_rows = 3, accumulators = 12; // 3 x 4, or for the last rows 2 x 6 and 1 x 12
using Totals = float[panel_rows][panel_rows][lanes];

// A vector loaded once into its register; folded into the multiply-adds it would be loaded three times.
PYROUTE_INLINE f32x8 load_once(const float *from) {
    f32x8 v = load<f32x8>(from);
#if defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

template <int rows, bool scaled>
PYROUTE_INLINE void multiply_tile(const PanelBlock &x, int row, const PanelBlock &y, int col, int steps, Totals &totals,
                                  const float (&scales)[panel_rows][16]) {
    constexpr int cols = accumulators / rows;
    f32x8 partial[rows][cols];
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j)
            partial[i][j] = f32x8{};
    const float *from_x = x.values[row], *from_y = y.values[col];
    for (int step = 0; step < steps; ++step) {
        f32x8 x_f32x8[rows];
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i)
            x_f32x8[i] = load_once(from_x + i * panel_depth + step * lanes);
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j) {
            const f32x8 y_f32x8 = load_once(from_y + j * panel_depth + step * lanes);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i)
                partial[i][j] = fma(x_f32x8[i], y_f32x8, partial[i][j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j) {
            float *total = totals[row + i][col + j];
            const f32x8 before = load<f32x8>(total);
            if constexpr (scaled) // a scale of 1 gives the bytes of the plain addition
                store(total, fma(partial[i][j], broadcast<f32x8>(scales[row + i][col + j]), before));
            else
                store(total, partial[i][j] + before);
        }
}

template <int rows, bool scaled>
PYROUTE_INLINE void multiply_row_tiles(const PanelBlock &x, int row, const PanelBlock &y, int num_cols, int steps,
                                       Totals &totals, const float (&scales)[panel_rows][16]) {
    for (int col = 0; col < num_cols; col += accumulators / rows)
        multiply_tile<rows, scaled>(x, row, y, col, steps, totals, scales);
}

// One block of the contraction for a group of rows and a group of columns; the last tile may compute columns too many.
template <bool scaled>
void multiply_block(const PanelBlock &x, int num_rows, const PanelBlock &y, int num_cols, int steps, Totals &totals) {
    float scales[panel_rows][16];
    if constexpr (scaled)
        for (int i = 0; i < num_rows; ++i)
            for (int j = 0; j < 16; j += lanes)
                store(&scales[i][j], load<f32x8>(&y.scales[j]) * broadcast<f32x8>(x.scales[i]));
    for (int row = 0; row < num_rows; row += tile_rows)
        switch (num_rows - row) {
        case 1:
            multiply_row_tiles<1, scaled>(x, row, y, num_cols, steps, totals, scales);
            break;
        case 2:
            multiply_row_tiles<2, scaled>(x, row, y, num_cols, steps, totals, scales);
            break;
        default:
            multiply_row_tiles<3, scaled>(x, row, y, num_cols, steps, totals, scales);
        }
}

// sum_lanes of four totals at once.
using f32x4 = float __attribute__((vector_size(16)));
PYROUTE_INLINE f32x4 sum_lanes_of_four(const float (*totals)[lanes]) {
    f32x4 s[4];
    for (int j = 0; j < 4; ++j)
        s[j] = load<f32x4>(totals[j]) + load<f32x4>(totals[j] + 4);
    const f32x4 ab_lo = __builtin_shufflevector(s[0], s[1], 0, 4, 1, 5);
    const f32x4 ab_hi = __builtin_shufflevector(s[0], s[1], 2, 6, 3, 7);
    const f32x4 cd_lo = __builtin_shufflevector(s[2], s[3], 0, 4, 1, 5);
    const f32x4 cd_hi = __builtin_shufflevector(s[2], s[3], 2, 6, 3, 7);
    const f32x4 even =
        __builtin_shufflevector(ab_lo, cd_lo, 0, 1, 4, 5) + __builtin_shufflevector(ab_hi, cd_hi, 0, 1, 4, 5);
    const f32x4 odd =
        __builtin_shufflevector(ab_lo, cd_lo, 2, 3, 6, 7) + __builtin_shufflevector(ab_hi, cd_hi, 2, 3, 6, 7);
    return even + odd;
}

void write_row(const PanelProduct &p, int64_t row, int64_t col, const float (*totals)[lanes], int num_cols) {
    float sums[16] = {};
    for (int j = 0; j < num_cols; j += 4)
        store(&sums[j], sum_lanes_of_four(totals + j));
    for (int j = 0; j < num_cols; j += lanes) {
        const int count = smaller(num_cols - j, lanes);
        const int64_t at = row * p.out_stride + col + j;
        f32x8 value = load<f32x8>(&sums[j]);
        if (p.out_type == ElementType::bfloat16) {
            store_elements<Bfloat16>(static_cast<uint16_t *>(p.out) + at, value, count);
            continue;
        }
        float *out = static_cast<float *>(p.out) + at;
        if (p.accumulate)
            value = load_elements<Float32>(out, count) + value;
        store_elements<Float32>(out, value, count);
    }
}

// A group of rows against a group of columns.
void multiply_groups(const PanelProduct &p, int64_t blocks, int64_t group, int64_t col_group) {
    const int64_t row = group * panel_rows, col = col_group * panel_rows;
    const int num_rows = smaller(p.num_rows - row, panel_rows), num_cols = smaller(p.num_cols - col, panel_rows);
    alignas(64) Totals totals = {};
    PanelBlock unpacked;
    const Packing packing_of_y = packing_of(p.source);
    for (int64_t block = 0; block < blocks; ++block) {
        const int steps = (smaller(p.length - block * panel_depth, panel_depth) + lanes - 1) / lanes;
        if (!p.y)
            pack_block(p.source, packing_of_y, p.first_col + col, num_cols, block, unpacked);
        const PanelBlock &x = p.x[group * blocks + block];
        const PanelBlock &y = p.y ? p.y[col_group * blocks + block] : unpacked;
        if (p.scaled)
            multiply_block<true>(x, num_rows, y, num_cols, steps, totals);
        else
            multiply_block<false>(x, num_rows, y, num_cols, steps, totals);
    }
    for (int i = 0; i < num_rows; ++i)
        write_row(p, row + i, col, totals[i], num_cols);
}

void multiply(const PanelProduct &p) {
    const int64_t blocks = (p.length + panel_depth - 1) / panel_depth;
    for (int64_t row = 0; row < p.num_rows; row += panel_rows)
        for (int64_t col = 0; col < p.num_cols; col += panel_rows)
            multiply_groups(p, blocks, row / panel_rows, col / panel_rows);
}

} // namespace

const GroupedGemmKernels grouped_gemm_kernels = {pack, multiply};

} // namespace pyroute::cpu::PYROUTE_ISA
