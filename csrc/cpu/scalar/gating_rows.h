// One token's logits as a row of lanes: loads, sums in the order of the contract (docs/ops/gating.md) and maxima.
//
// Rows are padded to a multiple of 32 experts with logits of -inf, whose scores, probabilities and slopes are +0: sums
// need no tail. Scalar is float (8 lanes a vector) or double (4); the programs are the same.
#pragma once

#include "cpu/scalar/gating_pack.h"
#include "gating.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

template <class Scalar> PYROUTE_INLINE int64_t whole_vectors(int64_t count) {
    constexpr int64_t width = Lane<Wide<Scalar>>::width;
    return (count + width - 1) / width * width;
}

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

// The token's logits: in place where they are whole vectors of what is computed in, else copied to `row`.
template <class Scalar> PYROUTE_INLINE const Scalar *row_of(const Logits &logits, int64_t token, Scalar *row) {
    constexpr FloatType own = sizeof(Scalar) == 4 ? FloatType::float32 : FloatType::float64;
    if (logits.type == own && logits.num_experts % 8 == 0)
        return static_cast<const Scalar *>(logits.data) + token * logits.num_experts;
    load_row(logits, token, row);
    return row;
}

// A caller's [E] as a row padded with +0.
template <class Scalar> PYROUTE_INLINE void copy_row(const void *from, int64_t row_index, int64_t count, Scalar *row) {
    memcpy(row, static_cast<const Scalar *>(from) + row_index * count, static_cast<size_t>(count) * sizeof(Scalar));
    fill_row(row, count, Scalar(0));
}

// --- sums and maxima ----------------------------------------------------------------------------------------------

// Calls whole(j, i) for every full vector of experts i, i + 1, ... and part(j, i) for the last one if it is not full;
// j says which of the row_block / width vectors of its block it is.
template <class Scalar, class Whole, class Part>
PYROUTE_INLINE void for_vectors(int64_t count, Whole whole, Part part) {
    constexpr int width = Lane<Wide<Scalar>>::width, vectors = static_cast<int>(row_block) / width;
    int64_t i = 0;
    for (; i + row_block <= count; i += row_block)
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j)
            whole(j, i + j * width);
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        if (i + (j + 1) * width <= count)
            whole(j, i + j * width);
        else if (i + j * width < count)
            part(j, i + j * width);
}

// visit(tag, i) with the type of a pack for every full one, then of a vector for the rest, the last padded.
template <class Scalar, class Visit> PYROUTE_INLINE void for_packs(int64_t count, Visit visit) {
    using P = PackOf<Scalar>;
    using One = Pack<Wide<Scalar>, 1>;
    int64_t i = 0;
    for (; i + P::lanes <= count; i += P::lanes)
        visit(P{}, i);
    for (; i < count; i += One::lanes)
        visit(One{}, i);
}

template <class Scalar> struct RowSum {
    using V = Wide<Scalar>;
    static constexpr int vectors = static_cast<int>(row_block) / Lane<V>::width;
    V lanes[vectors];
};

PYROUTE_INLINE float tree(const f32x8 &v) { return sum_lanes(v); }
PYROUTE_INLINE double tree(const f64x4 &v) { return (v[0] + v[2]) + (v[1] + v[3]); }

template <class Scalar> PYROUTE_INLINE Scalar total(RowSum<Scalar> &sum) {
#pragma GCC unroll 16
    for (int half = RowSum<Scalar>::vectors / 2; half >= 1; half /= 2)
#pragma GCC unroll 16
        for (int j = 0; j < half; ++j)
            sum.lanes[j] += sum.lanes[j + half];
    return tree(sum.lanes[0]);
}

// whole(tag, i) is the pack of tag's type of experts i, i + 1, ..., part(i) the last vector if it is not full; returns
// the sum over experts. Vectors past the last expert would add +0.
template <class Scalar, class Whole, class Part> PYROUTE_INLINE Scalar sum_row(int64_t count, Whole whole, Part part) {
    using P = PackOf<Scalar>;
    using One = Pack<Wide<Scalar>, 1>;
    constexpr int width = One::lanes, vectors = RowSum<Scalar>::vectors;
    struct {
        P packs[static_cast<int>(row_block) / P::lanes];
    } sums;
#pragma GCC unroll 16
    for (P &sum : sums.packs)
        sum = P{};
    int64_t i = 0;
    for (; i + row_block <= count; i += row_block) {
        int64_t at = i;
#pragma GCC unroll 16
        for (P &sum : sums.packs) {
            sum = sum + whole(P{}, at);
            at += P::lanes;
        }
    }
    auto sum = bit_cast<RowSum<Scalar>>(sums);
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        if (i + (j + 1) * width <= count)
            sum.lanes[j] += whole(One{}, i + j * width).v[0];
        else if (i + j * width < count)
            sum.lanes[j] += part(i + j * width);
    return total(sum);
}
// The same where the last vector is like the others.
template <class Scalar, class Term> PYROUTE_INLINE Scalar sum_row(int64_t count, Term term) {
    return sum_row<Scalar>(count, term, [&](int64_t i) { return term(Pack<Wide<Scalar>, 1>{}, i).v[0]; });
}

// One bit per lane of a comparison.
PYROUTE_INLINE unsigned lane_bits(const i32x8 &mask) {
#if defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#elif defined(__SSE2__)
    struct Halves {
        __m128 low, high;
    };
    const auto halves = bit_cast<Halves>(mask);
    return static_cast<unsigned>(_mm_movemask_ps(halves.low) | _mm_movemask_ps(halves.high) << 4);
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

template <class Mask> PYROUTE_INLINE bool any_lane(const Mask &mask) {
    if constexpr (sizeof(Mask) == 64) {
        struct Halves {
            i32x8 low, high;
        };
        const auto halves = bit_cast<Halves>(mask);
        return lane_bits((i32x8)(halves.low | halves.high)) != 0;
    } else {
        return lane_bits(mask) != 0;
    }
}

template <class V, class Pick> PYROUTE_INLINE typename Lane<V>::Scalar over_lanes(const V &v, Pick pick) {
    auto result = v[0];
    for (int lane = 1; lane < Lane<V>::width; ++lane)
        result = pick(v[lane], result);
    return result;
}

template <class Scalar> PYROUTE_INLINE bool has_nan(const Scalar *row, int64_t count) {
    using V = Wide<Scalar>;
    auto ordered = ~typename Lane<V>::Int{};
    for (int64_t i = 0; i < count; i += Lane<V>::width) {
        const V v = load<V>(row + i);
        ordered &= v == v;
    }
    return any_lane(~ordered);
}

// The largest logit, NaN if any is, and the smallest of those in full vectors.
template <class Scalar> struct RowRange {
    Scalar largest, smallest;
};

template <class Scalar> PYROUTE_INLINE RowRange<Scalar> range_of_row(const Scalar *row, int64_t count) {
    using V = Wide<Scalar>;
    constexpr int vectors = RowSum<Scalar>::vectors;
    V largest[vectors], smallest[vectors];
    typename Lane<V>::Int ordered[2] = {~typename Lane<V>::Int{}, ~typename Lane<V>::Int{}};
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) {
        largest[j] = broadcast<V>(-WideOf<Scalar>::infinity);
        smallest[j] = broadcast<V>(WideOf<Scalar>::infinity);
    }
    const auto part = [&](int j, int64_t i) {
        const V v = load<V>(row + i);
        largest[j] = larger(v, largest[j]);
        ordered[j & 1] &= v == v;
    };
    const auto whole = [&](int j, int64_t i) {
        part(j, i);
        smallest[j] = smaller(load<V>(row + i), smallest[j]);
    };
    for_vectors<Scalar>(count, whole, part);
#pragma GCC unroll 16
    for (int j = 1; j < vectors; ++j) {
        largest[0] = larger(largest[j], largest[0]);
        smallest[0] = smaller(smallest[j], smallest[0]);
    }
    const auto max = [](Scalar a, Scalar b) { return a > b ? a : b; };
    const auto min = [](Scalar a, Scalar b) { return a < b ? a : b; };
    const bool has_nan = any_lane(~(ordered[0] & ordered[1]));
    return {has_nan ? WideOf<Scalar>::nan : over_lanes(largest[0], max), over_lanes(smallest[0], min)};
}

} // namespace pyroute::cpu::PYROUTE_ISA
