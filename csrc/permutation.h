// Routes: which row of the expert-sorted matrix every slot has, and the moves between tokens and rows.
#pragma once

#include <stdint.h>

#include "float_type.h"
#include "quantization.h"

namespace pyroute {

// Rows are by expert, then token, then slot. -1: a padding row, a slot that is not routed.
struct RouteMaps {
    int64_t num_tokens, top_k, num_rows;
    const int32_t *row_to_token; // [num_rows]
    const int32_t *token_to_row; // [num_tokens, top_k]
};

struct PermuteArgs {
    RouteMaps maps;
    int64_t row_bytes;
    const uint8_t *x; // [num_tokens, row_bytes]
    uint8_t *rows;    // [num_rows, row_bytes]
};

struct PermuteQuantizeArgs {
    RouteMaps maps;
    int64_t hidden, block_cols;
    FloatType x_type;
    const void *x; // [num_tokens, hidden]
    bool power_of_two;
    uint8_t *codes; // [num_rows, hidden], e4m3
    float *scales;  // [num_rows, ceil(hidden / block_cols)]
};

struct UnpermuteArgs {
    RouteMaps maps; // row_to_token is not used
    int64_t hidden;
    FloatType type;
    const void *rows;         // [num_rows, hidden]
    const void *topk_weights; // [num_tokens, top_k], float64 for float64 rows, else float32; or null
    void *out;                // [num_tokens, hidden]
    bool streaming;           // set by the driver: the output is too large to stay in the caches
};

struct UnpermuteBackwardArgs {
    RouteMaps maps;
    int64_t hidden;
    FloatType type;
    const void *grad_y;       // [num_tokens, hidden]
    const void *rows;         // [num_rows, hidden]
    const void *topk_weights; // [num_tokens, top_k], float64 for float64 rows, else float32
    void *grad_rows;          // [num_rows, hidden]
    void *grad_topk_weights;  // [num_tokens, top_k], the weights' type
    bool streaming;           // set by the driver: grad_rows are too many to stay in the caches
};

} // namespace pyroute
