// float8_e4m3fn and float8_e5m2 to and from float32, eight at a time.
//
// fp8_encode<Format>  nearest even; finite values saturate; NaN and infinities become the one NaN code, without sign
// Format::decode      exact; NaN codes give some NaN
//
// pyroute/_array/quantization.py is the same cast in array code. The conversions of libraries and of hardware differ
// from it, and from each other, at overflow and at infinity.
#pragma once

#include "cpu/half.h"

namespace pyroute::cpu::PYROUTE_ISA {

struct E4m3 {
    static constexpr int mantissa_bits = 3, min_exponent = -6;
    static constexpr uint32_t nan_code = 0x7f;
    static constexpr float max_value = 448.0f;
    static constexpr uint32_t max_value_bits = 0x43e00000;

    PYROUTE_INLINE f32x8 decode(const u8x8 &codes) {
#if defined(__F16C__)
        // One exponent bit less than float16: sign-extended and shifted, the code is float16 for value / 256. The NaN
        // code becomes float16's by exponent bits of its own.
        using i16x8 = int16_t __attribute__((vector_size(16)));
        const i16x8 wide =
            bit_cast<i16x8>(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(&codes))));
        const i16x8 shifted = wide << 7;
        const i16x8 nan = (shifted & 0x3f80) == 0x3f80;
        const i16x8 half = (shifted & static_cast<int16_t>(0xbf80)) | (nan & 0x7c00);
        return bit_cast<f32x8>(_mm256_cvtph_ps(bit_cast<__m128i>(half))) * 256.0f;
#else
        const u32x8 code = __builtin_convertvector(codes, u32x8);
        const i32x8 magnitude = (i32x8)(code & 0x7f);
        // a subnormal borrows the exponent of the smallest normal value, which is then subtracted
        const i32x8 subnormal = magnitude < 0x08;
        const i32x8 nan = magnitude == 0x7f;
        const i32x8 bits = (magnitude << 20) + (120 << 23) + (subnormal & (1 << 23));
        const f32x8 value = bit_cast<f32x8>(bits) - bit_cast<f32x8>(subnormal & (121 << 23));
        return bit_cast<f32x8>((bit_cast<u32x8>(value) | (u32x8)(nan & 0x7fc00000)) | ((code & 0x80) << 24));
#endif
    }
};

struct E5m2 {
    static constexpr int mantissa_bits = 2, min_exponent = -14;
    static constexpr uint32_t nan_code = 0x7e;
    static constexpr float max_value = 57344.0f;
    static constexpr uint32_t max_value_bits = 0x47600000;

    // the upper byte of float16
    PYROUTE_INLINE f32x8 decode(const u8x8 &codes) { return f16_to_f32(__builtin_convertvector(codes, u16x8) << 8); }
};

template <class Format> PYROUTE_INLINE u32x8 fp8_encode(const f32x8 &x) {
    const u32x8 bits = bit_cast<u32x8>(x);
    const u32x8 magnitude = bits & 0x7fffffff;
    const u32x8 code =
        narrow_magnitude<Format::mantissa_bits, Format::min_exponent, Format::max_value_bits>(magnitude) |
        ((bits >> 24) & 0x80);
    return (i32x8)magnitude >= 0x7f800000 ? u32x8{} + Format::nan_code : code;
}

} // namespace pyroute::cpu::PYROUTE_ISA
