#include "cuda/grouped_gemm.h"

#include <algorithm>

#include "cuda/grouped_gemm_arguments.h"
#include "cuda/sm90/grouped_gemm.h"

namespace pyroute::cuda {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A workspace from its start: without an address it is only measured.
class Cutter {
  public:
    explicit Cutter(void *start) : start_(static_cast<char *>(start)) {}
    template <class T> T *take(int64_t count) {
        char *const at = start_ ? start_ + size_ : nullptr;
        size_ += static_cast<size_t>(divide_up(count * static_cast<int64_t>(sizeof(T)), 256) * 256);
        return reinterpret_cast<T *>(at);
    }
    size_t size() const { return size_; }

  private:
    char *start_;
    size_t size_ = 0;
};

// tile_rows 0: no tiles.
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

void limit(bool ok, const char *what) {
    if (!ok)
        throw Error(std::string("grouped_gemm: ") + what);
}

uint32_t num_blocks(int64_t count) {
    limit(count < int64_t{1} << 31, "the result has more tiles than a launch has blocks");
    return static_cast<uint32_t>(count);
}

void check_sizes(int64_t num_rows, int64_t n, int64_t k) {
    constexpr int64_t most = (int64_t{1} << 31) - 1;
    limit(num_rows <= most && n <= most && k <= most, "rows, N and K must be below 2**31 on a GPU");
}

// The plan is made on the device; `restarting` says which of the operands of rows need their scale rows.
GemmPlan make_plan(const Stream &stream, Cutter &workspace, const int64_t *expert_offsets, int64_t num_rows,
                   int64_t num_experts, int64_t tile_rows, const GemmOperand *const (&restarting)[2]) {
    GemmPlanArgs args = {};
    args.expert_offsets = expert_offsets;
    args.num_rows = num_rows;
    args.num_experts = num_experts;
    args.tile_rows = tile_rows > 0 ? tile_rows : 1;
    args.plan = cut_plan(workspace, num_rows, num_experts, tile_rows);
    for (int i = 0; i < 2; ++i) {
        args.block_rows[i] = restarting[i] ? restarting[i]->block_rows : 1;
        if (!restarting[i])
            args.plan.block_starts[i] = nullptr;
    }
    launch(stream, "grouped_gemm", "grouped_gemm_plan", {1, 256}, args);
    return args.plan;
}

struct GeneralShape {
    const char *kernel;
    int64_t tile_rows, tile_cols;
    uint32_t shared_bytes() const { return static_cast<uint32_t>((tile_rows + tile_cols) * 128 * 4); }
};

constexpr int64_t tile_group = 12; // row tiles side by side; see place_of

// The two give the same bytes.
GeneralShape general_shape(const GroupedGemmArgs &args) {
    if (args.num_rows <= 8 * args.num_experts)
        return {"grouped_gemm_few_rows", 8, 64};
    return {"grouped_gemm_general", 64, 32};
}

void multiply(const Stream &stream, GroupedGemmArgs &args, Restarts restarts, void *workspace, bool transposed) {
    const int64_t num_cols = transposed ? args.k : args.n;
    check_sizes(args.num_rows, args.n, args.k);
    if (args.num_rows == 0 || num_cols == 0)
        return;
    const GeneralShape shape = general_shape(args);
    Cutter cutter(workspace);
    const GemmPlan plan = make_plan(stream, cutter, args.expert_offsets, args.num_rows, args.num_experts,
                                    shape.tile_rows, {restarts.a ? &args.a : nullptr, nullptr});
    args.expert_offsets = plan.offsets;
    args.a.expert_block_starts = plan.block_starts[0];
    const int64_t tiles = most_tiles(args.num_rows, args.num_experts, shape.tile_rows);
    launch(stream, "grouped_gemm", shape.kernel,
           {num_blocks(tiles * divide_up(num_cols, shape.tile_cols)), 128, shape.shared_bytes()},
           GeneralGemmArgs{args, plan, transposed, tile_group});
}

} // namespace

// Enough for either path: where `out` will lie is not known yet, and a path may ask for its alignment.
size_t grouped_gemm_workspace(const Stream &stream, const GroupedGemmArgs &args, bool transposed) {
    Cutter cutter(nullptr);
    cut_plan(cutter, args.num_rows, args.num_experts, general_shape(args).tile_rows);
    if (sm90::serves(device_info(stream.device), args, transposed))
        return std::max(cutter.size(), sm90::workspace(args, transposed));
    return cutter.size();
}

size_t grouped_gemm_wgrad_workspace(const Stream &stream, const GroupedGemmWgradArgs &args, Restarts restarts) {
    Cutter cutter(nullptr);
    cut_plan(cutter, args.num_rows, args.num_experts, 0);
    if (sm90::serves_wgrad(device_info(stream.device), args, restarts.a && restarts.grad_out))
        return std::max(cutter.size(), sm90::wgrad_workspace(args));
    return cutter.size();
}

void grouped_gemm(const Stream &stream, GroupedGemmArgs args, Restarts restarts, void *workspace) {
    if (sm90::serves(device_info(stream.device), args, false))
        return sm90::grouped_gemm(stream, args, false, workspace);
    multiply(stream, args, restarts, workspace, false);
}

void grouped_gemm_dgrad(const Stream &stream, GroupedGemmArgs args, Restarts restarts, void *workspace) {
    if (sm90::serves(device_info(stream.device), args, true))
        return sm90::grouped_gemm(stream, args, true, workspace);
    multiply(stream, args, restarts, workspace, true);
}

void grouped_gemm_wgrad(const Stream &stream, GroupedGemmWgradArgs args, Restarts restarts, void *workspace) {
    check_sizes(args.num_rows, args.n, args.k);
    if (args.num_experts == 0 || args.n == 0 || args.k == 0)
        return;
    if (sm90::serves_wgrad(device_info(stream.device), args, restarts.a && restarts.grad_out))
        return sm90::grouped_gemm_wgrad(stream, args, workspace);
    Cutter cutter(workspace);
    const GemmPlan plan = make_plan(stream, cutter, args.expert_offsets, args.num_rows, args.num_experts, 0,
                                    {restarts.grad_out ? &args.grad_out : nullptr, restarts.a ? &args.a : nullptr});
    args.expert_offsets = plan.offsets;
    args.grad_out.expert_block_starts = plan.block_starts[0];
    args.a.expert_block_starts = plan.block_starts[1];
    const GeneralShape shape = {"grouped_gemm_wgrad_general", 64, 32};
    const int64_t tiles = divide_up(args.n, shape.tile_rows) * divide_up(args.k, shape.tile_cols);
    launch(stream, "grouped_gemm", shape.kernel, {num_blocks(args.num_experts * tiles), 128, shape.shared_bytes()},
           GeneralWgradArgs{args, tile_group});
}

} // namespace pyroute::cuda
