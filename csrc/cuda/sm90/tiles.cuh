// Before the products: the table of tiles, and operands laid out along the contraction.
//
// make_tiles: one block of 256 threads reads the offsets, cuts every expert's segment into tiles of `tile_rows` rows
// (the last one partial) and numbers them by a scan. Offsets are clamped to the rows and tiles to the table, so that
// offsets that are no offsets cannot make anything outside the arrays be touched.
//
// transpose_bytes: FP8 matrix products read both operands along the contraction, so wgrad wants the columns of its
// operands and dgrad those of the weights. One block per 128 x 128 bytes: 16-byte loads along rows, 4 x 4 bytes turned
// in registers, 16-byte stores along columns. Rows past a segment's end become zeros.
#pragma once

#include "cuda/device.cuh"
#include "cuda/sm90/arguments.h"

namespace pyroute::cuda::sm90 {

constexpr uint32_t table_threads = 256;

struct WarpTotals {
    int32_t tiles[table_threads / 32];
};

PYROUTE_DEVICE void make_tiles(const TileTableArgs &args) {
    PYROUTE_SHARED(WarpTotals, totals);
    const uint32_t lane = lane_id(), warp = warp_id();
    const int64_t segments = args.num_experts + (args.with_tail ? 1 : 0);
    int32_t carry = 0;
    for (int64_t base = 0; base < segments; base += table_threads) {
        const int64_t e = base + threadIdx.x;
        int32_t begin = 0, length = 0;
        if (e < segments) {
            const auto at = [&](int64_t i) {
                return i > args.num_experts ? args.num_rows
                                            : min_of(max_of(args.expert_offsets[i], int64_t{0}), args.num_rows);
            };
            const int64_t first = at(e);
            begin = static_cast<int32_t>(first);
            length = static_cast<int32_t>(max_of(at(e + 1) - first, int64_t{0}));
        }
        const int32_t count = divide_up(length, args.tile_rows);
        int32_t upto = count; // of this warp, this segment included
        for (uint32_t distance = 1; distance < 32; distance *= 2) {
            const int32_t before = shuffle_up(upto, distance);
            upto += lane >= distance ? before : 0;
        }
        if (lane == 31)
            totals.tiles[warp] = upto;
        sync_block();
        int32_t first_tile = carry + upto - count;
        for (uint32_t w = 0; w < table_threads / 32; ++w) {
            first_tile += w < warp ? totals.tiles[w] : 0;
            carry += totals.tiles[w];
        }
        sync_block();
        if (args.starts && e <= args.num_experts)
            args.starts[e] = min_of(first_tile, args.capacity);
        for (uint32_t s = 0; s < 32; ++s) { // a warp writes one segment's tiles together
            const int32_t tiles = shuffle(count, s), from = shuffle(first_tile, s);
            const int32_t row = shuffle(begin, s), rows = shuffle(length, s);
            const int64_t expert = base + warp * 32 + s;
            for (auto t = static_cast<int32_t>(lane); t < tiles && from + t < args.capacity; t += 32)
                args.tiles[from + t] = {expert < args.num_experts ? static_cast<int32_t>(expert) : -1,
                                        row + t * args.tile_rows, min_of(rows - t * args.tile_rows, args.tile_rows), 0};
        }
    }
    if (threadIdx.x == 0) {
        *args.num_tiles = min_of(carry, args.capacity);
        if (args.starts)
            args.starts[args.num_experts] = min_of(carry, args.capacity);
    }
}

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
        if (static_cast<int32_t>(blockIdx.y) >= *args.num_tiles)
            return;
        const Tile tile = args.tiles[blockIdx.y];
        row = tile.row, valid = tile.valid_rows, to = int64_t{blockIdx.y} * 128;
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
