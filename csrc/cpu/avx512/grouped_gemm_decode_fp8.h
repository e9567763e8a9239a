// FP8 weights by tables of bytes (AVX-512 VBMI), two columns in a register.
//
// The codes are sorted before fp8_tables.h widens them, so that the lower half of a register holds eight elements of
// one column, the upper half those of the next. Permuting both bytes to their places step by step, and broadcasting the
// rows instead of keeping every step beside itself, was slower by 10 to 27 % (one Zen 4 core).
#pragma once

#include "cpu/avx512/fp8_tables.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

// Which four codes go to which 128 bits: 0, 2, 4, 6 of a column's 32 codes in fours are the first lanes of four steps,
// 1, 3, 5, 7 the last lanes.
struct LaneOrder {
    uint32_t fours[16];
};
alignas(64) constexpr LaneOrder lane_order = {{0, 2, 4, 6, 1, 3, 5, 7, 16, 18, 20, 22, 17, 19, 21, 23}};

template <class Format> class CodeReader {
  public:
    // Thirty-two codes of two columns as four steps.
    PYROUTE_INLINE void read(const CodeReader &t, const __m256i &first, const __m256i &second, __m512 (&steps)[4]) {
        const __m512i codes =
            _mm512_permutex2var_epi32(_mm512_castsi256_si512(first), t.order_, _mm512_castsi256_si512(second));
        CodeWidener<Format>::widen(t.widener_, codes, steps);
    }

  private:
    CodeWidener<Format> widener_;
    __m512i order_ = _mm512_load_si512(lane_order.fours);
};

// `pairs` pairs of columns from `col` on; `partner`: from the first of a pair to the second. Fully unrolled for a whole
// block.
template <class Format, int rows, int pairs, bool whole>
PYROUTE_INLINE void multiply_pairs(Block &b, const CodeReader<Format> &reader, int col, int64_t partner) {
    const uint8_t *y = static_cast<const uint8_t *>(b.y) + col * b.y_stride;
    const int64_t stride = 2 * b.y_stride;
    const int length = whole ? panel_depth : b.length;
    __m512 partial[pairs][rows], values[pairs][4];
#pragma GCC unroll 8
    for (int j = 0; j < pairs; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i)
            partial[j][i] = _mm512_setzero_ps();
    for (int k = 0; k < length; k += 32) {
        const auto mask = static_cast<__mmask32>(length - k >= 32 ? ~0u : (1u << (length - k)) - 1);
#pragma GCC unroll 8
        for (int j = 0; j < pairs; ++j) {
            const uint8_t *from = y + j * stride + k;
            if (whole)
                CodeReader<Format>::read(reader, load<__m256i>(from), load<__m256i>(from + partner), values[j]);
            else
                CodeReader<Format>::read(reader, _mm256_maskz_loadu_epi8(mask, from),
                                         _mm256_maskz_loadu_epi8(mask, from + partner), values[j]);
        }
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step)
            if (whole || k + step * lanes < length)
#pragma GCC unroll 8
                for (int i = 0; i < rows; ++i) {
                    __m512 x = _mm512_load_ps(&b.x_twice[i][2 * (k + step * lanes)]);
                    if (pairs > 1)
                        asm("" : "+v"(x)); // loaded once, not once for each multiply-add
#pragma GCC unroll 8
                    for (int j = 0; j < pairs; ++j)
                        partial[j][i] = _mm512_fmadd_ps(x, values[j][step], partial[j][i]);
                }
    }
#pragma GCC unroll 8
    for (int j = 0; j < pairs; ++j) {
        const float *scales = &b.y_scales[col + 2 * j]; // the one behind the last is any number
        const __m512 y_scales = _mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(_mm256_set1_ps(scales[0])),
                                                         _mm256_set1_ps(scales[1]), 1);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            float *total = b.totals[total_index(col + 2 * j, i, rows)];
            const __m512 scale = _mm512_mul_ps(y_scales, _mm512_set1_ps(b.x_scales[i]));
            _mm512_store_ps(total, _mm512_fmadd_ps(partial[j][i], scale, _mm512_load_ps(total)));
        }
    }
}

constexpr int pairs_at_once(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

template <class Format, int rows> struct TableBlock {
    static void multiply(Block &b) {
        for (int i = 0; i < rows; ++i)
            for (int k = 0; k < b.length; k += lanes)
                _mm512_store_ps(&b.x_twice[i][2 * k], _mm512_maskz_broadcast_f32x8(0xffff, _mm256_load_ps(&b.x[i][k])));
        b.length == panel_depth ? multiply_all<true>(b) : multiply_all<false>(b);
    }

    template <bool whole> static void multiply_all(Block &b) {
        constexpr int pairs = pairs_at_once(rows), cols = 2 * pairs;
        const CodeReader<Format> reader;
        int col = 0;
        for (; col + cols <= b.num_cols; col += cols) {
            fetch_next(b, cols * b.length);
            multiply_pairs<Format, rows, pairs, whole>(b, reader, col, b.y_stride);
        }
        for (; col < b.num_cols; col += 2) // a last column without a partner is its own
            multiply_pairs<Format, rows, 1, whole>(b, reader, col, col + 1 < b.num_cols ? b.y_stride : 0);
    }
};

// Blocks of one column, two in a register; a last one without a partner is its own, and that half is not used.
template <class Format> struct TableRun {
    using Storage = uint8_t;
    CodeReader<Format> reader;

    static bool place(Run &r) {
        if (r.num_blocks % 2)
            memset(r.x + r.num_blocks * panel_depth, 0, panel_depth * sizeof(float));
        for (float *to = r.x, *end = r.x + r.num_blocks * panel_depth; to < end; to += 2 * panel_depth) {
            alignas(64) float pair[2][panel_depth];
            memcpy(pair, to, sizeof(pair));
            for (int k = 0; k < panel_depth; k += lanes)
                for (int half = 0; half < 2; ++half)
                    store(to + 2 * k + half * lanes, load<f32x8>(&pair[half][k]));
        }
        return true;
    }

    template <int blocks>
    PYROUTE_INLINE void add(const TableRun &kernel, const Run &r, const uint8_t *y, int first, f32x8 &total) {
        constexpr int pairs = (blocks + 1) / 2;
        const float *x = r.x + first * panel_depth;
        y += first * panel_depth;
        __m512 partial[pairs], values[4];
#pragma GCC unroll 2
        for (int j = 0; j < pairs; ++j)
            partial[j] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int k = 0; k < panel_depth; k += 32)
#pragma GCC unroll 2
            for (int j = 0; j < pairs; ++j) {
                const uint8_t *from = y + 2 * j * panel_depth + k;
                const int partner = 2 * j + 1 < blocks ? panel_depth : 0;
                CodeReader<Format>::read(kernel.reader, load<__m256i>(from), load<__m256i>(from + partner), values);
#pragma GCC unroll 4
                for (int step = 0; step < 4; ++step)
                    partial[j] = _mm512_fmadd_ps(_mm512_load_ps(x + 2 * (j * panel_depth + k + step * lanes)),
                                                 values[step], partial[j]);
            }
#pragma GCC unroll 4
        for (int i = 0; i < blocks; ++i) { // an immediate is a constant without unrolling too
            const __m256 half = i % 2 ? _mm512_maskz_extractf32x8_ps(0xff, partial[i / 2], 1)
                                      : _mm512_maskz_extractf32x8_ps(0xff, partial[i / 2], 0);
            total = fma(bit_cast<f32x8>(half), broadcast<f32x8>(r.scales[first + i]), total);
        }
    }
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
