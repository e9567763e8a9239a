#include "cpu/gating.h"

#include <algorithm>

#include "cpu/memory.h"
#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {

// About 2 ns an expert, so that a share holds 20 us of work.
int64_t tokens_per_share(int64_t num_experts) { return std::max<int64_t>(1, 10'000 / num_experts); }

// body(begin, end, scratch) over tokens; the scratch memory is allocated once per share.
template <class Body> void over_tokens(const Logits &logits, Body &&body) {
    const int64_t row = (logits.num_experts + 31) / 32 * 32;
    parallel_ranges(logits.num_tokens, tokens_per_share(logits.num_experts), [&](int64_t begin, int64_t end) {
        const Workspace<double> scratch(row * (end - begin < 8 ? gating_scratch_rows : gating_block_rows));
        body(begin, end, scratch.get());
    });
}

} // namespace

namespace {

// Adds a share's slots to the counts: in place if it is the only one, else by way of a table of its own.
void count_slots(const GatingArgs &args, int64_t begin, int64_t end, void *scratch) {
    const bool alone = begin == 0 && end == args.logits.num_tokens;
    auto *counts = alone ? args.tokens_per_expert : static_cast<int32_t *>(scratch);
    if (!alone)
        std::fill_n(counts, args.router.num_experts, 0);
    for (int64_t i = begin * args.router.top_k; i < end * args.router.top_k; ++i)
        if (args.topk_idx[i] >= 0)
            ++counts[args.topk_idx[i]];
    if (!alone)
        for (int64_t e = 0; e < args.router.num_experts; ++e)
            __atomic_fetch_add(args.tokens_per_expert + e, counts[e], __ATOMIC_RELAXED);
}

} // namespace

void topk_gating(const GatingArgs &args) {
    const auto forward = current_gating_kernels().forward;
    std::fill_n(args.tokens_per_expert, args.router.num_experts, 0);
    over_tokens(args.logits, [&](int64_t begin, int64_t end, void *scratch) {
        forward(args, begin, end, scratch);
        count_slots(args, begin, end, scratch);
    });
}

void expert_choice(const ExpertChoiceArgs &args) {
    const auto &kernels = current_gating_kernels();
    Logits real = args.logits;
    real.num_tokens = args.num_real;
    over_tokens(real, [&](int64_t begin, int64_t end, void *scratch) {
        kernels.expert_choice_keys(args, begin, end, scratch);
    });
    parallel_chunks(args.logits.num_experts, 1, [&](int64_t begin, int64_t end) {
        const Workspace<double> scratch((args.num_real + 31) / 32 * 32 * choose_scratch_rows);
        kernels.expert_choice(args, begin, end, scratch.get());
    });
}

void topk_gating_backward(const GatingBackwardArgs &args) {
    const auto backward = current_gating_backward_kernels().backward;
    over_tokens(args.logits, [&](int64_t begin, int64_t end, void *scratch) { backward(args, begin, end, scratch); });
}

void gating_loss_terms(const LossTermsArgs &args) {
    const auto loss_terms = current_gating_backward_kernels().loss_terms;
    over_tokens(args.logits, [&](int64_t begin, int64_t end, void *scratch) { loss_terms(args, begin, end, scratch); });
}

} // namespace pyroute::cpu
