// One token's routing, whatever its logits: scores, choice, weights.
//
//   scores    a vector program per expert; only of the chosen experts where nothing else needs them
//   choice    of values without NaN: groups by their best two (gating_groups.h), then the k best by a threshold
//             (gating_select.h). With NaN, long lists and groups ranked by more: integer keys in the order of the
//             values, inserted one by one (gating_choice.h). Both give the same ids
//   weights   k values, in slot order
#pragma once

#include "cpu/scalar/gating_choice.h"
#include "cpu/scalar/gating_groups.h"
#include "cpu/scalar/gating_scores.h"

namespace pyroute::cpu::PYROUTE_ISA {

template <class Scalar> struct ForwardRows {
    using Key = typename Lane<Scalar>::Int;
    Scalar *logits, *scores, *bias, *ranked, *chosen, *weights, *candidates;
    Key *keys, *score_keys, *group_keys; // what ranks experts, experts inside groups without a bias, groups
    SortBuffer<Key> sort;
    int32_t *group_ids, *kept; // kept[g]: may the token take experts of group g
    char *free;                // the scratch memory that is left
    bool bias_is_finite = true;

    explicit ForwardRows(void *workspace, int64_t num_experts) {
        Scratch scratch{static_cast<char *>(workspace)};
        const int64_t row = padded(num_experts);
        Scalar **const values[] = {&logits, &scores, &bias, &ranked, &chosen, &weights};
        Key **const ordered[] = {&keys, &score_keys, &group_keys};
        for (Scalar **array : values)
            *array = take<Scalar>(scratch, row);
        for (Key **array : ordered)
            *array = take<Key>(scratch, row);
        group_ids = take<int32_t>(scratch, row);
        kept = take<int32_t>(scratch, row);
        sort = take_sort_buffer<Key>(scratch, row);
        candidates = take<Scalar>(scratch, row + row_block);
        free = scratch.free;
        memset(chosen, 0, static_cast<size_t>(row) * sizeof(Scalar));
    }

    void load_bias(const void *from, int64_t num_experts) {
        copy_row(from, 0, num_experts, bias);
        for (int64_t i = 0; i < num_experts; ++i)
            bias_is_finite = bias_is_finite && bias[i] - bias[i] == 0;
    }
};

// --- choice -------------------------------------------------------------------------------------------------------

template <class Scalar, class Value>
PYROUTE_INLINE void keys_of_row(typename Lane<Scalar>::Int *keys, int64_t count, Value value) {
    for (int64_t i = 0; i < count; i += Lane<Wide<Scalar>>::width)
        store(keys + i, order_keys(value(i)));
}

// The key that ranks a group: of the sum of its n largest values, largest first.
template <class Scalar>
PYROUTE_INLINE typename Lane<Scalar>::Int group_key(const typename Lane<Scalar>::Int *keys, int64_t size, int64_t n,
                                                    const ForwardRows<Scalar> &rows) {
    using Keys = typename Lane<Wide<Scalar>>::Int;
    Scalar score;
    if (n <= 2) {
        const auto top = top_two<Keys>(keys, size);
        if (n == 1)
            return top.first;
        score = value_of_key<Scalar>(top.first) + value_of_key<Scalar>(top.second);
    } else {
        best_positions<Keys>(keys, {1, size, nullptr}, n, rows.group_ids, rows.sort);
        score = value_of_key<Scalar>(keys[rows.group_ids[0]]);
        for (int64_t i = 1; i < n; ++i)
            score += value_of_key<Scalar>(keys[rows.group_ids[i]]);
    }
    return order_keys(broadcast<Wide<Scalar>>(score))[0];
}

// Marks the groups that a token keeps, from the keys that rank its experts.
template <class Scalar>
PYROUTE_INLINE void keep_groups(const Router &router, const typename Lane<Scalar>::Int *keys,
                                const ForwardRows<Scalar> &rows) {
    const int64_t size = router.num_experts / router.num_groups;
    for (int64_t g = 0; g < router.num_groups; ++g) {
        rows.group_keys[g] = group_key(keys + g * size, size, router.group_topn, rows);
        rows.kept[g] = 0;
    }
    best_positions<typename Lane<Wide<Scalar>>::Int>(rows.group_keys, {1, router.num_groups, nullptr},
                                                     router.topk_groups, rows.group_ids, rows.sort);
    for (int64_t i = 0; i < router.topk_groups; ++i)
        rows.kept[rows.group_ids[i]] = 1;
}

// Ids, best first, whatever the values. The scores are there if there is a bias or if there are groups.
template <class Scalar>
__attribute__((noinline)) void choose_any(const Router &router, bool biased, const Scalar *z,
                                          const ForwardRows<Scalar> &rows, int32_t *ids) {
    using V = Wide<Scalar>;
    const int64_t num_experts = router.num_experts, num_groups = router.num_groups;
    if (biased)
        keys_of_row<Scalar>(rows.keys, num_experts, [&](int64_t i) PYROUTE_INLINED {
            return load<V>(rows.scores + i) + load<V>(rows.bias + i);
        });
    else
        keys_of_row<Scalar>(rows.keys, num_experts, [&](int64_t i) PYROUTE_INLINED { return load<V>(z + i); });
    if (num_groups > 1) {
        if (!biased)
            keys_of_row<Scalar>(rows.score_keys, num_experts,
                                [&](int64_t i) PYROUTE_INLINED { return load<V>(rows.scores + i); });
        keep_groups(router, biased ? rows.keys : rows.score_keys, rows);
    }
    const Candidates candidates{num_groups, num_experts / num_groups, num_groups > 1 ? rows.kept : nullptr};
    best_positions<typename Lane<V>::Int>(rows.keys, candidates, router.top_k, ids, rows.sort);
}

// The same for values without NaN; false if it takes choose_any.
template <class Scalar>
PYROUTE_INLINE bool choose_ordered(const Router &router, bool biased, const Scalar *z, const ForwardRows<Scalar> &rows,
                                   int32_t *ids) {
    const int64_t top_k = router.top_k;
    const Scalar *values = biased ? rows.ranked : z;
    if (top_k > select_most)
        return false;
    if (router.num_groups == 1)
        return select_best(values, router.num_experts, top_k, ids);
    if (router.num_groups > groups_most || router.group_topn > 2 || router.num_experts > 65536)
        return false;
    const uint64_t kept = kept_groups(router, biased ? rows.ranked : rows.scores);
    const int64_t size = router.num_experts / router.num_groups;
    int32_t base[groups_most];
    if (!kept || !select_best(rows.candidates, gather_groups(values, size, kept, rows.candidates, base), top_k, ids))
        return false;
    const uint64_t inverse = ((uint64_t(1) << 32) + static_cast<uint64_t>(size) - 1) / static_cast<uint64_t>(size);
    for (int64_t j = 0; j < top_k; ++j) // position / size is exact for positions and sizes up to 2^16
        ids[j] += base[(static_cast<uint64_t>(ids[j]) * inverse) >> 32];
    return true;
}

// --- weights ------------------------------------------------------------------------------------------------------

template <class Scalar> PYROUTE_INLINE Scalar weight_divisor(const Router &router, Scalar sum) {
    const auto eps = static_cast<Scalar>(router.renormalize_eps);
    return router.renormalize == Renormalize::sum ? sum + eps : (sum < eps ? eps : sum);
}

// From scores at the slots, or logits at the slots for the post stage, to the weights. An id of -1 is not routed.
template <class Scalar>
PYROUTE_INLINE void finish_weights(const Router &router, const int32_t *ids, Scalar *values, Scalar *weights) {
    using V = Wide<Scalar>;
    const int64_t top_k = router.top_k;
    Scalar divisor = 1;
    if (router.renormalize != Renormalize::none) {
        Scalar sum = 0;
        for (int64_t j = 0; j < top_k; ++j)
            sum += ids[j] >= 0 ? values[j] : Scalar(0);
        divisor = weight_divisor(router, sum);
    }
    const auto scale = static_cast<Scalar>(router.scaling_factor);
    for (int64_t j = 0; j < top_k; j += Lane<V>::width)
        store(values + j, canonical(load<V>(values + j) / divisor * scale));
    for (int64_t j = 0; j < top_k; ++j)
        weights[j] = ids[j] >= 0 ? values[j] : Scalar(0);
}

template <class Program, class Scalar, class Keep>
PYROUTE_INLINE bool score_and_rank_row(const Scalar *z, int64_t count, Keep keep) {
    return map_row<Program>(z, count, [&](int64_t i, const auto &pack, const auto &e, auto range) PYROUTE_INLINED {
        keep(i, score_of<Program>(pack, e, range));
    });
}

// A softmax score is exp(logit - largest) / sum.
template <class Scalar> struct SoftmaxParts {
    Scalar largest, sum;
};

// The scores that choosing needs, and in rows.ranked score + bias; returns whether none of them is NaN. Without
// all_scores softmax leaves rows.scores to be divided by its sum.
template <class Scalar>
PYROUTE_INLINE bool score_token(const Router &router, bool biased, bool all_scores, const Scalar *z,
                                const ForwardRows<Scalar> &rows, SoftmaxParts<Scalar> &softmax) {
    using V = Wide<Scalar>;
    const int64_t num_experts = router.num_experts;
    const auto keep = [&](int64_t i, const auto &score) PYROUTE_INLINED {
        store_pack(rows.scores + i, score);
        if (biased)
            store_pack(rows.ranked + i, score + load_pack_like(score, rows.bias + i));
    };
    bool ordered;
    if (router.score == Score::softmax && (all_scores || !router.post)) {
        const RowRange<Scalar> range = range_of_row(z, num_experts);
        softmax = {range.largest, exp_row(z, range, rows.scores, num_experts)};
        ordered = all_scores ? softmax.sum == softmax.sum : range.largest == range.largest;
        if (!all_scores)
            return ordered;
        for (int64_t i = 0; i < num_experts; i += Lane<V>::width)
            keep(i, Pack<V, 1>{{load<V>(rows.scores + i) / softmax.sum}});
    } else if (!all_scores) {
        return !has_nan(z, num_experts);
    } else if (router.score == Score::sigmoid) {
        ordered = !score_and_rank_row<Sigmoid>(z, num_experts, keep);
    } else {
        ordered = !score_and_rank_row<Sqrtsoftplus>(z, num_experts, keep);
    }
    if (biased)
        fill_row(rows.ranked, num_experts, -WideOf<Scalar>::infinity);
    return ordered && rows.bias_is_finite;
}

template <class Scalar>
PYROUTE_INLINE void gate_token(const GatingArgs &args, const ForwardRows<Scalar> &rows, int64_t token) {
    const Router &router = args.router;
    const int64_t num_experts = router.num_experts, top_k = router.top_k;
    const Scalar *z = row_of(args.logits, token, rows.logits);
    int32_t *ids = args.topk_idx + token * top_k;
    Scalar *weights = static_cast<Scalar *>(args.topk_weights) + token * top_k;
    const bool biased = args.bias && !args.given_idx, all_scores = !args.given_idx && (biased || router.num_groups > 1);
    Scalar divisor = 1;
    if (!args.given_idx) {
        SoftmaxParts<Scalar> softmax = {};
        if (!score_token(router, biased, all_scores, z, rows, softmax) || !choose_ordered(router, biased, z, rows, ids))
            choose_any(router, biased, z, rows, ids);
        divisor = all_scores ? Scalar(1) : softmax.sum;
    } else {
        if (router.score == Score::softmax && !router.post)
            divisor = exp_row(z, range_of_row(z, num_experts), rows.scores, num_experts);
        for (int64_t j = 0; j < top_k; ++j) {
            const int32_t id = args.given_idx[token * top_k + j];
            ids[j] = is_expert(id, num_experts) ? id : -1;
        }
    }

    const bool by_slot = router.post || (router.score != Score::softmax && !all_scores);
    const Scalar *values = by_slot ? z : rows.scores;
    for (int64_t j = 0; j < top_k; ++j)
        rows.chosen[j] = ids[j] >= 0 ? values[ids[j]] : -WideOf<Scalar>::infinity;
    const int64_t full = whole_vectors<Scalar>(top_k);
    if (router.post)
        softmax_of_slots(rows.chosen, rows.weights, top_k);
    else if (by_slot)
        score_row<Scalar>(router.score, rows.chosen, rows.weights, full);
    else
        for (int64_t j = 0; j < full; j += Lane<Wide<Scalar>>::width)
            store(rows.weights + j, load<Wide<Scalar>>(rows.chosen + j) / divisor);
    finish_weights(router, ids, rows.weights, weights);
}

} // namespace pyroute::cpu::PYROUTE_ISA
