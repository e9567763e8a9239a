#pragma once

#include "../permutation.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

// Copies of each token's bytes in its rows.
struct SpreadArgs {
    int64_t top_k;
    const int32_t *token_to_row; // [num_tokens, top_k]
    int64_t row_bytes;
    const uint8_t *x; // [num_tokens, row_bytes]
    uint8_t *rows;    // [num_rows, row_bytes]
    bool streaming;   // past the caches: the rows are too many to stay in them
    // For streaming, or null: the inverse map, whose padding rows are zero already. A line that two rows share is then
    // written once, with the second one.
    const int32_t *row_to_token = nullptr; // [num_rows]
    int64_t num_rows = 0;
};

struct PermutationKernels {
    // All for tokens begin to end - 1.
    void (*spread)(const SpreadArgs &, int64_t begin, int64_t end);
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
