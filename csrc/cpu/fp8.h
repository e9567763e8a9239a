// float8_e4m3fn and float8_e5m2 to and from float32, eight at a time.
//
// fp8_encode<Format>  nearest even; finite values saturate; NaN and infinities become the one NaN code, without sign
// Format::decode      exact; NaN codes give some NaN
// fp8_decode32        the same for long runs
//
// pyroute/_array/quantization.py is the same cast in array code. The conversions of libraries and of hardware differ
// from it, and from each other, at overflow and at infinity.
#pragma once

#include "cpu/half.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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
        const i32x8 subnormal = less(magnitude, i32x8{} + 0x08);
        const i32x8 nan = less(i32x8{} + 0x7e, magnitude);
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

// Eight numbers below 256 as bytes. Without AVX-512's single instruction for it, compilers build this conversion from
// shuffles of single elements; two packs do it (quantising float32 by AVX2: 1.3 to 2.0 elements a nanosecond).
PYROUTE_INLINE u8x8 pack_bytes(const u32x8 &v) {
#if defined(__SSE2__) && !defined(__AVX512VL__)
    struct Halves {
        __m128i low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
    const __m128i words = _mm_packs_epi32(halves.low, halves.high);
    u8x8 bytes;
    _mm_storel_epi64(reinterpret_cast<__m128i *>(&bytes), _mm_packus_epi16(words, words));
    return bytes;
#else
    return __builtin_convertvector(v, u8x8);
#endif
}

template <class Format> PYROUTE_INLINE u8x8 fp8_encode(const f32x8 &x) {
    const u32x8 bits = bit_cast<u32x8>(x);
    const u32x8 magnitude = bits & 0x7fffffff;
    const u32x8 code =
        narrow_magnitude<Format::mantissa_bits, Format::min_exponent, Format::max_value_bits>(magnitude) |
        ((bits >> 24) & 0x80);
    return pack_bytes(select(less((i32x8)magnitude, i32x8{} + 0x7f800000), code, u32x8{} + Format::nan_code));
}

// Thirty-two codes to float32. e4m3 on Zen 4, data in L1: 0.72 ns for eight codes; by way of float16, sixteen at a
// time, 0.90, eight at a time 1.13.
template <class Format> PYROUTE_INLINE void fp8_decode32(Format, const uint8_t *from, float *to) {
    for (int i = 0; i < 32; i += 8)
        store(to + i, Format::decode(load<u8x8>(from + i)));
}

#if defined(__AVX2__)
// Two instructions per vector widen bfloat16, and e4m3 is bfloat16 but for the exponent's bias: its high byte is a
// table over the code's upper four bits, its low byte the lower four bits moved up. Codes with exponent 0 or 1 differ
// by a second table, which yields zero for the other codes since their index has its top bit set.
PYROUTE_INLINE void fp8_decode32(E4m3, const uint8_t *from, float *to) {
    using u8x32 = uint8_t __attribute__((vector_size(32)));
    using u16x16 = uint16_t __attribute__((vector_size(32)));
    const auto lookup = [](const u8x32 &table, const u8x32 &index) __attribute__((always_inline)) {
        return bit_cast<u8x32>(_mm256_shuffle_epi8(bit_cast<__m256i>(table), bit_cast<__m256i>(index)));
    };
    // clang-format off
    const u8x32 high_table = {60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195,
                              60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195};
    // what to add to 60, and what to flip in the lower bits moved up: m * 2^-9 for the codes 0 to 7
    const u8x32 high_fix = {196, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                            196, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const u8x32 low_fix = {0, 0x10, 0xa0, 0xf0, 0x40, 0x70, 0x20, 0x10, 0, 0, 0, 0, 0, 0, 0, 0,
                           0, 0x10, 0xa0, 0xf0, 0x40, 0x70, 0x20, 0x10, 0, 0, 0, 0, 0, 0, 0, 0};
    // clang-format on
    // The unpacking below works on the halves of a register: the order of dwords that leaves results in order.
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const u8x32 code = bit_cast<u8x32>(
        _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)), order));
    const u8x32 magnitude = code & 0x7f;
    const u8x32 fix = bit_cast<u8x32>(_mm256_adds_epu8(bit_cast<__m256i>(magnitude), _mm256_set1_epi8(0x70)));
    const u8x32 upper = bit_cast<u8x32>(bit_cast<u16x16>(code) >> 4) & 0x0f;
    const u8x32 lower = bit_cast<u8x32>(bit_cast<u16x16>(code) << 4) & 0xf0;
    const u8x32 nan = (u8x32)(magnitude == 0x7f);
    const __m256i high = bit_cast<__m256i>((lookup(high_table, upper) + lookup(high_fix, fix)) | nan);
    const __m256i low = bit_cast<__m256i>(lower ^ lookup(low_fix, fix));
    const __m256i first = _mm256_unpacklo_epi8(low, high), last = _mm256_unpackhi_epi8(low, high);
    const __m256i zero = _mm256_setzero_si256();
    store(to, _mm256_unpacklo_epi16(zero, first));
    store(to + 8, _mm256_unpackhi_epi16(zero, first));
    store(to + 16, _mm256_unpacklo_epi16(zero, last));
    store(to + 24, _mm256_unpackhi_epi16(zero, last));
}
#endif

} // namespace pyroute::cpu::PYROUTE_ISA
