// Arguments of the grouped matrix products. Sizes: R rows sorted by expert, E experts, weights [E, N, K].
#pragma once

#include <stdint.h>

namespace pyroute {

enum class ElementType : int32_t { float32, bfloat16, e4m3, e5m2 };

// A row-major operand; FP8 codes carry one scale per block of rows x cols in the last two axes.
struct GemmOperand {
    const void *data; // [R, cols] or [E, rows, cols]
    ElementType type;
    const float *scales;                // [..., scale_rows, ceil(cols / block_cols)], or null: all 1
    int64_t scale_rows;                 // of one matrix
    int64_t block_rows, block_cols;     // 1 and 1 without scales
    const int64_t *expert_block_starts; // [E + 1] first scale row of each segment, or null: blocks do not restart
};

struct GroupedGemmArgs {
    GemmOperand a;                 // forward [R, K], dgrad [R, N] (the gradient of out)
    GemmOperand b;                 // [E, N, K]
    const int64_t *expert_offsets; // [E + 1], from 0, not decreasing, at most R
    void *out;                     // forward [R, N], dgrad [R, K]; every row is written
    ElementType out_type;          // float32 or bfloat16
    int64_t num_rows, num_experts, n, k;
    // The masked layout, forward only: a [E, rows_per_expert, K] and out [E, rows_per_expert, N], of which expert e has
    // the first tokens_per_expert[e] rows, 0 to rows_per_expert; the others take no part and are not written.
    // expert_offsets is null, num_rows E * rows_per_expert.
    const int32_t *tokens_per_expert = nullptr; // [E], or null: expert_offsets say it
    int64_t rows_per_expert = 0;
    bool segments_only = false; // on a GPU: rows past the last segment are not written
};

struct GroupedGemmWgradArgs {
    GemmOperand grad_out;          // [R, N]
    GemmOperand a;                 // [R, K]
    const int64_t *expert_offsets; // [E + 1]
    float *out;                    // [E, N, K]
    bool accumulate;               // add to out; otherwise overwrite, empty experts with zeros
    int64_t num_rows, num_experts, n, k;
};

} // namespace pyroute
