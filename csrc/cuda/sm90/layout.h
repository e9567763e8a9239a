// Where things are in Hopper's grouped GEMM, as plain functions: matrix descriptors, the swizzle, who holds what of a
// tile, the order of tiles, sizes of tables. Host and device code; tests/cuda/test_sm90_layout.py runs them on the
// host.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__) // NVRTC too
#define PYROUTE_BOTH __host__ __device__ __forceinline__ constexpr
#else
#define PYROUTE_BOTH constexpr
#endif

namespace pyroute::cuda::sm90 {

constexpr uint32_t row_bytes = 128;      // of every operand tile in shared memory: the width of the swizzle
constexpr uint32_t group_bytes = 1024;   // 8 rows, the period of the swizzle
constexpr uint32_t panel_rows = 64;      // of a warpgroup; rows of the products' A
constexpr uint32_t panel_bytes = 8192;   // 64 rows of 128 bytes
constexpr uint32_t most_shared = 232448; // dynamic shared memory of a block on sm_90
constexpr uint32_t warpgroup = 128;      // threads
constexpr uint32_t step_bytes = 32;      // depth of one product along a row
constexpr int32_t scale_block = 128;     // elements of the contraction between two additions to the totals

// Registers of a thread after the hand-over between the loading warpgroup and two that multiply: what 384 threads start
// with, 168 each, is what there is.
constexpr uint32_t loader_registers = 24, math_registers = 240;
static_assert(loader_registers + 2 * math_registers == 3 * 168, "as many as before");

// Where byte `offset` of a tile with rows of 128 bytes lies: chunks of 16 bytes are permuted within each row.
PYROUTE_BOTH uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// What a matrix product is told of an operand in shared memory, 128-byte swizzle. `leading`: bytes from one panel of 64
// elements to the next (operands whose rows run along the depth; ignored otherwise); groups of 8 rows are 1024 apart.
PYROUTE_BOTH uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{group_bytes >> 4} << 32 |
           uint64_t{1} << 62;
}

// The descriptor `bytes` further on, within the block's window: one addition, without a carry into the other fields.
PYROUTE_BOTH uint64_t descriptor_at(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & 0xffffffff00000000u) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// Element i of a thread's sums of a product of 64 rows: its row among the 64 and its column.
PYROUTE_BOTH uint32_t sum_row(uint32_t warp, uint32_t lane, uint32_t i) { return warp * 16 + lane / 4 + (i & 2) * 4; }
PYROUTE_BOTH uint32_t sum_col(uint32_t lane, uint32_t i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

// Staging of a bfloat16 result: panels of 64 rows x 64 columns, swizzled. The address that a lane gives store_matrices
// for column groups j and j + 1 (j even) of its warp's 16 rows: matrices are (rows 0-7, j), (8-15, j), (0-7, j + 1),
// (8-15, j + 1), which is the order of the thread's sums.
PYROUTE_BOTH uint32_t staged_row(uint32_t warp, uint32_t lane, uint32_t j) {
    const uint32_t row = warp * 16 + (lane & 15), chunk = j + (lane >> 4);
    return chunk / 8 * panel_bytes + swizzled(row * row_bytes + chunk % 8 * 16);
}

// Item i of num_m x num_n tiles, in the order of pyroute::cuda::place_of; 32 bits, which half the divisions' time.
struct TilePlace {
    int32_t m, n;
};
PYROUTE_BOTH TilePlace place_of(int32_t item, int32_t num_m, int32_t num_n, int32_t group) {
    const int32_t first = item / (group * num_n) * group;
    const int32_t left = num_m - first, size = left < group ? left : group;
    const int32_t r = item - first * num_n;
    return {first + r % size, r / size};
}

PYROUTE_BOTH int64_t blocks_of(int64_t extent, int64_t block) { return (extent + block - 1) / block; }

// Dynamic shared memory of a kernel: staging of the result, the stages of the operands, scales, barriers. Everything
// the swizzle works on starts at a multiple of 1024.
struct SharedPlan {
    uint32_t staging, stages, a_bytes, b_bytes, scale_bytes; // all stages: scales behind the operands
    PYROUTE_BOTH uint32_t a(uint32_t stage) const { return staging + stage * a_bytes; }
    PYROUTE_BOTH uint32_t b(uint32_t stage) const { return staging + stages * a_bytes + stage * b_bytes; }
    PYROUTE_BOTH uint32_t scales(uint32_t stage) const {
        return staging + stages * (a_bytes + b_bytes) + stage * scale_bytes;
    }
    PYROUTE_BOTH uint32_t full(uint32_t stage) const { return scales(stages) + stage * 8; }
    PYROUTE_BOTH uint32_t empty(uint32_t stage) const { return full(stages) + stage * 8; }
    PYROUTE_BOTH uint32_t idle() const { return empty(stages); }
    PYROUTE_BOTH uint32_t total() const { return idle() + 8; }
    PYROUTE_BOTH bool sound() const {
        return staging % group_bytes == 0 && a_bytes % group_bytes == 0 && b_bytes % group_bytes == 0 &&
               scale_bytes % 128 == 0 && total() <= most_shared;
    }
};

} // namespace pyroute::cuda::sm90
