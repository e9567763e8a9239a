// Routes and moves on the GPU: the launchers. Every one queues work on the stream and returns.
#pragma once

#include "../permutation.h"
#include "cuda/launch.h"

namespace pyroute::cuda {

void permute(const Stream &stream, const PermuteArgs &args);

} // namespace pyroute::cuda
