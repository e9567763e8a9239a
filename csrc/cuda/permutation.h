// Routes and moves on the GPU: the launchers. Every one queues work on the stream and returns.
#pragma once

#include "../permutation.h"
#include "cuda/launch.h"

namespace pyroute::cuda {

// Padding rows get `padding` over and over: zero, or four bytes where rows are float32.
void permute(const Stream &stream, const PermuteArgs &args, uint32_t padding);

void permute_quantize(const Stream &stream, const PermuteQuantizeArgs &args);
void unpermute(const Stream &stream, const UnpermuteArgs &args);
void unpermute_backward(const Stream &stream, const UnpermuteBackwardArgs &args);

} // namespace pyroute::cuda
