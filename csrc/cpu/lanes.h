// Fixed-width vectors for the CPU kernels.
//
// A kernel is written once, over vectors whose width is part of the contract (8 floats), and compiled once per
// instruction set. The compiler lowers a lane operation to two SSE2 or NEON registers, one AVX2 register or half an
// AVX-512 one; the IEEE operation per lane is the same, so the bytes are the same on every instruction set.
//
// Everything here lives in the namespace of the instruction set that the file is compiled for (PYROUTE_ISA is
// `scalar`, `avx2` or `avx512`) and is always inlined: a shared inline function could be compiled with AVX2 and then be
// the copy that the linker keeps for the baseline path.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef PYROUTE_ISA
#error "compile kernels with -DPYROUTE_ISA=scalar|avx2|avx512"
#endif

#define PYROUTE_INLINE static inline __attribute__((always_inline))

namespace pyroute::cpu::PYROUTE_ISA {

using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using u32x8 = uint32_t __attribute__((vector_size(32)));
using u16x8 = uint16_t __attribute__((vector_size(16)));
using u8x8 = uint8_t __attribute__((vector_size(8)));
using f64x4 = double __attribute__((vector_size(32)));
using i64x4 = int64_t __attribute__((vector_size(32)));

// What a program over floating-point values needs to know of its type; the types are scalars and vectors alike.
template <class V> struct Lane;
template <> struct Lane<float> {
    using Scalar = float;
    using Int = int32_t;
    using Uint = uint32_t;
    static constexpr int width = 1;
};
template <> struct Lane<double> {
    using Scalar = double;
    using Int = int64_t;
    using Uint = uint64_t;
    static constexpr int width = 1;
};
template <> struct Lane<f32x8> {
    using Scalar = float;
    using Int = i32x8;
    using Uint = u32x8;
    static constexpr int width = 8;
};
template <> struct Lane<f64x4> {
    using Scalar = double;
    using Int = i64x4;
    using Uint = uint64_t __attribute__((vector_size(32)));
    static constexpr int width = 4;
};

template <class To, class From> PYROUTE_INLINE To bit_cast(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V> PYROUTE_INLINE V broadcast(typename Lane<V>::Scalar value) {
    return value - V{}; // x - 0 is x, which x + 0 is not for -0
}

// a < b as a mask of ones, and a choice by such a mask. The operators do the same, but where a vector takes two
// registers GCC 12 takes them apart into single elements: 53 instructions for a comparison, by halves 9.
template <class Half, class V> PYROUTE_INLINE i32x8 less_by_halves(const V &a, const V &b) {
    struct Halves {
        Half low, high;
    };
    const Halves x = bit_cast<Halves>(a), y = bit_cast<Halves>(b);
    const struct {
        decltype(x.low < y.low) low, high;
    } mask = {x.low < y.low, x.high < y.high};
    return bit_cast<i32x8>(mask);
}
PYROUTE_INLINE i32x8 less(const f32x8 &a, const f32x8 &b) {
#if defined(__AVX2__)
    return a < b;
#else
    return less_by_halves<float __attribute__((vector_size(16)))>(a, b);
#endif
}
PYROUTE_INLINE i32x8 less(const i32x8 &a, const i32x8 &b) {
#if defined(__AVX2__)
    return a < b;
#else
    return less_by_halves<int32_t __attribute__((vector_size(16)))>(a, b);
#endif
}
template <class V> PYROUTE_INLINE V select(const i32x8 &mask, const V &yes, const V &no) {
#if defined(__AVX2__)
    return mask ? yes : no;
#else
    return bit_cast<V>((mask & bit_cast<i32x8>(yes)) | (~mask & bit_cast<i32x8>(no)));
#endif
}

// memcpy is the one unaligned access that neither aliasing rules nor UBSan object to; it becomes a single load.
template <class V, class T> PYROUTE_INLINE V load(const T *from) {
    V v;
    memcpy(&v, from, sizeof(V));
    return v;
}
template <class V, class T> PYROUTE_INLINE void store(T *to, const V &v) { memcpy(to, &v, sizeof(V)); }

// First `count` < 8 lanes; the others are `fill`. Never touches memory past the count.
PYROUTE_INLINE f32x8 load_partial(const float *from, int count, float fill) {
    f32x8 v = broadcast<f32x8>(fill);
    memcpy(&v, from, sizeof(float) * static_cast<size_t>(count));
    return v;
}
PYROUTE_INLINE void store_partial(float *to, const f32x8 &v, int count) {
    memcpy(to, &v, sizeof(float) * static_cast<size_t>(count));
}

// a * b + c with one rounding. Without FMA hardware this is the C library's slow and correct fmaf.
PYROUTE_INLINE f32x8 fma(const f32x8 &a, const f32x8 &b, const f32x8 &c) {
#if defined(__FMA__)
    return bit_cast<f32x8>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#else
    f32x8 r;
    for (int i = 0; i < 8; ++i)
        r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#endif
}

PYROUTE_INLINE float sqrt_lanes(float v) { return __builtin_sqrtf(v); }
PYROUTE_INLINE double sqrt_lanes(double v) { return __builtin_sqrt(v); }
PYROUTE_INLINE f32x8 sqrt_lanes(const f32x8 &v) {
#if defined(__AVX2__)
    return bit_cast<f32x8>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
#else
    f32x8 r;
    for (int i = 0; i < 8; ++i)
        r[i] = __builtin_sqrtf(v[i]);
    return r;
#endif
}

// Sum of the eight lanes by the fixed tree 4, 2, 1: ((0+4)+(2+6)) + ((1+5)+(3+7)).
PYROUTE_INLINE float sum_lanes(const f32x8 &v) {
    const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
    return (a + c) + (b + d);
}

// bfloat16 is the upper half of a float32. Rounding is to nearest even; every NaN becomes 0x7fc0 with its sign kept.
PYROUTE_INLINE float bf16_to_f32(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
PYROUTE_INLINE u32x8 widen(const u16x8 &v) {
#if defined(__AVX2__) // GCC 12 makes four instructions of the conversion
    return bit_cast<u32x8>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
    return __builtin_convertvector(v, u32x8);
#endif
}
PYROUTE_INLINE f32x8 bf16_to_f32(const u16x8 &bits) { return bit_cast<f32x8>(widen(bits) << 16); }
PYROUTE_INLINE uint16_t f32_to_bf16(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(nan ? (((bits >> 16) & 0x8000u) | 0x7fc0u) : rounded);
}
PYROUTE_INLINE u16x8 f32_to_bf16(const f32x8 &value) {
    const u32x8 bits = bit_cast<u32x8>(value);
    const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const u32x8 quiet = ((bits >> 16) & 0x8000u) | 0x7fc0u;
    const i32x8 nan = less(i32x8{} + 0x7f800000, (i32x8)(bits & 0x7fffffffu));
    return __builtin_convertvector(select(nan, quiet, rounded), u16x8);
}

} // namespace pyroute::cpu::PYROUTE_ISA
