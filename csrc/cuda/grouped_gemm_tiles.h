// How a grouped GEMM is cut into tiles of rows, for host and device: what the plan kernel writes, and which tile a
// block takes. Plain functions, so that the tests call them on the host.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__) // NVRTC too
#define PYROUTE_ANYWHERE __host__ __device__
#else
#define PYROUTE_ANYWHERE
#endif

namespace pyroute::cuda {

// Rows [row, row + rows) of the sorted rows, all of one expert; expert -1: rows past the last segment, to be zero.
struct GemmTile {
    int32_t expert, rows;
    int64_t row;
};

// What the plan kernel writes into the workspace. Segments are those of the caller's offsets, forced to start at 0, not
// to decrease and to end within the rows, so that nothing that follows them can leave an array.
struct GemmPlan {
    int64_t *offsets;         // [E + 1]
    int64_t *tile_starts;     // [E + 1] first tile of each expert
    int64_t *block_starts[2]; // [E + 1] first scale row of each segment of an operand whose blocks restart, or null
    int64_t *num_tiles;       // [1]
    GemmTile *tiles;          // experts in order, then the rows past the last segment; null: no tiles are wanted
};

// No segmentation has more tiles: every segment and the rest end in at most one tile that is not full.
PYROUTE_ANYWHERE constexpr int64_t most_tiles(int64_t num_rows, int64_t num_experts, int64_t tile_rows) {
    return (num_rows + (num_experts + 1) * (tile_rows - 1)) / tile_rows;
}

struct TilePlace {
    int64_t m, n;
};

// Work item i of num_m x num_n tiles: groups of `group` row tiles, in a group rows run fastest. What runs at the same
// time shares few panels of both operands, which the second-level cache holds; and the row tiles of one expert read its
// weights one after another.
PYROUTE_ANYWHERE constexpr TilePlace place_of(int64_t i, int64_t num_m, int64_t num_n, int64_t group) {
    const int64_t per_group = group * num_n, g = i / per_group, first = g * group, in_group = i - g * per_group;
    const int64_t size = num_m - first < group ? num_m - first : group;
    return {first + in_group % size, in_group / size};
}

} // namespace pyroute::cuda
