// The entry points of the permutation kernels.
#include "cuda/permutation.cuh"
#include "cuda/permutation_backward.cuh"
#include "cuda/permutation_quantize.cuh"
#include "cuda/permutation_sum.cuh"
#include "cuda/route_layouts.cuh"
#include "cuda/routes.cuh"

namespace cuda = pyroute::cuda;

PYROUTE_KERNEL(plan_routes_small, 1024, 1, cuda::PlanRoutesArgs) { cuda::plan_routes_small(args); }
PYROUTE_KERNEL(count_routes, 256, 4, cuda::PlanRoutesArgs) { cuda::count_routes(args); }
PYROUTE_KERNEL(count_routes_wide, 32, 16, cuda::PlanRoutesArgs) { cuda::count_routes_wide(args); }
PYROUTE_KERNEL(sum_chunks, 1024, 1, cuda::PlanRoutesArgs) { cuda::sum_chunks(args); }
PYROUTE_KERNEL(place_routes, 256, 4, cuda::PlanRoutesArgs) { cuda::place_routes(args); }
PYROUTE_KERNEL(place_routes_wide, 32, 16, cuda::PlanRoutesArgs) { cuda::place_routes_wide(args); }

PYROUTE_KERNEL(route_ends, 256, 4, cuda::RouteLayoutArgs) { cuda::route_ends(args); }
PYROUTE_KERNEL(route_row_experts, 256, 4, cuda::RouteLayoutArgs) { cuda::route_row_experts(args); }
PYROUTE_KERNEL(route_dense_map, 256, 4, cuda::RouteLayoutArgs) { cuda::route_dense_map(args); }
PYROUTE_KERNEL(route_rows_by_slot, 256, 4, cuda::RouteLayoutArgs) { cuda::route_rows_by_slot(args); }

PYROUTE_KERNEL(permute_16, 256, 3, cuda::MoveArgs) { cuda::permute<cuda::Words>(args); }
PYROUTE_KERNEL(permute_4, 256, 3, cuda::MoveArgs) { cuda::permute<uint32_t>(args); }
PYROUTE_KERNEL(permute_2, 256, 3, cuda::MoveArgs) { cuda::permute<uint16_t>(args); }
PYROUTE_KERNEL(permute_1, 256, 3, cuda::MoveArgs) { cuda::permute<uint8_t>(args); }

// One entry point per float type; addresses that are no multiples of what they should be have the ones named _any.
#define PYROUTE_MOVES(name, Type, n, blocks)                                                                           \
    PYROUTE_KERNEL(unpermute_##name, 256, blocks, cuda::SumArgs) { cuda::unpermute<cuda::Type, n>(args); }             \
    PYROUTE_KERNEL(unpermute_backward_##name, 256, blocks, cuda::SumBackwardArgs) {                                    \
        cuda::unpermute_backward<cuda::Type, n>(args);                                                                 \
    }                                                                                                                  \
    PYROUTE_KERNEL(permute_quantize_##name, 256, blocks, cuda::QuantizeMoveArgs) {                                     \
        cuda::permute_quantize<cuda::Type, (n > 1)>(args);                                                             \
    }

PYROUTE_MOVES(float32, Float32, 4, 2)
PYROUTE_MOVES(bfloat16, Bfloat16, 8, 3)
PYROUTE_MOVES(float16, Float16, 8, 3)
PYROUTE_MOVES(float64, Float64, 2, 2)
PYROUTE_MOVES(float32_any, Float32, 1, 2)
PYROUTE_MOVES(bfloat16_any, Bfloat16, 1, 2)
PYROUTE_MOVES(float16_any, Float16, 1, 2)
PYROUTE_MOVES(float64_any, Float64, 1, 2)
