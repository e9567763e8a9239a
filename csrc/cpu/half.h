// float16 to and from float32, and the rounding that every smaller float type shares.
//
// narrow_magnitude  rounds to nearest even by one float32 addition: with the number 2^(23 - M) units above x's own
//                   exponent added, float32 rounds the sum to M bits of x, and the low bits of the sum count the steps.
//                   Below the smallest normal exponent the steps stay that exponent's, which is what subnormals are.
#pragma once

#include "cpu/lanes.h"

namespace pyroute::cpu::PYROUTE_ISA {

// GCC 12 makes a comparison and a masked move of the choice on AVX-512, where one instruction does it.
PYROUTE_INLINE i32x8 min_lanes(const i32x8 &a, const i32x8 &b) {
#if defined(__AVX2__)
    return bit_cast<i32x8>(_mm256_min_epi32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    return select(less(a, b), a, b);
#endif
}
PYROUTE_INLINE i32x8 max_lanes(const i32x8 &a, const i32x8 &b) {
#if defined(__AVX2__)
    return bit_cast<i32x8>(_mm256_max_epi32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    return select(less(a, b), b, a);
#endif
}

// Code of a magnitude (float32 bits without sign, finite or not) in a format with M mantissa bits and the smallest
// normal value 2^min_exponent. Magnitudes above `largest_bits` count as that; NaN and infinity too.
template <int M, int min_exponent, uint32_t largest_bits>
PYROUTE_INLINE u32x8 narrow_magnitude(const u32x8 &magnitude) {
    const i32x8 smallest = i32x8{} + ((127 + min_exponent) << 23);
    const i32x8 largest = i32x8{} + static_cast<int32_t>(largest_bits);
    const i32x8 capped = min_lanes((i32x8)magnitude, largest); // signed: all of these are below 2^31
    const i32x8 exponent = max_lanes(capped & 0x7f800000, smallest);
    const i32x8 magic = exponent + ((23 - M) << 23);
    const i32x8 steps = bit_cast<i32x8>(bit_cast<f32x8>(capped) + bit_cast<f32x8>(magic)) - magic;
    return (u32x8)(steps + ((exponent - smallest) >> (23 - M)));
}

PYROUTE_INLINE f32x8 f16_to_f32(const u16x8 &half) {
#if defined(__F16C__)
    return bit_cast<f32x8>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
#else
    const u32x8 code = __builtin_convertvector(half, u32x8);
    const i32x8 magnitude = (i32x8)(code & 0x7fff);
    // A subnormal borrows the exponent of the smallest normal value, which is then subtracted: no float32 subnormal
    // appears. Infinity and NaN need the exponent offset (112) twice.
    const i32x8 subnormal = less(magnitude, i32x8{} + 0x0400);
    const i32x8 top = less(i32x8{} + 0x7bff, magnitude);
    const i32x8 bits = (magnitude << 13) + (112 << 23) + (subnormal & (1 << 23)) + (top & (112 << 23));
    const f32x8 borrowed = bit_cast<f32x8>(subnormal & (113 << 23));
    const u32x8 value = bit_cast<u32x8>(bit_cast<f32x8>(bits) - borrowed);
    return bit_cast<f32x8>(value | ((code & 0x8000) << 16));
#endif
}

PYROUTE_INLINE u16x8 f32_to_f16(const f32x8 &value) {
#if defined(__F16C__)
    return bit_cast<u16x8>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    const u32x8 bits = bit_cast<u32x8>(value);
    const u32x8 magnitude = bits & 0x7fffffff;
    const u32x8 nan = 0x7e00 | ((magnitude >> 13) & 0x03ff);
    const u32x8 rounded = narrow_magnitude<10, -14, 0x47800000>(magnitude); // 2^16, the cap, comes out as infinity
    const u32x8 code = select(less(i32x8{} + 0x7f800000, (i32x8)magnitude), nan, rounded);
    return __builtin_convertvector(code | ((bits >> 16) & 0x8000), u16x8);
#endif
}

} // namespace pyroute::cpu::PYROUTE_ISA
