// Gating, forward, one token at a time.
//
//   scores    a vector program per expert; only of the chosen experts where nothing else needs them
//   choice    integer keys in the order of the values; a sorted list of the k best so far. A group is ranked by its
//   one,
//             two or n largest; experts of the groups that are not kept are not looked at again
//   weights   k values, in slot order
//
// Reads E logits and writes 8 k bytes a token; a row of scratch (E values, at most four times) stays in the L1 cache.
#include "cpu/gating.h"

#include "cpu/scalar/gating_choice.h"
#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

template <class Scalar> struct ForwardRows {
    using Key = typename Lane<Scalar>::Int;
    Scalar *logits, *scores, *bias, *chosen, *weights;
    Key *keys, *score_keys, *group_keys; // what ranks experts, experts inside groups without a bias, groups
    Key *heap_keys;
    int32_t *group_ids, *kept; // kept[g]: may the token take experts of group g

    explicit ForwardRows(void *workspace, int64_t num_experts) {
        Scratch scratch{static_cast<char *>(workspace)};
        const int64_t row = padded(num_experts);
        Scalar **const values[] = {&logits, &scores, &bias, &chosen, &weights};
        Key **const ordered[] = {&keys, &score_keys, &group_keys, &heap_keys};
        for (Scalar **array : values)
            *array = take<Scalar>(scratch, row);
        for (Key **array : ordered)
            *array = take<Key>(scratch, row);
        group_ids = take<int32_t>(scratch, row);
        kept = take<int32_t>(scratch, row);
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
        best_positions<Keys>(keys, {1, size, nullptr}, n, rows.group_ids, rows.heap_keys);
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
                                                     router.topk_groups, rows.group_ids, rows.heap_keys);
    for (int64_t i = 0; i < router.topk_groups; ++i)
        rows.kept[rows.group_ids[i]] = 1;
}

// Ids, best first. The scores are there if there is a bias or if there are groups.
template <class Scalar>
PYROUTE_INLINE void choose_experts(const Router &router, bool biased, const ForwardRows<Scalar> &rows, int32_t *ids) {
    using V = Wide<Scalar>;
    const int64_t num_experts = router.num_experts, num_groups = router.num_groups;
    if (biased)
        keys_of_row<Scalar>(rows.keys, num_experts,
                            [&](int64_t i) { return load<V>(rows.scores + i) + load<V>(rows.bias + i); });
    else
        keys_of_row<Scalar>(rows.keys, num_experts, [&](int64_t i) { return load<V>(rows.logits + i); });
    if (num_groups > 1) {
        if (!biased)
            keys_of_row<Scalar>(rows.score_keys, num_experts, [&](int64_t i) { return load<V>(rows.scores + i); });
        keep_groups(router, biased ? rows.keys : rows.score_keys, rows);
    }
    const Candidates candidates{num_groups, num_experts / num_groups, num_groups > 1 ? rows.kept : nullptr};
    best_positions<typename Lane<V>::Int>(rows.keys, candidates, router.top_k, ids, rows.heap_keys);
}

// --- weights ------------------------------------------------------------------------------------------------------

// From scores at the slots, or logits at the slots for the post stage, to the weights in place.
template <class Scalar>
PYROUTE_INLINE void finish_weights(const Router &router, const int32_t *ids, Scalar *values, Scalar *weights) {
    const int64_t top_k = router.top_k;
    Scalar divisor = 1;
    if (router.renormalize != Renormalize::none) {
        const auto eps = static_cast<Scalar>(router.renormalize_eps);
        Scalar sum = 0;
        for (int64_t j = 0; j < top_k; ++j)
            sum += ids[j] >= 0 ? values[j] : Scalar(0);
        divisor = router.renormalize == Renormalize::sum ? sum + eps : (sum < eps ? eps : sum);
    }
    const auto scale = static_cast<Scalar>(router.scaling_factor);
    for (int64_t j = 0; j < top_k; ++j)
        weights[j] = ids[j] >= 0 ? canonical(values[j] / divisor * scale) : Scalar(0);
}

template <class Scalar>
PYROUTE_INLINE void gate_token(const GatingArgs &args, const ForwardRows<Scalar> &rows, int64_t token) {
    const Router &router = args.router;
    const int64_t num_experts = router.num_experts, top_k = router.top_k, row = padded(num_experts);
    int32_t *ids = args.topk_idx + token * top_k;
    Scalar *weights = static_cast<Scalar *>(args.topk_weights) + token * top_k;
    if (args.token_mask && !args.token_mask[token]) {
        for (int64_t j = 0; j < top_k; ++j) {
            ids[j] = -1;
            weights[j] = 0;
        }
        return;
    }
    load_row(args.logits, token, rows.logits);
    const bool all_scores = !args.given_idx && (args.bias || router.num_groups > 1);
    Scalar divisor = 1; // of what rows.scores holds
    if (router.score == Score::softmax && (all_scores || !router.post)) {
        const Scalar largest = largest_of_row(rows.logits, row);
        divisor = exp_row(rows.logits, largest, rows.scores, row);
        if (all_scores) {
            divide_row(rows.scores, divisor, row);
            divisor = 1;
        }
    } else if (all_scores) {
        score_row<Scalar>(router.score, rows.logits, rows.scores, nullptr, row);
    }

    if (!args.given_idx)
        choose_experts(router, args.bias != nullptr, rows, ids);
    else
        for (int64_t j = 0; j < top_k; ++j) {
            const int32_t id = args.given_idx[token * top_k + j];
            ids[j] = is_expert(id, num_experts) ? id : -1;
        }

    const bool by_slot = router.post || (router.score != Score::softmax && !all_scores);
    const Scalar *values = by_slot ? rows.logits : rows.scores;
    for (int64_t j = 0; j < top_k; ++j)
        rows.chosen[j] = ids[j] >= 0 ? values[ids[j]] : -WideOf<Scalar>::infinity;
    if (router.post)
        softmax_of_slots(rows.chosen, rows.weights, top_k);
    else if (by_slot)
        score_row<Scalar>(router.score, rows.chosen, rows.weights, nullptr, top_k);
    else
        for (int64_t j = 0; j < top_k; ++j)
            rows.weights[j] = rows.chosen[j] / divisor;
    finish_weights(router, ids, rows.weights, weights);
}

template <class Scalar> void gate_tokens(const GatingArgs &args, int64_t begin, int64_t end, void *workspace) {
    const ForwardRows<Scalar> rows(workspace, args.router.num_experts);
    if (args.bias)
        copy_row(args.bias, 0, args.router.num_experts, rows.bias);
    for (int64_t token = begin; token < end; ++token)
        gate_token(args, rows, token);
}

void forward(const GatingArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        gate_tokens<double>(args, begin, end, workspace);
    else
        gate_tokens<float>(args, begin, end, workspace);
}

// --- expert choice ------------------------------------------------------------------------------------------------

// Keys of the scores, by expert.
template <class Scalar> void score_keys(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *workspace) {
    using V = Wide<Scalar>;
    using Key = typename Lane<Scalar>::Int;
    const int64_t num_experts = args.logits.num_experts, row = padded(num_experts);
    const ForwardRows<Scalar> rows(workspace, num_experts);
    for (int64_t i = begin; i < end; ++i) {
        load_row(args.logits, args.tokens[i], rows.logits);
        const Scalar sum = exp_row(rows.logits, largest_of_row(rows.logits, row), rows.scores, row);
        keys_of_row<Scalar>(rows.keys, num_experts, [&](int64_t e) { return load<V>(rows.scores + e) / sum; });
        for (int64_t e = 0; e < num_experts; ++e)
            static_cast<Key *>(args.keys)[e * args.num_real + i] = rows.keys[e];
    }
}

template <class Scalar> void choose_tokens(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *heap) {
    using Key = typename Lane<Scalar>::Int;
    const int64_t num_real = args.num_real, capacity = args.capacity, taken = capacity < num_real ? capacity : num_real;
    for (int64_t e = begin; e < end; ++e) {
        const Key *keys = static_cast<const Key *>(args.keys) + e * num_real;
        int32_t *ids = args.token_idx + e * capacity;
        Scalar *weights = static_cast<Scalar *>(args.token_weights) + e * capacity;
        best_positions<typename Lane<Wide<Scalar>>::Int>(keys, {1, num_real, nullptr}, taken, ids,
                                                         static_cast<Key *>(heap));
        for (int64_t j = 0; j < capacity; ++j) {
            weights[j] = j < taken ? value_of_key<Scalar>(keys[ids[j]]) : Scalar(0);
            ids[j] = j < taken ? args.tokens[ids[j]] : -1;
        }
    }
}

void expert_choice_keys(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        score_keys<double>(args, begin, end, workspace);
    else
        score_keys<float>(args, begin, end, workspace);
}

void expert_choice(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *heap) {
    if (args.logits.type == FloatType::float64)
        choose_tokens<double>(args, begin, end, heap);
    else
        choose_tokens<float>(args, begin, end, heap);
}

} // namespace

extern const GatingKernels gating_kernels = {forward, expert_choice_keys, expert_choice};

} // namespace pyroute::cpu::PYROUTE_ISA
