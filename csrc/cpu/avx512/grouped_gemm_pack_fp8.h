// Sixteen rows of FP8 codes become a strip: transposed as bytes and widened last, so that neither the transpose nor its
// loads and stores handle float32.
#pragma once

#include "cpu/avx512/fp8_tables.h"
#include "cpu/grouped_gemm.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

// Rows row, row + 4, row + 8, row + 12, a line of each: 128 bits of all four beside each other in each of `parts`.
PYROUTE_INLINE void quarter_lines(const uint8_t *row, int64_t stride, __m512i (&parts)[4]) {
    __m512i line[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        line[i] = _mm512_loadu_si512(row + 4 * i * stride);
    const __m512i front[2] = {_mm512_maskz_shuffle_i32x4(0xffff, line[0], line[1], 0x44),
                              _mm512_maskz_shuffle_i32x4(0xffff, line[2], line[3], 0x44)};
    const __m512i back[2] = {_mm512_maskz_shuffle_i32x4(0xffff, line[0], line[1], 0xee),
                             _mm512_maskz_shuffle_i32x4(0xffff, line[2], line[3], 0xee)};
    parts[0] = _mm512_maskz_shuffle_i32x4(0xffff, front[0], front[1], 0x88);
    parts[1] = _mm512_maskz_shuffle_i32x4(0xffff, front[0], front[1], 0xdd);
    parts[2] = _mm512_maskz_shuffle_i32x4(0xffff, back[0], back[1], 0x88);
    parts[3] = _mm512_maskz_shuffle_i32x4(0xffff, back[0], back[1], 0xdd);
}

// The whole lines of the rows; returns how many elements of the contraction that is.
template <class Format>
int64_t pack_code_lines(const uint8_t *rows, int64_t stride, int64_t length, int64_t lane_floats, float *to) {
    const CodeWidener<Format> widener;
    int64_t depth = 0;
    for (; depth + 64 <= length; depth += 64) {
        __m512i parts[4][4]; // [row % 4][part]: 128 bits i are row 4 * i + row % 4
#pragma GCC unroll 4
        for (int row = 0; row < 4; ++row) {
            for (int i = 0; i < 4; ++i)
                __builtin_prefetch(rows + (row + 4 * i) * stride + depth + 64);
            quarter_lines(rows + row * stride + depth, stride, parts[row]);
        }
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part, to += 2 * strip_cols) {
            const __m512i a = parts[0][part], b = parts[1][part], c = parts[2][part], d = parts[3][part];
            const __m512i ab[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
            const __m512i cd[2] = {_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)};
#pragma GCC unroll 2
            for (int step = 0; step < 2; ++step) { // of eight elements
                __m512 values[4];
                CodeWidener<Format>::widen(widener, _mm512_unpacklo_epi16(ab[step], cd[step]), values);
#pragma GCC unroll 4
                for (int lane = 0; lane < 4; ++lane)
                    _mm512_storeu_ps(to + step * strip_cols + lane * lane_floats, values[lane]);
                CodeWidener<Format>::widen(widener, _mm512_unpackhi_epi16(ab[step], cd[step]), values);
#pragma GCC unroll 4
                for (int lane = 0; lane < 4; ++lane)
                    _mm512_storeu_ps(to + step * strip_cols + (lane + 4) * lane_floats, values[lane]);
            }
        }
    }
    return depth;
}

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
