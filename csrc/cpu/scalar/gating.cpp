// Gating, forward, one token at a time.
//
//   scores    a vector program per expert; only of the chosen experts where nothing else needs them
//   choice    integer keys in the order of the values; a list of the k best so far, kept sorted, and its last key as
//   the
//             threshold that a vector of keys is compared with: past the first few vectors most are passed over whole.
//             Groups are lists of one, two or n; experts of the groups that are not kept are not scanned at all
//   weights   k values, in slot order
//
// Reads E logits and writes 8 k bytes a token; a row of scratch (E values, at most four times) stays in the L1 cache.
#include "cpu/gating.h"

#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

// --- choice -------------------------------------------------------------------------------------------------------

// Integers in the order of the values: NaN lowest, then -inf, ..., -0 equal to +0, ..., +inf.
template <class V> PYROUTE_INLINE typename Lane<V>::Int order_keys(V v) {
    using S = typename Lane<V>::Scalar;
    using Int = typename Lane<V>::Int;
    using I = typename Lane<S>::Int;
    constexpr int sign_shift = sizeof(I) * 8 - 1;
    constexpr I highest = static_cast<I>(~(typename Lane<S>::Uint(1) << sign_shift));
    const Int bits = bit_cast<Int>(v + S(0)); // -0 + 0 is +0
    const Int keys = bits ^ ((bits >> sign_shift) & highest);
    return v == v ? keys : Int{} + (-highest - 1);
}

template <class Scalar> PYROUTE_INLINE typename Lane<Scalar>::Int order_key(Scalar value) {
    return order_keys(broadcast<Wide<Scalar>>(value))[0];
}

template <class Scalar> PYROUTE_INLINE Scalar value_of_key(typename Lane<Scalar>::Int key) {
    using I = typename Lane<Scalar>::Int;
    constexpr int sign_shift = sizeof(I) * 8 - 1;
    constexpr I highest = static_cast<I>(~(typename Lane<Scalar>::Uint(1) << sign_shift));
    return key == -highest - 1 ? WideOf<Scalar>::nan
                               : bit_cast<Scalar>(static_cast<I>(key ^ ((key >> sign_shift) & highest)));
}

// One bit per lane of a comparison.
PYROUTE_INLINE unsigned lane_bits(const i32x8 &mask) {
#if defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#else
    unsigned bits = 0;
    for (int i = 0; i < 8; ++i)
        bits |= static_cast<unsigned>(mask[i] & 1) << i;
    return bits;
#endif
}
PYROUTE_INLINE unsigned lane_bits(const i64x4 &mask) {
#if defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
#else
    unsigned bits = 0;
    for (int i = 0; i < 4; ++i)
        bits |= static_cast<unsigned>(mask[i] & 1) << i;
    return bits;
#endif
}

// The `limit` largest keys met so far, largest first, with their positions. Positions are met in ascending order and an
// equal key goes behind, so ties go to the lower position.
template <class Key> struct Best {
    Key *keys;
    int32_t *ids;
    int64_t limit;
    int64_t count = 0;

    __attribute__((always_inline)) void insert(Key key, int64_t id) {
        int64_t j = count < limit ? count++ : limit - 1;
        for (; j > 0 && keys[j - 1] < key; --j) {
            keys[j] = keys[j - 1];
            ids[j] = ids[j - 1];
        }
        keys[j] = key;
        ids[j] = static_cast<int32_t>(id);
    }

    template <class IntVector> __attribute__((always_inline)) void scan(const Key *from, int64_t begin, int64_t end) {
        constexpr int width = sizeof(IntVector) / sizeof(Key);
        int64_t i = begin;
        for (; i < end && count < limit; ++i)
            insert(from[i], i);
        for (; i + width <= end; i += width) {
            const IntVector candidates = load<IntVector>(from + i);
            unsigned better = lane_bits(candidates > keys[limit - 1]);
            for (; better; better &= better - 1) {
                const int lane = __builtin_ctz(better);
                if (candidates[lane] > keys[limit - 1]) // the threshold may have risen since the comparison
                    insert(candidates[lane], i + lane);
            }
        }
        for (; i < end; ++i)
            if (from[i] > keys[limit - 1])
                insert(from[i], i);
    }
};

template <class Scalar> struct ForwardRows {
    using Key = typename Lane<Scalar>::Int;
    Scalar *logits, *scores, *bias, *chosen, *weights;
    Key *keys, *best_keys; // of the experts
    Key *score_keys;       // of the experts, where the scores rank the groups
    Key *group_keys, *group_best;
    int32_t *group_ids, *kept; // kept[g]: does the token take experts of group g

    explicit ForwardRows(void *workspace, int64_t num_experts) {
        Scratch scratch{static_cast<char *>(workspace)};
        const int64_t row = padded(num_experts);
        Scalar **const values[] = {&logits, &scores, &bias, &chosen, &weights};
        Key **const ordered[] = {&keys, &best_keys, &score_keys, &group_keys, &group_best};
        for (Scalar **array : values)
            *array = take<Scalar>(scratch, row);
        for (Key **array : ordered)
            *array = take<Key>(scratch, row);
        group_ids = take<int32_t>(scratch, row);
        kept = take<int32_t>(scratch, row);
    }
};

template <class Scalar, class Value>
PYROUTE_INLINE void keys_of_row(typename Lane<Scalar>::Int *keys, int64_t count, Value value) {
    for (int64_t i = 0; i < count; i += Lane<Wide<Scalar>>::width)
        store(keys + i, order_keys(value(i)));
}

// Which groups a token keeps, from the keys that rank its experts.
template <class Scalar>
PYROUTE_INLINE void keep_groups(const Router &router, const typename Lane<Scalar>::Int *keys,
                                const ForwardRows<Scalar> &rows) {
    using Key = typename Lane<Scalar>::Int;
    using Keys = typename Lane<Wide<Scalar>>::Int;
    const int64_t size = router.num_experts / router.num_groups;
    for (int64_t g = 0; g < router.num_groups; ++g) {
        Best<Key> best{rows.group_best, rows.group_ids, router.group_topn};
        best.template scan<Keys>(keys, g * size, (g + 1) * size);
        Scalar score = value_of_key<Scalar>(rows.group_best[0]);
        for (int64_t i = 1; i < router.group_topn; ++i)
            score += value_of_key<Scalar>(rows.group_best[i]);
        rows.group_keys[g] = order_key(score);
        rows.kept[g] = 0;
    }
    Best<Key> best{rows.group_best, rows.group_ids, router.topk_groups};
    best.template scan<Keys>(rows.group_keys, 0, router.num_groups);
    for (int64_t i = 0; i < router.topk_groups; ++i)
        rows.kept[rows.group_ids[i]] = 1;
}

// Ids, best first. The scores are there if there is a bias or if there are groups.
template <class Scalar>
PYROUTE_INLINE void choose_experts(const Router &router, bool biased, const ForwardRows<Scalar> &rows, int32_t *ids) {
    using V = Wide<Scalar>;
    using Key = typename Lane<Scalar>::Int;
    using Keys = typename Lane<V>::Int;
    const int64_t num_experts = router.num_experts;
    if (biased)
        keys_of_row<Scalar>(rows.keys, num_experts,
                            [&](int64_t i) { return load<V>(rows.scores + i) + load<V>(rows.bias + i); });
    else
        keys_of_row<Scalar>(rows.keys, num_experts, [&](int64_t i) { return load<V>(rows.logits + i); });
    Best<Key> best{rows.best_keys, ids, router.top_k};
    if (router.num_groups == 1)
        return best.template scan<Keys>(rows.keys, 0, num_experts);
    if (!biased)
        keys_of_row<Scalar>(rows.score_keys, num_experts, [&](int64_t i) { return load<V>(rows.scores + i); });
    keep_groups(router, biased ? rows.keys : rows.score_keys, rows);
    const int64_t size = num_experts / router.num_groups;
    for (int64_t g = 0; g < router.num_groups; ++g)
        if (rows.kept[g])
            best.template scan<Keys>(rows.keys, g * size, (g + 1) * size);
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

} // namespace

extern const GatingKernels gating_kernels = {forward};

} // namespace pyroute::cpu::PYROUTE_ISA
