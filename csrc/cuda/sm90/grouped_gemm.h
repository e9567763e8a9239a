// Hopper's grouped GEMM: the launchers. csrc/cuda/grouped_gemm.cpp asks `serves` first and calls the portable kernels
// where it says no. The answer follows from the card, types, N, K and alignments, never from the rows, because the
// kernels' bytes differ.
#pragma once

#include "../../grouped_gemm.h"
#include "cuda/launch.h"

namespace pyroute::cuda::sm90 {

// Both operands bfloat16, or both FP8, of either kind, with float32 scales for blocks of
//   forward, dgrad   (1, 128) of the rows, (128, 128) of b
//   wgrad            (128, 1) of both, restarting at the segments
// 16-byte aligned, K (dgrad: N) a multiple of 16 bytes' elements, N (dgrad: K) a multiple of 8; bfloat16 dgrad: N a
// multiple of 64; FP8 wgrad and dgrad: N and K multiples of 16; everything below 2^31.
bool serves(const DeviceInfo &card, const GroupedGemmArgs &args, bool transposed);
bool serves_wgrad(const DeviceInfo &card, const GroupedGemmWgradArgs &args, bool restarts);

// Whether dgrad by these weights [experts, n, k] reads their codes along n; and those codes, [experts, k, n rounded up
// to a multiple of 128], for callers that keep them: zeros behind n.
bool wants_transposed(const DeviceInfo &card, const GemmOperand &b, int64_t experts, int64_t n, int64_t k);
void transpose_weights(const Stream &stream, const GemmOperand &b, int64_t experts, int64_t n, int64_t k, uint8_t *to);

// Bytes, at an address that is a multiple of 256. FP8 dgrad (unless it is given b_transposed) and wgrad copy operands
// into it, transposed.
size_t workspace(const GroupedGemmArgs &args, bool transposed, const uint8_t *b_transposed);
size_t wgrad_workspace(const GroupedGemmWgradArgs &args);

// expert_offsets are the caller's, of any values; expert_block_starts are not read. b_transposed: what
// transpose_weights made of b, or null.
void grouped_gemm(const Stream &stream, const GroupedGemmArgs &args, bool transposed, const uint8_t *b_transposed,
                  void *workspace);
void grouped_gemm_wgrad(const Stream &stream, const GroupedGemmWgradArgs &args, void *workspace);

// Kernels built with PYROUTE_HANG_TRAP write here when a wait never ends (ring.cuh): 8 words for each block, in pinned
// host memory, at least 8 * num_sms words. Null: nowhere.
void report_hangs_to(uint32_t *words);

} // namespace pyroute::cuda::sm90
