// Gating on the GPU: the launchers. Every one queues work on the stream and returns.
#pragma once

#include <cstddef>

#include "cuda/gating_args.h"
#include "cuda/launch.h"

namespace pyroute::cuda {

// Bytes of workspace that an op takes; 0 where tokens fit into registers.
size_t topk_gating_workspace(const Stream &stream, const GatingArgs &args);
size_t topk_gating_backward_workspace(const Stream &stream, const GatingBackwardArgs &args);

void topk_gating(const Stream &stream, const GatingArgs &args, void *workspace);
// z_scale: in the device's memory, in place of args.z_scale; or null.
void topk_gating_backward(const Stream &stream, const GatingBackwardArgs &args, const double *z_scale, void *workspace);
void gating_loss_terms(const Stream &stream, const LossTermsArgs &args);

// What the losses need of the assignments. The counts that args names are set to zeros and filled.
void count_assignments(const Stream &stream, BalanceCounts args);
void balance_terms(const Stream &stream, const BalanceFractions &args, FloatType type);
void sum_tokens(const Stream &stream, const TokenSum &args);
void share_among_tokens(const Stream &stream, const TokenShare &args);

void update_bias(const Stream &stream, const BiasUpdate &args, FloatType type);
void copy_integers(const Stream &stream, const IntegerCopy &args);
void expert_choice(const Stream &stream, const ExpertChoiceLaunch &args);

} // namespace pyroute::cuda
