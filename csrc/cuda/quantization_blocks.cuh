// Which rows a thread block works on, and what its threads say to each other about them.
#pragma once

#include "cuda/device.cuh"
#include "cuda/fp8.cuh"
#include "cuda/quantization_args.h"

namespace pyroute::cuda {

// Rows that have scales: those before the last offset.
PYROUTE_DEVICE int64_t used_rows(const Fp8Blocks &b) {
    return b.expert_offsets ? max_of<int64_t>(0, min_of(b.expert_offsets[b.num_segments], b.rows)) : b.rows;
}

// A row of blocks: `rows` consecutive rows, at most as many as a block has; none past the last segment.
struct Strip {
    int64_t first_row, rows; // of the whole stack
    int64_t scale_row;       // likewise
};

// The strip that holds row `index` of the scales of a matrix whose blocks restart at each segment. Every thread of the
// thread block calls it: thread i takes segments i, i + blockDim.x, ...; a sum over the segments before each gives the
// rows of scales before it. Offsets are clamped: nonsense in them moves blocks, but not out of the matrix.
PYROUTE_DEVICE Strip find_in_segments(const Fp8Blocks &b, int64_t index) {
    struct Found {
        Strip strip;
        int64_t warp_blocks[32];
    };
    PYROUTE_SHARED(Found, found);
    if (threadIdx.x == 0)
        found.strip = {0, 0, index};
    int64_t before_all = 0;
    const uint32_t num_warps = blockDim.x / 32;
    for (int64_t base = 0; base < b.num_segments; base += blockDim.x) {
        const int64_t segment = base + threadIdx.x;
        int64_t begin = 0, end = 0;
        if (segment < b.num_segments) {
            begin = max_of<int64_t>(0, min_of(b.expert_offsets[segment], b.rows));
            end = max_of(begin, min_of(b.expert_offsets[segment + 1], b.rows));
        }
        const int64_t blocks = divide_up(end - begin, b.block_rows);
        int64_t up_to_here = blocks; // of this warp
        for (uint32_t distance = 1; distance < 32; distance *= 2) {
            const int64_t other = shuffle_up(up_to_here, distance);
            up_to_here += lane_id() >= distance ? other : 0;
        }
        if (lane_id() == 31)
            found.warp_blocks[warp_id()] = up_to_here;
        sync_block();
        int64_t before = before_all + up_to_here - blocks;
        for (uint32_t warp = 0; warp < num_warps; ++warp) {
            before += warp < warp_id() ? found.warp_blocks[warp] : 0;
            before_all += found.warp_blocks[warp];
        }
        if (before <= index && index < before + blocks) {
            const int64_t first = begin + (index - before) * b.block_rows;
            found.strip = {first, min_of(b.block_rows, end - first), index};
        }
        sync_block(); // before the sums are written again, and read
    }
    return found.strip;
}

// `index` counts the rows of scales of all matrices.
PYROUTE_DEVICE Strip find_strip(const Fp8Blocks &b, int64_t scale_rows, int64_t index) {
    if (b.expert_offsets && b.block_rows > 1)
        return find_in_segments(b, index);
    const int64_t matrix = index / scale_rows, first = (index - matrix * scale_rows) * b.block_rows;
    const int64_t rows = max_of<int64_t>(0, min_of(b.block_rows, used_rows(b) - first));
    return {matrix * b.rows + first, rows, index};
}

// Zeros in the rows past the last segment, a share by each thread of the grid.
PYROUTE_DEVICE void zero_unused_rows(const Fp8Blocks &b, void *to, int64_t row_bytes) {
    if (!b.expert_offsets)
        return;
    auto *const bytes = static_cast<uint8_t *>(to);
    const int64_t begin = used_rows(b) * row_bytes, end = b.rows * row_bytes;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t to_words = -reinterpret_cast<int64_t>(bytes + begin) & 15;
    const int64_t words = min_of(end, begin + to_words), after = words + (end - words) / 16 * 16;
    for (int64_t i = begin + thread; i < words; i += threads)
        bytes[i] = 0;
    for (int64_t i = words + 16 * thread; i < after; i += 16 * threads)
        store_words(bytes + i, Words{});
    for (int64_t i = after + thread; i < end; i += threads)
        bytes[i] = 0;
}

// The largest value of a thread block's threads; every one of them calls it.
PYROUTE_DEVICE uint32_t largest_of_block(uint32_t value) {
    struct Warps {
        uint32_t largest[32];
    };
    PYROUTE_SHARED(Warps, warps);
    value = reduce_max(value);
    if (lane_id() == 0)
        warps.largest[warp_id()] = value;
    sync_block();
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp)
        value = max_of(value, warps.largest[warp]);
    sync_block();
    return value;
}

} // namespace pyroute::cuda
