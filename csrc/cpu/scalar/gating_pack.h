// Several vectors that go through a program side by side.
//
// A score takes some 30 dependent operations of 3 cycles each, and a core looks only so far ahead: vector after vector
// a row of 256 sigmoids takes 133 ns on Zen 4, four 8-lane vectors step by step 95, two 16-lane vectors 88. A pack is
// 32 floats (16 doubles), which is also what a sum over experts keeps apart: packs are added as they are.
#pragma once

#include "cpu/elementary.h"
#include "cpu/elements.h"

namespace pyroute::cpu::PYROUTE_ISA {

// A lambda is inlined like everything else here: what a call would pass through memory stays in registers.
#define PYROUTE_INLINED __attribute__((always_inline))

template <class V, int count> struct Pack {
    using Vector = V;
    static constexpr int vectors = count, lanes = count * Lane<V>::width;
    V v[count];
};

#if defined(__AVX512F__)
using f32x16 = float __attribute__((vector_size(64)));
template <> struct Lane<f32x16> {
    using Scalar = float;
    using Int = int32_t __attribute__((vector_size(64)));
    using Uint = uint32_t __attribute__((vector_size(64)));
    static constexpr int width = 16;
};
PYROUTE_INLINE f32x16 sqrt_lanes(const f32x16 &v) {
    return bit_cast<f32x16>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(v)));
}
PYROUTE_INLINE f64x8 sqrt_lanes(const f64x8 &v) {
    return bit_cast<f64x8>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(v)));
}
template <class Scalar> struct PackFor {
    using P = Pack<f32x16, 2>;
};
template <> struct PackFor<double> {
    using P = Pack<f64x8, 2>;
};
#else
template <class Scalar> struct PackFor {
    using P = Pack<f32x8, 4>;
};
template <> struct PackFor<double> {
    using P = Pack<f64x4, 4>;
};
#endif
template <class Scalar> using PackOf = typename PackFor<Scalar>::P;

// f of the vectors of each pack, one after the other. Written out, since GCC keeps an array that a loop walks in
// memory.
template <class F, class P, class... More> PYROUTE_INLINE P zip(F f, const P &a, const More &...more) {
    if constexpr (P::vectors == 4)
        return {{f(a.v[0], more.v[0]...), f(a.v[1], more.v[1]...), f(a.v[2], more.v[2]...), f(a.v[3], more.v[3]...)}};
    else if constexpr (P::vectors == 2)
        return {{f(a.v[0], more.v[0]...), f(a.v[1], more.v[1]...)}};
    else
        return {{f(a.v[0], more.v[0]...)}};
}

template <class V, int count>
PYROUTE_INLINE Pack<V, count> operator+(const Pack<V, count> &a, const Pack<V, count> &b) {
    return zip([](const V &x, const V &y) PYROUTE_INLINED { return x + y; }, a, b);
}
template <class V, int count>
PYROUTE_INLINE Pack<V, count> operator*(const Pack<V, count> &a, const Pack<V, count> &b) {
    return zip([](const V &x, const V &y) PYROUTE_INLINED { return x * y; }, a, b);
}
template <class V, int count>
PYROUTE_INLINE Pack<V, count> operator/(const Pack<V, count> &a, const Pack<V, count> &b) {
    return zip([](const V &x, const V &y) PYROUTE_INLINED { return x / y; }, a, b);
}

// With one number for every lane.
template <class V, int count>
PYROUTE_INLINE Pack<V, count> operator-(const Pack<V, count> &a, typename Lane<V>::Scalar b) {
    return zip([b](const V &x) PYROUTE_INLINED { return x - b; }, a);
}
template <class V, int count>
PYROUTE_INLINE Pack<V, count> operator*(const Pack<V, count> &a, typename Lane<V>::Scalar b) {
    return zip([b](const V &x) PYROUTE_INLINED { return x * b; }, a);
}
template <class V, int count>
PYROUTE_INLINE Pack<V, count> operator/(const Pack<V, count> &a, typename Lane<V>::Scalar b) {
    return zip([b](const V &x) PYROUTE_INLINED { return x / b; }, a);
}

// Every NaN as the one quiet NaN.
template <class V> PYROUTE_INLINE V canonical_lanes(const V &v) {
    using S = typename Lane<V>::Scalar;
    if constexpr (sizeof(V) == 32 && sizeof(S) == 4)
        return canonical(v);
    else
        return v == v ? v : broadcast<V>(sizeof(S) == 4 ? S(__builtin_nanf("")) : S(__builtin_nan("")));
}

// The lanes of `yes` where the mask is all ones.
template <class V, class Mask> PYROUTE_INLINE V blend(const Mask &mask, const V &yes, const V &no) {
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32)
        return bit_cast<V>(_mm256_blendv_ps(bit_cast<__m256>(no), bit_cast<__m256>(yes), bit_cast<__m256>(mask)));
    else
        return mask ? yes : no;
#else
    return bit_cast<V>((Mask)((bit_cast<Mask>(yes) & mask) | (bit_cast<Mask>(no) & ~mask)));
#endif
}

// The lanes of `negative` where z has its sign bit set.
template <class V> PYROUTE_INLINE V by_sign(const V &z, const V &negative, const V &other) {
    using Int = typename Lane<V>::Int;
    return blend((Int)(bit_cast<Int>(z) < 0), negative, other);
}
#if defined(__AVX2__)
PYROUTE_INLINE f32x8 by_sign(const f32x8 &z, const f32x8 &negative, const f32x8 &other) {
    return bit_cast<f32x8>(_mm256_blendv_ps(bit_cast<__m256>(other), bit_cast<__m256>(negative), bit_cast<__m256>(z)));
}
#endif

// Keeps the compiler from computing one vector of a pack to its end before it begins the next.
template <class V> PYROUTE_INLINE void in_step(V &v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

// One step of a program: f of the vectors of each pack.
template <class F, class P, class... More> PYROUTE_INLINE P each(F f, const P &first, const More &...more) {
    P result = zip(f, first, more...);
    in_step(result.v[0]);
    if constexpr (P::vectors > 1)
        in_step(result.v[1]);
    if constexpr (P::vectors > 2) {
        in_step(result.v[2]);
        in_step(result.v[3]);
    }
    return result;
}

template <class P, class T> PYROUTE_INLINE P load_pack(const T *from) {
    using V = typename P::Vector;
    constexpr int width = Lane<V>::width;
    if constexpr (P::vectors == 4)
        return {{load<V>(from), load<V>(from + width), load<V>(from + 2 * width), load<V>(from + 3 * width)}};
    else if constexpr (P::vectors == 2)
        return {{load<V>(from), load<V>(from + width)}};
    else
        return {{load<V>(from)}};
}
template <class P, class T> PYROUTE_INLINE P load_pack_like(const P &, const T *from) { return load_pack<P>(from); }
template <class V, int count, class T> PYROUTE_INLINE void store_pack(T *to, const Pack<V, count> &pack) {
    store(to, pack.v[0]);
    if constexpr (count > 1)
        store(to + Lane<V>::width, pack.v[1]);
    if constexpr (count > 2) {
        store(to + 2 * Lane<V>::width, pack.v[2]);
        store(to + 3 * Lane<V>::width, pack.v[3]);
    }
}

// exp_normal_lanes in steps.
template <class V, int count> PYROUTE_INLINE Pack<V, count> exp_normal(const Pack<V, count> &x) {
    using E = Elementary<typename Lane<V>::Scalar>;
    using S = typename Lane<V>::Scalar;
    using Uint = typename Lane<V>::Uint;
    using P = Pack<V, count>;
    const P shifted = each([](const V &a) PYROUTE_INLINED { return a * E::log2_e + E::round_magic; }, x);
    const P r = each(
        [](const V &a, const V &s) PYROUTE_INLINED {
            const V n = s - E::round_magic;
            return (a - n * E::ln2_hi) - n * E::ln2_lo;
        },
        x, shifted);
    P p = each([](const V &a)
                   PYROUTE_INLINED { return a * E::exp_poly[E::exp_terms - 1] + E::exp_poly[E::exp_terms - 2]; },
               r);
    for (int i = E::exp_terms - 3; i >= 0; --i)
        p = each([i](const V &a, const V &b) PYROUTE_INLINED { return a * b + E::exp_poly[i]; }, p, r);
    return each(
        [](const V &a, const V &b, const V &s) PYROUTE_INLINED {
            const V e = (a * (b * b) + b) + S(1);
            return bit_cast<V>((Uint)(bit_cast<Uint>(e) + (bit_cast<Uint>(s) << E::mantissa_bits)));
        },
        p, r, shifted);
}

} // namespace pyroute::cpu::PYROUTE_ISA
