#include "cpu/gating.h"

#include <algorithm>
#include <memory>

#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {

// About 2 ns an expert, so that a share holds 20 us of work.
int64_t tokens_per_share(int64_t num_experts) { return std::max<int64_t>(1, 10'000 / num_experts); }

// body(begin, end, scratch) over tokens; the scratch memory is allocated once per share.
template <class Body> void over_tokens(const Logits &logits, Body &&body) {
    const auto row = static_cast<size_t>((logits.num_experts + 31) / 32 * 32);
    parallel_ranges(logits.num_tokens, tokens_per_share(logits.num_experts), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<double[]> scratch(new double[row * gating_scratch_rows]);
        body(begin, end, scratch.get());
    });
}

} // namespace

void topk_gating(const GatingArgs &args) {
    const auto forward = current_gating_kernels().forward;
    over_tokens(args.logits, [&](int64_t begin, int64_t end, void *scratch) { forward(args, begin, end, scratch); });
    // one pass over the ids, 1 ns each, is less than a table per thread would cost
    std::fill_n(args.tokens_per_expert, args.router.num_experts, 0);
    for (int64_t i = 0; i < args.logits.num_tokens * args.router.top_k; ++i)
        if (args.topk_idx[i] >= 0)
            ++args.tokens_per_expert[args.topk_idx[i]];
}

void expert_choice(const ExpertChoiceArgs &args) {
    const auto &kernels = current_gating_kernels();
    Logits real = args.logits;
    real.num_tokens = args.num_real;
    over_tokens(real, [&](int64_t begin, int64_t end, void *scratch) {
        kernels.expert_choice_keys(args, begin, end, scratch);
    });
    parallel_chunks(args.logits.num_experts, 1, [&](int64_t begin, int64_t end) {
        const auto row = static_cast<size_t>((args.num_real + 31) / 32 * 32);
        const std::unique_ptr<double[]> scratch(new double[row * choose_scratch_rows]);
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
