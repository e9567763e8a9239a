// FP8 matrix products read both operands along the contraction, so wgrad wants the columns of its operands and dgrad
// those of the weights: bytes of [rows, cols] to [cols, rows], rows padded with zeros to multiples of 128.
//
// One block per 128 x 128 bytes: 16-byte loads along rows, 4 x 4 bytes turned in registers, through shared memory,
// 16-byte stores along columns. Each byte is read and written once.
#pragma once

#include "cuda/device.cuh"
#include "cuda/sm90/arguments.h"

namespace pyroute::cuda::sm90 {

constexpr uint32_t transpose_threads = 256;

struct TransposedBlock { // [column][row], words of 4 rows; the odd pitch keeps columns in different banks
    uint32_t words[128][33];
};

// The bytes in column c of four rows' words, the first row lowest.
PYROUTE_DEVICE uint32_t column_of(const uint32_t (&rows)[4], uint32_t c) {
    const uint32_t shift = c * 8;
    return (rows[0] >> shift & 255) | (rows[1] >> shift & 255) << 8 | (rows[2] >> shift & 255) << 16 |
           (rows[3] >> shift & 255) << 24;
}

// blockIdx.x: columns of 128; blockIdx.y: tile of the table, or block of 128 rows of all matrices.
PYROUTE_DEVICE void transpose_bytes(const TransposeArgs &args) {
    PYROUTE_SHARED(TransposedBlock, block);
    const int64_t col = int64_t{blockIdx.x} * 128;
    int64_t row, valid, to;
    if (args.tiles) {
        if (blockIdx.y >= *args.num_tiles)
            return;
        const GemmTile tile = args.tiles[blockIdx.y];
        row = tile.row, valid = tile.rows, to = int64_t{blockIdx.y} * 128;
    } else {
        const int64_t blocks = args.to_pitch / 128, matrix = blockIdx.y / blocks, first = blockIdx.y % blocks * 128;
        row = matrix * args.rows + first, valid = min_of(args.rows - first, int64_t{128});
        to = matrix * args.cols * args.to_pitch + first;
    }
    // 8 threads a row of 128 bytes, 4 rows each: 32 groups of rows
    const uint32_t chunk = threadIdx.x % 8, group = threadIdx.x / 8;
    Words rows[4];
    PYROUTE_UNROLL
    for (uint32_t r = 0; r < 4; ++r) {
        const int64_t at = group * 4 + r;
        rows[r] = Words{};
        if (at < valid && col + chunk * 16 < args.cols) // columns come in multiples of 16
            rows[r] = load_words_once(args.from + (row + at) * args.cols + col + chunk * 16);
    }
    PYROUTE_UNROLL
    for (uint32_t w = 0; w < 4; ++w) {
        const uint32_t four[4] = {rows[0].w[w], rows[1].w[w], rows[2].w[w], rows[3].w[w]};
        PYROUTE_UNROLL
        for (uint32_t c = 0; c < 4; ++c)
            block.words[chunk * 16 + w * 4 + c][group] = column_of(four, c);
    }
    sync_block();
    PYROUTE_UNROLL
    for (uint32_t i = 0; i < 4; ++i) { // 8 threads a column of 128 rows
        const uint32_t c = i * 32 + threadIdx.x / 8, w = threadIdx.x % 8 * 4;
        if (col + c < args.cols)
            store_words(args.to + to + (col + c) * args.to_pitch + w * 4,
                        {{block.words[c][w], block.words[c][w + 1], block.words[c][w + 2], block.words[c][w + 3]}});
    }
}

} // namespace pyroute::cuda::sm90
