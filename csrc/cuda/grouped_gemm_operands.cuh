// Operands of a grouped GEMM as its kernels see them: the two sides of a product X Y^T, and the tile of it that a block
// computes.
#pragma once

#include "cuda/float_rows.cuh"
#include "cuda/fp8.cuh"
#include "cuda/grouped_gemm_arguments.h"

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

// What a block computes of X Y^T.
struct ProductTile {
    GemmSide x, y;
    uint32_t x_row, y_row; // the tile's first
    int rows, cols;        // that exist
    int64_t length;        // of the contraction
    void *out;             // element (0, 0) of the tile
    ElementType out_type;
    int64_t out_stride;
    bool accumulate;
};

// Forward and dgrad: a tile of rows, of one expert or past all of them, times a run of columns. False: nothing to do.
template <int tile_rows, int tile_cols> PYROUTE_DEVICE bool find_tile(const RowsProductArgs &args, ProductTile &t) {
    const GroupedGemmArgs &g = args.gemm;
    const int64_t length = args.transposed ? g.n : g.k, num_cols = args.transposed ? g.k : g.n;
    const int64_t num_m = *args.plan.num_tiles, num_n = divide_up<int64_t>(num_cols, tile_cols);
    if (blockIdx.x >= num_m * num_n)
        return false;
    const TilePlace place = place_of(blockIdx.x, num_m, num_n, args.tile_group);
    const GemmTile tile = args.plan.tiles[place.m];
    const int64_t col = place.n * tile_cols;
    const bool exists = tile.expert >= 0; // else a contraction of no length: zeros
    const int64_t expert = exists ? tile.expert : 0, begin = exists ? args.plan.offsets[expert] : 0;
    t.length = exists ? length : 0;
    t.x = side_of_segment(g.a, expert, begin, length, false);
    t.y = side_of_matrix(g.b, expert, g.n, g.k, args.transposed);
    t.x_row = static_cast<uint32_t>(tile.row - begin);
    t.y_row = static_cast<uint32_t>(col);
    t.rows = tile.rows;
    t.cols = static_cast<int>(min_of<int64_t>(num_cols - col, tile_cols));
    t.out = static_cast<char *>(g.out) + (tile.row * num_cols + col) * item_size(g.out_type);
    t.out_type = g.out_type;
    t.out_stride = num_cols;
    t.accumulate = false;
    return true;
}

// wgrad: a tile of one expert's [N, K].
template <int tile_rows, int tile_cols> PYROUTE_DEVICE bool find_tile(const WgradProductArgs &args, ProductTile &t) {
    const GroupedGemmWgradArgs &g = args.gemm;
    const int64_t num_m = divide_up<int64_t>(g.n, tile_rows), num_n = divide_up<int64_t>(g.k, tile_cols);
    const int64_t expert = blockIdx.x / (num_m * num_n);
    const TilePlace place = place_of(blockIdx.x - expert * num_m * num_n, num_m, num_n, args.tile_group);
    const int64_t begin = args.plan.offsets[expert], row = place.m * tile_rows, col = place.n * tile_cols;
    t.length = args.plan.offsets[expert + 1] - begin;
    if (t.length == 0 && g.accumulate)
        return false;
    t.x = side_of_segment(g.grad_out, expert, begin, g.n, true);
    t.y = side_of_segment(g.a, expert, begin, g.k, true);
    t.x_row = static_cast<uint32_t>(row);
    t.y_row = static_cast<uint32_t>(col);
    t.rows = static_cast<int>(min_of<int64_t>(g.n - row, tile_rows));
    t.cols = static_cast<int>(min_of<int64_t>(g.k - col, tile_cols));
    t.out = g.out + (expert * g.n + row) * g.k + col;
    t.out_type = ElementType::float32;
    t.out_stride = g.k;
    t.accumulate = g.accumulate;
    return true;
}

} // namespace pyroute::cuda
