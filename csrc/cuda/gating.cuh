// topk_gating: ids, weights and counts of tokens whose experts fit into the registers of a warp, or of 8 or 16 lanes of
// it: up to 1024 experts, in up to 32 groups that are ranked by their best one or two. gating_any.cuh takes the rest.
//
//   scores    of all experts only where the choice or a softmax asks for them; else of the chosen ones
//   choice    integer keys in the order of the numbers, k picks of the largest (gating_choice.cuh)
//   weights   slot j in lane j, from the token's row of scores or logits in shared memory; sums over slots in order
//
// Launch: warps over tokens, each its own, in as many blocks as fit the device at once; a block counts ids in shared
// memory and adds its counts to the global ones at its end. Registers: logits and keys, two per expert of a lane.
// Reads E logits, writes 8 k bytes a token, and is bound by instructions (docs/cuda.md): of the 1000 that a token of
// 256 experts in 8 groups costs, 240 are scores, 180 eight picks, 90 groups, 80 looks for a lane's next expert. Source:
// this project.
#pragma once

#include "cuda/gating_choice.cuh"

namespace pyroute::cuda {

// A token's shared memory.
struct TokenRows {
    float *values; // [E] logits, scores, or exponentials of softmax; zeros to the end of the lanes
    int32_t *ids;  // [k]
    float *slots;  // [k], and zeros to a multiple of four
};

// What a softmax score is made of: exp(logit - largest) / sum.
struct SoftmaxOf {
    float largest, sum;
};

// --- scores -------------------------------------------------------------------------------------------------------

template <bool in_range, int items> PYROUTE_DEVICE void exponentials(float (&z)[items], float largest) {
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        z[i] = exponential<in_range>(z[i] - largest);
}

// Turns logits into exponentials, in registers and in the row, and gives their sum.
template <int lanes, int items>
PYROUTE_DEVICE float softmax_sum(const GatingLaunch &launch, const Share &mine, float (&z)[items], float *row) {
    float largest = z[0];
    bool ordered = z[0] == z[0];
    PYROUTE_UNROLL
    for (int i = 1; i < items; ++i) {
        largest = max_of(largest, z[i]);
        ordered = ordered && z[i] == z[i];
    }
    largest = value_of_key(max_over_lanes<lanes>(key_of(largest)));
    if (ballot(!ordered) & token_lanes<lanes>(mine))
        largest = nan_f32();
    bool in_range = true;
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        in_range = in_range && z[i] - largest >= -score_range;
    if (ballot(in_range) == all_lanes)
        exponentials<true>(z, largest);
    else
        exponentials<false>(z, largest);
    store_run(launch, mine, z, row);
    sync_warp();
    return sum_of_row<lanes, items>(mine, row);
}

template <bool in_range, int items> PYROUTE_DEVICE void scores_of(Score score, float (&z)[items]) {
    if (score == Score::sigmoid) {
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i)
            z[i] = sigmoid_of<in_range>(z[i]);
    } else {
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i)
            z[i] = sqrtsoftplus_of<in_range>(z[i]);
    }
}

template <int items> PYROUTE_DEVICE bool all_in_range(const float (&z)[items], float range) {
    bool in_range = true;
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        in_range = in_range && fabsf(z[i]) <= range;
    return ballot(in_range) == all_lanes;
}

// --- choice -------------------------------------------------------------------------------------------------------

// With `numbers` none of them is NaN or -0.
template <bool numbers, int items>
PYROUTE_DEVICE void keys_of(const GatingLaunch &launch, const Share &mine, const float (&x)[items],
                            uint32_t (&keys)[items]) {
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        keys[i] = numbers ? key_of_bits(bits_of(x[i])) : key_of(x[i]);
    if (launch.full)
        return;
    PYROUTE_UNROLL
    for (int i = 0; i < items; ++i)
        keys[i] = i < mine.count ? keys[i] : 0;
}

// Chooses by logits where there are neither a bias nor groups. Leaves exponentials (softmax before the choice) or
// logits in the row; returns the exponentials' sum.
template <int lanes, int items>
PYROUTE_DEVICE float choose_by_logits(const GatingLaunch &launch, const Share &mine, float (&z)[items],
                                      const TokenRows &rows) {
    const Router &router = launch.args.router;
    if (!launch.args.given_idx) {
        uint32_t keys[items];
        keys_of<false>(launch, mine, z, keys);
        pick_experts<lanes>(mine, keys, best_two(mine, keys), launch.top_k, rows.ids);
    }
    if (router.score == Score::softmax && !router.post)
        return softmax_sum<lanes>(launch, mine, z, rows.values);
    store_run(launch, mine, z, rows.values);
    return 1.0f;
}

// Chooses by scores: with a bias, or with groups, or with both.
template <int lanes, int items>
PYROUTE_DEVICE float choose_by_scores(const GatingLaunch &launch, const Share &mine, bool bias_has_numbers,
                                      int64_t token, float (&z)[items], const TokenRows &rows) {
    const Router &router = launch.args.router;
    const bool biased = launch.args.bias != nullptr, grouped = router.num_groups > 1;
    uint32_t keys[items];
    if (!biased)
        keys_of<false>(launch, mine, z, keys);
    float sum = 1.0f;
    bool are_numbers = false; // and above 0
    if (router.score == Score::softmax) {
        sum = softmax_sum<lanes>(launch, mine, z, rows.values);
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i)
            z[i] = z[i] / sum;
    } else {
        are_numbers = all_in_range(z, range_of(router.score));
        if (are_numbers)
            scores_of<true>(router.score, z);
        else
            scores_of<false>(router.score, z);
        store_run(launch, mine, z, rows.values);
    }
    if (biased) {
        float bias[items];
        load_run<Float32>(launch.args.bias, 0, mine, launch.vectors, bias);
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i)
            z[i] = z[i] + bias[i]; // never -0: no score is
        if (are_numbers && bias_has_numbers)
            keys_of<true>(launch, mine, z, keys);
        else
            keys_of<false>(launch, mine, z, keys);
    }
    BestTwo best = best_two(mine, keys);
    if (grouped) {
        uint32_t first = best.key1, second = best.key2;
        if (!biased) {
            uint32_t ranking[items];
            keys_of<false>(launch, mine, z, ranking);
            const BestTwo values = best_two(mine, ranking);
            first = values.key1;
            second = values.key2;
        }
        if (!keeps_group<lanes>(launch, mine, first, second))
            best = {0, 0, 0, 0};
    }
    pick_experts<lanes>(mine, keys, best, launch.top_k, rows.ids);
    if (router.post) { // its weights are made of logits
        sync_warp();
        load_logits(launch, token, mine, z);
        store_run(launch, mine, z, rows.values);
    }
    return sum;
}

// --- weights ------------------------------------------------------------------------------------------------------

// A slot's value before any sum over slots: its score, or its logit for a softmax over slots; 0 if it is not routed.
template <int lanes>
PYROUTE_DEVICE void load_slots(const GatingLaunch &launch, const Share &mine, int64_t token, bool masked, bool scored,
                               float sum, const TokenRows &rows) {
    const GatingArgs &args = launch.args;
    const Router &router = args.router;
    PYROUTE_KEEP_LOOP
    for (auto j = static_cast<int32_t>(mine.index); j < launch.top_k; j += lanes) {
        int32_t id = args.given_idx ? args.given_idx[token * launch.top_k + j] : rows.ids[j];
        id = masked || static_cast<uint32_t>(id) >= static_cast<uint32_t>(launch.num_experts) ? -1 : id;
        float value = 0.0f;
        if (id >= 0) {
            value = rows.values[id];
            if (!router.post && router.score == Score::softmax)
                value = value / sum;
            else if (!router.post && !scored)
                value = score_of<false>(router.score, value);
        }
        rows.ids[j] = id;
        rows.slots[j] = value;
    }
}

// In order; slots that are not routed hold 0, as do those after the last, to a multiple of four.
PYROUTE_DEVICE float sum_of_slots(const float *slots, int32_t top_k) {
    float sum = 0.0f;
    for (int32_t j = 0; j < top_k; j += 4) {
        float four[4];
        load_four(slots + j, four);
        for (int i = 0; i < 4; ++i)
            sum += four[i];
    }
    return sum;
}

// From the slots' logits to a softmax over those that are routed.
template <int lanes> PYROUTE_DEVICE void softmax_of_slots(const Share &mine, int32_t top_k, const TokenRows &rows) {
    float largest = -infinity_f32();
    for (int32_t j = 0; j < top_k; ++j)
        if (rows.ids[j] >= 0 && (rows.slots[j] > largest || rows.slots[j] != rows.slots[j]))
            largest = rows.slots[j];
    sync_warp();
    for (auto j = static_cast<int32_t>(mine.index); j < top_k; j += lanes)
        rows.slots[j] = rows.ids[j] >= 0 ? exp_of(rows.slots[j] - largest) : 0.0f;
    sync_warp();
    const float sum = sum_of_slots(rows.slots, top_k);
    sync_warp();
    for (auto j = static_cast<int32_t>(mine.index); j < top_k; j += lanes)
        rows.slots[j] = rows.ids[j] >= 0 ? rows.slots[j] / sum : 0.0f;
}

PYROUTE_DEVICE float weight_divisor(const GatingLaunch &launch, const float *slots) {
    const Router &router = launch.args.router;
    if (router.renormalize == Renormalize::none)
        return 1.0f;
    const float sum = sum_of_slots(slots, launch.top_k), eps = launch.renormalize_eps;
    return router.renormalize == Renormalize::sum ? sum + eps : (sum < eps ? eps : sum);
}

template <int lanes>
PYROUTE_DEVICE void write_slots(const GatingLaunch &launch, const Share &mine, int64_t token, const TokenRows &rows,
                                int32_t *counts) {
    const int64_t first = token * launch.top_k;
    int32_t *const to_ids = launch.args.topk_idx + first;
    float *const to_weights = static_cast<float *>(launch.args.topk_weights) + first;
    const float divisor = weight_divisor(launch, rows.slots);
    PYROUTE_KEEP_LOOP
    for (auto j = static_cast<int32_t>(mine.index); j < launch.top_k; j += lanes) {
        const int32_t id = rows.ids[j];
        const float weight = canonical(rows.slots[j] / divisor * launch.scaling_factor);
        to_ids[j] = id;
        to_weights[j] = id >= 0 ? weight : 0.0f;
        if (id >= 0)
            atomic_add(counts + id, 1);
    }
}

// --- all tokens ---------------------------------------------------------------------------------------------------

// Adds a block's counts to everybody's.
PYROUTE_DEVICE void flush_counts(const GatingLaunch &launch, const int32_t *counts) {
    int32_t *to = launch.args.tokens_per_expert;
    for (auto e = static_cast<int32_t>(threadIdx.x); e < launch.num_experts; e += static_cast<int32_t>(blockDim.x)) {
        if (launch.alone)
            to[e] = counts[e];
        else if (counts[e])
            atomic_add(to + e, counts[e]);
    }
}

template <int lanes, int items> PYROUTE_DEVICE void gate_tokens(const GatingLaunch &launch) {
    PYROUTE_DYNAMIC_SHARED(memory);
    constexpr uint32_t tokens = 32 / lanes; // of a warp
    const GatingArgs &args = launch.args;
    const Router &router = args.router;
    const Share mine = share_of<lanes>(launch);
    auto *counts = reinterpret_cast<int32_t *>(memory);
    const int32_t count_words = divide_up(launch.num_experts, 4) * 4, slot_words = divide_up(launch.top_k, 4) * 4;
    TokenRows rows;
    rows.values = reinterpret_cast<float *>(counts + count_words) +
                  (warp_id() * tokens + mine.token) * static_cast<uint32_t>(launch.token_words);
    rows.ids = reinterpret_cast<int32_t *>(rows.values + row_words<lanes, items>);
    rows.slots = reinterpret_cast<float *>(rows.ids + slot_words);
    const auto thread = static_cast<int32_t>(threadIdx.x), index = static_cast<int32_t>(mine.index);
    for (int32_t e = thread; e < launch.num_experts; e += static_cast<int32_t>(blockDim.x))
        counts[e] = 0;
    if (!launch.full) // else every token writes all of its row
        for (int32_t e = index; e < row_words<lanes, items>; e += lanes)
            rows.values[e] = 0.0f;
    for (int32_t j = launch.top_k + index; j < slot_words; j += lanes)
        rows.slots[j] = 0.0f;
    sync_block();

    const bool by_scores = !args.given_idx && (args.bias || router.num_groups > 1);
    bool bias_has_numbers = false;
    if (args.bias) {
        float bias[items];
        load_run<Float32>(args.bias, 0, mine, launch.vectors, bias);
        bias_has_numbers = all_in_range(bias, 3.0e38f); // and no infinity, whose sum with a score would do as well
    }
    const int64_t warps = blockDim.x / 32, stride = gridDim.x * warps * tokens;
    for (int64_t base = (blockIdx.x * warps + warp_id()) * tokens; base < args.logits.num_tokens; base += stride) {
        const bool is_token = base + mine.token < args.logits.num_tokens;
        const int64_t token = is_token ? base + mine.token : args.logits.num_tokens - 1;
        float z[items];
        load_logits(launch, token, mine, z);
        const float sum = by_scores ? choose_by_scores<lanes>(launch, mine, bias_has_numbers, token, z, rows)
                                    : choose_by_logits<lanes>(launch, mine, z, rows);
        sync_warp();
        load_slots<lanes>(launch, mine, token, args.token_mask && !args.token_mask[token], by_scores, sum, rows);
        sync_warp();
        if (router.post) {
            softmax_of_slots<lanes>(mine, launch.top_k, rows);
            sync_warp();
        }
        if (is_token)
            write_slots<lanes>(launch, mine, token, rows, counts);
        sync_warp();
    }
    sync_block();
    flush_counts(launch, counts);
}

} // namespace pyroute::cuda
