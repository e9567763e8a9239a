// Packing for grouped GEMM: rows or columns of a matrix become float32 panel rows along the contraction. bfloat16 and
// FP8 are widened exactly; an FP8 scale either stays beside its block or, where scale blocks and the contraction's
// blocks of 128 do not fit, is multiplied in with one rounding.
#pragma once

#include "cpu/elements.h"
#include "cpu/fp8.h"
#include "cpu/grouped_gemm.h"
#if defined(__AVX512VBMI__)
#include "cpu/avx512/grouped_gemm_pack_fp8.h"
#endif

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

// Eight panel rows (fewer, if `count` is less), 32 elements of the contraction: widened, if need be, into `wide`.
template <class Type, bool multiply_scales>
PYROUTE_INLINE void widen_square(const PanelSource &s, int64_t first, int count, int64_t depth, int length,
                                 float (&wide)[8][32], const float *(&rows)[8]) {
    for (int i = 0; i < 8; ++i) {
        rows[i] = wide[i];
        if (i >= count) {
            memset(wide[i], 0, sizeof(wide[i]));
            continue;
        }
        const auto *from = matrix_row<Type, false>(s, first + i).elements + depth;
        for (size_t line = 0; line < 32 * sizeof(*from); line += 64)
            __builtin_prefetch(reinterpret_cast<const char *>(from + 64) + line);
        if constexpr (sizeof(*from) == sizeof(float))
            if (length == 32) {
                rows[i] = reinterpret_cast<const float *>(from);
                continue;
            }
        pack_row<Type, multiply_scales>(s, first + i, depth, length, wide[i]);
    }
}

// The part of a strip of rows that a kernel of the type's own packs: [0, returned element of the contraction).
template <class Type>
PYROUTE_INLINE int64_t pack_lines(Type, const PanelSource &, int64_t, const PackedShape &, float *) {
    return 0;
}
#if defined(__AVX512VBMI__)
template <class Format>
PYROUTE_INLINE int64_t pack_lines(Fp8<Format>, const PanelSource &s, int64_t first, const PackedShape &shape,
                                  float *to) {
    const uint8_t *rows = matrix_row<Fp8<Format>, false>(s, first).elements;
    return pack_code_lines<Format>(rows, s.stride, s.length, shape.lane_floats, to);
}
#endif

// Matrix rows become panel rows: squares of 8 x 8 are transposed.
template <class Type, bool multiply_scales, int width>
void pack_rows(const PanelSource &s, int64_t first, int64_t count, float *to) {
    const PackedShape shape = packed_shape(s.length, width);
    for (; count > 0; first += width, count -= width, to += shape.floats) {
        int64_t depth = 0;
        if constexpr (!multiply_scales && width == strip_cols)
            if (count >= width)
                depth = pack_lines(Type{}, s, first, shape, to);
        for (; depth < s.length; depth += 32) {
            const int length = smaller(s.length - depth, 32);
#pragma GCC unroll 2
            for (int row = 0; row < width; row += 8) {
                alignas(32) float wide[8][32];
                const float *rows[8];
                widen_square<Type, multiply_scales>(s, first + row, smaller(count - row, 8), depth, length, wide, rows);
                float *at = to + depth / panel_lanes * width + row;
                for (int i = 0; i < length; i += panel_lanes, at += width) {
                    f32x8 square[8];
#pragma GCC unroll 8
                    for (int j = 0; j < 8; ++j)
                        square[j] = load<f32x8>(rows[j] + i);
                    transpose(square);
#pragma GCC unroll 8
                    for (int lane = 0; lane < panel_lanes; ++lane)
                        if (width - row >= 8)
                            store(at + lane * shape.lane_floats, square[lane]);
                        else
                            memcpy(at + lane * shape.lane_floats, &square[lane], 4 * sizeof(float));
                }
            }
        }
    }
}

// Matrix columns become panel rows: runs of a matrix row are copied.
template <class Type, bool multiply_scales, int width>
void pack_columns(const PanelSource &s, int64_t first, int64_t count, float *to) {
    const PackedShape shape = packed_shape(s.length, width);
    for (int64_t depth = 0; depth < shape.steps * panel_lanes; ++depth) {
        float *at = to + depth % panel_lanes * shape.lane_floats + depth / panel_lanes * width;
        for (int64_t col = 0; col < count; col += 96) { // both widths divide it
            alignas(64) float wide[96 + 8];
            const int run = smaller(count - col, 96);
            const float *from = wide;
            if (depth >= s.length)
                memset(wide, 0, sizeof(wide));
            else if (sizeof(typename Type::Storage) == sizeof(float) && run % width == 0)
                from = reinterpret_cast<const float *>(matrix_row<Type, false>(s, depth).elements + first + col);
            else {
                pack_row<Type, multiply_scales>(s, depth, first + col, run, wide);
                for (int i = (run + 7) / 8 * 8; i % width; ++i)
                    wide[i] = 0;
            }
            for (int i = 0; i < run; i += width, at += shape.floats)
                memcpy(at, from + i, width * sizeof(float));
        }
    }
}

// Scales of up to 16 panel rows in one block of the contraction. A division takes up to 20 cycles and the block 400, so
// the blocks are walked.
void pack_scales(const PanelSource &s, int64_t first_row, int num_rows, int64_t block, float *to) {
    memset(to, 0, 16 * sizeof(float));
    if (!s.keeps_scales) {
        for (int i = 0; i < num_rows; ++i)
            to[i] = 1.0f;
        return;
    }
    const int64_t depth = block * panel_depth;
    const int64_t extent = s.columns ? s.block_cols : s.block_rows;
    const float *scale =
        s.columns ? row_scales(s, depth) + first_row / s.block_cols : row_scales(s, first_row) + depth / s.block_cols;
    int64_t in_block = (s.columns ? first_row : s.first_block_row + first_row) % extent;
    for (int i = 0; i < num_rows; ++i) {
        to[i] = *scale;
        if (++in_block == extent) {
            in_block = 0;
            scale += s.columns ? 1 : s.scale_stride;
        }
    }
}

template <class Type, bool multiply_scales, int width>
void pack_values(const PanelSource &s, int64_t first, int64_t count, float *to) {
    s.columns ? pack_columns<Type, multiply_scales, width>(s, first, count, to)
              : pack_rows<Type, multiply_scales, width>(s, first, count, to);
}

// Panel rows [first, first + count) to consecutive groups of `width`.
template <int width> void pack_panels(const PanelSource &s, int64_t first, int64_t count, bool scaled, float *to) {
    const bool multiply_scales = s.scales && !s.keeps_scales;
    switch (s.type) {
    case ElementType::float32:
        pack_values<Float32, false, width>(s, first, count, to);
        break;
    case ElementType::bfloat16:
        pack_values<Bfloat16, false, width>(s, first, count, to);
        break;
    case ElementType::e4m3:
        multiply_scales ? pack_values<Fp8<E4m3>, true, width>(s, first, count, to)
                        : pack_values<Fp8<E4m3>, false, width>(s, first, count, to);
        break;
    default:
        multiply_scales ? pack_values<Fp8<E5m2>, true, width>(s, first, count, to)
                        : pack_values<Fp8<E5m2>, false, width>(s, first, count, to);
    }
    if (!scaled)
        return;
    const PackedShape shape = packed_shape(s.length, width);
    for (int64_t row = 0; row < count; row += width, to += shape.floats)
        for (int64_t block = 0; block < shape.blocks; ++block)
            pack_scales(s, first + row, smaller(count - row, width), block,
                        to + panel_lanes * shape.lane_floats + 16 * block);
}

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
