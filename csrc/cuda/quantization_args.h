// Arguments of the quantisation kernels: those of the op, and what their launches decided.
#pragma once

#include "../quantization.h"

namespace pyroute {

// Of a stack in blocks on a device. row_block_starts is not used: kernels find the blocks of a segment by themselves.
struct QuantizeLaunch {
    QuantizeFp8Args op;
    int64_t scale_rows; // of one matrix; with expert_offsets the bound that does not depend on them
    uint32_t col_blocks;
    uint32_t num_blocks;     // quantize_row128: all of them
    uint32_t threads_across; // quantize_any: of a block's columns, a power of two
    uint32_t group;          // quantize_any: threads of a block: 1, 32 or 256
    bool segments_only;      // rows past the last segment and the scales that no row has are not written
};

struct DequantizeLaunch {
    DequantizeFp8Args op;
    int64_t scale_rows;
    uint32_t col_blocks;
    uint32_t threads_across; // of 16 columns each, a power of two
    uint32_t column_parts;   // thread blocks beside each other
    int64_t part_rows;       // rows of a thread block; those of a block where segments restart them
    bool whole_words;        // rows and their 16 columns begin at multiples of 16 bytes
};

// to[m, c, r] = from[m, r, c]; rows of `to` are to_pitch >= rows items apart, those past `rows` are zero.
struct TransposeLaunch {
    int64_t num_matrices, rows, cols, to_pitch;
    const void *from;
    void *to;
};

} // namespace pyroute
