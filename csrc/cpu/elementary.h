// exp, log and log1p as programs of IEEE add, subtract, multiply, divide and integer steps, in one stated order.
//
// pyroute/_array/elementary.py is the same program in NumPy; both give the same bytes, which a library's exp does not
// promise from one instruction set to the next. Compile with -ffp-contract=off: a fused multiply-add changes bits.
//
//   exp x    n = round(x / ln 2), r = x - n ln2_hi - n ln2_lo, |r| <= 0.347; e^r = (p(r) r^2 + r) + 1; times 2^n in two
//            exact halves, so subnormal results round once. float32: p of degree 4, largest error 1.4 * 2^-24 relative.
//   log1p u  0 <= u <= 1: s = u / (2 + u), log1p u = 2 atanh s = 2s + 2s (s^2 p(s^2)).
//   log x    x normal and positive: x = 2^e m, m in [sqrt 1/2, sqrt 2); log x = e ln 2 + log m, log m as above.
//
// Coefficients: weighted least-squares fits on Chebyshev nodes for float32, Taylor terms for float64.
#pragma once

#include "cpu/lanes.h"

namespace pyroute::cpu::PYROUTE_ISA {

template <class Scalar> struct Elementary;

template <> struct Elementary<float> {
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
    static constexpr float round_magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    static constexpr int32_t round_magic_bits = 0x4b400000, sqrt_half_bits = 0x3f3504f3;
    static constexpr float log2_e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
    static constexpr float exp_min = -104.0f, exp_max = 89.0f; // beyond: 0 and inf after rounding
    static constexpr float exp_normal = -87.0f;                // from here the result is normal
    static constexpr int exp_terms = 5, atanh_terms = 5;
    static constexpr float exp_poly[exp_terms] = {0.4999999403953552f, 0.1666652113199234f, 0.04166838899254799f,
                                                  0.0083687175065279f, 0.0013814596459269524f};
    static constexpr float atanh_poly[atanh_terms] = {0.3333333730697632f, 0.19999438524246216f, 0.14308442175388336f,
                                                      0.10713828355073929f, 0.12150469422340393f};
};

template <> struct Elementary<double> {
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
    static constexpr double round_magic = 6755399441055744.0; // 1.5 * 2^52
    static constexpr int64_t round_magic_bits = 0x4338000000000000, sqrt_half_bits = 0x3fe6a09e667f3bcd;
    static constexpr double log2_e = 1.4426950408889634, ln2_hi = 6.93147180369123816490e-01,
                            ln2_lo = 1.90821492927058770002e-10;
    static constexpr double exp_min = -746.0, exp_max = 710.0, exp_normal = -708.0;
    static constexpr int exp_terms = 12, atanh_terms = 16;
    static constexpr double exp_poly[exp_terms] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                                   1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                                   1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    static constexpr double atanh_poly[atanh_terms] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11, 1.0 / 13,
                                                       1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23, 1.0 / 25,
                                                       1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33};
};

template <class V, class Scalar, int N> PYROUTE_INLINE V horner(const Scalar (&coefficients)[N], V x) {
    V p = broadcast<V>(coefficients[N - 1]);
    for (int i = N - 2; i >= 0; --i)
        p = p * x + coefficients[i];
    return p;
}

// a > b ? a : b and a < b ? a : b, so b where one of them is NaN: one instruction, which GCC does not make of those.
template <class V> PYROUTE_INLINE V larger(const V &a, const V &b) { return a > b ? a : b; }
template <class V> PYROUTE_INLINE V smaller(const V &a, const V &b) { return a < b ? a : b; }
#if defined(__AVX2__)
PYROUTE_INLINE f32x8 larger(const f32x8 &a, const f32x8 &b) {
    return bit_cast<f32x8>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
PYROUTE_INLINE f32x8 smaller(const f32x8 &a, const f32x8 &b) {
    return bit_cast<f32x8>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
PYROUTE_INLINE f64x4 larger(const f64x4 &a, const f64x4 &b) {
    return bit_cast<f64x4>(_mm256_max_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b)));
}
PYROUTE_INLINE f64x4 smaller(const f64x4 &a, const f64x4 &b) {
    return bit_cast<f64x4>(_mm256_min_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b)));
}
#else
PYROUTE_INLINE f32x8 larger(const f32x8 &a, const f32x8 &b) { return select(less(b, a), a, b); }
PYROUTE_INLINE f32x8 smaller(const f32x8 &a, const f32x8 &b) { return select(less(a, b), a, b); }
#endif

// e^x = p 2^n; `shifted` holds n in its low bits.
template <class V> struct ExpParts {
    V p, n, shifted;
};
template <class V> PYROUTE_INLINE ExpParts<V> exp_parts(const V &x) {
    using S = typename Lane<V>::Scalar;
    using E = Elementary<S>;
    const V shifted = x * E::log2_e + E::round_magic;
    const V n = shifted - E::round_magic;
    const V r = (x - n * E::ln2_hi) - n * E::ln2_lo;
    return {(horner(E::exp_poly, r) * (r * r) + r) + S(1), n, shifted};
}

// 2^n for n a valid exponent; other n (from NaN) give some value that the caller's NaN absorbs.
template <class V> PYROUTE_INLINE V exp2_int(typename Lane<V>::Int n) {
    using E = Elementary<typename Lane<V>::Scalar>;
    using Uint = typename Lane<V>::Uint;
    using Int = typename Lane<V>::Int;
    const Uint biased = (Uint)(n) + (Uint)(Int{} + E::exponent_bias);
    return bit_cast<V>((Uint)(biased << E::mantissa_bits));
}

// p 2^n, rounded once where it is subnormal: AVX-512 has an instruction for it.
template <class V> PYROUTE_INLINE V scale_by_power(const ExpParts<V> &e) {
    using E = Elementary<typename Lane<V>::Scalar>;
    using Int = typename Lane<V>::Int;
    using Uint = typename Lane<V>::Uint;
    const Uint offset = (Uint)(Int{} + E::round_magic_bits);
    const Int whole = (Int)(bit_cast<Uint>(e.shifted) - offset);
    const Int half = whole >> 1;
    const Int rest = (Int)((Uint)whole - (Uint)half);
    return (e.p * exp2_int<V>(half)) * exp2_int<V>(rest);
}
#if defined(__AVX512VL__)
PYROUTE_INLINE f32x8 scale_by_power(const ExpParts<f32x8> &e) {
    return bit_cast<f32x8>(_mm256_scalef_ps(bit_cast<__m256>(e.p), bit_cast<__m256>(e.n)));
}
PYROUTE_INLINE f64x4 scale_by_power(const ExpParts<f64x4> &e) {
    return bit_cast<f64x4>(_mm256_scalef_pd(bit_cast<__m256d>(e.p), bit_cast<__m256d>(e.n)));
}
#endif

template <class V> PYROUTE_INLINE V exp_lanes(V x) {
    using E = Elementary<typename Lane<V>::Scalar>;
    x = larger(broadcast<V>(E::exp_min), x); // of NaN it is NaN
    x = smaller(broadcast<V>(E::exp_max), x);
    return scale_by_power(exp_parts(x));
}

// The bits of exp_lanes for x in [exp_normal, 0], where the result is normal: n is added to p's exponent, two
// instructions in place of nine.
template <class V> PYROUTE_INLINE V exp_normal_lanes(const V &x) {
    using E = Elementary<typename Lane<V>::Scalar>;
    using Uint = typename Lane<V>::Uint;
    const ExpParts<V> e = exp_parts(x);
    return bit_cast<V>((Uint)(bit_cast<Uint>(e.p) + (bit_cast<Uint>(e.shifted) << E::mantissa_bits)));
}

// 2 atanh(s) for 0 <= |s| <= 1/3
template <class V> PYROUTE_INLINE V twice_atanh(V s) {
    const V q = s * s;
    const V twice = s + s;
    return twice + twice * (q * horner(Elementary<typename Lane<V>::Scalar>::atanh_poly, q));
}

template <class V> PYROUTE_INLINE V log1p_lanes(V u) { return twice_atanh(u / (u + typename Lane<V>::Scalar(2))); }

template <class V> PYROUTE_INLINE V log_lanes(V x) {
    using S = typename Lane<V>::Scalar;
    using E = Elementary<S>;
    using Int = typename Lane<V>::Int;
    using Uint = typename Lane<V>::Uint;
    const Uint bits = bit_cast<Uint>(x);
    const Int exponent = (Int)(bits - (Uint)(Int{} + E::sqrt_half_bits)) >> E::mantissa_bits;
    const V m = bit_cast<V>((Uint)(bits - ((Uint)exponent << E::mantissa_bits)));
    // the exponent as a floating-point number, by the same magic as in exp
    const V e = bit_cast<V>((Uint)((Uint)exponent + (Uint)(Int{} + E::round_magic_bits))) - E::round_magic;
    const V log_m = twice_atanh((m - S(1)) / (m + S(1)));
    return e * E::ln2_hi + (e * E::ln2_lo + log_m);
}

} // namespace pyroute::cpu::PYROUTE_ISA
