// A token's row over the 32 lanes of a warp: lane l has experts l, l + 32, ..., as the contract's sums go. In registers
// up to 1024 experts, else read again from memory and computed again whenever it is wanted; the bits are the same.
//
//   each(f)      f(i, e) of a lane's experts e, i counting them
//   sum(f)       the sum over experts of f(i, e), in the order of the contract
//   z, p         logit, and softmax score once `softmax()` was called
#pragma once

#include "cuda/gating_scores.cuh"

namespace pyroute::cuda {

// The logit of an expert, as it is computed with.
template <class Scalar> PYROUTE_DEVICE Scalar logit_at(const Logits &logits, int64_t token, int64_t expert) {
    const int64_t at = token * logits.num_experts + expert;
    if constexpr (sizeof(Scalar) == 8) {
        return static_cast<const double *>(logits.data)[at];
    } else {
        if (logits.type == FloatType::float32)
            return static_cast<const float *>(logits.data)[at];
        const uint16_t half = static_cast<const uint16_t *>(logits.data)[at];
        return logits.type == FloatType::bfloat16 ? bf16_to_f32(half) : f16_to_f32(half);
    }
}

template <class Scalar> PYROUTE_DEVICE Scalar sum_over_lanes(Scalar x) {
    PYROUTE_UNROLL
    for (uint32_t distance = 16; distance; distance /= 2)
        x += shuffle_xor(x, distance);
    return x;
}

// The largest of all lanes; NaN if there is one.
template <class Scalar> PYROUTE_DEVICE Scalar max_over_lanes_or_nan(Scalar x) {
    PYROUTE_UNROLL
    for (uint32_t distance = 16; distance; distance /= 2) {
        const Scalar other = shuffle_xor(x, distance);
        x = other > x || other != other ? other : x;
    }
    return x;
}

// exp(logit - largest) / sum
template <class Scalar> struct RowSoftmax {
    Scalar largest, sum;
    PYROUTE_DEVICE Scalar exponential_of(Scalar z) const { return exp_of(z - largest); }
    PYROUTE_DEVICE Scalar of(Scalar z) const { return exponential_of(z) / sum; }
    PYROUTE_DEVICE Scalar logsumexp() const { return largest + log_of(sum); }
};

// --- in memory ----------------------------------------------------------------------------------------------------

template <class Scalar_> struct MemoryRow {
    using Scalar = Scalar_;
    const Logits &logits;
    int64_t token;
    RowSoftmax<Scalar> parts;

    PYROUTE_DEVICE MemoryRow(const Logits &logits_, int64_t token_) : logits(logits_), token(token_), parts{} {}
    PYROUTE_DEVICE void load() {}
    PYROUTE_DEVICE Scalar z(int, int64_t e) const { return logit_at<Scalar>(logits, token, e); }
    PYROUTE_DEVICE Scalar p(int i, int64_t e) const { return parts.of(z(i, e)); }

    template <class F> PYROUTE_DEVICE void each(F f) const {
        PYROUTE_KEEP_LOOP
        for (int64_t e = lane_id(); e < logits.num_experts; e += 32)
            f(0, e);
    }
    template <class F> PYROUTE_DEVICE Scalar sum(F f) const {
        Scalar total = 0;
        each([&](int i, int64_t e) { total += f(i, e); });
        return sum_over_lanes(total);
    }
    PYROUTE_DEVICE void find_largest() {
        Scalar largest = -ScoreLimits<Scalar>::infinity();
        each([&](int i, int64_t e) {
            const Scalar x = z(i, e);
            largest = x > largest || x != x ? x : largest;
        });
        parts.largest = max_over_lanes_or_nan(largest);
    }
    PYROUTE_DEVICE void softmax() {
        find_largest();
        parts.sum = sum([&](int i, int64_t e) { return parts.exponential_of(z(i, e)); });
    }
    PYROUTE_DEVICE ScoreAndSlope<Scalar> score_and_slope(Score score, int i, int64_t e) const {
        return score_and_slope_of(score, z(i, e));
    }
};

// --- in registers -------------------------------------------------------------------------------------------------

template <int items> struct RegisterRow {
    using Scalar = float;
    const Logits &logits;
    int64_t token;
    RowSoftmax<float> parts;
    float logit[items], score[items];

    PYROUTE_DEVICE RegisterRow(const Logits &logits_, int64_t token_) : logits(logits_), token(token_), parts{} {}
    PYROUTE_DEVICE void load() {
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i) {
            const int64_t e = lane_id() + 32u * static_cast<uint32_t>(i);
            logit[i] = e < logits.num_experts ? logit_at<float>(logits, token, e) : -infinity_f32();
        }
    }
    PYROUTE_DEVICE float z(int i, int64_t) const { return logit[i]; }
    PYROUTE_DEVICE float p(int i, int64_t) const { return score[i]; }

    template <class F> PYROUTE_DEVICE void each(F f) const {
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i) {
            const int64_t e = lane_id() + 32u * static_cast<uint32_t>(i);
            if (e < logits.num_experts)
                f(i, e);
        }
    }
    template <class F> PYROUTE_DEVICE float sum(F f) const {
        float total = 0.0f;
        each([&](int i, int64_t e) { total += f(i, e); });
        return sum_over_lanes(total);
    }
    PYROUTE_DEVICE void find_largest() {
        float largest = logit[0];
        PYROUTE_UNROLL
        for (int i = 1; i < items; ++i)
            largest = logit[i] > largest || logit[i] != logit[i] ? logit[i] : largest;
        parts.largest = max_over_lanes_or_nan(largest);
    }
    template <bool in_range> PYROUTE_DEVICE void softmax_in() {
        float total = 0.0f;
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i) {
            score[i] = exponential<in_range>(logit[i] - parts.largest);
            total += lane_id() + 32u * static_cast<uint32_t>(i) < logits.num_experts ? score[i] : 0.0f;
        }
        parts.sum = sum_over_lanes(total);
        PYROUTE_UNROLL
        for (int i = 0; i < items; ++i)
            score[i] = quotient<in_range>(score[i], parts.sum);
    }
    PYROUTE_DEVICE void softmax() {
        find_largest();
        bool in_range = true;
        each([&](int i, int64_t) { in_range = in_range && logit[i] - parts.largest >= -score_range; });
        if (ballot(in_range) == all_lanes)
            softmax_in<true>();
        else
            softmax_in<false>();
    }
    PYROUTE_DEVICE ScoreAndSlope<float> score_and_slope(Score kind, int i, int64_t) const {
        return score_and_slope_of(kind, logit[i]);
    }
};

} // namespace pyroute::cuda
