// The entry points of grouped GEMM on e4m3 codes.
#include "cuda/grouped_gemm_mma.cuh"

namespace pyroute::cuda {
template <bool dgrad, int rows> using E4m3Rows = Config<Kind::fp8, false, dgrad, rows>;
using E4m3Wgrad = Config<Kind::fp8, true, true, 128>;

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
