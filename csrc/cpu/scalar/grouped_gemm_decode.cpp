// A few rows times a run of an expert's columns, weights straight from memory to registers.
//
// The contract is that of scalar/grouped_gemm.cpp: blocks of 128, eight lanes, fused multiply-adds from +0 in a block,
// total = fma(partial, scale, total), lanes summed 4, 2, 1 apart.
//
// Plan: block by block of the contraction the rows are widened (at most 4 KiB) and every column of the run passes by,
// some columns at a time, each weight widened once for all rows. The totals (at most 16 KiB) wait in L1. What the
// thread will read next is fetched line by line meanwhile.
#include "cpu/grouped_gemm_decode.h"

#include "cpu/scalar/grouped_gemm_pack.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

constexpr int lanes = 8;

// One block of the contraction for all columns of a call.
struct Block {
    const void *y; // weights of the first column
    int64_t y_stride;
    int length, num_cols;
    const char *next;
    alignas(64) float x[decode_rows][panel_depth];
    float x_scales[decode_rows];
    float y_scales[decode_totals];
    alignas(64) float totals[decode_totals][lanes]; // [column][row]
};

template <class Type> struct Exact {
    using Storage = typename Type::Storage;
    PYROUTE_INLINE f32x8 widen(const Storage *from) { return load_elements<Type>(from); }
    PYROUTE_INLINE f32x8 widen(const Storage *from, int count) { return load_elements<Type>(from, count); }
};

template <class Weights, int rows, int cols> PYROUTE_INLINE void multiply_columns(Block &b, int col) {
    const auto *y = static_cast<const typename Weights::Storage *>(b.y) + col * b.y_stride;
    f32x8 partial[cols][rows];
#pragma GCC unroll 12
    for (int j = 0; j < cols; ++j)
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i)
            partial[j][i] = f32x8{};
    int k = 0;
    for (; k + lanes <= b.length; k += lanes)
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j) {
            const f32x8 weights = Weights::widen(y + j * b.y_stride + k);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i)
                partial[j][i] = fma(load<f32x8>(&b.x[i][k]), weights, partial[j][i]);
        }
    if (k < b.length)
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j) {
            const f32x8 weights = Weights::widen(y + j * b.y_stride + k, b.length - k);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i)
                partial[j][i] = fma(load<f32x8>(&b.x[i][k]), weights, partial[j][i]);
        }
#pragma GCC unroll 12
    for (int j = 0; j < cols; ++j)
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) {
            float *total = b.totals[(col + j) * rows + i];
            const f32x8 scale = broadcast<f32x8>(b.y_scales[col + j] * b.x_scales[i]);
            store(total, fma(partial[j][i], scale, load<f32x8>(total)));
        }
}

constexpr int columns_at_once(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

template <class Weights, int rows> void multiply_block(Block &b) {
    constexpr int cols = columns_at_once(rows);
    const int64_t bytes = b.length * static_cast<int>(sizeof(typename Weights::Storage));
    int col = 0;
    for (; col + cols <= b.num_cols; col += cols) {
        if (b.next)
            for (int64_t line = 0; line < cols * bytes; line += 64)
                __builtin_prefetch(b.next + col * bytes + line, 0, 2);
        multiply_columns<Weights, rows, cols>(b, col);
    }
    for (; col < b.num_cols; ++col)
        multiply_columns<Weights, rows, 1>(b, col);
    if (b.next)
        b.next += b.num_cols * bytes;
}

using MultiplyBlock = void (*)(Block &);

template <class Weights> MultiplyBlock by_rows(int64_t num_rows) {
    constexpr MultiplyBlock all[decode_rows] = {
        multiply_block<Weights, 1>, multiply_block<Weights, 2>, multiply_block<Weights, 3>, multiply_block<Weights, 4>,
        multiply_block<Weights, 5>, multiply_block<Weights, 6>, multiply_block<Weights, 7>, multiply_block<Weights, 8>};
    return all[num_rows - 1];
}

MultiplyBlock multiply_block_of(ElementType type, int64_t num_rows) {
    switch (type) {
    case ElementType::float32:
        return by_rows<Exact<Float32>>(num_rows);
    case ElementType::bfloat16:
        return by_rows<Exact<Bfloat16>>(num_rows);
    case ElementType::e4m3:
        return by_rows<Exact<Fp8<E4m3>>>(num_rows);
    default:
        return by_rows<Exact<Fp8<E5m2>>>(num_rows);
    }
}

int item_size(ElementType type) { return type == ElementType::float32 ? 4 : type == ElementType::bfloat16 ? 2 : 1; }

// Scales of matrix rows [first, first + count) in one block of the contraction.
void row_block_scales(const PanelSource &s, int64_t first, int count, int64_t block, float *to) {
    if (!s.keeps_scales) {
        for (int i = 0; i < count; ++i)
            to[i] = 1.0f;
        return;
    }
    const float *scale = row_scales(s, first) + block * panel_depth / s.block_cols;
    int64_t left = s.block_rows - (s.first_block_row + first) % s.block_rows;
    for (int i = 0; i < count; scale += s.scale_stride, left = s.block_rows)
        for (const int end = left < count - i ? i + static_cast<int>(left) : count; i < end; ++i)
            to[i] = *scale;
}

void write_totals(const Block &b, const DecodeProduct &p, int64_t first_col) {
    const auto rows = static_cast<int>(p.num_rows);
    for (int i = 0; i < rows; ++i)
        for (int col = 0; col < b.num_cols; col += lanes) {
            const int count = smaller(b.num_cols - col, lanes);
            f32x8 value = {};
            for (int j = 0; j < count; ++j)
                value[j] = sum_lanes(load<f32x8>(b.totals[(col + j) * rows + i]));
            const int64_t at = i * p.out_stride + first_col + col;
            if (p.out_type == ElementType::bfloat16)
                store_elements<Bfloat16>(static_cast<uint16_t *>(p.out) + at, value, count);
            else
                store_elements<Float32>(static_cast<float *>(p.out) + at, value, count);
        }
}

void multiply(const DecodeProduct &p, int64_t first_col, int64_t num_cols, const char *next) {
    Block b;
    b.num_cols = static_cast<int>(num_cols);
    b.y_stride = p.y.stride;
    b.next = next;
    memset(b.totals, 0, sizeof(b.totals[0]) * static_cast<size_t>(num_cols * p.num_rows));
    const auto multiply_block = multiply_block_of(p.y.type, p.num_rows);
    const Packing packing_of_x = packing_of(p.x);
    const char *y = static_cast<const char *>(p.y.data) + first_col * p.y.stride * item_size(p.y.type);
    PanelBlock x;
    for (int64_t depth = 0; depth < p.x.length; depth += panel_depth) {
        const int64_t block = depth / panel_depth;
        const auto rows = static_cast<int>(p.num_rows);
        b.y = y + depth * item_size(p.y.type);
        b.length = smaller(p.x.length - depth, panel_depth);
        packing_of_x.row_block(p.x, 0, rows, block, x);
        memcpy(b.x, x.values, sizeof(b.x[0]) * static_cast<size_t>(rows));
        row_block_scales(p.x, 0, rows, block, b.x_scales);
        row_block_scales(p.y, first_col, b.num_cols, block, b.y_scales);
        multiply_block(b);
    }
    write_totals(b, p, first_col);
}

} // namespace

const GroupedGemmDecodeKernels grouped_gemm_decode_kernels = {multiply};

} // namespace pyroute::cpu::PYROUTE_ISA
