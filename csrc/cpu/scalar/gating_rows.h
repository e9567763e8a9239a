// One token's logits as a row of lanes: loads, scores and sums in the order of the contract (docs/ops/gating.md).
//
// Rows are padded to a multiple of 32 experts with logits of -inf, whose scores, probabilities and slopes are +0: sums
// need no tail. Scalar is float (8 lanes a vector) or double (4); the programs are the same.
#pragma once

#include "cpu/elementary.h"
#include "cpu/elements.h"
#include "gating.h"

namespace pyroute::cpu::PYROUTE_ISA {

template <class Scalar> struct WideOf;
template <> struct WideOf<float> {
    using V = f32x8;
    static constexpr float small_logit = -20.0f; // below: sqrt(log1p(exp z)) is exp(z / 2), see the array floor
    static constexpr float infinity = __builtin_inff(), nan = __builtin_nanf("");
};
template <> struct WideOf<double> {
    using V = f64x4;
    static constexpr double small_logit = -40.0;
    static constexpr double infinity = __builtin_inf(), nan = __builtin_nan("");
};
template <class Scalar> using Wide = typename WideOf<Scalar>::V;

constexpr int64_t row_block = 32; // lanes of a sum over experts
constexpr double balance_eps = 1e-20;

PYROUTE_INLINE int64_t padded(int64_t count) { return (count + row_block - 1) / row_block * row_block; }

// Consecutive 32-byte aligned arrays in the scratch memory of a thread.
struct Scratch {
    char *free;
};
template <class T> PYROUTE_INLINE T *take(Scratch &scratch, int64_t count) {
    T *taken = reinterpret_cast<T *>(scratch.free);
    scratch.free += padded(count * static_cast<int64_t>(sizeof(T)));
    return taken;
}

PYROUTE_INLINE f64x4 sqrt_lanes(const f64x4 &v) {
#if defined(__AVX2__)
    return bit_cast<f64x4>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
#else
    f64x4 r;
    for (int i = 0; i < 4; ++i)
        r[i] = __builtin_sqrt(v[i]);
    return r;
#endif
}

PYROUTE_INLINE f64x4 canonical(const f64x4 &v) { return v == v ? v : broadcast<f64x4>(__builtin_nan("")); }
PYROUTE_INLINE float canonical(float v) { return v == v ? v : __builtin_nanf(""); }
PYROUTE_INLINE double canonical(double v) { return v == v ? v : __builtin_nan(""); }

PYROUTE_INLINE bool is_expert(int32_t id, int64_t num_experts) { return id >= 0 && id < num_experts; }

// --- loads --------------------------------------------------------------------------------------------------------

template <class Type> PYROUTE_INLINE void widen_row(const Logits &logits, int64_t token, typename Type::Scalar *row) {
    const int64_t count = logits.num_experts;
    const auto *from = static_cast<const typename Type::Storage *>(logits.data) + token * count;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        store(row + i, load_elements<Type>(from + i));
    if (i < count)
        store(row + i, load_elements<Type>(from + i, count - i));
}

template <class Scalar> PYROUTE_INLINE void fill_row(Scalar *row, int64_t begin, Scalar value) {
    for (int64_t i = begin; i < padded(begin); ++i)
        row[i] = value;
}

PYROUTE_INLINE void load_row(const Logits &logits, int64_t token, float *row) {
    if (logits.type == FloatType::float32)
        widen_row<Float32>(logits, token, row);
    else if (logits.type == FloatType::bfloat16)
        widen_row<Bfloat16>(logits, token, row);
    else
        widen_row<Float16>(logits, token, row);
    fill_row(row, logits.num_experts, -WideOf<float>::infinity);
}
PYROUTE_INLINE void load_row(const Logits &logits, int64_t token, double *row) {
    widen_row<Float64>(logits, token, row);
    fill_row(row, logits.num_experts, -WideOf<double>::infinity);
}

// A caller's [E] as a row padded with +0.
template <class Scalar> PYROUTE_INLINE void copy_row(const void *from, int64_t row_index, int64_t count, Scalar *row) {
    memcpy(row, static_cast<const Scalar *>(from) + row_index * count, static_cast<size_t>(count) * sizeof(Scalar));
    fill_row(row, count, Scalar(0));
}

// --- sums and maxima ----------------------------------------------------------------------------------------------

template <class Scalar> struct RowSum {
    using V = Wide<Scalar>;
    static constexpr int vectors = static_cast<int>(row_block) / Lane<V>::width;
    V lanes[vectors] = {};
};

PYROUTE_INLINE float tree(const f32x8 &v) { return sum_lanes(v); }
PYROUTE_INLINE double tree(const f64x4 &v) { return (v[0] + v[2]) + (v[1] + v[3]); }

template <class Scalar> PYROUTE_INLINE Scalar total(RowSum<Scalar> &sum) {
    for (int half = RowSum<Scalar>::vectors / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; ++j)
            sum.lanes[j] += sum.lanes[j + half];
    return tree(sum.lanes[0]);
}

// term(i) is the vector of experts i, i + 1, ...; returns the sum over experts.
template <class Scalar, class Term> PYROUTE_INLINE Scalar sum_row(int64_t count, Term term) {
    constexpr int width = Lane<Wide<Scalar>>::width, vectors = RowSum<Scalar>::vectors;
    RowSum<Scalar> sum;
    for (int64_t i = 0; i < count; i += row_block)
        for (int j = 0; j < vectors; ++j)
            sum.lanes[j] += term(i + j * width);
    return total(sum);
}

// NaN if any is NaN.
template <class Scalar> PYROUTE_INLINE Scalar largest_of_row(const Scalar *row, int64_t count) {
    using V = Wide<Scalar>;
    constexpr int width = Lane<V>::width, vectors = RowSum<Scalar>::vectors;
    V best[vectors];
    typename Lane<V>::Int nan = {};
    for (int j = 0; j < vectors; ++j)
        best[j] = broadcast<V>(-WideOf<Scalar>::infinity);
    for (int64_t i = 0; i < count; i += row_block)
        for (int j = 0; j < vectors; ++j) {
            const V v = load<V>(row + i + j * width);
            best[j] = v > best[j] ? v : best[j];
            nan |= v != v;
        }
    Scalar result = -WideOf<Scalar>::infinity;
    bool has_nan = false;
    for (int lane = 0; lane < width; ++lane) {
        for (int j = 0; j < vectors; ++j)
            result = best[j][lane] > result ? best[j][lane] : result;
        has_nan = has_nan || nan[lane] != 0;
    }
    return has_nan ? WideOf<Scalar>::nan : result;
}

// --- scores -------------------------------------------------------------------------------------------------------

template <class V> PYROUTE_INLINE V minus_magnitude(V z) {
    using Uint = typename Lane<V>::Uint;
    constexpr int sign_shift = sizeof(typename Lane<V>::Scalar) * 8 - 1;
    return bit_cast<V>((Uint)(bit_cast<Uint>(z) | ((Uint{} + 1) << sign_shift)));
}

template <class V> struct ScoreAndSlope {
    V score, slope;
};

template <class V> PYROUTE_INLINE ScoreAndSlope<V> sigmoid_lanes(V z) {
    using S = typename Lane<V>::Scalar;
    const V one = broadcast<V>(S(1)), e = exp_lanes(minus_magnitude(z));
    const auto is_positive = z >= S(0);
    const V score = (is_positive ? one : e) / (one + e), rest = (is_positive ? e : one) / (one + e);
    return {score, score * rest};
}

template <class V> PYROUTE_INLINE ScoreAndSlope<V> sqrtsoftplus_lanes(V z) {
    using S = typename Lane<V>::Scalar;
    const V zero = {}, half = broadcast<V>(S(0.5));
    const V positive = z > zero ? z : zero;
    const V root = sqrt_lanes(positive + log1p_lanes(exp_lanes(minus_magnitude(z))));
    const V small = exp_lanes(half * z);
    const auto is_small = z < WideOf<S>::small_logit; // false for NaN
    return {is_small ? small : root, is_small ? half * small : sigmoid_lanes(z).score / (root + root)};
}

// e[i] = exp(z[i] - largest); returns their sum over experts.
template <class Scalar> PYROUTE_INLINE Scalar exp_row(const Scalar *z, Scalar largest, Scalar *e, int64_t count) {
    using V = Wide<Scalar>;
    return sum_row<Scalar>(count, [&](int64_t i) {
        const V v = exp_lanes(load<V>(z + i) - largest);
        store(e + i, v);
        return v;
    });
}

template <class Scalar> PYROUTE_INLINE void divide_row(Scalar *row, Scalar divisor, int64_t count) {
    using V = Wide<Scalar>;
    for (int64_t i = 0; i < count; i += Lane<V>::width)
        store(row + i, load<V>(row + i) / divisor);
}

template <class Scalar, class Program>
PYROUTE_INLINE void map_row(const Scalar *z, Scalar *scores, Scalar *slopes, int64_t count, Program program) {
    using V = Wide<Scalar>;
    if (slopes)
        for (int64_t i = 0; i < count; i += Lane<V>::width) {
            const ScoreAndSlope<V> result = program(load<V>(z + i));
            store(scores + i, result.score);
            store(slopes + i, result.slope);
        }
    else
        for (int64_t i = 0; i < count; i += Lane<V>::width)
            store(scores + i, program(load<V>(z + i)).score);
}

// Scores of experts one by one, sigmoid or sqrtsoftplus; `count` values up to the next full vector. Slopes may be null.
template <class Scalar>
PYROUTE_INLINE void score_row(Score score, const Scalar *z, Scalar *scores, Scalar *slopes, int64_t count) {
    using V = Wide<Scalar>;
    if (score == Score::sigmoid)
        map_row(z, scores, slopes, count, [](const V &v) { return sigmoid_lanes(v); });
    else
        map_row(z, scores, slopes, count, [](const V &v) { return sqrtsoftplus_lanes(v); });
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
