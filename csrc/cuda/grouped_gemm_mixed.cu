// The entry points of grouped GEMM on bfloat16 rows and e4m3 weights.
#include "cuda/grouped_gemm_mma.cuh"

namespace pyroute::cuda {
template <bool dgrad, int rows> using MixedRows = Config<Kind::mixed, false, dgrad, rows>;

} // namespace pyroute::cuda

PYROUTE_KERNEL(grouped_gemm_mixed, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::MixedRows<false, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_mixed_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::MixedRows<false, 16>>(args);
}
PYROUTE_KERNEL(grouped_gemm_mixed_dgrad, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::MixedRows<true, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_mixed_dgrad_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::MixedRows<true, 16>>(args);
}
