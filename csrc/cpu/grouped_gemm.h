// Grouped GEMM on the CPU: all three products are out = X Y^T over packed panels.
#pragma once

#include "../grouped_gemm.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

void grouped_gemm(const GroupedGemmArgs &args);
void grouped_gemm_dgrad(const GroupedGemmArgs &args);
void grouped_gemm_wgrad(const GroupedGemmWgradArgs &args);

// Static: the kernel files of every instruction set see this header.
static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t item_size(ElementType type) {
    return type == ElementType::float32 ? 4 : type == ElementType::bfloat16 ? 2 : 1;
}

constexpr int panel_depth = 128; // elements of the contraction between two additions to the totals
constexpr int panel_lanes = 8;   // lane l of a block takes its elements l, l + 8, ...
constexpr int group_rows = 12;   // rows of X that are packed together
constexpr int strip_cols = 16;   // columns of Y

// A packed group or strip of `width` rows or columns, float32 whatever the operand's type: lane by lane, within a lane
// [step of 8 elements][width], elements past the contraction's end zero; then [block of 128][16] scales. Each lane is
// one cache line longer than its elements, so that lanes do not compete for the same cache sets.
struct PackedShape {
    int64_t steps, blocks, lane_floats, floats;
};
static constexpr PackedShape packed_shape(int64_t length, int width) {
    const int64_t steps = divide_up(length, panel_lanes), blocks = divide_up(length, panel_depth);
    const int64_t lane_floats = divide_up(steps * width, 16) * 16 + 16;
    return {steps, blocks, lane_floats, panel_lanes * lane_floats + 16 * blocks};
}

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
    bool keeps_scales; // each block of the contraction has one scale: it is packed beside the values, not into them
};

// Memory that will be packed next: rows of `row_bytes`; none if num_rows is 0.
struct NextRead {
    const char *data;
    int64_t num_rows, row_bytes, row_stride;
};

enum class PanelScales { none, per_row, per_element }; // per_row: each strip has one scale per block

// A run of rows times a run of columns, packed in consecutive groups and strips.
struct PanelProduct {
    const float *x, *y;
    int64_t num_rows, num_cols, length;
    PanelScales scales;
    void *out; // element (0, 0)
    ElementType out_type;
    int64_t out_stride;
    bool accumulate; // add to out, float32 only
    bool streams;    // out goes past the caches: float32, whole lines, not added to
    NextRead next;
};

struct GroupedGemmKernels {
    // Rows [first, first + count) to groups, columns to strips; `scaled`: with their scales.
    void (*pack_x)(const PanelSource &source, int64_t first, int64_t count, bool scaled, float *groups);
    void (*pack_y)(const PanelSource &source, int64_t first, int64_t count, bool scaled, float *strips);
    void (*multiply)(const PanelProduct &product);
};

PYROUTE_DECLARE_KERNELS(GroupedGemmKernels, grouped_gemm_kernels)

} // namespace pyroute::cpu
