#include "cpu/route_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {
constexpr int64_t slots_per_run = 16384; // about 25 us for the two passes of one thread
// Between the columns of two runs, so that two threads do not write to one cache line: 100000 tokens, top-8 of 64,
// took 3.0 ms without it and 1.1 with it (Zen 4).
constexpr int64_t gap = 128 / sizeof(int32_t);

// The next row of its expert for every slot of tokens [begin, end). In a function of its own, because as a part of
// place GCC 12 keeps `row` on the stack: 1.0 ns a slot becomes 1.8.
template <class Id>
__attribute__((noinline)) void number_slots(const Id *topk_idx, int64_t begin, int64_t end, int64_t top_k,
                                            int32_t *next_row, int32_t *row_to_token, int32_t *token_to_row) {
    for (int64_t token = begin; token < end; ++token)
        for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
            const auto expert = static_cast<int64_t>(topk_idx[slot]);
            if (expert < 0) {
                token_to_row[slot] = -1;
                continue;
            }
            const int32_t row = next_row[expert + 1]++;
            token_to_row[slot] = row;
            row_to_token[row] = static_cast<int32_t>(token);
        }
}
} // namespace

template <class Id>
RoutePlanner<Id>::RoutePlanner(const Id *topk_idx, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                               int64_t alignment)
    : topk_idx_(topk_idx), num_tokens_(num_tokens), top_k_(top_k), num_experts_(num_experts), alignment_(alignment),
      // a run's counts should not outnumber its slots
      num_runs_(std::clamp<int64_t>(num_tokens * top_k / std::max(slots_per_run, num_experts), 1, num_threads())),
      stride_(num_experts + 1 + gap), next_row_(static_cast<size_t>(num_runs_ * stride_)),
      padding_end_(static_cast<size_t>(num_experts)) {}

template <class Id> int64_t RoutePlanner<Id>::count(int32_t *tokens_per_expert, int64_t *expert_offsets) {
    parallel_ranges(num_runs_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
            int32_t *const counts = columns(run);
            const Id *const last = topk_idx_ + first_token(run + 1) * top_k_;
            const auto columns_used = static_cast<uint64_t>(num_experts_);
            for (const Id *id = topk_idx_ + first_token(run) * top_k_; id < last; ++id) {
                const uint64_t column = static_cast<uint64_t>(static_cast<int64_t>(*id)) + 1; // -1 is 0
                if (column > columns_used)
                    throw std::out_of_range("_core: an expert id is outside -1..num_experts-1");
                ++counts[column];
            }
        }
    });
    int64_t row = 0;
    for (int64_t expert = 0; expert < num_experts_; ++expert) {
        expert_offsets[expert] = row;
        const int64_t first = row;
        for (int64_t run = 0; run < num_runs_; ++run) {
            int32_t &cell = columns(run)[expert + 1];
            const int32_t here = cell;
            cell = static_cast<int32_t>(row); // not used if the rows turn out to pass int32
            row += here;
        }
        tokens_per_expert[expert] = static_cast<int32_t>(row - first);
        row = first + (row - first + alignment_ - 1) / alignment_ * alignment_;
        padding_end_[static_cast<size_t>(expert)] = row;
    }
    expert_offsets[num_experts_] = row;
    if (row > std::numeric_limits<int32_t>::max())
        throw std::overflow_error(std::to_string(row) + " rows");
    return row;
}

template <class Id> void RoutePlanner<Id>::place(int32_t *row_to_token, int32_t *token_to_row) {
    parallel_ranges(num_runs_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
            number_slots(topk_idx_, first_token(run), first_token(run + 1), top_k_, columns(run), row_to_token,
                         token_to_row);
        }
    });
    // the last run stops where an expert's padding begins
    const int32_t *ends = columns(num_runs_ - 1);
    for (int64_t expert = 0; expert < num_experts_; ++expert)
        std::fill(row_to_token + ends[expert + 1], row_to_token + padding_end_[static_cast<size_t>(expert)], -1);
}

template class RoutePlanner<int32_t>;
template class RoutePlanner<int64_t>;

} // namespace pyroute::cpu
