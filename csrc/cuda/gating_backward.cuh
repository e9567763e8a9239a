// topk_gating_backward: a row of gradients of the logits from the gradients of the weights, the balance loss and the
// z-loss, added in this order (docs/ops/gating.md, csrc/cpu/scalar/gating_backward.cpp). A warp takes a token.
//
//   slots     lane j has slot j: its logit, score and gradient; sums over slots go through shared memory, in order
//   row       read only if a part asks for all experts: softmax without a renormalisation whose eps vanishes, a loss
//   gradient  the slots' into a row of zeros, then every lane writes its experts
//
// Reads 8 k bytes, k logits or all E, writes E gradients a token. Source: this project.
#pragma once

#include "cuda/gating_args.h"
#include "cuda/gating_row.cuh"

namespace pyroute::cuda {

// A token's slots in memory that all lanes see, [k] each, and its row of gradients.
template <class Scalar> struct SlotRows {
    int32_t *ids; // -1: not routed
    Scalar *logits, *grads, *terms;
    Scalar *values; // scores
    Scalar *row;    // [E]
};

template <class F> PYROUTE_DEVICE void each_slot(int64_t top_k, F f) {
    PYROUTE_KEEP_LOOP
    for (int64_t j = lane_id(); j < top_k; j += 32)
        f(j);
}

// The sum of term(j) over the routed slots in order; every lane has it. No term of another slot is computed.
template <class Scalar, class Term>
PYROUTE_DEVICE Scalar sum_slots(const SlotRows<Scalar> &slots, int64_t top_k, Term term) {
    sync_warp();
    each_slot(top_k, [&](int64_t j) { slots.terms[j] = slots.ids[j] >= 0 ? term(j) : Scalar(0); });
    sync_warp();
    Scalar sum = 0;
    for (int64_t j = 0; j < top_k; ++j)
        sum += slots.terms[j];
    return sum;
}

// Loads the slots; false if none of them is routed.
template <class Scalar>
PYROUTE_DEVICE bool load_slots(const GatingBackwardArgs &args, int64_t token, const SlotRows<Scalar> &slots) {
    const int64_t top_k = args.router.top_k;
    const auto scale = static_cast<Scalar>(args.router.scaling_factor);
    bool routed = false;
    each_slot(top_k, [&](int64_t j) {
        const int32_t id = args.topk_idx[token * top_k + j];
        const bool valid = is_expert(id, args.router.num_experts);
        slots.ids[j] = valid ? id : -1;
        slots.logits[j] = valid ? logit_at<Scalar>(args.logits, token, id) : -ScoreLimits<Scalar>::infinity();
        slots.grads[j] = static_cast<const Scalar *>(args.grad_weights)[token * top_k + j] * scale;
        routed = routed || valid;
    });
    return ballot(routed) != 0;
}

// --- weights ------------------------------------------------------------------------------------------------------

// Softmax over the routed slots: their scores in place of their logits, their gradients in place of the weights'.
template <class Scalar> PYROUTE_DEVICE void slots_backward(int64_t top_k, const SlotRows<Scalar> &slots) {
    sync_warp();
    Scalar largest = -ScoreLimits<Scalar>::infinity();
    for (int64_t j = 0; j < top_k; ++j)
        if (slots.logits[j] > largest || slots.logits[j] != slots.logits[j])
            largest = slots.logits[j];
    sync_warp();
    each_slot(top_k, [&](int64_t j) { slots.logits[j] = exp_of(slots.logits[j] - largest); });
    const Scalar sum = sum_slots(slots, top_k, [&](int64_t j) { return slots.logits[j]; });
    each_slot(top_k, [&](int64_t j) { slots.logits[j] = slots.logits[j] / sum; });
    const Scalar inner = sum_slots(slots, top_k, [&](int64_t j) { return slots.logits[j] * slots.grads[j]; });
    each_slot(top_k, [&](int64_t j) { slots.grads[j] = slots.logits[j] * (slots.grads[j] - inner); });
}

// From the gradients of the weights to those of the scores; returns <score, its gradient>.
template <class Scalar>
PYROUTE_DEVICE Scalar renormalize_backward(const Router &router, const SlotRows<Scalar> &slots) {
    const int64_t top_k = router.top_k;
    if (router.renormalize == Renormalize::none)
        return sum_slots(slots, top_k, [&](int64_t j) { return slots.values[j] * slots.grads[j]; });
    const auto eps = static_cast<Scalar>(router.renormalize_eps);
    const Scalar total = sum_slots(slots, top_k, [&](int64_t j) { return slots.values[j]; });
    const bool is_sum = router.renormalize == Renormalize::sum, clamped = !is_sum && total < eps;
    const Scalar divisor = is_sum ? total + eps : (clamped ? eps : total);
    const Scalar inner =
        sum_slots(slots, top_k, [&](int64_t j) { return (slots.values[j] / divisor) * slots.grads[j]; });
    each_slot(top_k,
              [&](int64_t j) { slots.grads[j] = (clamped ? slots.grads[j] : slots.grads[j] - inner) / divisor; });
    return is_sum ? inner * (eps / divisor) : (clamped ? inner : Scalar(0));
}

// Is softmax with renormalisation a softmax over the chosen logits, to the last bit of its denominator?
template <class Scalar>
PYROUTE_DEVICE bool eps_vanishes(const Router &router, const SlotRows<Scalar> &slots, Scalar largest) {
    const Scalar sum = sum_slots(slots, router.top_k, [&](int64_t j) { return exp_of(slots.logits[j] - largest); });
    const Scalar least = sum / static_cast<Scalar>(router.num_experts);
    const auto eps = static_cast<Scalar>(router.renormalize_eps);
    return router.renormalize == Renormalize::sum ? least + eps == least : least >= eps;
}

// What a row's gradient is made of, beside the gradients of its slots.
template <class Scalar> struct RowTerms {
    bool dense = false, balance = false, z = false;
    Scalar dense_inner = 0;              // of softmax weights: g becomes p (g - dense_inner)
    Scalar scale = 0, balance_inner = 0; // then + slope (scale (f - balance_inner))
    Scalar share = 0;                    // then + share p
    const Scalar *fractions = nullptr;
};

// Leaves the slots' gradients in slots.grads. The row is loaded, if it will be wanted.
template <class Row, class Scalar>
PYROUTE_DEVICE void weights_backward(const Router &router, Row &row, bool &has_p, const SlotRows<Scalar> &slots,
                                     RowTerms<Scalar> &terms) {
    if (router.post)
        return slots_backward(router.top_k, slots);
    if (router.score == Score::softmax) {
        if (router.renormalize != Renormalize::none) {
            row.find_largest();
            if (eps_vanishes(router, slots, row.parts.largest))
                return slots_backward(router.top_k, slots);
        }
        row.softmax();
        has_p = true;
        terms.dense = true;
        each_slot(router.top_k, [&](int64_t j) { slots.values[j] = row.parts.of(slots.logits[j]); });
        terms.dense_inner = renormalize_backward(router, slots);
        return;
    }
    each_slot(router.top_k, [&](int64_t j) {
        const ScoreAndSlope<Scalar> of = score_and_slope_of(router.score, slots.logits[j]);
        slots.values[j] = of.score;
        slots.logits[j] = of.slope; // in its place
    });
    renormalize_backward(router, slots);
    each_slot(router.top_k, [&](int64_t j) { slots.grads[j] = slots.grads[j] * slots.logits[j]; });
}

// --- losses -------------------------------------------------------------------------------------------------------

PYROUTE_DEVICE int64_t sequence_of(const BalanceTerms &balance, int64_t token) {
    const int32_t given = balance.sequence[token];
    return given >= 0 && given < balance.num_sequences ? given : 0;
}

// <P, f>, and what the scores were divided by: 1 for softmax.
template <class Scalar> struct BalanceInner {
    Scalar inner, divisor;
};
template <class Row, class Scalar>
PYROUTE_DEVICE BalanceInner<Scalar> balance_inner(Score score, const Row &row, const Scalar *fractions) {
    if (score == Score::softmax)
        return {row.sum([&](int i, int64_t e) { return row.p(i, e) * fractions[e]; }), Scalar(1)};
    const Scalar total = row.sum([&](int i, int64_t e) { return score_of<false>(score, row.z(i, e)); });
    const Scalar divisor = total + static_cast<Scalar>(balance_eps);
    const Scalar inner =
        row.sum([&](int i, int64_t e) { return (score_of<false>(score, row.z(i, e)) / divisor) * fractions[e]; });
    return {inner, divisor};
}

// --- all tokens ---------------------------------------------------------------------------------------------------

template <class Row, class Scalar>
PYROUTE_DEVICE void write_row(const GatingBackwardArgs &args, const Row &row, const RowTerms<Scalar> &terms,
                              const Scalar *gradients, Scalar *out) {
    const Score score = args.router.score;
    if (!terms.dense && !terms.balance && !terms.z) // without a row
        return row.each([&](int, int64_t e) { out[e] = canonical(gradients[e]); });
    row.each([&](int i, int64_t e) {
        Scalar g = gradients[e];
        if (terms.dense)
            g = row.p(i, e) * (g - terms.dense_inner);
        if (terms.balance) {
            const Scalar slope = score == Score::softmax ? row.p(i, e) : row.score_and_slope(score, i, e).slope;
            g = g + slope * ((terms.fractions[e] - terms.balance_inner) * terms.scale);
        }
        if (terms.z)
            g = g + row.p(i, e) * terms.share;
        out[e] = canonical(g);
    });
}

template <class Row, class Scalar>
PYROUTE_DEVICE void backward_token(const GatingBackwardArgs &args, double z_scale, Row &row,
                                   const SlotRows<Scalar> &slots, Scalar *out) {
    const Router &router = args.router;
    const bool by_row = args.balance.fractions || z_scale != 0 || (router.score == Score::softmax && !router.post);
    RowTerms<Scalar> terms;
    bool has_p = false;
    const bool routed = load_slots(args, row.token, slots);
    if (by_row)
        row.load();
    row.each([&](int, int64_t e) { slots.row[e] = 0; });
    if (routed)
        weights_backward(router, row, has_p, slots, terms);
    sync_warp();
    each_slot(router.top_k, [&](int64_t j) { // an id that comes again adds again: all its slots find the same sum
        Scalar sum = 0;
        for (int64_t i = 0; routed && i < router.top_k; ++i)
            sum += slots.ids[i] == slots.ids[j] ? slots.grads[i] : Scalar(0);
        if (slots.ids[j] >= 0)
            store_same(slots.row + slots.ids[j], sum);
    });
    sync_warp();
    if (!has_p && (z_scale != 0 || (args.balance.fractions && router.score == Score::softmax)))
        row.softmax();
    if (args.balance.fractions) {
        const int64_t sequence = sequence_of(args.balance, row.token);
        terms.balance = true;
        terms.fractions = static_cast<const Scalar *>(args.balance.fractions) + sequence * router.num_experts;
        const BalanceInner<Scalar> part = balance_inner(router.score, row, terms.fractions);
        const Scalar scale = static_cast<const Scalar *>(args.balance.scales)[sequence];
        terms.balance_inner = part.inner;
        terms.scale = router.score == Score::softmax ? scale : scale / part.divisor;
    }
    if (z_scale != 0) {
        terms.z = true;
        terms.share = static_cast<Scalar>(z_scale) * row.parts.logsumexp();
    }
    write_row(args, row, terms, slots.row, out);
}

// `memory` holds the slots of a warp; the row of gradients is in it where Row keeps in registers, else it is `out`.
template <class Row, class Scalar>
PYROUTE_DEVICE void backward_tokens(const GatingBackwardLaunch &launch, Scalar *memory, bool row_in_memory) {
    const GatingBackwardArgs &args = launch.args;
    const int64_t num_experts = args.router.num_experts, top_k = args.router.top_k;
    const double z_scale = launch.z_scale ? *launch.z_scale : args.z_scale;
    SlotRows<Scalar> slots = {};
    slots.logits = memory;
    slots.grads = slots.logits + top_k;
    slots.terms = slots.grads + top_k;
    slots.values = slots.terms + top_k;
    slots.ids = reinterpret_cast<int32_t *>(slots.values + top_k);
    slots.row = memory + slot_arrays * top_k;
    const int64_t warps = blockDim.x / 32;
    for (int64_t token = blockIdx.x * warps + warp_id(); token < args.logits.num_tokens; token += gridDim.x * warps) {
        Scalar *out = static_cast<Scalar *>(args.grad_logits) + token * num_experts;
        Row row(args.logits, token);
        if (args.token_mask && !args.token_mask[token]) {
            row.each([&](int, int64_t e) { out[e] = 0; });
            continue;
        }
        if (!row_in_memory)
            slots.row = out;
        backward_token(args, z_scale, row, slots, out);
        sync_warp();
    }
}

template <int items> PYROUTE_DEVICE void backward_in_registers(const GatingBackwardLaunch &launch) {
    PYROUTE_DYNAMIC_SHARED(memory);
    auto *words = reinterpret_cast<float *>(memory) + warp_id() * static_cast<uint32_t>(launch.warp_words);
    backward_tokens<RegisterRow<items>>(launch, words, true);
}

template <class Scalar> PYROUTE_DEVICE void backward_any(const GatingBackwardLaunch &launch) {
    const int64_t warp = blockIdx.x * (blockDim.x / 32) + warp_id();
    auto *numbers = static_cast<Scalar *>(launch.workspace) + warp * slot_arrays * launch.args.router.top_k;
    backward_tokens<MemoryRow<Scalar>>(launch, numbers, false);
}

// --- terms of the losses ------------------------------------------------------------------------------------------

// terms[t]: <P_t, f>, or logsumexp squared.
template <class Scalar> PYROUTE_DEVICE void loss_terms_of_tokens(const LossTermsArgs &args) {
    const int64_t warps = blockDim.x / 32;
    for (int64_t token = blockIdx.x * warps + warp_id(); token < args.logits.num_tokens; token += gridDim.x * warps) {
        MemoryRow<Scalar> row(args.logits, token);
        double term;
        if (args.balance.fractions) {
            if (args.score == Score::softmax)
                row.softmax();
            const auto *fractions = static_cast<const Scalar *>(args.balance.fractions) +
                                    sequence_of(args.balance, token) * args.logits.num_experts;
            term = static_cast<double>(balance_inner(args.score, row, fractions).inner);
        } else {
            row.softmax();
            const auto logsumexp = static_cast<double>(row.parts.logsumexp());
            term = logsumexp * logsumexp;
        }
        if (lane_id() == 0)
            args.terms[token] = canonical(term);
    }
}

} // namespace pyroute::cuda
