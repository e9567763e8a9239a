// The arguments of the grouped GEMM kernels, for launchers and device code.
#pragma once

#include "../grouped_gemm.h"
#include "cuda/grouped_gemm_tiles.h"

namespace pyroute::cuda {

struct GemmPlanArgs {
    const int64_t *expert_offsets; // the caller's, on the device: of any values
    int64_t num_rows, num_experts, tile_rows;
    int64_t block_rows[2]; // of the scale blocks that restart
    GemmPlan plan;
};

// Forward and dgrad.
struct RowsProductArgs {
    GroupedGemmArgs gemm; // expert_block_starts are the plan's
    GemmPlan plan;
    bool transposed; // dgrad: the contraction runs along N
    int64_t tile_group;
};

struct WgradProductArgs {
    GroupedGemmWgradArgs gemm;
    GemmPlan plan;
    int64_t tile_group;
};

// Dynamic shared memory of the kernels in grouped_gemm_mma.cuh: a ring of stages of 128 bytes of the contraction for
// each row and `b_bytes` for each of 128 columns, and their scales.
PYROUTE_ANYWHERE constexpr int mma_stage_bytes(int rows, int b_bytes) {
    return (rows * 128 + 128 * b_bytes + (rows + 128) * 4 + 127) / 128 * 128;
}
constexpr int mma_stages(int rows) { return rows == 128 ? 3 : 4; } // 99 KiB, the most that every card has; 75 KiB

} // namespace pyroute::cuda
