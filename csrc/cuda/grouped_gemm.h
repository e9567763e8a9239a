// Grouped GEMM on the GPU: the launchers. Every one queues work on the stream and returns.
//
// Which kernel computes a product follows from its types, sizes and alignment alone, never from how many rows an expert
// has, where two kernels would give different bytes: a row's bytes do not depend on its batch. On sm_90 the kernels of
// sm90/ take what they serve, then the tensor-core kernels of every card, then those for any type and shape, which give
// the CPU floor's bytes. To compare with: PYROUTE_GROUPED_GEMM=portable leaves the first out, =general the first two.
#pragma once

#include "../grouped_gemm.h"
#include "cuda/launch.h"

namespace pyroute::cuda {

// Whether the scale blocks of the operands that hold rows restart at the segments. Then expert_block_starts is made
// here, from expert_offsets.
struct Restarts {
    bool a = false, grad_out = false;
};

// FP8 weights along the contraction of dgrad, for callers that use them more than once: where dgrad wants them it takes
// what this makes of b [num_experts, n, k], num_experts * k * (n rounded up to a multiple of 128) bytes at a multiple
// of 16.
bool grouped_gemm_wants_transposed(int device, const GemmOperand &b, int64_t num_experts, int64_t n, int64_t k);
void grouped_gemm_transpose(const Stream &stream, const GemmOperand &b, int64_t num_experts, int64_t n, int64_t k,
                            uint8_t *to);

// Bytes of the workspace, at an address that is a multiple of 256. b_transposed is null unless `transposed`.
size_t grouped_gemm_workspace(const Stream &stream, const GroupedGemmArgs &args, bool transposed,
                              const uint8_t *b_transposed);
size_t grouped_gemm_wgrad_workspace(const Stream &stream, const GroupedGemmWgradArgs &args, Restarts restarts);

void grouped_gemm(const Stream &stream, const GroupedGemmArgs &args, Restarts restarts, void *workspace);
void grouped_gemm_dgrad(const Stream &stream, const GroupedGemmArgs &args, Restarts restarts,
                        const uint8_t *b_transposed, void *workspace);
void grouped_gemm_wgrad(const Stream &stream, const GroupedGemmWgradArgs &args, Restarts restarts, void *workspace);

} // namespace pyroute::cuda
