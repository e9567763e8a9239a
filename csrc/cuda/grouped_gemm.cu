// The entry points of grouped GEMM that need no tensor cores.
#include "cuda/grouped_gemm_general.cuh"
#include "cuda/grouped_gemm_plan.cuh"

PYROUTE_KERNEL(grouped_gemm_plan, 256, 1, pyroute::cuda::GemmPlanArgs) { pyroute::cuda::plan_grouped_gemm(args); }

PYROUTE_KERNEL(grouped_gemm_general, 128, 2, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_general<64, 32, 4, 4>(args);
}
PYROUTE_KERNEL(grouped_gemm_few_rows, 128, 3, pyroute::cuda::RowsProductArgs) {
    pyroute::cuda::grouped_gemm_general<8, 64, 1, 4>(args);
}
PYROUTE_KERNEL(grouped_gemm_wgrad_general, 128, 2, pyroute::cuda::WgradProductArgs) {
    pyroute::cuda::grouped_gemm_wgrad_general<64, 32, 4, 4>(args);
}
