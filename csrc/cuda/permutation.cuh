// Moves: each token is read once and written to its rows; the rows that are no token's are filled.
//
//   permute        a group of lanes takes up to four words per lane of one token, and writes them to one row after the
//                  other. Its loads, and those of eight row numbers, are all in flight before the first store
//   fill_padding   a warp looks at eight rows and fills those without a token
//
// 256 threads, 3 blocks per SM (66 registers; with 4 sm_120 spills): 48 KiB of tokens in flight where words are of 16
// bytes, which a warp takes 2 KiB of a row at a time. Words are of 4, 2 or 1 bytes where an address or the length of a
// row says so. Bytes: T + R rows, 4 per slot and per row of the maps; row after row would read R + R, for a token's
// rows lie too far apart for L2.
#pragma once

#include "cuda/device.cuh"
#include "cuda/permutation_args.h"

namespace pyroute::cuda {

constexpr int rows_at_once = 8; // row numbers that are read ahead

// A quotient of numbers that are not negative, rarely of more than 32 bits.
PYROUTE_DEVICE int64_t quotient(int64_t a, int64_t b) {
    if ((static_cast<uint64_t>(a | b) >> 32) == 0)
        return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
}

// Part of a token's row, for a group of lanes: 2^lanes_log2 neighbours, `strips` parts per token.
struct Strips {
    int64_t first, step; // this group's strips are first, first + step, ...
    int64_t per_token, total;
    uint32_t lanes, member; // of the group

    PYROUTE_DEVICE Strips(int64_t num_tokens, int64_t items, int items_per_lane, uint32_t lanes_log2, uint32_t blocks)
        : lanes(1u << lanes_log2), member(threadIdx.x & (lanes - 1)) {
        first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) >> lanes_log2;
        step = static_cast<int64_t>(blocks) * blockDim.x >> lanes_log2;
        per_token = divide_up(items, static_cast<int64_t>(lanes) * items_per_lane);
        total = num_tokens * per_token;
    }
};

// rows[i] of slots base to base + 7; -1 where there is no slot, or no such row.
PYROUTE_DEVICE void load_rows(const RouteMaps &maps, int64_t token, int64_t base, int32_t (&rows)[rows_at_once]) {
    const int32_t *from = maps.token_to_row + token * maps.top_k + base;
    const auto slots = static_cast<int32_t>(maps.top_k - base);
    PYROUTE_UNROLL
    for (int i = 0; i < rows_at_once; ++i) {
        const int32_t row = i < slots ? from[i] : -1;
        rows[i] = static_cast<uint32_t>(row) < static_cast<uint32_t>(maps.num_rows) ? row : -1;
    }
}

// fill(row), by all lanes of a warp, for every row before `rows_end` that is no token's. `block` of `blocks` blocks.
template <class Fill>
PYROUTE_DEVICE void for_each_padding_row(const RouteMaps &maps, const int64_t *rows_end, uint32_t block,
                                         uint32_t blocks, const Fill &fill) {
    const int64_t end = rows_end ? min_of(*rows_end, maps.num_rows) : maps.num_rows;
    const int64_t warps = static_cast<int64_t>(blocks) * (blockDim.x / 32);
    const int64_t warp = static_cast<int64_t>(block) * (blockDim.x / 32) + warp_id();
    for (int64_t base = warp * padding_rows_at_once; base < end; base += warps * padding_rows_at_once) {
        const int64_t row = base + lane_id();
        const bool looks = lane_id() < padding_rows_at_once && row < end;
        const int32_t token = looks ? maps.row_to_token[row] : 0;
        for (uint32_t left = ballot(looks && (token < 0 || token >= maps.num_tokens)); left != 0; left &= left - 1)
            fill(base + first_bit(left));
    }
}

template <class Word> PYROUTE_DEVICE Word load_word(const uint8_t *from) {
    if constexpr (sizeof(Word) == 16)
        return load_words_once(from);
    else
        return *reinterpret_cast<const Word *>(from);
}

template <class Word> PYROUTE_DEVICE void store_word(uint8_t *to, const Word &word) {
    if constexpr (sizeof(Word) == 16)
        store_words_once(to, word);
    else
        *reinterpret_cast<Word *>(to) = word;
}

template <class Word> PYROUTE_DEVICE Word repeated(uint32_t value) {
    if constexpr (sizeof(Word) == 16)
        return {{value, value, value, value}};
    else
        return static_cast<Word>(value);
}

template <class Word> PYROUTE_DEVICE void fill_padding(const MoveArgs &args) {
    const PermuteArgs &move = args.move;
    const Word value = repeated<Word>(args.padding);
    const int64_t words = move.row_bytes / static_cast<int64_t>(sizeof(Word));
    const uint32_t block = blockIdx.x - args.token_blocks, blocks = gridDim.x - args.token_blocks;
    for_each_padding_row(move.maps, args.rows_end, block, blocks, [&](int64_t row) {
        uint8_t *const to = move.rows + row * move.row_bytes;
        for (int64_t word = lane_id(); word < words; word += 32)
            store_word(to + word * static_cast<int64_t>(sizeof(Word)), value);
    });
}

// Word: Words, uint32_t, uint16_t or uint8_t. Addresses and the length of a row are multiples of it.
template <class Word> PYROUTE_DEVICE void permute(const MoveArgs &args) {
    if (blockIdx.x >= args.token_blocks)
        return fill_padding<Word>(args);
    constexpr auto size = static_cast<int64_t>(sizeof(Word));
    const PermuteArgs &move = args.move;
    const int64_t words = move.row_bytes / size;
    const Strips strips(move.maps.num_tokens, words, words_per_lane, args.lanes_log2, args.token_blocks);
    for (int64_t strip = strips.first; strip < strips.total; strip += strips.step) {
        const int64_t token = quotient(strip, strips.per_token);
        const int64_t begin = (strip - token * strips.per_token) * strips.lanes * words_per_lane + strips.member;
        const int64_t left = words - begin; // words of this lane: 0, lanes, 2 * lanes and 3 * lanes if below that
        for (int64_t base = 0; base < move.maps.top_k; base += rows_at_once) {
            int32_t rows[rows_at_once];
            load_rows(move.maps, token, base, rows);
            Word word[words_per_lane];
            const uint8_t *const from = move.x + token * move.row_bytes + begin * size;
            PYROUTE_UNROLL
            for (int i = 0; i < words_per_lane; ++i)
                if (i * strips.lanes < left)
                    word[i] = load_word<Word>(from + i * strips.lanes * size);
            PYROUTE_UNROLL
            for (int slot = 0; slot < rows_at_once; ++slot) {
                if (rows[slot] < 0)
                    continue;
                uint8_t *const to = move.rows + rows[slot] * move.row_bytes + begin * size;
                PYROUTE_UNROLL
                for (int i = 0; i < words_per_lane; ++i)
                    if (i * strips.lanes < left)
                        store_word(to + i * strips.lanes * size, word[i]);
            }
        }
    }
}

} // namespace pyroute::cuda
