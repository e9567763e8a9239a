// Routes and moves on the GPU: the launchers. Every one queues work on the stream and returns.
#pragma once

#include "../permutation.h"
#include "cuda/launch.h"

namespace pyroute::cuda {

// What writes rows writes all of them, or, with `rows_end` (on the device), those before *rows_end: behind the last
// segment lie as many more as other ids could have needed, and who never reads them need not have them filled.

// Padding rows get `padding` over and over: zero, or four bytes where rows are float32.
void permute(const Stream &stream, const PermuteArgs &args, uint32_t padding, const int64_t *rows_end);

void permute_quantize(const Stream &stream, const PermuteQuantizeArgs &args, const int64_t *rows_end);
void unpermute(const Stream &stream, const UnpermuteArgs &args);
void unpermute_backward(const Stream &stream, const UnpermuteBackwardArgs &args, const int64_t *rows_end);

} // namespace pyroute::cuda
