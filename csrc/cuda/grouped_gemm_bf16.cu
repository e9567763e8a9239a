// The entry points of grouped GEMM on bfloat16.
#include "cuda/grouped_gemm_mma.cuh"

namespace pyroute::cuda {
template <bool dgrad, int rows> using Bf16Rows = Config<Kind::bf16, false, dgrad, rows>;
using Bf16Wgrad = Config<Kind::bf16, true, true, 128>;

} // namespace pyroute::cuda

PYROUTE_KERNEL(grouped_gemm_bf16, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::Bf16Rows<false, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_bf16_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::Bf16Rows<false, 16>>(args);
}
PYROUTE_KERNEL(grouped_gemm_bf16_dgrad, 256, 1, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::Bf16Rows<true, 128>>(args);
}
PYROUTE_KERNEL(grouped_gemm_bf16_dgrad_low, 256, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::Bf16Rows<true, 16>>(args);
}
PYROUTE_KERNEL(grouped_gemm_bf16_wgrad, 256, 1, pyroute::cuda::WgradProductArgs) {
    pyroute::cuda::grouped_gemm_mma<pyroute::cuda::Bf16Wgrad>(args);
}
