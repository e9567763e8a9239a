// The arguments of the grouped GEMM kernels, for launchers and device code.
#pragma once

#include "../grouped_gemm.h"
#include "cuda/grouped_gemm_tiles.h"

namespace pyroute::cuda {

// Which rows belong to which expert; the caller's arrays, on the device: of any values.
struct GemmRows {
    const int64_t *expert_offsets;
    int64_t num_rows, num_experts;
    const int32_t *tokens_per_expert; // or null; the masked layout, as in GroupedGemmArgs
    int64_t rows_per_expert;
    bool segments_only; // no tiles for the rows past the last segment
};

struct GemmPlanArgs {
    GemmRows rows;
    int64_t tile_rows;
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

// The ring of the kernels in grouped_gemm_mma.cuh, in dynamic shared memory: stages of some bytes of the contraction
// for each of `rows` rows and of 128 columns, and their scales.
struct MmaRing {
    int stages, a_bytes, b_bytes;

    PYROUTE_ANYWHERE constexpr int stage_bytes(int rows) const {
        return (rows * a_bytes + 128 * b_bytes + (rows + 128) * 4 + 127) / 128 * 128;
    }
};
// 128 rows: at most 99 KiB, all that a block may have on the smallest cards. 16 rows: two blocks on an SM or more;
// bfloat16 beside FP8 has stages of twice the depth there, or a stage's fixed cost would be as much as its products.
PYROUTE_ANYWHERE constexpr MmaRing mma_ring(int rows, bool mixed) {
    if (rows == 128)
        return {3, 128, mixed ? 64 : 128};
    return mixed ? MmaRing{3, 256, 128} : MmaRing{4, 128, 128};
}

} // namespace pyroute::cuda
