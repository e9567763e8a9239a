// Gating, backward: one gradient row per token from the weights, the balance loss and the z-loss, added in this order.
//
//   weights   scores that stand alone, softmax over the chosen logits, and softmax with a renormalisation whose eps
//             vanishes: k values scattered into zeros. Softmax otherwise: its dense Jacobian
//   balance   p (scale (f - <p, f>)) for softmax, slope ((scale / sum s) (f - <s / sum s, f>)) otherwise
//   z-loss    (scale logsumexp) p
//
// The row's probabilities are computed once, and only if one of the three needs them. Reads E logits and k gradients,
// writes E gradients a token.
#include "cpu/gating.h"

#include "cpu/scalar/gating_scores.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

template <class Scalar> struct BackwardRows {
    const Scalar *z; // the token's logits
    Scalar *logits, *grad, *p, *scores, *slopes, *fractions;
    Scalar *chosen, *slot_p, *slot_slopes, *slot_grads; // [k]
    int32_t *ids;

    explicit BackwardRows(void *workspace, int64_t num_experts) {
        Scratch scratch{static_cast<char *>(workspace)};
        const int64_t row = padded(num_experts);
        Scalar **const values[] = {&logits,    &grad,   &p,      &scores,      &slopes,
                                   &fractions, &chosen, &slot_p, &slot_slopes, &slot_grads};
        for (Scalar **array : values)
            *array = take<Scalar>(scratch, row);
        ids = take<int32_t>(scratch, row);
        memset(chosen, 0, static_cast<size_t>(row) * sizeof(Scalar));
    }
};

template <class Scalar> PYROUTE_INLINE Scalar logsumexp(Scalar largest, Scalar sum) {
    return largest + log_lanes(broadcast<Wide<Scalar>>(sum))[0];
}

// Sum over the routed slots in order.
template <class Scalar, class Term> PYROUTE_INLINE Scalar sum_slots(const int32_t *ids, int64_t top_k, Term term) {
    Scalar sum = 0;
    for (int64_t j = 0; j < top_k; ++j)
        if (ids[j] >= 0)
            sum += term(j);
    return sum;
}

// --- weights ------------------------------------------------------------------------------------------------------

// Softmax over the routed slots.
template <class Scalar> PYROUTE_INLINE void slots_backward(const Router &router, const BackwardRows<Scalar> &rows) {
    softmax_of_slots(rows.chosen, rows.slot_p, router.top_k);
    const Scalar inner =
        sum_slots<Scalar>(rows.ids, router.top_k, [&](int64_t j) { return rows.slot_p[j] * rows.slot_grads[j]; });
    for (int64_t j = 0; j < router.top_k; ++j)
        rows.slot_grads[j] = rows.slot_p[j] * (rows.slot_grads[j] - inner);
}

// From the gradient of the renormalised scores to that of the scores, in slot_grads; returns <score, its gradient>.
template <class Scalar>
PYROUTE_INLINE Scalar renormalize_backward(const Router &router, const BackwardRows<Scalar> &rows,
                                           const Scalar *values) {
    const int32_t *ids = rows.ids;
    Scalar *grads = rows.slot_grads;
    if (router.renormalize == Renormalize::none)
        return sum_slots<Scalar>(ids, router.top_k, [&](int64_t j) { return values[j] * grads[j]; });
    const auto eps = static_cast<Scalar>(router.renormalize_eps);
    const Scalar total = sum_slots<Scalar>(ids, router.top_k, [&](int64_t j) { return values[j]; });
    const bool is_sum = router.renormalize == Renormalize::sum, clamped = !is_sum && total < eps;
    const Scalar divisor = is_sum ? total + eps : (clamped ? eps : total);
    const Scalar inner =
        sum_slots<Scalar>(ids, router.top_k, [&](int64_t j) { return (values[j] / divisor) * grads[j]; });
    for (int64_t j = 0; j < router.top_k; ++j)
        grads[j] = (clamped ? grads[j] : grads[j] - inner) / divisor;
    return is_sum ? inner * (eps / divisor) : (clamped ? inner : Scalar(0));
}

// Is softmax with renormalisation a softmax over the chosen logits, to the last bit of its denominator? With m the
// largest logit the sum of the chosen scores is at least sum_j exp(z_j - m) / E: found without E exponentials.
template <class Scalar>
PYROUTE_INLINE bool eps_vanishes(const Router &router, const BackwardRows<Scalar> &rows, Scalar largest) {
    using V = Wide<Scalar>;
    for (int64_t j = 0; j < router.top_k; j += Lane<V>::width)
        store(rows.slot_p + j, exp_lanes(load<V>(rows.chosen + j) - largest));
    const Scalar sum = sum_slots<Scalar>(rows.ids, router.top_k, [&](int64_t j) { return rows.slot_p[j]; });
    const Scalar least = sum / static_cast<Scalar>(router.num_experts);
    const auto eps = static_cast<Scalar>(router.renormalize_eps);
    return router.renormalize == Renormalize::sum ? least + eps == least : least >= eps;
}

// Loads the slots; false if none of them is routed.
template <class Scalar>
PYROUTE_INLINE bool load_slots(const GatingBackwardArgs &args, const BackwardRows<Scalar> &rows, int64_t token) {
    const int64_t top_k = args.router.top_k;
    const auto scale = static_cast<Scalar>(args.router.scaling_factor);
    const Scalar *grad_weights = static_cast<const Scalar *>(args.grad_weights) + token * top_k;
    bool routed = false;
    for (int64_t j = 0; j < top_k; ++j) {
        const int32_t id = args.topk_idx[token * top_k + j];
        const bool valid = is_expert(id, args.router.num_experts);
        rows.ids[j] = valid ? id : -1;
        rows.chosen[j] = valid ? rows.z[id] : -WideOf<Scalar>::infinity;
        rows.slot_grads[j] = grad_weights[j] * scale;
        routed = routed || valid;
    }
    return routed;
}

// Probabilities of the row and what they were made of, on demand.
template <class Scalar> struct RowSoftmax {
    RowRange<Scalar> range = {};
    Scalar sum = 0;
    bool has_range = false, has_p = false;
};

template <class Scalar>
PYROUTE_INLINE void need_range(RowSoftmax<Scalar> &softmax, const BackwardRows<Scalar> &rows, int64_t num_experts) {
    if (!softmax.has_range)
        softmax.range = range_of_row(rows.z, num_experts);
    softmax.has_range = true;
}

template <class Scalar>
PYROUTE_INLINE void need_p(RowSoftmax<Scalar> &softmax, const BackwardRows<Scalar> &rows, int64_t num_experts) {
    if (softmax.has_p)
        return;
    need_range(softmax, rows, num_experts);
    softmax.sum = exp_row(rows.z, softmax.range, rows.p, num_experts);
    const Scalar divisor = softmax.sum;
    for_packs<Scalar>(num_experts, [&](auto tag, int64_t i) PYROUTE_INLINED {
        store_pack(rows.p + i, load_pack<decltype(tag)>(rows.p + i) / divisor);
    });
    softmax.has_p = true;
}

// What a row's gradient is made of, beside the gradients of its slots.
template <class Scalar> struct RowTerms {
    bool dense = false, balance = false, z = false;
    Scalar dense_inner = 0;              // of softmax weights: g becomes p (g - dense_inner)
    Scalar scale = 0, balance_inner = 0; // then + slope (scale (f - balance_inner))
    Scalar share = 0;                    // then + share p
    const Scalar *slopes = nullptr;      // p itself for softmax
};

// Leaves the slots' gradients in slot_grads.
template <class Scalar>
PYROUTE_INLINE void weights_backward(const Router &router, const BackwardRows<Scalar> &rows,
                                     RowSoftmax<Scalar> &softmax, RowTerms<Scalar> &terms) {
    if (router.post)
        return slots_backward(router, rows);
    if (router.score == Score::softmax) {
        if (router.renormalize != Renormalize::none) {
            need_range(softmax, rows, router.num_experts);
            if (eps_vanishes(router, rows, softmax.range.largest))
                return slots_backward(router, rows);
        }
        need_p(softmax, rows, router.num_experts);
        for (int64_t j = 0; j < router.top_k; ++j)
            rows.chosen[j] = rows.ids[j] >= 0 ? rows.p[rows.ids[j]] : Scalar(0);
        terms.dense = true;
        terms.dense_inner = renormalize_backward(router, rows, rows.chosen);
        return;
    }
    score_and_slope_row(router.score, rows.chosen, rows.slot_p, rows.slot_slopes, whole_vectors<Scalar>(router.top_k));
    renormalize_backward(router, rows, rows.slot_p);
    for (int64_t j = 0; j < router.top_k; ++j)
        rows.slot_grads[j] *= rows.slot_slopes[j];
}

// --- losses -------------------------------------------------------------------------------------------------------

// The row of f of a token's sequence, loaded when the sequence changes; returns the sequence.
template <class Scalar>
PYROUTE_INLINE int64_t load_fractions(const BalanceTerms &balance, const Logits &logits, int64_t token, int64_t loaded,
                                      Scalar *fractions) {
    const int32_t given = balance.sequence[token];
    const int64_t sequence = given >= 0 && given < balance.num_sequences ? given : 0;
    if (sequence != loaded)
        copy_row(balance.fractions, sequence, logits.num_experts, fractions);
    return sequence;
}

template <class Scalar> PYROUTE_INLINE Scalar sum_of_row(const Scalar *row, int64_t count) {
    return sum_row<Scalar>(count,
                           [&](auto tag, int64_t i) PYROUTE_INLINED { return load_pack<decltype(tag)>(row + i); });
}

// The sum of (s / divisor) f.
template <class Scalar>
PYROUTE_INLINE Scalar normalized_product(const Scalar *s, Scalar divisor, const Scalar *f, int64_t count) {
    return sum_row<Scalar>(count, [&](auto tag, int64_t i) PYROUTE_INLINED {
        using P = decltype(tag);
        return (load_pack<P>(s + i) / divisor) * load_pack<P>(f + i);
    });
}

template <class Scalar>
PYROUTE_INLINE void balance_backward(Score score, const BackwardRows<Scalar> &rows, Scalar scale, int64_t num_experts,
                                     RowTerms<Scalar> &terms) {
    const Scalar *f = rows.fractions, *p = rows.p;
    terms.balance = true;
    terms.scale = scale;
    terms.slopes = p;
    if (score != Score::softmax) {
        Scalar *scores = rows.scores;
        score_and_slope_row(score, rows.z, scores, rows.slopes, num_experts);
        const Scalar divisor = sum_of_row(scores, num_experts) + static_cast<Scalar>(balance_eps);
        terms.balance_inner = normalized_product(scores, divisor, f, num_experts);
        terms.scale = scale / divisor;
        terms.slopes = rows.slopes;
        return;
    }
    terms.balance_inner = sum_row<Scalar>(num_experts, [&](auto tag, int64_t i) PYROUTE_INLINED {
        using P = decltype(tag);
        return load_pack<P>(p + i) * load_pack<P>(f + i);
    });
}

// The slots' gradients into zeros.
template <class Scalar> PYROUTE_INLINE void scatter_slots(const BackwardRows<Scalar> &rows, int64_t top_k, Scalar *to) {
    for (int64_t j = 0; j < top_k; ++j)
        if (rows.ids[j] >= 0)
            to[rows.ids[j]] += rows.slot_grads[j];
}

template <class Scalar>
PYROUTE_INLINE void write_sparse(const BackwardRows<Scalar> &rows, int64_t top_k, int64_t num_experts, bool routed,
                                 Scalar *out) {
    memset(out, 0, static_cast<size_t>(num_experts) * sizeof(Scalar));
    if (!routed)
        return;
    scatter_slots(rows, top_k, out);
    for (int64_t j = 0; j < top_k; ++j)
        if (rows.ids[j] >= 0)
            out[rows.ids[j]] = canonical(out[rows.ids[j]]);
}

template <class Scalar>
PYROUTE_INLINE void write_dense(const BackwardRows<Scalar> &rows, const RowTerms<Scalar> &terms, int64_t num_experts,
                                Scalar *out) {
    for_packs<Scalar>(num_experts, [&](auto tag, int64_t i) PYROUTE_INLINED {
        using P = decltype(tag);
        P g = load_pack<P>(rows.grad + i);
        if (terms.dense)
            g = load_pack<P>(rows.p + i) * (g - terms.dense_inner);
        if (terms.balance)
            g = g + load_pack<P>(terms.slopes + i) *
                        ((load_pack<P>(rows.fractions + i) - terms.balance_inner) * terms.scale);
        if (terms.z)
            g = g + load_pack<P>(rows.p + i) * terms.share;
        g = zip([](const auto &v) PYROUTE_INLINED { return canonical_lanes(v); }, g);
        if (i + P::lanes <= num_experts)
            store_pack(out + i, g);
        else
            memcpy(out + i, &g, static_cast<size_t>(num_experts - i) * sizeof(Scalar));
    });
}

template <class Scalar>
PYROUTE_INLINE void backward_token(const GatingBackwardArgs &args, BackwardRows<Scalar> &rows, int64_t token,
                                   int64_t &sequence, Scalar *out) {
    const Router &router = args.router;
    const int64_t num_experts = router.num_experts;
    rows.z = row_of(args.logits, token, rows.logits);
    RowSoftmax<Scalar> softmax;
    RowTerms<Scalar> terms;
    const bool routed = load_slots(args, rows, token);
    if (routed)
        weights_backward(router, rows, softmax, terms);
    if (args.balance.fractions) {
        if (router.score == Score::softmax)
            need_p(softmax, rows, num_experts);
        sequence = load_fractions(args.balance, args.logits, token, sequence, rows.fractions);
        const Scalar scale = static_cast<const Scalar *>(args.balance.scales)[sequence];
        balance_backward(router.score, rows, scale, num_experts, terms);
    }
    if (args.z_scale != 0) {
        need_p(softmax, rows, num_experts);
        terms.z = true;
        terms.share = static_cast<Scalar>(args.z_scale) * logsumexp(softmax.range.largest, softmax.sum);
    }
    if (!terms.dense && !terms.balance && !terms.z)
        return write_sparse(rows, router.top_k, num_experts, routed, out);
    memset(rows.grad, 0, static_cast<size_t>(padded(num_experts)) * sizeof(Scalar));
    if (routed)
        scatter_slots(rows, router.top_k, rows.grad);
    write_dense(rows, terms, num_experts, out);
}

template <class Scalar>
void backward_tokens(const GatingBackwardArgs &args, int64_t begin, int64_t end, void *workspace) {
    const int64_t num_experts = args.router.num_experts;
    BackwardRows<Scalar> rows(workspace, num_experts);
    int64_t sequence = -1;
    for (int64_t token = begin; token < end; ++token) {
        Scalar *out = static_cast<Scalar *>(args.grad_logits) + token * num_experts;
        if (!args.token_mask || args.token_mask[token])
            backward_token(args, rows, token, sequence, out);
        else
            memset(out, 0, static_cast<size_t>(num_experts) * sizeof(Scalar));
    }
}

template <class Scalar>
void loss_terms_of_tokens(const LossTermsArgs &args, int64_t begin, int64_t end, void *workspace) {
    const int64_t num_experts = args.logits.num_experts;
    const BackwardRows<Scalar> rows(workspace, num_experts);
    int64_t sequence = -1;
    for (int64_t token = begin; token < end; ++token) {
        const Scalar *z = row_of(args.logits, token, rows.logits);
        Scalar divisor;
        if (args.balance.fractions && args.score != Score::softmax) {
            score_row(args.score, z, rows.p, num_experts);
            divisor = sum_of_row(rows.p, num_experts) + static_cast<Scalar>(balance_eps);
        } else {
            const RowRange<Scalar> range = range_of_row(z, num_experts);
            divisor = exp_row(z, range, rows.p, num_experts);
            if (!args.balance.fractions) {
                const double value = static_cast<double>(logsumexp(range.largest, divisor));
                args.terms[token] = canonical(value * value);
                continue;
            }
        }
        sequence = load_fractions(args.balance, args.logits, token, sequence, rows.fractions);
        args.terms[token] =
            canonical(static_cast<double>(normalized_product(rows.p, divisor, rows.fractions, num_experts)));
    }
}

void backward(const GatingBackwardArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        backward_tokens<double>(args, begin, end, workspace);
    else
        backward_tokens<float>(args, begin, end, workspace);
}

void loss_terms(const LossTermsArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        loss_terms_of_tokens<double>(args, begin, end, workspace);
    else
        loss_terms_of_tokens<float>(args, begin, end, workspace);
}

} // namespace

extern const GatingBackwardKernels gating_backward_kernels = {backward, loss_terms};

} // namespace pyroute::cpu::PYROUTE_ISA
