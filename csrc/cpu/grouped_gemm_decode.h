// Grouped GEMM for a few rows per expert, which reads every weight once: at one row the weights' bytes are the cost.
//
// Rows are widened block by block on the stack; weights go from memory to registers and are never stored. The order of
// every sum is that of the tiles (scalar/grouped_gemm.cpp), so the bytes do not depend on which of the two paths ran.
#pragma once

#include "cpu/grouped_gemm.h"

namespace pyroute::cpu {

constexpr int64_t decode_rows = 8; // of one expert; above it packed panels and tiles are faster

// A segment's rows times an expert's weights.
struct DecodeProduct {
    PanelSource x, y; // y: matrix rows, its scales kept beside the blocks
    int64_t num_rows; // 1..decode_rows
    void *out;        // row-major
    int64_t out_stride;
    ElementType out_type;
};

constexpr int64_t decode_totals = 512; // rows x columns of one call at most

struct GroupedGemmDecodeKernels {
    // Columns [first_col, first_col + num_cols), num_rows x num_cols <= decode_totals. `next`: what the caller will
    // read after this, as long as the weights of this call; fetched into L2 meanwhile. Or null.
    void (*multiply)(const DecodeProduct &product, int64_t first_col, int64_t num_cols, const char *next);
};

PYROUTE_DECLARE_KERNELS(GroupedGemmDecodeKernels, grouped_gemm_decode_kernels)

// Collects products and runs them in one parallel region, without memory of its own.
class DecodeBatch {
  public:
    ~DecodeBatch() = default;
    // False: not for this path.
    bool add(const PanelSource &x, const PanelSource &y, int64_t num_rows, int64_t num_cols, void *out,
             ElementType out_type);
    void run();

  private:
    static constexpr int64_t capacity = 64;
    struct Entry {
        DecodeProduct product;
        int64_t num_cols, task_cols;
        int64_t end_task; // in the batch's numbering
    };
    const char *weights_of(int64_t task) const;
    int64_t entry_of(int64_t task) const;

    Entry entries_[capacity];
    int64_t count_ = 0, bytes_ = 0;
};

} // namespace pyroute::cpu
