// FP8 with block scales: the arguments of quantize_fp8 and dequantize_fp8.
#pragma once

#include <stdint.h>

#include "float_type.h"

namespace pyroute {

enum class Fp8Format { e4m3, e5m2 };

// How a stack of matrices is cut into blocks. Rows are cut within segments: with expert_offsets those of the experts
// (one matrix), otherwise one segment, all rows of a matrix. Blocks at the end of a segment or a row may be partial.
struct Fp8Blocks {
    int64_t num_matrices, rows, cols;
    int64_t block_rows, block_cols;
    const int64_t *expert_offsets;   // [num_segments + 1], or null
    const int64_t *row_block_starts; // [num_segments + 1]: rows of scales before each segment; null without offsets
    int64_t num_segments;            // 1 without offsets
    Fp8Format format;
};

struct QuantizeFp8Args {
    Fp8Blocks blocks;
    FloatType x_type;
    const void *x;     // [num_matrices, rows, cols]
    bool power_of_two; // ue8m0: scales are rounded up to a power of two
    uint8_t *codes;    // [num_matrices, rows, cols]
    float *scales;     // [num_matrices, row blocks, col blocks]
};

struct DequantizeFp8Args {
    Fp8Blocks blocks;
    const uint8_t *codes; // [num_matrices, rows, cols]
    const float *scales;  // [num_matrices, row blocks, col blocks]
    FloatType out_type;
    void *out; // [num_matrices, rows, cols]
};

} // namespace pyroute
