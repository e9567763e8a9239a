// Routes: a stable counting sort of the slots by expert, without an atomic that decides an order.
//
//   count    each chunk of slots counts its experts; rows are preset to -1
//   offsets  per expert an exclusive sum over the chunks; the last block to finish sums the padded totals over experts
//   place    each chunk again: its warps hold consecutive runs of it, 32 slots at a time. A slot's row is the next one
//            of its expert, plus the number of lanes before it with the same expert
//
// With up to 1024 experts a chunk is a block's, whose warps have a table of next rows each in shared memory; with more
// it is one warp's, whose table is the chunk's row of the workspace. Up to 4096 slots in few rows, which is decoding,
// are one block and one launch. Three launches otherwise: 8 * (E + T k) bytes of tables in caches, ids twice, 4 bytes
// per slot and row.
#pragma once

#include "cuda/device.cuh"
#include "cuda/permutation_args.h"

namespace pyroute::cuda {

constexpr uint32_t no_expert = 0xffffffffu;
constexpr uint32_t shared_counts = 8 * shared_experts; // eight warps of 1024 experts, or 32 of 256
struct SharedRows {
    int32_t of[shared_counts];
};
struct SharedCounts {
    int32_t of[shared_counts / 8];
};
struct ScanScratch {
    int64_t of[33];
};

// The id of a slot, or no_expert for whatever is not in 0..num_experts-1.
PYROUTE_DEVICE uint32_t expert_of(const PlanRoutesArgs &args, int64_t slot) {
    uint64_t id = 0; // a negative one becomes huge
    switch (args.id_bytes) {
    case 1:
        id = static_cast<const uint8_t *>(args.topk_idx)[slot];
        break;
    case 2:
        id = static_cast<const uint16_t *>(args.topk_idx)[slot];
        break;
    case 4:
        id = static_cast<const uint32_t *>(args.topk_idx)[slot];
        break;
    default:
        id = static_cast<const uint64_t *>(args.topk_idx)[slot];
    }
    const bool negative = args.id_signed && id >> (8 * args.id_bytes - 1) != 0;
    return !negative && id < static_cast<uint64_t>(args.num_experts) ? static_cast<uint32_t>(id) : no_expert;
}

struct Slots {
    int64_t begin, end;
};

// Part i of n nearly equal ones; all but the last are multiples of 32.
PYROUTE_DEVICE Slots part_of(const Slots &slots, int64_t i, int64_t n) {
    const int64_t size = divide_up(divide_up(slots.end - slots.begin, n), int64_t{32}) * 32;
    const int64_t begin = min_of(slots.begin + i * size, slots.end);
    return {begin, min_of(begin + size, slots.end)};
}

PYROUTE_DEVICE Slots chunk_slots(const PlanRoutesArgs &args, int64_t chunk) {
    const int64_t begin = min_of(chunk * args.slots_per_chunk, args.num_slots);
    return {begin, min_of(begin + args.slots_per_chunk, args.num_slots)};
}

// `threads` threads, this one the number `thread`, count the experts of the slots.
PYROUTE_DEVICE void count_slots(const PlanRoutesArgs &args, const Slots &slots, int32_t *counts, uint32_t thread,
                                uint32_t threads) {
    for (int64_t slot = slots.begin + thread; slot < slots.end; slot += threads) {
        const uint32_t expert = expert_of(args, slot);
        if (expert != no_expert)
            atomic_add(counts + expert, 1);
    }
}

// One warp gives the slots their rows. next_row[e] is the next one of expert e, from first_row[e] on if that is given.
PYROUTE_DEVICE void place_slots(const PlanRoutesArgs &args, const Slots &slots, int32_t *next_row,
                                const int64_t *first_row) {
    const auto top_k = static_cast<uint32_t>(args.top_k);
    const uint32_t lane = lane_id();
    int64_t slot = slots.begin + lane;
    uint32_t next = slot < slots.end ? expert_of(args, slot) : no_expert; // loaded a step ahead
    for (int64_t base = slots.begin; base < slots.end; base += 32) {
        const uint32_t expert = next;
        const uint32_t same = match_any(expert);
        const uint32_t rank = count_bits(same & ((1u << lane) - 1));
        int64_t row = -1;
        if (expert != no_expert)
            row = (first_row ? first_row[expert] : 0) + next_row[expert] + rank;
        next = slot + 32 < slots.end ? expert_of(args, slot + 32) : no_expert;
        sync_warp(); // all have read
        if (expert != no_expert && rank == 0)
            next_row[expert] += static_cast<int32_t>(count_bits(same));
        sync_warp(); // and the next step reads what is written
        if (slot < slots.end)
            args.token_to_row[slot] = static_cast<int32_t>(row);
        if (row >= 0 && row < args.num_rows) // always so, unless the ids changed since they were counted
            args.row_to_token[row] = static_cast<int32_t>(static_cast<uint32_t>(slot) / top_k);
        slot += 32;
    }
}

// The sum over the threads before this one and over all; every thread of the block takes part.
struct Scan {
    int64_t before, total;
};
PYROUTE_DEVICE Scan scan_block(int64_t value, ScanScratch &scratch) {
    int64_t sum = value;
    PYROUTE_UNROLL
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const int64_t other = shuffle_up(sum, distance);
        sum += lane_id() >= distance ? other : 0;
    }
    if (lane_id() == 31)
        scratch.of[warp_id()] = sum;
    sync_block();
    if (warp_id() == 0) {
        const int64_t of_warp = lane_id() < blockDim.x / 32 ? scratch.of[lane_id()] : 0;
        int64_t warps = of_warp;
        PYROUTE_UNROLL
        for (uint32_t distance = 1; distance < 32; distance *= 2) {
            const int64_t other = shuffle_up(warps, distance);
            warps += lane_id() >= distance ? other : 0;
        }
        scratch.of[lane_id()] = warps - of_warp;
        if (lane_id() == 31)
            scratch.of[32] = warps;
    }
    sync_block();
    const Scan result = {scratch.of[warp_id()] + sum - value, scratch.of[32]};
    sync_block(); // scratch is free again
    return result;
}

PYROUTE_DEVICE int64_t padded(int64_t count, int64_t alignment) { return divide_up(count, alignment) * alignment; }

// Rows that no slot gets stay -1.
PYROUTE_DEVICE void clear_rows(const PlanRoutesArgs &args) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < args.num_rows; row += threads)
        args.row_to_token[row] = -1;
}

// Exclusive sums of one expert's counts, `stride` apart; gives the total.
PYROUTE_DEVICE int32_t sum_before(int32_t *counts, uint32_t n, int64_t stride, int32_t first) {
    int32_t sum = 0;
    for (uint32_t i = 0; i < n; ++i) {
        const int32_t here = counts[i * stride];
        counts[i * stride] = first + sum;
        sum += here;
    }
    return sum;
}

// All in one block of 1024 threads, one per expert.
PYROUTE_DEVICE void plan_routes_small(const PlanRoutesArgs &args) {
    PYROUTE_SHARED(SharedRows, shared);
    int32_t *const next_row = shared.of;
    PYROUTE_SHARED(ScanScratch, scratch);
    const auto num_experts = static_cast<uint32_t>(args.num_experts);
    const uint32_t runs = min_of(shared_counts / num_experts, 32u);
    for (uint32_t i = threadIdx.x; i < runs * num_experts; i += blockDim.x)
        next_row[i] = 0;
    clear_rows(args);
    sync_block();
    const Slots run = part_of({0, args.num_slots}, warp_id(), runs);
    int32_t *table = next_row + warp_id() * num_experts;
    if (warp_id() < runs)
        count_slots(args, run, table, lane_id(), 32);
    sync_block();
    int32_t count = 0;
    if (threadIdx.x < num_experts)
        count = sum_before(next_row + threadIdx.x, runs, num_experts, 0);
    const Scan rows = scan_block(padded(count, args.alignment), scratch);
    if (threadIdx.x < num_experts) {
        args.tokens_per_expert[threadIdx.x] = count;
        args.expert_offsets[threadIdx.x] = rows.before;
        for (uint32_t i = 0; i < runs; ++i)
            next_row[i * num_experts + threadIdx.x] += static_cast<int32_t>(rows.before);
    }
    if (threadIdx.x == 0)
        args.expert_offsets[num_experts] = rows.total;
    sync_block();
    if (warp_id() < runs)
        place_slots(args, run, table, nullptr);
}

// A block's chunk, counted in shared memory.
PYROUTE_DEVICE void count_routes(const PlanRoutesArgs &args) {
    PYROUTE_SHARED(SharedCounts, shared);
    int32_t *const counts = shared.of;
    const auto num_experts = static_cast<uint32_t>(args.num_experts);
    for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x)
        counts[e] = 0;
    clear_rows(args);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *args.blocks_done = 0;
    sync_block();
    count_slots(args, chunk_slots(args, blockIdx.x), counts, threadIdx.x, blockDim.x);
    sync_block();
    int32_t *const to = args.chunk_rows + static_cast<int64_t>(blockIdx.x) * num_experts;
    for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x)
        to[e] = counts[e];
}

// Any number of experts: counted where the counts stay.
PYROUTE_DEVICE void count_routes_wide(const PlanRoutesArgs &args) {
    int32_t *const counts = args.chunk_rows + static_cast<int64_t>(blockIdx.x) * args.num_experts;
    for (int64_t e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        counts[e] = 0;
    clear_rows(args);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *args.blocks_done = 0;
    sync_block();
    count_slots(args, chunk_slots(args, blockIdx.x), counts, threadIdx.x, blockDim.x);
}

// First rows of all experts, by one block.
PYROUTE_DEVICE void sum_experts(const PlanRoutesArgs &args, ScanScratch &scratch) {
    int64_t first = 0;
    for (int64_t base = 0; base < args.num_experts; base += blockDim.x) {
        const int64_t expert = base + threadIdx.x;
        const bool exists = expert < args.num_experts;
        const Scan rows = scan_block(exists ? padded(args.tokens_per_expert[expert], args.alignment) : 0, scratch);
        if (exists)
            args.expert_offsets[expert] = first + rows.before;
        first += rows.total;
    }
    if (threadIdx.x == 0)
        args.expert_offsets[args.num_experts] = first;
}

// A block of 1024 threads takes 32 experts, one per lane, and each of its warps a run of the chunks.
PYROUTE_DEVICE void sum_chunks(const PlanRoutesArgs &args) {
    PYROUTE_SHARED(SharedCounts, shared);
    int32_t *const of_warps = shared.of; // [32 warps, 32 experts]
    PYROUTE_SHARED(ScanScratch, scratch);
    PYROUTE_SHARED(bool, is_last);
    const int64_t expert = static_cast<int64_t>(blockIdx.x) * 32 + lane_id();
    const auto chunks = static_cast<uint32_t>(args.num_chunks), size = divide_up(chunks, 32u);
    const uint32_t begin = min_of(warp_id() * size, chunks), count = min_of(begin + size, chunks) - begin;
    int32_t *const column = args.chunk_rows + begin * args.num_experts + expert;
    int32_t sum = 0;
    if (expert < args.num_experts)
        for (uint32_t i = 0; i < count; ++i)
            sum += column[i * args.num_experts];
    of_warps[threadIdx.x] = sum;
    sync_block();
    if (expert < args.num_experts) {
        int32_t before = 0;
        for (uint32_t w = 0; w < warp_id(); ++w)
            before += of_warps[w * 32 + lane_id()];
        sum_before(column, count, args.num_experts, before);
        if (warp_id() == 31)
            args.tokens_per_expert[expert] = before + sum;
    }
    fence_device();
    sync_block();
    if (threadIdx.x == 0)
        is_last = atomic_add(args.blocks_done, 1u) == gridDim.x - 1;
    sync_block();
    if (!is_last)
        return;
    fence_device();
    sum_experts(args, scratch);
}

// A block's chunk: what its warps count in shared memory becomes their first rows.
PYROUTE_DEVICE void place_routes(const PlanRoutesArgs &args) {
    PYROUTE_SHARED(SharedRows, shared);
    int32_t *const next_row = shared.of;
    const auto num_experts = static_cast<uint32_t>(args.num_experts);
    const uint32_t runs = blockDim.x / 32;
    for (uint32_t i = threadIdx.x; i < runs * num_experts; i += blockDim.x)
        next_row[i] = 0;
    sync_block();
    const Slots run = part_of(chunk_slots(args, blockIdx.x), warp_id(), runs);
    int32_t *const table = next_row + warp_id() * num_experts;
    count_slots(args, run, table, lane_id(), 32);
    sync_block();
    const int32_t *const before = args.chunk_rows + static_cast<int64_t>(blockIdx.x) * num_experts;
    for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x)
        sum_before(next_row + e, runs, num_experts, static_cast<int32_t>(args.expert_offsets[e]) + before[e]);
    sync_block();
    place_slots(args, run, table, nullptr);
}

// A warp's chunk; its table was made by sum_chunks.
PYROUTE_DEVICE void place_routes_wide(const PlanRoutesArgs &args) {
    place_slots(args, chunk_slots(args, blockIdx.x),
                args.chunk_rows + static_cast<int64_t>(blockIdx.x) * args.num_experts, args.expert_offsets);
}

} // namespace pyroute::cuda
