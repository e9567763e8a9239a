// topk_gating of routers that gating.cuh does not take: float64, more than 1024 experts, more than 32 groups, groups
// ranked by more than their best two. A warp takes a token; what ranks its experts lies in a workspace as integer keys.
//
// Lane l scores experts l, l + 32, ..., as the contract's sums go. The next best is the largest key after the last one
// in the order of keys and ids: k passes over the keys, and nothing is marked as taken.
//
// Reads E logits and k times E keys, writes 8 k bytes a token. Source: this project.
#pragma once

#include "cuda/gating_args.h"
#include "cuda/gating_row.cuh"

namespace pyroute::cuda {

// --- choice -------------------------------------------------------------------------------------------------------

template <class Key> struct Picked {
    Key key;
    int64_t at;
};

// The first of all positions in the order of keys, best first, and positions.
template <class Key> PYROUTE_DEVICE Picked<Key> before_all() { return {static_cast<Key>(~Key{0}), -1}; }

// The best of the keys [begin, end) after `last`; of those whose group is kept, where kept is not null.
template <class Key>
PYROUTE_DEVICE Picked<Key> next_best(const Key *keys, int64_t begin, int64_t end, const Picked<Key> &last,
                                     const Key *kept, int64_t group_size) {
    Picked<Key> best = {0, begin};
    for (int64_t i = begin + lane_id(); i < end; i += 32) {
        const Key key = keys[i];
        const bool after = key < last.key || (key == last.key && i > last.at);
        if (after && key > best.key && (!kept || kept[i / group_size]))
            best = {key, i};
    }
    PYROUTE_UNROLL
    for (uint32_t distance = 16; distance; distance /= 2) {
        const Picked<Key> other = {shuffle_xor(best.key, distance), shuffle_xor(best.at, distance)};
        if (other.key > best.key || (other.key == best.key && other.at < best.at))
            best = other;
    }
    return best;
}

// A warp's part of the workspace.
template <class Scalar> struct AnyRows {
    using Key = typename OrderKey<Scalar>::Key;
    Key *ranked, *values; // [E] what ranks experts, and experts inside their groups
    Key *groups, *kept;   // [G], [E]: what ranks groups, and 1 for those that the token keeps
};

template <class Scalar> PYROUTE_DEVICE void keep_groups(const Router &router, const AnyRows<Scalar> &rows) {
    using Key = typename OrderKey<Scalar>::Key;
    const int64_t size = router.num_experts / router.num_groups;
    for (int64_t g = 0; g < router.num_groups; ++g) {
        Picked<Key> last = before_all<Key>();
        Scalar sum = 0;
        for (int64_t i = 0; i < router.group_topn; ++i) {
            last = next_best<Key>(rows.values, g * size, (g + 1) * size, last, nullptr, 1);
            sum = i ? sum + value_of_key(last.key) : value_of_key(last.key);
        }
        if (lane_id() == 0) {
            rows.groups[g] = key_of(sum);
            rows.kept[g] = 0;
        }
    }
    sync_warp();
    Picked<Key> last = before_all<Key>();
    for (int64_t i = 0; i < router.topk_groups; ++i) {
        last = next_best<Key>(rows.groups, 0, router.num_groups, last, nullptr, 1);
        if (lane_id() == 0)
            rows.kept[last.at] = 1;
    }
    sync_warp();
}

template <class Scalar>
PYROUTE_DEVICE void choose_any(const GatingArgs &args, int64_t token, const RowSoftmax<Scalar> &softmax,
                               const AnyRows<Scalar> &rows, int32_t *ids) {
    using Key = typename OrderKey<Scalar>::Key;
    const Router &router = args.router;
    const bool grouped = router.num_groups > 1;
    for (int64_t e = lane_id(); e < router.num_experts; e += 32) {
        const Scalar z = logit_at<Scalar>(args.logits, token, e);
        Scalar score = 0;
        if (args.bias || grouped)
            score = router.score == Score::softmax ? softmax.of(z) : score_of<false>(router.score, z);
        const Scalar value = args.bias ? score + static_cast<const Scalar *>(args.bias)[e] : score;
        rows.ranked[e] = key_of(args.bias ? value : z);
        rows.values[e] = key_of(value);
    }
    sync_warp();
    if (grouped)
        keep_groups<Scalar>(router, rows);
    Picked<Key> last = before_all<Key>();
    for (int64_t j = 0; j < router.top_k; ++j) {
        last = next_best<Key>(rows.ranked, 0, router.num_experts, last, grouped ? rows.kept : nullptr,
                              router.num_experts / router.num_groups);
        if (lane_id() == 0)
            ids[j] = static_cast<int32_t>(last.at);
    }
}

// --- weights ------------------------------------------------------------------------------------------------------

// Softmax over the routed slots, from their logits.
template <class Scalar> PYROUTE_DEVICE void softmax_of_any_slots(const int32_t *ids, Scalar *slots, int64_t top_k) {
    Scalar largest = -ScoreLimits<Scalar>::infinity(), sum = 0;
    for (int64_t j = 0; j < top_k; ++j)
        if (ids[j] >= 0 && (slots[j] > largest || slots[j] != slots[j]))
            largest = slots[j];
    sync_warp();
    for (int64_t j = lane_id(); j < top_k; j += 32)
        slots[j] = ids[j] >= 0 ? exp_of(slots[j] - largest) : Scalar(0);
    sync_warp();
    for (int64_t j = 0; j < top_k; ++j)
        sum += slots[j];
    sync_warp();
    for (int64_t j = lane_id(); j < top_k; j += 32)
        slots[j] = ids[j] >= 0 ? slots[j] / sum : Scalar(0);
    sync_warp();
}

template <class Scalar>
PYROUTE_DEVICE void weigh_any(const GatingArgs &args, int64_t token, const RowSoftmax<Scalar> &softmax, int32_t *ids,
                              Scalar *weights) {
    const Router &router = args.router;
    for (int64_t j = lane_id(); j < router.top_k; j += 32) {
        Scalar value = 0;
        if (ids[j] >= 0) {
            const Scalar z = logit_at<Scalar>(args.logits, token, ids[j]);
            value = router.post ? z : router.score == Score::softmax ? softmax.of(z) : score_of<false>(router.score, z);
        }
        weights[j] = value;
    }
    sync_warp();
    if (router.post)
        softmax_of_any_slots(ids, weights, router.top_k);
    Scalar divisor = 1;
    if (router.renormalize != Renormalize::none) {
        const auto eps = static_cast<Scalar>(router.renormalize_eps);
        Scalar sum = 0;
        for (int64_t j = 0; j < router.top_k; ++j)
            sum += weights[j];
        divisor = router.renormalize == Renormalize::sum ? sum + eps : (sum < eps ? eps : sum);
        sync_warp();
    }
    for (int64_t j = lane_id(); j < router.top_k; j += 32) {
        const Scalar weight = canonical(weights[j] / divisor * static_cast<Scalar>(router.scaling_factor));
        weights[j] = ids[j] >= 0 ? weight : Scalar(0);
        if (ids[j] >= 0)
            atomic_add(args.tokens_per_expert + ids[j], 1);
    }
}

// --- all tokens ---------------------------------------------------------------------------------------------------

template <class Scalar> PYROUTE_DEVICE void gate_any_tokens(const AnyGatingLaunch &launch) {
    using Key = typename OrderKey<Scalar>::Key;
    const GatingArgs &args = launch.args;
    const Router &router = args.router;
    const int64_t warps = blockDim.x / 32, warp = blockIdx.x * warps + warp_id();
    const int64_t keys = gating_workspace_rows * router.num_experts + router.num_groups;
    AnyRows<Scalar> rows;
    rows.ranked = static_cast<Key *>(launch.workspace) + warp * keys;
    rows.values = rows.ranked + router.num_experts;
    rows.kept = rows.values + router.num_experts;
    rows.groups = rows.kept + router.num_experts;
    for (int64_t token = warp; token < args.logits.num_tokens; token += gridDim.x * warps) {
        int32_t *ids = args.topk_idx + token * router.top_k;
        RowSoftmax<Scalar> softmax = {};
        if (router.score == Score::softmax) {
            MemoryRow<Scalar> row(args.logits, token);
            row.softmax();
            softmax = row.parts;
        }
        if (!args.given_idx)
            choose_any(args, token, softmax, rows, ids);
        sync_warp();
        const bool masked = args.token_mask && !args.token_mask[token];
        for (int64_t j = lane_id(); j < router.top_k; j += 32) {
            const int32_t id = args.given_idx ? args.given_idx[token * router.top_k + j] : ids[j];
            ids[j] = masked || !is_expert(id, router.num_experts) ? -1 : id;
        }
        sync_warp();
        weigh_any(args, token, softmax, ids, static_cast<Scalar *>(args.topk_weights) + token * router.top_k);
        sync_warp();
    }
}

} // namespace pyroute::cuda
