// What other libraries read instead of a plan's own maps: one thread per entry, a binary search for a row's expert.
#pragma once

#include "cuda/device.cuh"
#include "cuda/permutation_args.h"

namespace pyroute::cuda {

PYROUTE_DEVICE int64_t grid_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
PYROUTE_DEVICE int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The expert in whose segment a row lies: how many segments end at or before it; num_experts past the last.
PYROUTE_DEVICE int64_t segment_of(const RouteLayoutArgs &args, int64_t row) {
    int64_t low = 0, high = args.num_experts;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (args.expert_offsets[middle + 1] <= row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// int32 [num_experts]: the end of each segment, for torch.
PYROUTE_DEVICE void route_ends(const RouteLayoutArgs &args) {
    auto *ends = static_cast<int32_t *>(args.out);
    for (int64_t e = grid_thread(); e < args.num_experts; e += grid_threads())
        ends[e] = static_cast<int32_t>(args.expert_offsets[e + 1]);
}

// int32 [num_rows]: each row's expert, -1 on padding, for DeepGEMM.
PYROUTE_DEVICE void route_row_experts(const RouteLayoutArgs &args) {
    auto *experts = static_cast<int32_t *>(args.out);
    for (int64_t row = grid_thread(); row < args.maps.num_rows; row += grid_threads()) {
        const int64_t expert = args.maps.row_to_token[row] >= 0 ? segment_of(args, row) : args.num_experts;
        experts[row] = expert < args.num_experts ? static_cast<int32_t>(expert) : -1;
    }
}

// bool [num_tokens, num_experts], false so far, for Megatron-LM and TransformerEngine.
PYROUTE_DEVICE void route_dense_map(const RouteLayoutArgs &args) {
    auto *dense = static_cast<uint8_t *>(args.out);
    const int64_t top_k = args.maps.top_k;
    for (int64_t slot = grid_thread(); slot < args.maps.num_tokens * top_k; slot += grid_threads()) {
        const int32_t row = args.maps.token_to_row[slot];
        const int64_t expert = row >= 0 ? segment_of(args, row) : args.num_experts;
        if (expert < args.num_experts)
            store_same(dense + slot / top_k * args.num_experts + expert, uint8_t{1}); // an expert may be chosen twice
    }
}

// int32 [top_k * num_tokens]: rows by slot, then token, for TransformerEngine.
PYROUTE_DEVICE void route_rows_by_slot(const RouteLayoutArgs &args) {
    auto *rows = static_cast<int32_t *>(args.out);
    const int64_t top_k = args.maps.top_k, tokens = args.maps.num_tokens;
    for (int64_t slot = grid_thread(); slot < tokens * top_k; slot += grid_threads())
        rows[slot % top_k * tokens + slot / top_k] = args.maps.token_to_row[slot];
}

} // namespace pyroute::cuda
