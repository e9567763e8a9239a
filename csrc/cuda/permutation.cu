// The entry points of the permutation kernels.
#include "cuda/permutation.cuh"

PYROUTE_KERNEL(permute_bytes, 256, 4, pyroute::PermuteArgs) { pyroute::cuda::permute_bytes(args); }
