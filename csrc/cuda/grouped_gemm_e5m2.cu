// The entry points of grouped GEMM on FP8 codes of which those of one side or both are e5m2, as gradients may be:
// <rows>_<weights>. A file of its own, so that who has none never compiles them.
#include "cuda/grouped_gemm_mma.cuh"

namespace pyroute::cuda {
template <bool a_e5m2, bool b_e5m2, bool dgrad, int rows>
using E5m2Rows = Config<Kind::fp8, false, dgrad, rows, a_e5m2, b_e5m2>;
template <bool a_e5m2, bool b_e5m2> using E5m2Wgrad = Config<Kind::fp8, true, true, 128, a_e5m2, b_e5m2>;

} // namespace pyroute::cuda

#define PYROUTE_E5M2_ROWS(name, a_e5m2, b_e5m2)                                                                        \
    PYROUTE_KERNEL(grouped_gemm_##name, 256, 1, pyroute::cuda::RowsProductArgs) {                                      \
        pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Rows<a_e5m2, b_e5m2, false, 128>>(args);                    \
    }                                                                                                                  \
    PYROUTE_KERNEL(grouped_gemm_##name##_low, 256, 2, pyroute::cuda::RowsProductArgs) {                                \
        pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Rows<a_e5m2, b_e5m2, false, 16>>(args);                     \
    }                                                                                                                  \
    PYROUTE_KERNEL(grouped_gemm_##name##_dgrad, 256, 1, pyroute::cuda::RowsProductArgs) {                              \
        pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Rows<a_e5m2, b_e5m2, true, 128>>(args);                     \
    }                                                                                                                  \
    PYROUTE_KERNEL(grouped_gemm_##name##_dgrad_low, 256, 2, pyroute::cuda::RowsProductArgs) {                          \
        pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Rows<a_e5m2, b_e5m2, true, 16>>(args);                      \
    }                                                                                                                  \
    PYROUTE_KERNEL(grouped_gemm_##name##_wgrad, 256, 1, pyroute::cuda::WgradProductArgs) {                             \
        pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Wgrad<a_e5m2, b_e5m2>>(args);                               \
    }

PYROUTE_E5M2_ROWS(e5m2_e4m3, true, false)
PYROUTE_E5M2_ROWS(e4m3_e5m2, false, true)
PYROUTE_E5M2_ROWS(e5m2_e5m2, true, true)
