#include "cuda/route_plan.h"

#include <algorithm>

namespace pyroute::cuda {

namespace {

constexpr const char *room = "permutation";
constexpr int64_t few_slots = 4096;     // that one block numbers in a microsecond or two
constexpr int64_t few_rows = 1 << 16;   // that one block presets, 256 KiB
constexpr int64_t few_counts = 4 << 20; // of all chunks, unless the slots are more: 16 MiB
constexpr int64_t most_chunks = 1024;   // of many slots
constexpr int64_t slots_of_block = 512; // a chunk of eight warps: 128 blocks for 8192 tokens, top-8
constexpr int64_t slots_of_warp = 256;  // a chunk of one warp

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

struct Chunks {
    int64_t count, slots;
};

Chunks chunks_of(int64_t num_slots, int64_t num_experts) {
    if (num_experts <= shared_experts) {
        const int64_t slots = std::max(slots_of_block, divide_up(divide_up(num_slots, most_chunks), 256) * 256);
        return {std::max<int64_t>(divide_up(num_slots, slots), 1), slots};
    }
    const int64_t affordable = std::min(std::max(few_counts, num_slots) / num_experts, 4 * most_chunks);
    const int64_t count = std::clamp<int64_t>(divide_up(num_slots, slots_of_warp), 1, std::max<int64_t>(affordable, 1));
    const int64_t slots = std::max<int64_t>(divide_up(divide_up(num_slots, count), 32) * 32, 32);
    return {std::max<int64_t>(divide_up(num_slots, slots), 1), slots};
}

} // namespace

size_t plan_routes_workspace(int64_t num_slots, int64_t num_experts) {
    return static_cast<size_t>(chunks_of(num_slots, num_experts).count * num_experts + 1) * sizeof(int32_t);
}

void plan_routes(const Stream &stream, const PlanRoutesArgs &given, void *workspace) {
    PlanRoutesArgs args = given;
    if (args.num_experts <= shared_experts && args.num_slots <= few_slots && args.num_rows <= few_rows)
        return launch(stream, room, "plan_routes_small", {1, 1024}, args);
    const Chunks chunks = chunks_of(args.num_slots, args.num_experts);
    args.num_chunks = chunks.count;
    args.slots_per_chunk = chunks.slots;
    args.chunk_rows = static_cast<int32_t *>(workspace);
    args.blocks_done = static_cast<uint32_t *>(workspace) + chunks.count * args.num_experts;
    const auto blocks = static_cast<uint32_t>(chunks.count);
    const bool wide = args.num_experts > shared_experts;
    if (wide) {
        fill(stream, workspace, 0, plan_routes_workspace(args.num_slots, args.num_experts));
        fill(stream, args.row_to_token, 0xff, static_cast<size_t>(args.num_rows) * sizeof(int32_t));
        launch(stream, room, "count_routes_wide", {blocks, 32}, args);
    } else {
        launch(stream, room, "count_routes", {blocks, 256}, args);
    }
    launch(stream, room, "sum_chunks", {static_cast<uint32_t>(divide_up(args.num_experts, 32)), 1024}, args);
    if (wide)
        launch(stream, room, "place_routes_wide", {blocks, 32}, args);
    else
        launch(stream, room, "place_routes", {blocks, 256}, args);
}

void write_layout(const Stream &stream, RouteLayout layout, const RouteLayoutArgs &args) {
    const RouteMaps &maps = args.maps;
    const int64_t slots = maps.num_tokens * maps.top_k;
    const auto write = [&](const char *kernel, int64_t entries) {
        launch(stream, room, kernel, {static_cast<uint32_t>(divide_up(entries, 256)), 256}, args);
    };
    switch (layout) {
    case RouteLayout::ends:
        return write("route_ends", args.num_experts);
    case RouteLayout::row_experts:
        return write("route_row_experts", maps.num_rows);
    case RouteLayout::dense_map:
        fill(stream, args.out, 0, static_cast<size_t>(maps.num_tokens) * static_cast<size_t>(args.num_experts));
        return write("route_dense_map", slots);
    case RouteLayout::rows_by_slot:
        return write("route_rows_by_slot", slots);
    }
}

} // namespace pyroute::cuda
