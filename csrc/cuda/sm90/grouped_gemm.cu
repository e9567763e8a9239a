// The entry points of Hopper's grouped GEMM.
#include "cuda/sm90/entry.cuh"
#include "cuda/sm90/transpose.cuh"

using namespace pyroute::cuda::sm90;

PYROUTE_KERNEL(transpose_bytes, transpose_threads, 4, TransposeArgs) { pyroute::cuda::sm90::transpose_bytes(args); }

PYROUTE_PRODUCT(fp8_128)
PYROUTE_PRODUCT(fp8_128_pair)
PYROUTE_PRODUCT(fp8_128_overlap)
PYROUTE_PRODUCT(fp8_192)
PYROUTE_PRODUCT(fp8_192_pair)
PYROUTE_PRODUCT(fp8_128_f32)
PYROUTE_PRODUCT(fp8_64)
PYROUTE_PRODUCT(fp8_64_f32)
PYROUTE_PRODUCT(bf16_128)
PYROUTE_PRODUCT(bf16_128_f32)
PYROUTE_PRODUCT(bf16_64)
PYROUTE_PRODUCT(bf16_64_f32)
PYROUTE_PRODUCT(bf16_dgrad_128)
PYROUTE_PRODUCT(bf16_dgrad_128_f32)

PYROUTE_WGRAD(fp8_wgrad)
PYROUTE_WGRAD(bf16_wgrad)
