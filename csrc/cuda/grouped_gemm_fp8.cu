// The entry points of grouped GEMM on FP8 codes: e4m3, and e5m2 gradients.
#include "cuda/grouped_gemm_mma.cuh"

namespace pyroute::cuda {
template <bool dgrad, int rows> using E4m3Rows = Config<Kind::fp8, false, false, dgrad, rows>;
using E4m3Wgrad = Config<Kind::fp8, false, true, true, 128>;
template <bool dgrad, int rows> using E5m2Rows = Config<Kind::fp8, true, false, dgrad, rows>;
using E5m2Wgrad = Config<Kind::fp8, true, true, true, 128>;

} // namespace pyroute::cuda

PYROUTE_KERNEL(grouped_gemm_fp8, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E4m3Rows<false, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_fp8_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E4m3Rows<false, 16>>(args);
}
PYROUTE_KERNEL(grouped_gemm_fp8_dgrad, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E4m3Rows<true, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_fp8_dgrad_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E4m3Rows<true, 16>>(args);
}
PYROUTE_KERNEL(grouped_gemm_fp8_wgrad, 256, 1, pyroute::cuda::WgradProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E4m3Wgrad>(args);
}
PYROUTE_KERNEL(grouped_gemm_e5m2_dgrad, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Rows<true, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_e5m2_dgrad_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Rows<true, 16>>(args);
}
PYROUTE_KERNEL(grouped_gemm_e5m2_wgrad, 256, 1, pyroute::cuda::WgradProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::E5m2Wgrad>(args);
}
