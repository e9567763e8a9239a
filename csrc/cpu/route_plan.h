#pragma once

#include <cstdint>
#include <vector>

namespace pyroute::cpu {

// A stable counting sort of the slots by expert. The tokens are cut into runs, one per thread: each run counts its
// slots per expert, a scan over (expert, run) gives every run its first row of every expert, and each run numbers its
// slots. A sort that is stable has one result, so the number of runs does not matter. Source: Knuth, TAOCP 3, 5.2.
template <class Id> class RoutePlanner {
  public:
    RoutePlanner(const Id *topk_idx, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t alignment);

    // First pass; returns the number of rows. std::out_of_range for an id outside -1..num_experts-1,
    // std::overflow_error when the rows pass int32.
    int64_t count(int32_t *tokens_per_expert, int64_t *expert_offsets);
    // Second pass.
    void place(int32_t *row_to_token, int32_t *token_to_row);

  private:
    int64_t first_token(int64_t run) const { return num_tokens_ * run / num_runs_; }

    const Id *topk_idx_; // [num_tokens, top_k]
    int32_t *columns(int64_t run) { return next_row_.data() + run * stride_; }

    int64_t num_tokens_, top_k_, num_experts_, alignment_, num_runs_, stride_;
    std::vector<int32_t> next_row_;    // [num_runs, stride]: counts, then rows; column 0 is for -1, e + 1 for expert e
    std::vector<int64_t> padding_end_; // [num_experts]
};

extern template class RoutePlanner<int32_t>;
extern template class RoutePlanner<int64_t>;

} // namespace pyroute::cpu
