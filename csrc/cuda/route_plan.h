// Plans on the GPU: the launchers. Every one queues work on the stream and returns.
#pragma once

#include "cuda/launch.h"
#include "cuda/permutation_args.h"

namespace pyroute::cuda {

// Bytes that plan_routes works in.
size_t plan_routes_workspace(int64_t num_slots, int64_t num_experts);

// Takes the arguments without their chunks.
void plan_routes(const Stream &stream, const PlanRoutesArgs &args, void *workspace);

// What RouteLayoutArgs::out is to hold; route_layouts.cuh says which type and shape.
enum class RouteLayout { ends, row_experts, dense_map, rows_by_slot };

void write_layout(const Stream &stream, RouteLayout layout, const RouteLayoutArgs &args);

} // namespace pyroute::cuda
