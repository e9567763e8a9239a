// Matrices with their axes exchanged, as bytes or as words of four: the layouts in which tensor cores and Hopper's copy
// engine read FP8 codes along the other axis and scales by column. No bit changes.
//
// 256 threads take a tile of 128 x 128 bytes or 32 x 32 words through shared memory. Word w of row r lies at place
// w ^ (a number of the row's own), so that neither the writes by column nor the reads by row share a bank.
// Bytes per item: its own, once read and once written.
#pragma once

#include "cuda/device.cuh"
#include "cuda/quantization_args.h"

namespace pyroute::cuda {

// Where a thread block's tile begins, in whole tiles of the matrix.
struct TransposeTile {
    int64_t matrix, row, col;
};

PYROUTE_DEVICE TransposeTile tile_of_block(const TransposeLaunch &args, int64_t tile) {
    const int64_t down = divide_up(args.to_pitch, tile), across = divide_up(args.cols, tile);
    const int64_t matrix = blockIdx.x / (down * across), within = blockIdx.x - matrix * down * across;
    return {matrix, within / across * tile, within % across * tile};
}

// Row i of the result holds byte i of each of the four words.
PYROUTE_DEVICE void transpose_bytes_4x4(uint32_t (&w)[4]) {
    const uint32_t a = (w[0] & 0x00ff00ff) | (w[1] & 0x00ff00ff) << 8; // bytes 0 and 2 of w0 and w1
    const uint32_t b = (w[0] >> 8 & 0x00ff00ff) | (w[1] & 0xff00ff00);
    const uint32_t c = (w[2] & 0x00ff00ff) | (w[3] & 0x00ff00ff) << 8;
    const uint32_t d = (w[2] >> 8 & 0x00ff00ff) | (w[3] & 0xff00ff00);
    w[0] = (a & 0xffff) | c << 16;
    w[1] = (b & 0xffff) | d << 16;
    w[2] = a >> 16 | (c & 0xffff0000);
    w[3] = b >> 16 | (d & 0xffff0000);
}

// The four bytes from `at` on of a row of `count` items; zeros past its end.
PYROUTE_DEVICE uint32_t load_four(const uint8_t *row, int64_t at, int64_t count, bool aligned) {
    if (aligned && at + 4 <= count)
        return *reinterpret_cast<const uint32_t *>(row + at);
    uint32_t four = 0;
    for (int i = 0; i < 4; ++i)
        four |= at + i < count ? static_cast<uint32_t>(row[at + i]) << (8 * i) : 0;
    return four;
}

PYROUTE_DEVICE void transpose_bytes(const TransposeLaunch &args) {
    struct Tile {
        uint32_t words[128][32]; // [column][four rows], swizzled
    };
    PYROUTE_SHARED(Tile, tile);
    const TransposeTile at = tile_of_block(args, 128);
    const auto *from = static_cast<const uint8_t *>(args.from) + at.matrix * args.rows * args.cols;
    const bool aligned = (args.cols | reinterpret_cast<int64_t>(from)) % 4 == 0;
    for (uint32_t fours = warp_id(); fours < 32; fours += 8) {
        uint32_t w[4];
        PYROUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t row = at.row + 4 * fours + i;
            w[i] = row < args.rows ? load_four(from + row * args.cols, at.col + 4 * lane_id(), args.cols, aligned) : 0;
        }
        transpose_bytes_4x4(w);
        PYROUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            tile.words[4 * lane_id() + i][fours ^ lane_id()] = w[i];
    }
    sync_block();
    auto *to = static_cast<uint8_t *>(args.to) + at.matrix * args.cols * args.to_pitch;
    const bool whole = (args.to_pitch | reinterpret_cast<int64_t>(to)) % 4 == 0;
    for (uint32_t c = warp_id(); c < 128 && at.col + c < args.cols; c += 8) {
        const uint32_t four = tile.words[c][lane_id() ^ (c / 4)];
        const int64_t row = at.row + 4 * lane_id();
        uint8_t *const out = to + (at.col + c) * args.to_pitch + row;
        if (whole && row < args.to_pitch)
            *reinterpret_cast<uint32_t *>(out) = four;
        else
            for (int i = 0; i < 4 && row + i < args.to_pitch; ++i)
                out[i] = static_cast<uint8_t>(four >> (8 * i));
    }
}

PYROUTE_DEVICE void transpose_words(const TransposeLaunch &args) {
    struct Tile {
        uint32_t words[32][32]; // [column][row], swizzled
    };
    PYROUTE_SHARED(Tile, tile);
    const TransposeTile at = tile_of_block(args, 32);
    const auto *from = static_cast<const uint32_t *>(args.from) + at.matrix * args.rows * args.cols;
    for (uint32_t r = warp_id(); r < 32; r += 8) {
        const int64_t row = at.row + r, col = at.col + lane_id();
        tile.words[lane_id()][r ^ lane_id()] = row < args.rows && col < args.cols ? from[row * args.cols + col] : 0;
    }
    sync_block();
    auto *to = static_cast<uint32_t *>(args.to) + at.matrix * args.cols * args.to_pitch;
    for (uint32_t c = warp_id(); c < 32 && at.col + c < args.cols; c += 8)
        if (at.row + lane_id() < args.to_pitch)
            to[(at.col + c) * args.to_pitch + at.row + lane_id()] = tile.words[c][lane_id() ^ c];
}

} // namespace pyroute::cuda
