#pragma once

#include "../permutation.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

struct PermutationKernels {
    // All for tokens begin to end - 1.
    void (*permute)(const PermuteArgs &, int64_t begin, int64_t end);        // padding rows are left alone
    void (*unpermute[4])(const UnpermuteArgs &, int64_t begin, int64_t end); // by FloatType
    void (*unpermute_backward[4])(const UnpermuteBackwardArgs &, int64_t begin, int64_t end);
};

PYROUTE_DECLARE_KERNELS(PermutationKernels, permutation_kernels)

// These throw std::out_of_range when a map names a row or token that does not exist.
void permute(const PermuteArgs &args);
void permute_quantize(const PermuteQuantizeArgs &args);
void unpermute(const UnpermuteArgs &args);
void unpermute_backward(const UnpermuteBackwardArgs &args);

} // namespace pyroute::cpu
