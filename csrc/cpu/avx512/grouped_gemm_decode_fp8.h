// FP8 weights by tables of bytes (AVX-512 VBMI), two columns in a register.
//
// An FP8 value is a bfloat16 exactly, subnormals, infinities and NaN included, and one permutation of two registers
// looks 64 codes up in a table of 128: once for the high bytes, once for the low ones. A last permutation moves both
// to the upper half of a float32 and sorts the lanes: the lower half of a register holds eight elements of one column,
// the upper half those of the next.
#pragma once

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

// Where the bytes of step s lie: byte 4 l + 2 of a register is the low byte of lane l, the next one its high byte.
struct LaneOrder {
    uint8_t of_step[4][64];
};
constexpr LaneOrder make_lane_order() {
    LaneOrder order{};
    for (int step = 0; step < 4; ++step)
        for (int lane = 0; lane < 16; ++lane) {
            const int from = lane / 8 * 32 + step * 8 + lane % 8;
            order.of_step[step][4 * lane + 2] = static_cast<uint8_t>(from);
            order.of_step[step][4 * lane + 3] = static_cast<uint8_t>(64 + from);
        }
    return order;
}
alignas(64) constexpr LaneOrder lane_order = make_lane_order();

template <class Format> class CodeReader {
  public:
    // Thirty-two codes of two columns as four registers.
    PYROUTE_INLINE void read(const CodeReader &t, const __m512i &codes, __m512 (&values)[4]) {
        const __m512i signs = _mm512_and_si512(codes, _mm512_set1_epi8(-128));
        const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(t.high_[0], codes, t.high_[1]), signs);
        const __m512i low = _mm512_permutex2var_epi8(t.low_[0], codes, t.low_[1]);
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step)
            values[step] =
                _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi8(0xcccccccccccccccc, low, t.order_[step], high));
    }

  private:
    PYROUTE_INLINE __m512i at(const uint8_t *from) { return _mm512_load_si512(from); }
    __m512i high_[2] = {at(code_tables<Format>.high), at(code_tables<Format>.high + 64)};
    __m512i low_[2] = {at(code_tables<Format>.low), at(code_tables<Format>.low + 64)};
    __m512i order_[4] = {at(lane_order.of_step[0]), at(lane_order.of_step[1]), at(lane_order.of_step[2]),
                         at(lane_order.of_step[3])};
};

// The zero-masking forms with full masks are the plain instructions; GCC 12 warns of the plain ones.
PYROUTE_INLINE __m512i side_by_side(const __m256i &low, const __m256i &high) {
    return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
}
PYROUTE_INLINE __m512 twice(const __m256 &v) { return _mm512_maskz_broadcast_f32x8(0xffff, v); }

PYROUTE_INLINE __m512i two_columns(const uint8_t *first, const uint8_t *second) {
    return side_by_side(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(first)),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i *>(second)));
}
PYROUTE_INLINE __m512i two_columns(const uint8_t *first, const uint8_t *second, int count) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return side_by_side(_mm256_maskz_loadu_epi8(mask, first), _mm256_maskz_loadu_epi8(mask, second));
}

// `pairs` pairs of columns from `col` on; a last column without a partner is its own.
template <class Format, int rows, int pairs>
PYROUTE_INLINE void multiply_pairs(Block &b, const CodeReader<Format> &reader, int col) {
    const uint8_t *y[pairs][2];
    __m512 partial[pairs][rows];
#pragma GCC unroll 8
    for (int j = 0; j < pairs; ++j) {
        const int first = col + 2 * j, second = smaller(first + 1, b.num_cols - 1);
        y[j][0] = static_cast<const uint8_t *>(b.y) + first * b.y_stride;
        y[j][1] = static_cast<const uint8_t *>(b.y) + second * b.y_stride;
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i)
            partial[j][i] = _mm512_setzero_ps();
    }
    __m512 values[4];
    int k = 0;
    for (; k + 32 <= b.length; k += 32)
#pragma GCC unroll 8
        for (int j = 0; j < pairs; ++j) {
            CodeReader<Format>::read(reader, two_columns(y[j][0] + k, y[j][1] + k), values);
#pragma GCC unroll 4
            for (int step = 0; step < 4; ++step)
#pragma GCC unroll 8
                for (int i = 0; i < rows; ++i)
                    partial[j][i] =
                        _mm512_fmadd_ps(twice(_mm256_load_ps(&b.x[i][k + step * lanes])), values[step], partial[j][i]);
        }
    if (k < b.length)
#pragma GCC unroll 8
        for (int j = 0; j < pairs; ++j) {
            CodeReader<Format>::read(reader, two_columns(y[j][0] + k, y[j][1] + k, b.length - k), values);
#pragma GCC unroll 4
            for (int step = 0; step < 4; ++step)
                if (k + step * lanes < b.length)
#pragma GCC unroll 8
                    for (int i = 0; i < rows; ++i)
                        partial[j][i] = _mm512_fmadd_ps(twice(_mm256_load_ps(&b.x[i][k + step * lanes])), values[step],
                                                        partial[j][i]);
        }
#pragma GCC unroll 8
    for (int j = 0; j < pairs; ++j) {
        const int first = col + 2 * j, second = smaller(first + 1, b.num_cols - 1);
        const __m512 y_scales =
            _mm512_castsi512_ps(side_by_side(_mm256_castps_si256(_mm256_set1_ps(b.y_scales[first])),
                                             _mm256_castps_si256(_mm256_set1_ps(b.y_scales[second]))));
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            float *total = b.totals[total_index(first, i, rows)];
            const __m512 scale = _mm512_mul_ps(y_scales, _mm512_set1_ps(b.x_scales[i]));
            _mm512_store_ps(total, _mm512_fmadd_ps(partial[j][i], scale, _mm512_load_ps(total)));
        }
    }
}

constexpr int pairs_at_once(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }

template <class Format, int rows> struct TableBlock {
    static void multiply(Block &b) {
        constexpr int pairs = pairs_at_once(rows), cols = 2 * pairs;
        const CodeReader<Format> reader;
        int col = 0;
        for (; col + cols <= b.num_cols; col += cols) {
            fetch_next(b, col, cols, 1);
            multiply_pairs<Format, rows, pairs>(b, reader, col);
        }
        for (; col < b.num_cols; col += 2)
            multiply_pairs<Format, rows, 1>(b, reader, col);
        done_with_block(b, 1);
    }
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
