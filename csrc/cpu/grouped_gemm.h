// Grouped GEMM on the CPU: all three products are out = X Y^T over panels that run along the contraction.
#pragma once

#include "../grouped_gemm.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

void grouped_gemm(const GroupedGemmArgs &args);
void grouped_gemm_dgrad(const GroupedGemmArgs &args);
void grouped_gemm_wgrad(const GroupedGemmWgradArgs &args);

constexpr int panel_rows = 12;   // four tiles of 3 rows, three tiles of 4 columns
constexpr int panel_depth = 128; // elements of the contraction between two additions to the totals

// A group of rows, one block of the contraction: float32 whatever the operand's type. 97 cache lines: consecutive
// blocks do not fall into the same cache sets. The elements past the contraction's end, up to a multiple of 8, are
// zero.
struct alignas(64) PanelBlock {
    float values[panel_rows][panel_depth];
    float scales[16]; // of each row in this block; [panel_rows, 16) is not used
};

// What is packed: the rows of a row-major matrix, or its columns.
struct PanelSource {
    const void *data; // element (0, 0)
    ElementType type;
    bool columns;            // a panel row is a column of the matrix, the contraction runs down its rows
    int64_t stride;          // elements from one matrix row to the next
    int64_t length;          // of the contraction
    const float *scales;     // of the block that holds element (0, 0), or null
    int64_t scale_stride;    // blocks in a row of blocks
    int64_t first_block_row; // place of matrix row 0 in its block
    int64_t block_rows, block_cols;
    bool
        keeps_scales; // each block of the contraction has one scale: it goes to PanelBlock::scales, not into the values
};

// A run of rows times a run of columns. Groups are consecutive, each ceil(length / panel_depth) blocks.
struct PanelProduct {
    const PanelBlock *x; // packed rows
    int64_t num_rows;
    const PanelBlock *y; // packed columns; null: packed block by block from `source` (for one group of rows)
    PanelSource source;
    int64_t first_col; // in source
    int64_t num_cols;
    int64_t length;
    bool scaled; // x or y has scales other than 1
    void *out;   // element (0, 0)
    ElementType out_type;
    int64_t out_stride;
    bool accumulate; // add to out, float32 only
};

struct GroupedGemmKernels {
    // Rows [first_row, first_row + num_rows) into consecutive groups at `panel`.
    void (*pack)(const PanelSource &source, int64_t first_row, int64_t num_rows, PanelBlock *panel);
    void (*multiply)(const PanelProduct &product);
};

PYROUTE_DECLARE_KERNELS(GroupedGemmKernels, grouped_gemm_kernels)

} // namespace pyroute::cpu
