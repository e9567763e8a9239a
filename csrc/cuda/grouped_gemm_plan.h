// The plan of a grouped GEMM, the host's side: its place in the workspace, and the kernel that makes it.
#pragma once

#include "cuda/grouped_gemm_arguments.h"
#include "cuda/launch.h"

namespace pyroute::cuda {

// A workspace from its start: without an address it is only measured.
class Cutter {
  public:
    explicit Cutter(void *start) : start_(static_cast<char *>(start)) {}
    template <class T> T *take(int64_t count) {
        char *const at = start_ ? start_ + size_ : nullptr;
        size_ += static_cast<size_t>((count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256);
        return reinterpret_cast<T *>(at);
    }
    size_t size() const { return size_; }

  private:
    char *start_;
    size_t size_ = 0;
};

// tile_rows 0: no tiles.
GemmPlan cut_plan(Cutter &workspace, int64_t num_rows, int64_t num_experts, int64_t tile_rows);

// Made on the device, in the stream's order; `restarting` says which of the operands of rows need their scale rows.
GemmPlan make_plan(const Stream &stream, Cutter &workspace, const GemmRows &rows, int64_t tile_rows,
                   const GemmOperand *const (&restarting)[2]);

inline GemmRows rows_of(const GroupedGemmArgs &args) {
    return {args.expert_offsets,    args.num_rows,        args.num_experts,
            args.tokens_per_expert, args.rows_per_expert, args.segments_only};
}
inline GemmRows rows_of(const GroupedGemmWgradArgs &args) {
    return {args.expert_offsets, args.num_rows, args.num_experts, nullptr, 0, true};
}

} // namespace pyroute::cuda
