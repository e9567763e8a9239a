// The entry points of the quantisation kernels: quantize_<blocks>_<type>_<format>, dequantize_<type>_<format>.
#include "cuda/quantization.cuh"
#include "cuda/transpose.cuh"

// How many thread blocks an SM is to have room for: what the registers of the elements that a thread holds allow,
// without spills on any target.
#define PYROUTE_QUANTIZE(name, row_blocks, blocks, Type, Format)                                                       \
    PYROUTE_KERNEL(quantize_row128_##name, 256, row_blocks, pyroute::QuantizeLaunch) {                                 \
        pyroute::cuda::quantize_row128<pyroute::cuda::Type, pyroute::cuda::Format>(args);                              \
    }                                                                                                                  \
    PYROUTE_KERNEL(quantize_tile128_##name, 256, 2, pyroute::QuantizeLaunch) {                                         \
        pyroute::cuda::quantize_tile128<pyroute::cuda::Type, pyroute::cuda::Format>(args);                             \
    }                                                                                                                  \
    PYROUTE_KERNEL(quantize_column128_##name, 256, 2, pyroute::QuantizeLaunch) {                                       \
        pyroute::cuda::quantize_column128<pyroute::cuda::Type, pyroute::cuda::Format>(args);                           \
    }                                                                                                                  \
    PYROUTE_KERNEL(quantize_any_##name, 256, 4, pyroute::QuantizeLaunch) {                                             \
        pyroute::cuda::quantize_any<pyroute::cuda::Type, pyroute::cuda::Format>(args);                                 \
    }                                                                                                                  \
    PYROUTE_KERNEL(dequantize_##name, 256, blocks, pyroute::DequantizeLaunch) {                                        \
        pyroute::cuda::dequantize<pyroute::cuda::Type, pyroute::cuda::Format>(args);                                   \
    }

PYROUTE_QUANTIZE(float32_e4m3, 5, 4, Float32, E4m3)
PYROUTE_QUANTIZE(bfloat16_e4m3, 5, 4, Bfloat16, E4m3)
PYROUTE_QUANTIZE(float16_e4m3, 5, 4, Float16, E4m3)
PYROUTE_QUANTIZE(float64_e4m3, 4, 3, Float64, E4m3)
PYROUTE_QUANTIZE(float32_e5m2, 5, 4, Float32, E5m2)
PYROUTE_QUANTIZE(bfloat16_e5m2, 5, 4, Bfloat16, E5m2)
PYROUTE_QUANTIZE(float16_e5m2, 5, 4, Float16, E5m2)
PYROUTE_QUANTIZE(float64_e5m2, 4, 3, Float64, E5m2)

PYROUTE_KERNEL(transpose_codes, 256, 4, pyroute::TransposeLaunch) { pyroute::cuda::transpose_bytes(args); }
PYROUTE_KERNEL(transpose_scales, 256, 4, pyroute::TransposeLaunch) { pyroute::cuda::transpose_words(args); }
