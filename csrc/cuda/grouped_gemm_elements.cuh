// Operands of a grouped GEMM as a kernel sees them: one side of a product X Y^T, its elements in float32, its scales.
#pragma once

#include "../grouped_gemm.h"
#include "cuda/float_rows.cuh"
#include "cuda/fp8.cuh"

namespace pyroute::cuda {

template <class Format> struct Fp8 { // FP8 codes as float_rows.cuh describes the other types
    using Storage = uint8_t;
    PYROUTE_DEVICE static float widen(uint8_t code) { return Format::decode(code); }
};

PYROUTE_DEVICE int64_t item_size(ElementType type) {
    return type == ElementType::float32 ? 4 : type == ElementType::bfloat16 ? 2 : 1;
}

constexpr int block_depth = 128; // elements of the contraction between two additions to the totals

// X or Y of a product X Y^T: its rows are rows of a row-major matrix, and the contraction runs along them; or, with
// `columns`, they are the matrix' columns, and the contraction runs down its rows.
struct GemmSide {
    const void *data; // element (0, 0)
    ElementType type;
    bool columns;
    int64_t stride;      // elements from one matrix row to the next
    const float *scales; // of the block that holds element (0, 0), or null
    int64_t scale_stride;
    uint32_t first_block_row; // place of matrix row 0 in its block
    uint32_t block_rows, block_cols;
    bool keeps_scales; // a block of the contraction has one scale: it is multiplied to the block's sum

    // The scale of (row, depth) is scales[of_row(row) + of_depth(depth)].
    PYROUTE_DEVICE int64_t of_row(uint32_t row) const {
        return columns ? row / block_cols : (first_block_row + row) / block_rows * scale_stride;
    }
    PYROUTE_DEVICE int64_t of_depth(uint32_t depth) const {
        return columns ? (first_block_row + depth) / block_rows * scale_stride : depth / block_cols;
    }
    // Of the element itself in `data`.
    PYROUTE_DEVICE int64_t at(int64_t row, int64_t depth) const {
        return columns ? depth * stride + row : row * stride + depth;
    }
};

// Matrix `index` of a stack [E, rows, cols].
PYROUTE_DEVICE GemmSide side_of_matrix(const GemmOperand &operand, int64_t index, int64_t rows, int64_t cols,
                                       bool columns) {
    GemmSide s;
    s.data = static_cast<const char *>(operand.data) + index * rows * cols * item_size(operand.type);
    s.type = operand.type;
    s.columns = columns;
    s.stride = cols;
    s.scale_stride = divide_up(cols, operand.block_cols);
    s.scales = operand.scales ? operand.scales + index * operand.scale_rows * s.scale_stride : nullptr;
    s.first_block_row = 0;
    s.block_rows = static_cast<uint32_t>(operand.block_rows);
    s.block_cols = static_cast<uint32_t>(operand.block_cols);
    s.keeps_scales = operand.scales && (columns ? s.block_rows : s.block_cols) % block_depth == 0;
    return s;
}

// Rows from `begin` on, the segment of expert e.
PYROUTE_DEVICE GemmSide side_of_segment(const GemmOperand &operand, int64_t e, int64_t begin, int64_t cols,
                                        bool columns) {
    GemmSide s = side_of_matrix(operand, 0, 0, cols, columns);
    s.data = static_cast<const char *>(s.data) + begin * cols * item_size(operand.type);
    if (!s.scales)
        return s;
    if (operand.expert_block_starts) {
        s.scales += operand.expert_block_starts[e] * s.scale_stride;
        return s;
    }
    s.scales += begin / operand.block_rows * s.scale_stride;
    s.first_block_row = static_cast<uint32_t>(begin % operand.block_rows);
    if (columns) // whether blocks fit would depend on where the segment starts, and so on the other experts
        s.keeps_scales = false;
    return s;
}

} // namespace pyroute::cuda
