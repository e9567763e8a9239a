#include "cuda/grouped_gemm_plan.h"

namespace pyroute::cuda {

GemmPlan cut_plan(Cutter &workspace, int64_t num_rows, int64_t num_experts, int64_t tile_rows) {
    GemmPlan plan = {};
    plan.offsets = workspace.take<int64_t>(num_experts + 1);
    plan.tile_starts = workspace.take<int64_t>(num_experts + 1);
    for (int64_t *&starts : plan.block_starts)
        starts = workspace.take<int64_t>(num_experts + 1);
    if (tile_rows > 0) {
        plan.num_tiles = workspace.take<int64_t>(1);
        plan.tiles = workspace.take<GemmTile>(most_tiles(num_rows, num_experts, tile_rows));
    }
    return plan;
}

GemmPlan make_plan(const Stream &stream, Cutter &workspace, const GemmRows &rows, int64_t tile_rows,
                   const GemmOperand *const (&restarting)[2]) {
    GemmPlanArgs args = {};
    args.rows = rows;
    args.tile_rows = tile_rows > 0 ? tile_rows : 1;
    args.plan = cut_plan(workspace, rows.num_rows, rows.num_experts, tile_rows);
    for (int i = 0; i < 2; ++i) {
        args.block_rows[i] = restarting[i] ? restarting[i]->block_rows : 1;
        if (!restarting[i])
            args.plan.block_starts[i] = nullptr;
    }
    launch(stream, "grouped_gemm", "grouped_gemm_plan", {1, 256}, args);
    return args.plan;
}

} // namespace pyroute::cuda
