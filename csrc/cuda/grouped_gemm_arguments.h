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

struct GeneralGemmArgs {
    GroupedGemmArgs gemm; // expert_offsets and expert_block_starts are the plan's
    GemmPlan plan;
    bool transposed; // dgrad: the contraction runs along N
    int64_t tile_group;
};

struct GeneralWgradArgs {
    GroupedGemmWgradArgs gemm;
    int64_t tile_group;
};

} // namespace pyroute::cuda
