// The entry points of Hopper's grouped GEMM.
#include "cuda/sm90/product.cuh"
#include "cuda/sm90/transpose.cuh"
#include "cuda/sm90/wgrad.cuh"

using namespace pyroute::cuda::sm90;

PYROUTE_KERNEL(transpose_bytes, transpose_threads, 4, TransposeArgs) { pyroute::cuda::sm90::transpose_bytes(args); }

#define PYROUTE_PRODUCT(shape)                                                                                         \
    PYROUTE_KERNEL(shape##_product, shape.threads(), 1, ProductArgs) { multiply_product<shape>(args); }

PYROUTE_PRODUCT(fp8_128)
PYROUTE_PRODUCT(fp8_128_pair)
PYROUTE_PRODUCT(fp8_128_overlap)
PYROUTE_PRODUCT(fp8_192)
PYROUTE_PRODUCT(fp8_192_pair)
PYROUTE_PRODUCT(fp8_128_f32)
PYROUTE_PRODUCT(fp8_64)
PYROUTE_PRODUCT(fp8_64_f32)
PYROUTE_PRODUCT(e5m2_128)
PYROUTE_PRODUCT(e5m2_128_f32)
PYROUTE_PRODUCT(e5m2_64)
PYROUTE_PRODUCT(e5m2_64_f32)
PYROUTE_PRODUCT(bf16_128)
PYROUTE_PRODUCT(bf16_128_f32)
PYROUTE_PRODUCT(bf16_64)
PYROUTE_PRODUCT(bf16_64_f32)
PYROUTE_PRODUCT(bf16_dgrad_128)
PYROUTE_PRODUCT(bf16_dgrad_128_f32)

PYROUTE_KERNEL(fp8_wgrad_product, fp8_wgrad.threads(), 1, WgradArgs) { multiply_wgrad<fp8_wgrad>(args); }
PYROUTE_KERNEL(e5m2_wgrad_product, e5m2_wgrad.threads(), 1, WgradArgs) { multiply_wgrad<e5m2_wgrad>(args); }
PYROUTE_KERNEL(bf16_wgrad_product, bf16_wgrad.threads(), 1, WgradArgs) { multiply_wgrad<bf16_wgrad>(args); }
