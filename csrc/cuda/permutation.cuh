#pragma once

#include "../permutation.h"
#include "cuda/device.cuh"

namespace pyroute::cuda {

PYROUTE_DEVICE void permute_bytes(const PermuteArgs &args) {
    const int64_t row = blockIdx.x;
    const int32_t token = args.maps.row_to_token[row];
    for (int64_t i = threadIdx.x; i < args.row_bytes; i += blockDim.x)
        args.rows[row * args.row_bytes + i] = token < 0 ? 0 : args.x[token * args.row_bytes + i];
}

} // namespace pyroute::cuda
