// Runs of numbers times inverse scales to FP8 codes.
//
//   encode_run    the codes of x[i] * inverse, for finite products that round to finite codes: those of a block whose
//                 values are all finite, since its scale is made for them. No overflow, no NaN, half the work
//   encode_any    the same for any products
//
// encode_run fetches what follows the run, in steps of its own, and can write its codes past the caches.
//
// Both are one float32 addition (cpu/half.h). With the exponent e of the product, at least the smallest normal one,
// the number added is 2^(e + 23 - M) plus as many units as the codes below 2^e count, so that the low byte of the sum
// is the code. On AVX-512 a table over the exponent gives the number; a magnitude's sign travels in packed bytes.
//
// 128 elements in L1 take 10.5 ns on AVX-512 and 16 on AVX2 (Zen 4; the general encoder of cpu/fp8.h: 60).
#pragma once

#include "cpu/elements.h"
#include "cpu/fp8.h"

namespace pyroute::cpu::PYROUTE_ISA {

// A block scale is computed in float32 whatever the type: float64 is rounded first.
PYROUTE_INLINE f32x8 as_f32(const f32x8 &v) { return v; }
PYROUTE_INLINE f32x8 as_f32(const f64x8 &v) { return __builtin_convertvector(v, f32x8); }

template <class Type> PYROUTE_INLINE f32x8 load_f32(const typename Type::Storage *from) {
    return as_f32(load_elements<Type>(from));
}
template <class Type> PYROUTE_INLINE f32x8 load_f32(const typename Type::Storage *from, int64_t count) {
    return as_f32(load_elements<Type>(from, count));
}

// The inverse scales of a run: one per 2^shift >= 32 elements, or one per element; and those of one step of it.
struct TwoInverses {
    static constexpr bool per_32 = true;
    float first, second; // of the first and the second 32 elements
};
struct InversePerBlock {
    const float *values;
    int shift;
    PYROUTE_INLINE TwoInverses from(const InversePerBlock &all, int64_t at) {
        return {all.values[at >> all.shift], all.values[(at + 32) >> all.shift]};
    }
    PYROUTE_INLINE TwoInverses last(const InversePerBlock &all, int64_t at) { // fewer than 64 elements are left
        return {all.values[at >> all.shift], 0.0f};
    }
};
struct InversePerElement {
    static constexpr bool per_32 = false;
    const float *values;
    PYROUTE_INLINE InversePerElement from(const InversePerElement &all, int64_t at) { return {all.values + at}; }
    PYROUTE_INLINE InversePerElement last(const InversePerElement &all, int64_t at) { return {all.values + at}; }
};

PYROUTE_INLINE f32x8 eight_at(const InversePerBlock &all, int64_t at) {
    return broadcast<f32x8>(all.values[at >> all.shift]);
}
PYROUTE_INLINE f32x8 eight_at(const InversePerElement &all, int64_t at) { return load<f32x8>(all.values + at); }

template <class Type, class Format, class Inverse>
PYROUTE_INLINE void encode_any(const typename Type::Storage *x, int64_t n, const Inverse &inverse, uint8_t *codes) {
    int64_t c = 0;
    for (; c + 8 <= n; c += 8)
        store(codes + c, fp8_encode<Format>(load_f32<Type>(x + c) * eight_at(inverse, c)));
    if (c < n) {
        const u8x8 last = fp8_encode<Format>(load_f32<Type>(x + c, n - c) * eight_at(inverse, c));
        memcpy(codes + c, &last, static_cast<size_t>(n - c));
    }
}

#if defined(__AVX2__)

template <class Type> constexpr bool is_bfloat16 = false;
template <> constexpr bool is_bfloat16<Bfloat16> = true;

PYROUTE_INLINE __m256 eight_inverses(const TwoInverses &step, int at) {
    return _mm256_set1_ps(at < 32 ? step.first : step.second);
}
PYROUTE_INLINE __m256 eight_inverses(const InversePerElement &all, int at) { return _mm256_loadu_ps(all.values + at); }

// The code of each magnitude in the low half of its lane; the upper half holds an exponent.
template <class Format> PYROUTE_INLINE __m256i codes8(__m256 magnitude) {
    constexpr int shift = 23 - Format::mantissa_bits;
    constexpr int smallest = (127 + Format::min_exponent) << 23;
    const __m256i all = _mm256_and_si256(_mm256_castps_si256(magnitude), _mm256_set1_epi32(0x7f800000));
    const __m256i exponent = _mm256_max_epi32(all, _mm256_set1_epi32(smallest));
    const __m256i raised = _mm256_add_epi32(exponent, _mm256_set1_epi32((shift << 23) - (smallest >> shift)));
    const __m256i magic = _mm256_add_epi32(raised, _mm256_srli_epi32(exponent, shift));
    return _mm256_castps_si256(_mm256_add_ps(magnitude, _mm256_castsi256_ps(magic)));
}

// Bytes in the order that packing leaves, twice four dwords, with the signs of `signs`; in the order of the elements.
template <bool streaming> PYROUTE_INLINE void store_codes32(uint8_t *to, __m256i codes, __m256i signs, __m256i order) {
    const __m256i sign = _mm256_and_si256(signs, _mm256_set1_epi8(-128));
    const __m256i both = _mm256_permutevar8x32_epi32(_mm256_or_si256(codes, sign), order);
    if (streaming)
        _mm256_stream_si256(reinterpret_cast<__m256i *>(to), both);
    else
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), both);
}

// bfloat16 with one scale: elements of even and odd places apart, which one shift brings together again.
template <class Format, bool streaming, class Inverse>
PYROUTE_INLINE void encode32_bf16(const uint16_t *x, const Inverse &inverse, uint8_t *codes) {
    const __m256 scale = eight_inverses(inverse, 0);
    __m256i v[2], words[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        v[i] = load<__m256i>(x + 16 * i);
        const __m256i odd = _mm256_and_si256(v[i], _mm256_set1_epi32(0x7fff0000));
        const __m256i even = _mm256_srli_epi32(_mm256_slli_epi32(v[i], 17), 1);
        const __m256i low = codes8<Format>(_mm256_mul_ps(_mm256_castsi256_ps(even), scale));
        const __m256i high = codes8<Format>(_mm256_mul_ps(_mm256_castsi256_ps(odd), scale));
        words[i] = _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
    }
    store_codes32<streaming>(codes, _mm256_packus_epi16(words[0], words[1]), _mm256_packs_epi16(v[0], v[1]),
                             _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
}

PYROUTE_INLINE __m256i low_halves(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi32(0xffff)); }

template <class Type, class Format, bool streaming, class Inverse>
PYROUTE_INLINE void encode32(const typename Type::Storage *x, const Inverse &inverse, uint8_t *codes) {
    if constexpr (is_bfloat16<Type> && Inverse::per_32)
        return encode32_bf16<Format, streaming>(x, inverse, codes);
    __m256 v[4];
    __m256i c[4];
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = bit_cast<__m256>(load_f32<Type>(x + 8 * i));
        c[i] = codes8<Format>(_mm256_mul_ps(_mm256_and_ps(v[i], no_sign), eight_inverses(inverse, 8 * i)));
    }
    const auto words = [](__m256 a, __m256 b) __attribute__((always_inline)) {
        return _mm256_packs_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
    };
    const __m256i signs = _mm256_packs_epi16(words(v[0], v[1]), words(v[2], v[3]));
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(low_halves(c[0]), low_halves(c[1])),
                                               _mm256_packus_epi32(low_halves(c[2]), low_halves(c[3])));
    store_codes32<streaming>(codes, packed, signs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

#endif

#if defined(__AVX512BW__)

// maskz forms where GCC 12 warns of its own undefined vectors; with a constant full mask they are the plain instruction
PYROUTE_INLINE __m512 sixteen_inverses(const TwoInverses &step, int at) {
    return _mm512_set1_ps(at < 32 ? step.first : step.second);
}
PYROUTE_INLINE __m512 sixteen_inverses(const InversePerElement &all, int at) {
    return _mm512_loadu_ps(all.values + at);
}

// What codes8 adds, by the exponent modulo 32.
template <class Format> struct MagicTable {
    alignas(64) int32_t of[32] = {};
    constexpr MagicTable() {
        constexpr int shift = 23 - Format::mantissa_bits;
        for (int e = Format::min_exponent; e < Format::min_exponent + 30; ++e)
            of[(127 + e) % 32] = ((127 + e + shift) << 23) + ((e - Format::min_exponent) << Format::mantissa_bits);
    }
};

template <class Format> PYROUTE_INLINE __m512i codes16(__m512 magnitude) {
    static constexpr MagicTable<Format> magic;
    constexpr float smallest = Format::min_exponent == -6 ? 0x1p-6f : 0x1p-14f;
    const __m512i exponent = _mm512_maskz_srli_epi32(
        0xffff, _mm512_castps_si512(_mm512_maskz_max_ps(0xffff, magnitude, _mm512_set1_ps(smallest))), 23);
    const __m512i number =
        _mm512_permutex2var_epi32(_mm512_load_si512(magic.of), exponent, _mm512_load_si512(magic.of + 16));
    return _mm512_castps_si512(_mm512_add_ps(magnitude, _mm512_castsi512_ps(number)));
}

template <bool streaming> PYROUTE_INLINE void store_codes64(uint8_t *to, __m512i codes, __m512i signs, __m512i order) {
    const __m512i mixed = _mm512_ternarylogic_epi32(codes, signs, _mm512_set1_epi8(-128), 0xf8); // a | (b & c)
    const __m512i both = _mm512_maskz_permutexvar_epi32(0xffff, order, mixed);
    if (streaming)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), both);
    else
        _mm512_storeu_si512(to, both);
}

template <class Format, bool streaming, class Inverse>
PYROUTE_INLINE void encode64_bf16(const uint16_t *x, const Inverse &inverse, uint8_t *codes) {
    __m512i v[2], words[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 scale = sixteen_inverses(inverse, 32 * i);
        v[i] = load<__m512i>(x + 32 * i);
        const __m512i odd = _mm512_and_si512(v[i], _mm512_set1_epi32(0x7fff0000));
        const __m512i even = _mm512_maskz_srli_epi32(0xffff, _mm512_maskz_slli_epi32(0xffff, v[i], 17), 1);
        const __m512i low = codes16<Format>(_mm512_mul_ps(_mm512_castsi512_ps(even), scale));
        const __m512i high = codes16<Format>(_mm512_mul_ps(_mm512_castsi512_ps(odd), scale));
        words[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_maskz_slli_epi32(0xffff, high, 16));
    }
    store_codes64<streaming>(codes, _mm512_packus_epi16(words[0], words[1]), _mm512_packs_epi16(v[0], v[1]),
                             _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
}

template <class Type> PYROUTE_INLINE __m512 sixteen_f32(const typename Type::Storage *x) {
    struct Halves {
        f32x8 low, high;
    };
    return bit_cast<__m512>(Halves{load_f32<Type>(x), load_f32<Type>(x + 8)});
}
template <> __m512 sixteen_f32<Float32>(const float *x) { return load<__m512>(x); }

template <class Type, class Format, bool streaming, class Inverse>
PYROUTE_INLINE void encode64(const typename Type::Storage *x, const Inverse &inverse, uint8_t *codes) {
    if constexpr (is_bfloat16<Type> && Inverse::per_32)
        return encode64_bf16<Format, streaming>(x, inverse, codes);
    const __m512 no_sign = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    __m512 v[4];
    __m512i c[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = sixteen_f32<Type>(x + 16 * i);
        c[i] = codes16<Format>(_mm512_mul_ps(_mm512_and_ps(v[i], no_sign), sixteen_inverses(inverse, 16 * i)));
    }
    const auto words = [](__m512 a, __m512 b) __attribute__((always_inline)) {
        return _mm512_packs_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b));
    };
    // the low words in the order of the instruction that packs the signs, which would saturate
    // clang-format off
    const __m512i low = _mm512_set_epi16(62, 60, 58, 56, 30, 28, 26, 24, 54, 52, 50, 48, 22, 20, 18, 16,
                                         46, 44, 42, 40, 14, 12, 10, 8, 38, 36, 34, 32, 6, 4, 2, 0);
    // clang-format on
    const __m512i packed =
        _mm512_packus_epi16(_mm512_permutex2var_epi16(c[0], low, c[1]), _mm512_permutex2var_epi16(c[2], low, c[3]));
    store_codes64<streaming>(codes, packed, _mm512_packs_epi16(words(v[0], v[1]), words(v[2], v[3])),
                             _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}

#endif

template <class Storage> PYROUTE_INLINE void fetch(const Storage *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(Storage)))
        __builtin_prefetch(from + i);
}

// Streaming takes codes that are aligned to 64 bytes and a multiple of 64 elements.
template <class Type, class Format, bool streaming, class Inverse>
PYROUTE_INLINE void encode_run(const typename Type::Storage *x, int64_t n, const Inverse &inverse, uint8_t *codes) {
    int64_t c = 0;
#if defined(__AVX512BW__)
    for (; c + 64 <= n; c += 64) {
        fetch(x + n + c, 64);
        encode64<Type, Format, streaming>(x + c, Inverse::from(inverse, c), codes + c);
    }
    if (c + 32 <= n) {
        encode32<Type, Format, false>(x + c, Inverse::last(inverse, c), codes + c);
        c += 32;
    }
#elif defined(__AVX2__)
    for (; c + 32 <= n; c += 32) {
        fetch(x + n + c, 32);
        encode32<Type, Format, streaming>(x + c, Inverse::last(inverse, c), codes + c);
    }
#endif
    for (; c + 8 <= n; c += 8)
        store(codes + c, fp8_encode<Format>(load_f32<Type>(x + c) * eight_at(inverse, c)));
    if (c < n) {
        const u8x8 last = fp8_encode<Format>(load_f32<Type>(x + c, n - c) * eight_at(inverse, c));
        memcpy(codes + c, &last, static_cast<size_t>(n - c));
    }
}

} // namespace pyroute::cpu::PYROUTE_ISA
