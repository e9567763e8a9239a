// What the kernels of this room take: the arguments of csrc/permutation.h with their cut into blocks and workspace.
#pragma once

#include <stdint.h>

#include "../permutation.h"

namespace pyroute::cuda {

// The cut of the work, as kernels and launchers both need it.
constexpr int64_t shared_experts = 1024;    // whose counts, of each of eight warps, fit in 32 KiB of shared memory
constexpr int words_per_lane = 4;           // of a token's row that is moved
constexpr int quantize_block = 128;         // columns that share a scale
constexpr int blocks_at_once = 8;           // of them, by a warp
constexpr int64_t padding_rows_at_once = 8; // looked at by a warp

struct PlanRoutesArgs {
    int64_t num_slots, top_k, num_experts, alignment, num_rows;
    const void *topk_idx; // [num_slots], ids that are not experts are not routed
    int32_t id_bytes;
    bool id_signed;
    int32_t *tokens_per_expert; // [num_experts]
    int64_t *expert_offsets;    // [num_experts + 1]
    int32_t *row_to_token;      // [num_rows]
    int32_t *token_to_row;      // [num_slots]
    // Slots are counted in chunks, runs of them. The last one may be short.
    int64_t num_chunks, slots_per_chunk;
    int32_t *chunk_rows;   // workspace [num_chunks, num_experts]: counts, then rows of the expert before the chunk's
    uint32_t *blocks_done; // workspace [1]
};

// Layouts of other libraries.
struct RouteLayoutArgs {
    RouteMaps maps;
    int64_t num_experts;
    const int64_t *expert_offsets; // [num_experts + 1]
    void *out;
};

// Blocks below `token_blocks` take tokens, the others rows, to fill those that are no token's.
//
// rows_end: where the rows that are written end, on the device (a plan's expert_offsets[num_experts]); those behind
// keep what they hold. Null: all are written.
struct MoveArgs {
    PermuteArgs move;
    const int64_t *rows_end;
    uint32_t padding; // four bytes of a padding row, the same ones if rows are not moved in multiples of four
    uint32_t token_blocks;
    uint32_t lanes_log2; // lanes that share a token's row
};

struct QuantizeMoveArgs {
    PermuteQuantizeArgs move;
    const int64_t *rows_end;
    uint32_t token_blocks;
};

struct SumArgs {
    UnpermuteArgs sum;
    uint32_t lanes_log2;
};

struct SumBackwardArgs {
    UnpermuteBackwardArgs sum;
    const int64_t *rows_end;
    uint32_t token_blocks;
};

} // namespace pyroute::cuda
