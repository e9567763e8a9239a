// The best experts of a token, from integer keys in registers: groups by their best one or two, then k picks.
//
// A pick takes the largest key of all lanes, the lowest lane that has it and, in that lane, its first expert with it.
// Every lane keeps the two best of its run at hand, so that a pick only moves one up; a lane that has given both away
// looks for the next one after the last in the order of keys and ids. Nothing is marked as taken in the run itself.
#pragma once

#include "cuda/gating_lanes.cuh"

namespace pyroute::cuda {

// Best and second best of a lane's run; key 0: there is none.
struct BestTwo {
    uint32_t key1, key2;
    int32_t id1, id2;
};

PYROUTE_DEVICE void offer(BestTwo &best, uint32_t key, int32_t id) {
    const bool first = key > best.key1, second = key > best.key2; // of equal keys the first stays first
    best.id2 = first ? best.id1 : second ? id : best.id2;
    best.key2 = first ? best.key1 : second ? key : best.key2;
    best.id1 = first ? id : best.id1;
    best.key1 = first ? key : best.key1;
}

template <int items> PYROUTE_DEVICE BestTwo best_two(const Share &mine, const uint32_t (&keys)[items]) {
    BestTwo best = {keys[0], 0, 0, 0};
    PYROUTE_UNROLL
    for (int i = 1; i < items; ++i)
        offer(best, keys[i], i);
    return {best.key1, best.key2, mine.first + best.id1, mine.first + best.id2};
}

// The best after one of them.
template <int items>
PYROUTE_DEVICE BestTwo best_after(const Share &mine, const uint32_t (&keys)[items], uint32_t key, int32_t id) {
    BestTwo best = {0, 0, 0, 0};
    const int32_t last = id - mine.first;
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i) {
        const bool next = keys[i] <= (i > last ? key : key - 1) && keys[i] > best.key1; // equal keys: after it
        best.key1 = next ? keys[i] : best.key1;
        best.id1 = next ? i : best.id1;
    }
    best.id1 += mine.first;
    return best;
}

// --- groups -------------------------------------------------------------------------------------------------------

// Whether the token keeps this lane's group, from the keys of the lane's best two values. A group without an expert in
// any lane has the key 0, which is never picked.
template <int lanes>
PYROUTE_DEVICE bool keeps_group(const GatingLaunch &launch, const Share &mine, uint32_t first, uint32_t second) {
    const Router &router = launch.args.router;
    for (uint32_t distance = 1; distance < 1u << launch.group_shift; distance *= 2) {
        const uint32_t other_first = shuffle_xor(first, distance), other_second = shuffle_xor(second, distance);
        second = max_of(min_of(first, other_first), max_of(second, other_second));
        first = max_of(first, other_first);
    }
    uint32_t key = first;
    if (router.group_topn == 2 && first)
        key = key_of(value_of_key(first) + value_of_key(second));
    const uint32_t before = mine.before & ~(all_lanes << (lane_id() >> launch.group_shift << launch.group_shift));
    bool kept = false;
    const auto topk_groups = static_cast<int32_t>(router.topk_groups);
    for (int32_t i = 0; i < topk_groups; ++i) {
        const bool is_best = key == max_over_lanes<lanes>(key);
        const bool won = !(ballot(is_best) & before) && is_best; // every lane of the lowest group
        kept = kept || won;
        key = won ? 0 : key;
    }
    return kept;
}

// --- experts ------------------------------------------------------------------------------------------------------

// Writes the ids of the k best, best first; there are at least k keys that are not 0.
template <int lanes, int items>
PYROUTE_DEVICE void pick_experts(const Share &mine, const uint32_t (&keys)[items], BestTwo best, int32_t top_k,
                                 int32_t *ids) {
    PYROUTE_KEEP_LOOP
    for (const int32_t *const end = ids + top_k; ids != end; ++ids) {
        const uint32_t key = max_over_lanes<lanes>(best.key1);
        const int32_t id = best.id1;
        const bool is_best = best.key1 == key, won = !(ballot(is_best) & mine.before) && is_best;
        if (won)
            *ids = id;
        best.key1 = won ? best.key2 : best.key1;
        best.id1 = won ? best.id2 : best.id1;
        best.key2 = won ? 0 : best.key2;
        if (won && !best.key1)
            best = best_after(mine, keys, key, id);
    }
}

} // namespace pyroute::cuda
