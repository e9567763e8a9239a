// FP8 codes to float32 by tables of bytes (AVX-512 VBMI), 64 at a time.
//
// An FP8 value is a bfloat16 exactly, subnormals, infinities and NaN included, and one permutation of two registers
// looks 64 codes up in a table of 128: once for the high bytes, once for the low ones. Unpacking with zeros moves both
// to the upper half of a float32.
#pragma once

#include "cpu/fp8.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

struct CodeTables {
    uint8_t high[128], low[128]; // of a magnitude's bfloat16
};

// m * 2^(e - bias - mantissa_bits) as bfloat16, for codes without sign.
template <class Format> constexpr CodeTables make_code_tables() {
    CodeTables tables{};
    constexpr int bits = Format::mantissa_bits, one = 1 << bits;
    for (int code = 0; code < 128; ++code) {
        int exponent = code >> bits, mantissa = code & (one - 1);
        int value = 0;
        if (code >= static_cast<int>(Format::nan_code) || (bits == 2 && exponent == 31))
            value = 0x7f80 | (mantissa ? 0x40 : 0);
        else if (code) {
            if (exponent == 0) { // normalise
                exponent = 1;
                while (mantissa < one) {
                    mantissa *= 2;
                    --exponent;
                }
            }
            value = (exponent + 126 + Format::min_exponent) << 7 | (mantissa & (one - 1)) << (7 - bits);
        }
        tables.high[code] = static_cast<uint8_t>(value >> 8);
        tables.low[code] = static_cast<uint8_t>(value);
    }
    return tables;
}
template <class Format> alignas(64) constexpr CodeTables code_tables = make_code_tables<Format>();

template <class Format> class CodeWidener {
  public:
    // Four codes of each 128 bits: the first four to values[0], the next to values[1].
    PYROUTE_INLINE void widen(const CodeWidener &t, const __m512i &codes, __m512 (&values)[4]) {
        const __m512i signs = _mm512_and_si512(codes, _mm512_set1_epi8(-128));
        const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(t.high_[0], codes, t.high_[1]), signs);
        const __m512i low = _mm512_permutex2var_epi8(t.low_[0], codes, t.low_[1]);
        const __m512i front = _mm512_unpacklo_epi8(low, high), back = _mm512_unpackhi_epi8(low, high);
        const __m512i zero = _mm512_setzero_si512();
        values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, front));
        values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, front));
        values[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, back));
        values[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, back));
    }

  private:
    PYROUTE_INLINE __m512i at(const void *from) { return _mm512_load_si512(from); }
    __m512i high_[2] = {at(code_tables<Format>.high), at(code_tables<Format>.high + 64)};
    __m512i low_[2] = {at(code_tables<Format>.low), at(code_tables<Format>.low + 64)};
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
