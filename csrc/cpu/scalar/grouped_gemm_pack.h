// Packing for grouped GEMM: rows or columns of a matrix become float32 panel rows along the contraction. bfloat16 and
// FP8 are widened exactly; an FP8 scale either stays beside its block or, where scale blocks and the contraction's
// blocks of 128 do not fit, is multiplied in with one rounding.
#pragma once

#include "cpu/elements.h"
#include "cpu/fp8.h"
#include "cpu/grouped_gemm.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

template <class Format> struct Fp8 { // FP8 codes as elements.h describes the other types
    using Storage = uint8_t;
    using Wide = f32x8;
    using Packed = u8x8;
    PYROUTE_INLINE f32x8 widen(const u8x8 &codes) { return Format::decode(codes); }
};

// Thirty-two elements.
template <class Type> PYROUTE_INLINE void widen32(Type, const typename Type::Storage *from, float *to) {
    for (int i = 0; i < 32; i += 8)
        store(to + i, load_elements<Type>(from + i));
}
template <class Format> PYROUTE_INLINE void widen32(Fp8<Format>, const uint8_t *from, float *to) {
    fp8_decode32(Format{}, from, to);
}

PYROUTE_INLINE int smaller(int64_t a, int b) { return a < b ? static_cast<int>(a) : b; }

template <class Type> struct MatrixRow {
    const typename Type::Storage *elements;
    const float *scales; // of its blocks, where they are multiplied in
};

PYROUTE_INLINE const float *row_scales(const PanelSource &s, int64_t row) {
    return s.scales + (s.first_block_row + row) / s.block_rows * s.scale_stride;
}

template <class Type, bool multiply_scales>
PYROUTE_INLINE MatrixRow<Type> matrix_row(const PanelSource &s, int64_t row) {
    return {static_cast<const typename Type::Storage *>(s.data) + row * s.stride,
            multiply_scales ? row_scales(s, row) : nullptr};
}

// A place in a matrix row. The division, up to 20 cycles, happens once per place and not once per row.
struct Columns {
    int64_t col, block; // block of the first one
    int count;          // 1..8
};
template <bool multiply_scales> PYROUTE_INLINE Columns columns_at(const PanelSource &s, int64_t col, int count) {
    return {col, multiply_scales ? col / s.block_cols : 0, count};
}

PYROUTE_INLINE f32x8 scales_of(const PanelSource &s, const float *scales, const Columns &at) {
    if (at.col + at.count <= (at.block + 1) * s.block_cols)
        return broadcast<f32x8>(scales[at.block]);
    f32x8 lanes = {};
    for (int i = 0; i < at.count; ++i)
        lanes[i] = scales[(at.col + i) / s.block_cols];
    return lanes;
}

// Up to eight elements of a matrix row, zeros behind them.
template <class Type, bool multiply_scales>
PYROUTE_INLINE f32x8 load_lanes(const PanelSource &s, const MatrixRow<Type> &row, const Columns &at) {
    const auto *from = row.elements + at.col;
    const f32x8 value = at.count == 8 ? load_elements<Type>(from) : load_elements<Type>(from, at.count);
    if constexpr (multiply_scales) {
        const f32x8 scaled = value * scales_of(s, row.scales, at);
        if (at.count == 8)
            return scaled;
        return i32x8{0, 1, 2, 3, 4, 5, 6, 7} < at.count ? scaled
                                                        : value; // the zeros stay zeros beside an infinite scale
    }
    return value;
}

// One panel row is a run of a matrix row.
template <class Type, bool multiply_scales>
PYROUTE_INLINE void pack_row(const PanelSource &s, int64_t row_index, int64_t begin, int length, float *to) {
    const auto row = matrix_row<Type, multiply_scales>(s, row_index);
    int i = 0;
    if constexpr (!multiply_scales)
        for (const auto *from = row.elements + begin; i + 32 <= length; i += 32)
            widen32(Type{}, from + i, to + i);
    for (; i < length; i += 8) {
        const Columns at = columns_at<multiply_scales>(s, begin + i, smaller(length - i, 8));
        store(to + i, load_lanes<Type, multiply_scales>(s, row, at));
    }
}

// v[i][j] becomes v[j][i].
PYROUTE_INLINE void transpose(f32x8 (&v)[8]) {
    f32x8 t[8], u[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            u[i + j + 2] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; ++j) {
        v[j] = __builtin_shufflevector(u[j], u[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[j + 4] = __builtin_shufflevector(u[j], u[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Eight columns of `count` matrix rows to eight elements of panel rows `row`, row + 1, ... at `depth`. The square stays
// in registers where its size is known.
template <class Type, bool multiply_scales, bool full>
PYROUTE_INLINE void pack_square(const PanelSource &s, const MatrixRow<Type> (&rows)[8], int count, const Columns &at,
                                PanelBlock *block, int64_t blocks, int64_t row, int64_t depth) {
    f32x8 square[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        square[i] = full || i < count ? load_lanes<Type, multiply_scales>(s, rows[i], at) : f32x8{};
    transpose(square);
    block += row / panel_rows * blocks;
    int64_t in_group = row % panel_rows;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        if (!full && j == at.count)
            break;
        store(&block->values[in_group][depth], square[j]);
        if (++in_group == panel_rows) {
            in_group = 0;
            block += blocks;
        }
    }
}

// Panel rows are the columns [first, first + num_rows): squares of 8 x 8 are transposed. All columns of eight matrix
// rows are read before the next eight, so that reads are runs and not single elements.
template <class Type, bool multiply_scales>
void pack_columns(const PanelSource &s, int64_t first, int64_t num_rows, int64_t blocks, PanelBlock *panel) {
    for (int64_t depth = 0; depth < s.length; depth += 8) {
        const int count = smaller(s.length - depth, 8);
        PanelBlock *block = panel + depth / panel_depth;
        const int64_t in_block = depth % panel_depth;
        MatrixRow<Type> rows[8];
        for (int i = 0; i < count; ++i)
            rows[i] = matrix_row<Type, multiply_scales>(s, depth + i);
        int64_t row = 0;
        if (count == 8)
            for (; row + 8 <= num_rows; row += 8)
                pack_square<Type, multiply_scales, true>(s, rows, 8, columns_at<multiply_scales>(s, first + row, 8),
                                                         block, blocks, row, in_block);
        for (; row < num_rows; row += 8) {
            const Columns at = columns_at<multiply_scales>(s, first + row, smaller(num_rows - row, 8));
            pack_square<Type, multiply_scales, false>(s, rows, count, at, block, blocks, row, in_block);
        }
    }
}

// The rows of a last group that a tile reads and nobody stored are zero; so are their scales.
void clear_rows(PanelBlock &block, int num_rows) {
    for (int row = num_rows; row < panel_rows; ++row) {
        memset(block.values[row], 0, sizeof(block.values[row]));
        block.scales[row] = 0;
    }
}

// Scales of panel rows in one block of the contraction. A division takes up to 20 cycles and the block 400, so the
// blocks are walked.
void pack_scales(const PanelSource &s, int64_t first_row, int num_rows, int64_t block, PanelBlock &to) {
    if (!s.keeps_scales) {
        for (int i = 0; i < num_rows; ++i)
            to.scales[i] = 1.0f;
        return;
    }
    const int64_t depth = block * panel_depth;
    const int64_t extent = s.columns ? s.block_cols : s.block_rows;
    const float *scale =
        s.columns ? row_scales(s, depth) + first_row / s.block_cols : row_scales(s, first_row) + depth / s.block_cols;
    int64_t in_block = (s.columns ? first_row : s.first_block_row + first_row) % extent;
    for (int i = 0; i < num_rows; ++i) {
        to.scales[i] = *scale;
        if (++in_block == extent) {
            in_block = 0;
            scale += s.columns ? 1 : s.scale_stride;
        }
    }
}

// Panel rows are the matrix rows [first, first + num_rows), one block of the contraction.
template <class Type, bool multiply_scales>
void pack_row_block(const PanelSource &s, int64_t first, int num_rows, int64_t block, PanelBlock &to) {
    const int length = smaller(s.length - block * panel_depth, panel_depth);
    for (int i = 0; i < num_rows; ++i) {
        const auto *next =
            reinterpret_cast<const char *>(matrix_row<Type, false>(s, first + i).elements + (block + 1) * panel_depth);
        for (size_t line = 0; line < panel_depth * sizeof(typename Type::Storage); line += 64)
            __builtin_prefetch(next + line);
        pack_row<Type, multiply_scales>(s, first + i, block * panel_depth, length, to.values[i]);
    }
}

struct Packing {
    void (*row_block)(const PanelSource &, int64_t first, int num_rows, int64_t block, PanelBlock &to);
    void (*columns)(const PanelSource &, int64_t first, int64_t num_rows, int64_t blocks, PanelBlock *panel);
};

template <class Type, bool multiply_scales>
constexpr Packing packing = {pack_row_block<Type, multiply_scales>, pack_columns<Type, multiply_scales>};

Packing packing_of(const PanelSource &s) {
    const bool multiply_scales = s.scales && !s.keeps_scales;
    switch (s.type) {
    case ElementType::float32:
        return packing<Float32, false>;
    case ElementType::bfloat16:
        return packing<Bfloat16, false>;
    case ElementType::e4m3:
        return multiply_scales ? packing<Fp8<E4m3>, true> : packing<Fp8<E4m3>, false>;
    default:
        return multiply_scales ? packing<Fp8<E5m2>, true> : packing<Fp8<E5m2>, false>;
    }
}

// One group of matrix rows, one block of the contraction.
void pack_block(const PanelSource &s, const Packing &of, int64_t first, int num_rows, int64_t block, PanelBlock &to) {
    of.row_block(s, first, num_rows, block, to);
    pack_scales(s, first, num_rows, block, to);
    clear_rows(to, num_rows);
}

[[maybe_unused]] void pack(const PanelSource &s, int64_t first, int64_t num_rows, PanelBlock *panel) {
    const Packing of = packing_of(s);
    const int64_t blocks = (s.length + panel_depth - 1) / panel_depth;
    if (s.columns)
        of.columns(s, first, num_rows, blocks, panel);
    for (int64_t row = 0; row < num_rows; row += panel_rows, panel += blocks) {
        const int in_group = smaller(num_rows - row, panel_rows);
        for (int64_t block = 0; block < blocks; ++block)
            if (s.columns) {
                pack_scales(s, first + row, in_group, block, panel[block]);
                clear_rows(panel[block], in_group);
            } else
                pack_block(s, of, first + row, in_group, block, panel[block]);
    }
}

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
