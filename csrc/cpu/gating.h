// Gating on the CPU: work over threads here, kernels per instruction set.
#pragma once

#include "../gating.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

void topk_gating(const GatingArgs &args);
void topk_gating_backward(const GatingBackwardArgs &args);
void gating_loss_terms(const LossTermsArgs &args);
void expert_choice(const ExpertChoiceArgs &args);

// Scratch memory of one thread, aligned to 64 bytes: rows of E doubles, each padded to a multiple of 32, 16 for less
// than eight tokens; to choose tokens, 3 rows of R doubles, each padded to a multiple of 32.
constexpr int64_t gating_scratch_rows = 16, gating_block_rows = 34, choose_scratch_rows = 3;

// Kernels take tokens (choose: experts) [begin, end) and the scratch memory of their thread.
struct GatingKernels {
    void (*forward)(const GatingArgs &args, int64_t begin, int64_t end, void *scratch);
    void (*expert_choice_keys)(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *scratch); // real tokens
    void (*expert_choice)(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *scratch);      // experts
};

struct GatingBackwardKernels {
    void (*backward)(const GatingBackwardArgs &args, int64_t begin, int64_t end, void *scratch);
    void (*loss_terms)(const LossTermsArgs &args, int64_t begin, int64_t end, void *scratch);
};

PYROUTE_DECLARE_KERNELS(GatingKernels, gating_kernels)
PYROUTE_DECLARE_KERNELS(GatingBackwardKernels, gating_backward_kernels)

} // namespace pyroute::cpu
