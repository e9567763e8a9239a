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

#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

template <class Scalar> struct BackwardRows {
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

// Softmax over the routed slots: grad must be zeros.
template <class Scalar> PYROUTE_INLINE void slots_backward(const Router &router, const BackwardRows<Scalar> &rows) {
    softmax_of_slots(rows.chosen, rows.slot_p, router.top_k);
    const Scalar inner =
        sum_slots<Scalar>(rows.ids, router.top_k, [&](int64_t j) { return rows.slot_p[j] * rows.slot_grads[j]; });
    for (int64_t j = 0; j < router.top_k; ++j)
        if (rows.ids[j] >= 0)
            rows.grad[rows.ids[j]] += rows.slot_p[j] * (rows.slot_grads[j] - inner);
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

template <class Scalar> PYROUTE_INLINE void dense_backward(const Router &router, const BackwardRows<Scalar> &rows) {
    using V = Wide<Scalar>;
    for (int64_t j = 0; j < router.top_k; ++j)
        rows.chosen[j] = rows.ids[j] >= 0 ? rows.p[rows.ids[j]] : Scalar(0);
    const Scalar inner = renormalize_backward(router, rows, rows.chosen);
    for (int64_t j = 0; j < router.top_k; ++j)
        if (rows.ids[j] >= 0)
            rows.grad[rows.ids[j]] += rows.slot_grads[j];
    for (int64_t i = 0; i < router.num_experts; i += Lane<V>::width)
        store(rows.grad + i, load<V>(rows.p + i) * (load<V>(rows.grad + i) - inner));
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
        rows.chosen[j] = valid ? rows.logits[id] : -WideOf<Scalar>::infinity;
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
PYROUTE_INLINE void need_range(RowSoftmax<Scalar> &softmax, const BackwardRows<Scalar> &rows, int64_t count) {
    if (!softmax.has_range)
        softmax.range = range_of_row(rows.logits, count);
    softmax.has_range = true;
}

template <class Scalar>
PYROUTE_INLINE void need_p(RowSoftmax<Scalar> &softmax, const BackwardRows<Scalar> &rows, int64_t row) {
    need_range(softmax, rows, row);
    if (!softmax.has_p) {
        softmax.sum = exp_row(rows.logits, softmax.range, rows.p, row);
        divide_row(rows.p, softmax.sum, row);
    }
    softmax.has_p = true;
}

template <class Scalar>
PYROUTE_INLINE void weights_backward(const Router &router, const BackwardRows<Scalar> &rows,
                                     RowSoftmax<Scalar> &softmax, int64_t row) {
    if (router.post)
        return slots_backward(router, rows);
    if (router.score == Score::softmax) {
        if (router.renormalize != Renormalize::none) {
            need_range(softmax, rows, row);
            if (eps_vanishes(router, rows, softmax.range.largest))
                return slots_backward(router, rows);
        }
        need_p(softmax, rows, row);
        return dense_backward(router, rows);
    }
    score_row(router.score, rows.chosen, rows.slot_p, rows.slot_slopes, router.top_k);
    renormalize_backward(router, rows, rows.slot_p);
    for (int64_t j = 0; j < router.top_k; ++j)
        if (rows.ids[j] >= 0)
            rows.grad[rows.ids[j]] += rows.slot_grads[j] * rows.slot_slopes[j];
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

template <class Scalar>
PYROUTE_INLINE void balance_backward(Score score, const BackwardRows<Scalar> &rows, Scalar scale, int64_t row) {
    using V = Wide<Scalar>;
    constexpr int width = Lane<V>::width;
    const Scalar *f = rows.fractions;
    if (score == Score::softmax) {
        const Scalar inner = sum_row<Scalar>(row, [&](int64_t i) { return load<V>(rows.p + i) * load<V>(f + i); });
        for (int64_t i = 0; i < row; i += width) {
            const V term = load<V>(rows.p + i) * (scale * (load<V>(f + i) - inner));
            store(rows.grad + i, load<V>(rows.grad + i) + term);
        }
        return;
    }
    score_row(score, rows.logits, rows.scores, rows.slopes, row);
    const Scalar sum = sum_row<Scalar>(row, [&](int64_t i) { return load<V>(rows.scores + i); });
    const Scalar divisor = sum + static_cast<Scalar>(balance_eps);
    const Scalar inner =
        sum_row<Scalar>(row, [&](int64_t i) { return (load<V>(rows.scores + i) / divisor) * load<V>(f + i); });
    const Scalar share = scale / divisor;
    for (int64_t i = 0; i < row; i += width) {
        const V term = load<V>(rows.slopes + i) * (share * (load<V>(f + i) - inner));
        store(rows.grad + i, load<V>(rows.grad + i) + term);
    }
}

template <class Scalar> PYROUTE_INLINE void store_gradient(const Scalar *grad, Scalar *out, int64_t num_experts) {
    using V = Wide<Scalar>;
    int64_t i = 0;
    for (; i + Lane<V>::width <= num_experts; i += Lane<V>::width)
        store(out + i, canonical(load<V>(grad + i)));
    for (; i < num_experts; ++i)
        out[i] = canonical(grad[i]);
}

template <class Scalar>
void backward_tokens(const GatingBackwardArgs &args, int64_t begin, int64_t end, void *workspace) {
    using V = Wide<Scalar>;
    const Router &router = args.router;
    const int64_t num_experts = router.num_experts, row = padded(num_experts);
    const BackwardRows<Scalar> rows(workspace, num_experts);
    const auto z_scale = static_cast<Scalar>(args.z_scale);
    int64_t sequence = -1;
    for (int64_t token = begin; token < end; ++token) {
        Scalar *out = static_cast<Scalar *>(args.grad_logits) + token * num_experts;
        if (args.token_mask && !args.token_mask[token]) {
            memset(out, 0, static_cast<size_t>(num_experts) * sizeof(Scalar));
            continue;
        }
        load_row(args.logits, token, rows.logits);
        memset(rows.grad, 0, static_cast<size_t>(row) * sizeof(Scalar));
        RowSoftmax<Scalar> softmax;
        if (load_slots(args, rows, token))
            weights_backward(router, rows, softmax, row);
        if (args.balance.fractions) {
            if (router.score == Score::softmax)
                need_p(softmax, rows, row);
            sequence = load_fractions(args.balance, args.logits, token, sequence, rows.fractions);
            balance_backward(router.score, rows, static_cast<const Scalar *>(args.balance.scales)[sequence], row);
        }
        if (args.z_scale != 0) {
            need_p(softmax, rows, row);
            const Scalar share = z_scale * logsumexp(softmax.range.largest, softmax.sum);
            for (int64_t i = 0; i < row; i += Lane<V>::width)
                store(rows.grad + i, load<V>(rows.grad + i) + share * load<V>(rows.p + i));
        }
        store_gradient(rows.grad, out, num_experts);
    }
}

template <class Scalar>
void loss_terms_of_tokens(const LossTermsArgs &args, int64_t begin, int64_t end, void *workspace) {
    using V = Wide<Scalar>;
    const int64_t row = padded(args.logits.num_experts);
    const BackwardRows<Scalar> rows(workspace, args.logits.num_experts);
    int64_t sequence = -1;
    for (int64_t token = begin; token < end; ++token) {
        load_row(args.logits, token, rows.logits);
        Scalar divisor;
        if (args.balance.fractions && args.score != Score::softmax) {
            score_row<Scalar>(args.score, rows.logits, rows.p, nullptr, row);
            divisor =
                sum_row<Scalar>(row, [&](int64_t i) { return load<V>(rows.p + i); }) + static_cast<Scalar>(balance_eps);
        } else {
            const RowRange<Scalar> range = range_of_row(rows.logits, row);
            divisor = exp_row(rows.logits, range, rows.p, row);
            if (!args.balance.fractions) {
                const double value = static_cast<double>(logsumexp(range.largest, divisor));
                args.terms[token] = canonical(value * value);
                continue;
            }
        }
        sequence = load_fractions(args.balance, args.logits, token, sequence, rows.fractions);
        args.terms[token] = canonical(static_cast<double>(sum_row<Scalar>(
            row, [&](int64_t i) { return (load<V>(rows.p + i) / divisor) * load<V>(rows.fractions + i); })));
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
