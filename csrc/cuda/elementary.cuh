// exp, log and log1p: csrc/cpu/elementary.h, one number at a time, with its bits. The programs and their errors are
// described there; coefficients and order must change together.
//
//   exp_of      any number; NaN gives NaN
//   log1p_of    of 0 <= u <= 1
//   log_of      of positive normal numbers
//
// The *_in_range words give the same bits in fewer instructions and without branches where the caller knows the range.
#pragma once

#include "cuda/device.cuh"

namespace pyroute::cuda {

template <class Scalar> struct Elementary;

template <> struct Elementary<float> {
    using Int = int32_t;
    using Uint = uint32_t;
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
    static constexpr float round_magic = 12582912.0f;
    static constexpr int32_t round_magic_bits = 0x4b400000, sqrt_half_bits = 0x3f3504f3;
    static constexpr float log2_e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
    static constexpr float exp_min = -104.0f, exp_max = 89.0f;
    // x - n ln2_hi. n has at most 8 bits and ln2_hi 9: their product is exact, so that fusing changes nothing.
    PYROUTE_DEVICE static float without_ln2_hi(float x, float n) { return fmaf(n, -ln2_hi, x); }
    PYROUTE_DEVICE static float exp_poly(float r) {
        return (((0.0013814596459269524f * r + 0.0083687175065279f) * r + 0.04166838899254799f) * r +
                0.1666652113199234f) *
                   r +
               0.4999999403953552f;
    }
    PYROUTE_DEVICE static float atanh_poly(float q) {
        return (((0.12150469422340393f * q + 0.10713828355073929f) * q + 0.14308442175388336f) * q +
                0.19999438524246216f) *
                   q +
               0.3333333730697632f;
    }
    PYROUTE_DEVICE static float of_bits(uint32_t bits) { return float_of(bits); }
};

template <> struct Elementary<double> {
    using Int = int64_t;
    using Uint = uint64_t;
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
    static constexpr double round_magic = 6755399441055744.0;
    static constexpr int64_t round_magic_bits = 0x4338000000000000, sqrt_half_bits = 0x3fe6a09e667f3bcd;
    static constexpr double log2_e = 1.4426950408889634, ln2_hi = 6.93147180369123816490e-01,
                            ln2_lo = 1.90821492927058770002e-10;
    static constexpr double exp_min = -746.0, exp_max = 710.0;
    PYROUTE_DEVICE static double without_ln2_hi(double x, double n) { return x - n * ln2_hi; }
    PYROUTE_DEVICE static double exp_poly(double r) {
        double p = 1.0 / 6227020800;
        p = p * r + 1.0 / 479001600;
        p = p * r + 1.0 / 39916800;
        p = p * r + 1.0 / 3628800;
        p = p * r + 1.0 / 362880;
        p = p * r + 1.0 / 40320;
        p = p * r + 1.0 / 5040;
        p = p * r + 1.0 / 720;
        p = p * r + 1.0 / 120;
        p = p * r + 1.0 / 24;
        p = p * r + 1.0 / 6;
        return p * r + 1.0 / 2;
    }
    PYROUTE_DEVICE static double atanh_poly(double q) {
        double p = 1.0 / 33;
        p = p * q + 1.0 / 31;
        p = p * q + 1.0 / 29;
        p = p * q + 1.0 / 27;
        p = p * q + 1.0 / 25;
        p = p * q + 1.0 / 23;
        p = p * q + 1.0 / 21;
        p = p * q + 1.0 / 19;
        p = p * q + 1.0 / 17;
        p = p * q + 1.0 / 15;
        p = p * q + 1.0 / 13;
        p = p * q + 1.0 / 11;
        p = p * q + 1.0 / 9;
        p = p * q + 1.0 / 7;
        p = p * q + 1.0 / 5;
        return p * q + 1.0 / 3;
    }
    PYROUTE_DEVICE static double of_bits(uint64_t bits) { return double_of(bits); }
};

// e^x = p 2^n; `shifted` holds n in its low bits.
template <class Scalar> struct ExpParts {
    Scalar p, shifted;
};
template <class Scalar> PYROUTE_DEVICE ExpParts<Scalar> exp_parts(Scalar x) {
    using E = Elementary<Scalar>;
    const Scalar shifted = x * E::log2_e + E::round_magic;
    const Scalar n = shifted - E::round_magic;
    const Scalar r = E::without_ln2_hi(x, n) - n * E::ln2_lo;
    return {(E::exp_poly(r) * (r * r) + r) + Scalar(1), shifted};
}

template <class Scalar> PYROUTE_DEVICE Scalar exp2_of_int(typename Elementary<Scalar>::Uint n) {
    using E = Elementary<Scalar>;
    return E::of_bits((n + E::exponent_bias) << E::mantissa_bits);
}

template <class Scalar> PYROUTE_DEVICE Scalar exp_of(Scalar x) {
    using E = Elementary<Scalar>;
    using Uint = typename E::Uint;
    x = x < E::exp_min ? E::exp_min : x; // of NaN it is NaN
    x = x > E::exp_max ? E::exp_max : x;
    const ExpParts<Scalar> e = exp_parts(x);
    const Uint whole = bits_of(e.shifted) - static_cast<Uint>(E::round_magic_bits); // of NaN anything: p is NaN
    const Uint half = static_cast<Uint>(static_cast<typename E::Int>(whole) >> 1);
    return (e.p * exp2_of_int<Scalar>(half)) * exp2_of_int<Scalar>(whole - half);
}

// For x in [-87, 0] (float64: [-708, 0]), where the result is normal: n is added to the exponent of p.
template <class Scalar> PYROUTE_DEVICE Scalar exp_in_range(Scalar x) {
    using E = Elementary<Scalar>;
    const ExpParts<Scalar> e = exp_parts(x);
    return E::of_bits(bits_of(e.p) + (bits_of(e.shifted) << E::mantissa_bits));
}

// a / b for b in [1, 2^12] and a in [2^-60, 2^12].
PYROUTE_DEVICE double divide_in_range(double a, double b) { return a / b; }
// sqrt(x) for x in [2^-60, 2^12]
PYROUTE_DEVICE double sqrt_in_range(double x) { return sqrt(x); }
// The compiler's own steps for a quotient and a root without its test of the range and the branch that goes with it: an
// approximation to one unit in the last place, one step of Newton's, and one correction by the exact remainder. Both
// are rounded correctly.
PYROUTE_DEVICE float divide_in_range(float a, float b) {
    float r = approximate_reciprocal(b);
    r = fmaf(r, fmaf(-b, r, 1.0f), r);
    const float q = a * r;
    return fmaf(r, fmaf(-b, q, a), q);
}
PYROUTE_DEVICE float sqrt_in_range(float x) {
    const float y = approximate_rsqrt(x), root = x * y;
    return fmaf(fmaf(-root, root, x), 0.5f * y, root);
}

// 2 atanh(s) for 0 <= |s| <= 1/3
template <class Scalar> PYROUTE_DEVICE Scalar twice_atanh(Scalar s) {
    const Scalar q = s * s, twice = s + s;
    return twice + twice * (q * Elementary<Scalar>::atanh_poly(q));
}

template <class Scalar> PYROUTE_DEVICE Scalar log1p_of(Scalar u) { return twice_atanh(u / (u + Scalar(2))); }

template <class Scalar> PYROUTE_DEVICE Scalar log_of(Scalar x) {
    using E = Elementary<Scalar>;
    using Int = typename E::Int;
    using Uint = typename E::Uint;
    const Uint bits = bits_of(x);
    const Int exponent = static_cast<Int>(bits - static_cast<Uint>(E::sqrt_half_bits)) >> E::mantissa_bits;
    const Scalar m = E::of_bits(bits - (static_cast<Uint>(exponent) << E::mantissa_bits));
    const Scalar e = E::of_bits(static_cast<Uint>(exponent) + static_cast<Uint>(E::round_magic_bits)) - E::round_magic;
    return e * E::ln2_hi + (e * E::ln2_lo + twice_atanh((m - Scalar(1)) / (m + Scalar(1))));
}

} // namespace pyroute::cuda
