// Scores of a row of logits, and their slopes.
#pragma once

#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

template <class V> PYROUTE_INLINE V minus_magnitude(V z) {
    using Uint = typename Lane<V>::Uint;
    constexpr int sign_shift = sizeof(typename Lane<V>::Scalar) * 8 - 1;
    return bit_cast<V>((Uint)(bit_cast<Uint>(z) | ((Uint{} + 1) << sign_shift)));
}

// Programs from logits to scores, and to slopes, their derivatives. They run for any logits, or with fewer steps and
// the same bits for logits that are `ordinary`; of NaN that is false. e is exp(-|z|).
struct Sigmoid {
    template <class V> PYROUTE_INLINE auto ordinary(const V &z) {
        return minus_magnitude(z) >= Elementary<typename Lane<V>::Scalar>::exp_normal;
    }
    template <class P> PYROUTE_INLINE P score(const P &z, const P &e) {
        using V = typename P::Vector;
        return each([](const V &a, const V &b) PYROUTE_INLINED { return by_sign(a, b, V{} + 1) / (b + 1); }, z,
                    e); // 1 or e, over 1 + e
    }
    template <class P> PYROUTE_INLINE P slope(const P &z, const P &e, const P &score) {
        using V = typename P::Vector;
        return score *
               each([](const V &a, const V &b) PYROUTE_INLINED { return by_sign(a, V{} + 1, b) / (b + 1); }, z, e);
    }
    template <class P> PYROUTE_INLINE P score_of_any(const P &z, const P &e) { return score(z, e); }
    template <class P> PYROUTE_INLINE P slope_of_any(const P &z, const P &e, const P &s) { return slope(z, e, s); }
};

struct Sqrtsoftplus {
    template <class V> PYROUTE_INLINE auto ordinary(const V &z) {
        using S = typename Lane<V>::Scalar;
        return (z >= WideOf<S>::small_logit) & (z <= -Elementary<S>::exp_normal);
    }
    template <class P> PYROUTE_INLINE P score(const P &z, const P &e) {
        using V = typename P::Vector;
        const P s = each([](const V &b) PYROUTE_INLINED { return b / (b + 2); }, e); // log1p_lanes
        const P twice = each([](const V &a) PYROUTE_INLINED { return twice_atanh(a); }, s);
        return each([](const V &a, const V &b) PYROUTE_INLINED { return sqrt_lanes(larger(a, V{}) + b); }, z, twice);
    }
    template <class P> PYROUTE_INLINE P slope(const P &z, const P &e, const P &score) {
        return Sigmoid::score(z, e) / (score + score);
    }
    template <class P> PYROUTE_INLINE P score_of_any(const P &z, const P &e) {
        return zip([](auto v, auto small, auto root) PYROUTE_INLINED { return small_or(v, small, root); }, z,
                   small_score(z), score(z, e));
    }
    template <class P> PYROUTE_INLINE P slope_of_any(const P &z, const P &e, const P &score) {
        using V = typename P::Vector;
        const P half = zip([](const V &v) PYROUTE_INLINED { return v * half_of<V>(); }, small_score(z));
        return zip([](auto v, auto small, auto root) PYROUTE_INLINED { return small_or(v, small, root); }, z, half,
                   slope(z, e, score));
    }

  private:
    template <class V> PYROUTE_INLINE V half_of() { return broadcast<V>(typename Lane<V>::Scalar(0.5)); }
    template <class P> PYROUTE_INLINE P small_score(const P &z) { // exp(z / 2)
        using V = typename P::Vector;
        return each([](const V &v) PYROUTE_INLINED { return exp_lanes(v * half_of<V>()); }, z);
    }
    template <class V> PYROUTE_INLINE V small_or(const V &z, const V &small, const V &other) {
        return z < WideOf<typename Lane<V>::Scalar>::small_logit ? small : other; // false for NaN
    }
};

// e[i] = exp(z[i] - largest); returns their sum over experts.
template <class Scalar>
PYROUTE_INLINE Scalar exp_row(const Scalar *z, const RowRange<Scalar> &range, Scalar *e, int64_t count) {
    using V = Wide<Scalar>;
    const Scalar largest = range.largest;
    const auto any = [&](int64_t i) PYROUTE_INLINED {
        const V v = exp_lanes(load<V>(z + i) - largest);
        store(e + i, v);
        return v;
    };
    if (range.smallest - largest >= Elementary<Scalar>::exp_normal) { // not with NaN
        const auto normal = [&](auto tag, int64_t i) PYROUTE_INLINED {
            const auto x =
                each([&](const auto &v) PYROUTE_INLINED { return v - largest; }, load_pack<decltype(tag)>(z + i));
            const auto result = exp_normal(x);
            store_pack(e + i, result);
            return result;
        };
        return sum_row<Scalar>(count, normal, any);
    }
    const auto general = [&](auto tag, int64_t i) PYROUTE_INLINED {
        const auto result = each([&](const auto &v) PYROUTE_INLINED { return exp_lanes(v - largest); },
                                 load_pack<decltype(tag)>(z + i));
        store_pack(e + i, result);
        return result;
    };
    return sum_row<Scalar>(count, general, any);
}

template <class Scalar> PYROUTE_INLINE void divide_row(Scalar *row, Scalar divisor, int64_t count) {
    using V = Wide<Scalar>;
    for (int64_t i = 0; i < count; i += Lane<V>::width)
        store(row + i, load<V>(row + i) / divisor);
}

template <class P> PYROUTE_INLINE P exp_minus_magnitude(const P &z) {
    using V = typename P::Vector;
    return exp_normal(zip([](const V &v) PYROUTE_INLINED { return minus_magnitude(v); }, z));
}

template <bool value> struct AnyLogits {
    static constexpr bool any = value;
};

// visit(i, z, e, AnyLogits) for the packs of a row in order, e = exp(-|z|): with AnyLogits<false> as long as all logits
// in full vectors are ordinary, once more from the first with AnyLogits<true> where one is not. Returns whether a logit
// is NaN.
template <class Program, class Scalar, class Visit>
PYROUTE_INLINE bool map_row(const Scalar *z, int64_t count, Visit visit) {
    using P = PackOf<Scalar>;
    using One = Pack<Wide<Scalar>, 1>;
    auto ordinary = ~typename Lane<typename P::Vector>::Int{};
    auto rest = ~typename Lane<Wide<Scalar>>::Int{}, ordered = rest;
    int64_t i = 0;
    for (; i + P::lanes <= count; i += P::lanes) {
        const P pack = load_pack<P>(z + i);
        for (int j = 0; j < P::vectors; ++j)
            ordinary &= Program::ordinary(pack.v[j]);
        visit(i, pack, exp_minus_magnitude(pack), AnyLogits<false>{});
    }
    for (; i + One::lanes <= count; i += One::lanes) {
        const One pack = load_pack<One>(z + i);
        rest &= Program::ordinary(pack.v[0]);
        visit(i, pack, exp_minus_magnitude(pack), AnyLogits<false>{});
    }
    if (any_lane(~ordinary) || any_lane(~rest))
        i = 0;
    for (; i < count; i += One::lanes) {
        const One pack = load_pack<One>(z + i);
        ordered &= pack.v[0] == pack.v[0];
        visit(i, pack, One{{exp_lanes(minus_magnitude(pack.v[0]))}}, AnyLogits<true>{});
    }
    return any_lane(~ordered);
}

template <class Program, class P, class Range> PYROUTE_INLINE P score_of(const P &z, const P &e, Range) {
    if constexpr (Range::any)
        return Program::score_of_any(z, e);
    else
        return Program::score(z, e);
}
template <class Program, class P, class Range>
PYROUTE_INLINE P slope_of(const P &z, const P &e, const P &score, Range) {
    if constexpr (Range::any)
        return Program::slope_of_any(z, e, score);
    else
        return Program::slope(z, e, score);
}

// Scores of experts one by one, sigmoid or sqrtsoftplus, up to the next full vector; returns whether a logit is NaN.
template <class Program, class Scalar>
PYROUTE_INLINE bool score_row_by(const Scalar *z, Scalar *scores, int64_t count) {
    return map_row<Program>(z, count, [&](int64_t i, const auto &pack, const auto &e, auto range) PYROUTE_INLINED {
        store_pack(scores + i, score_of<Program>(pack, e, range));
    });
}
template <class Program, class Scalar>
PYROUTE_INLINE void score_and_slope_row_by(const Scalar *z, Scalar *scores, Scalar *slopes, int64_t count) {
    map_row<Program>(z, count, [&](int64_t i, const auto &pack, const auto &e, auto range) PYROUTE_INLINED {
        const auto score = score_of<Program>(pack, e, range);
        store_pack(scores + i, score);
        store_pack(slopes + i, slope_of<Program>(pack, e, score, range));
    });
}

template <class Scalar> PYROUTE_INLINE bool score_row(Score score, const Scalar *z, Scalar *scores, int64_t count) {
    if (score == Score::sigmoid)
        return score_row_by<Sigmoid>(z, scores, count);
    return score_row_by<Sqrtsoftplus>(z, scores, count);
}
template <class Scalar>
PYROUTE_INLINE void score_and_slope_row(Score score, const Scalar *z, Scalar *scores, Scalar *slopes, int64_t count) {
    if (score == Score::sigmoid)
        score_and_slope_row_by<Sigmoid>(z, scores, slopes, count);
    else
        score_and_slope_row_by<Sqrtsoftplus>(z, scores, slopes, count);
}

// p[j] = exp(z[j] - m) / sum over the routed slots j in order, m their largest; slots that are not routed hold -inf in
// z, whose p is 0 (or NaN, where the row is) and never used. Up to the next full vector.
template <class Scalar> PYROUTE_INLINE void softmax_of_slots(const Scalar *z, Scalar *p, int64_t top_k) {
    using V = Wide<Scalar>;
    constexpr Scalar infinity = WideOf<Scalar>::infinity;
    Scalar largest = -infinity, sum = 0;
    for (int64_t j = 0; j < top_k; ++j)
        largest = z[j] > largest || z[j] != z[j] ? z[j] : largest;
    for (int64_t j = 0; j < top_k; j += Lane<V>::width)
        store(p + j, exp_lanes(load<V>(z + j) - largest));
    for (int64_t j = 0; j < top_k; ++j)
        sum += p[j];
    divide_row(p, sum, top_k);
}

} // namespace pyroute::cpu::PYROUTE_ISA
