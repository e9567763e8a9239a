// Scores of logits, one at a time: docs/ops/gating.md, with the bits of csrc/cpu/scalar/gating_scores.h. Integer keys
// in the order of numbers.
//
// in_range programs have fewer steps and no branches, and the same bits, for logits of a magnitude of at most range_of
// (softmax: at most score_range below the row's largest); NaN is in no range.
#pragma once

#include "../gating.h"
#include "cuda/elementary.cuh"
#include "cuda/float_rows.cuh"

namespace pyroute::cuda {

constexpr float score_range = 40.0f; // exp(-40) > 2^-60, the least that divide_in_range takes
constexpr double balance_eps = 1e-20;

template <class Scalar> struct ScoreLimits;
template <> struct ScoreLimits<float> {
    static constexpr float small_logit = -20.0f; // below: sqrt(log1p(exp z)) is exp(z / 2)
    PYROUTE_DEVICE static float infinity() { return infinity_f32(); }
};
template <> struct ScoreLimits<double> {
    static constexpr double small_logit = -40.0;
    PYROUTE_DEVICE static double infinity() { return double_of(uint64_t{0x7ff0} << 48); }
};

PYROUTE_DEVICE float minus_magnitude(float x) { return -fabsf(x); }
PYROUTE_DEVICE double minus_magnitude(double x) { return -fabs(x); }
PYROUTE_DEVICE float root_of(float x) { return sqrtf(x); }
PYROUTE_DEVICE double root_of(double x) { return sqrt(x); }
PYROUTE_DEVICE bool is_expert(int32_t id, int64_t num_experts) { return id >= 0 && id < num_experts; }

// --- scores -------------------------------------------------------------------------------------------------------

template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar quotient(Scalar a, Scalar b) {
    if constexpr (in_range)
        return divide_in_range(a, b);
    else
        return a / b;
}
template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar exponential(Scalar x) {
    if constexpr (in_range)
        return exp_in_range(x);
    else
        return exp_of(x);
}

// Of e = exp(-|z|): 1 or e, over 1 + e.
template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar sigmoid_part(bool large, Scalar e) {
    return quotient<in_range>(large ? Scalar(1) : e, Scalar(1) + e);
}

template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar sigmoid_of(Scalar z) {
    return sigmoid_part<in_range>(z >= 0, exponential<in_range>(minus_magnitude(z)));
}

template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar root_softplus_part(Scalar z, Scalar e) {
    const Scalar softplus = (z > 0 ? z : Scalar(0)) + twice_atanh(quotient<in_range>(e, e + Scalar(2)));
    if constexpr (in_range)
        return sqrt_in_range(softplus);
    else
        return root_of(softplus);
}

template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar sqrtsoftplus_of(Scalar z) {
    const Scalar root = root_softplus_part<in_range>(z, exponential<in_range>(minus_magnitude(z)));
    if constexpr (in_range)
        return root;
    else
        return z < ScoreLimits<Scalar>::small_logit ? exp_of(z * Scalar(0.5)) : root;
}

// Scores that stand alone.
template <bool in_range, class Scalar> PYROUTE_DEVICE Scalar score_of(Score score, Scalar z) {
    return score == Score::sigmoid ? sigmoid_of<in_range>(z) : sqrtsoftplus_of<in_range>(z);
}

// The largest magnitude of a logit that is in range.
PYROUTE_DEVICE float range_of(Score score) {
    return score == Score::sigmoid ? score_range : -ScoreLimits<float>::small_logit;
}

template <class Scalar> struct ScoreAndSlope {
    Scalar score, slope;
};
template <class Scalar> PYROUTE_DEVICE ScoreAndSlope<Scalar> score_and_slope_of(Score score, Scalar z) {
    const Scalar e = exp_of(minus_magnitude(z));
    const Scalar sigmoid = sigmoid_part<false>(z >= 0, e);
    if (score == Score::sigmoid)
        return {sigmoid, sigmoid * sigmoid_part<false>(z < 0, e)};
    if (z < ScoreLimits<Scalar>::small_logit) {
        const Scalar small = exp_of(z * Scalar(0.5));
        return {small, small * Scalar(0.5)};
    }
    const Scalar root = root_softplus_part<false>(z, e);
    return {root, sigmoid / (root + root)};
}

// --- keys ---------------------------------------------------------------------------------------------------------

// Unsigned integers in the order of the numbers: NaN 1, -inf, ..., -0 equal to +0, ..., +inf. 0 is below them all.
template <class Scalar> struct OrderKey;
template <> struct OrderKey<float> {
    using Key = uint32_t;
};
template <> struct OrderKey<double> {
    using Key = uint64_t;
};

PYROUTE_DEVICE uint32_t key_of_bits(uint32_t bits) {
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
PYROUTE_DEVICE uint64_t key_of_bits(uint64_t bits) {
    return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | uint64_t{1} << 63);
}
template <class Scalar> PYROUTE_DEVICE typename OrderKey<Scalar>::Key key_of_number(Scalar x) {
    return key_of_bits(bits_of(x + Scalar(0))); // -0 + 0 is +0
}
template <class Scalar> PYROUTE_DEVICE typename OrderKey<Scalar>::Key key_of(Scalar x) {
    return x == x ? key_of_number(x) : 1;
}

PYROUTE_DEVICE float value_of_key(uint32_t key) {
    return key == 1 ? nan_f32() : float_of(key >> 31 ? key ^ 0x80000000u : ~key);
}
PYROUTE_DEVICE double value_of_key(uint64_t key) {
    return key == 1 ? double_of(uint64_t{0x7ff8} << 48) : double_of(key >> 63 ? key ^ uint64_t{1} << 63 : ~key);
}

} // namespace pyroute::cuda
