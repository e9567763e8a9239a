// FP8 weights by shifts (AVX2). Exact widening by tables, thirty-two codes at a time, takes twice the instructions and
// ended at 11 GB/s of weights on one Zen 4 core.
#pragma once

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

// FP8 weights times 2^-bias in three instructions for eight: the code's bits at their places in a float32, whose
// exponent's bias is missing. The rows are multiplied by 2^bias or by 2^(bias - 32) beforehand (choose_power), which is
// undone in the block's sum.
template <class Format> struct Shifted {
    using Storage = uint8_t;
    static constexpr int exponent_shift = 23 - Format::mantissa_bits, bias = 126 + Format::min_exponent;
    static constexpr int special_code = Format::mantissa_bits == 3 ? 0xff : 0xfc; // the first one, with its sign set

    PYROUTE_INLINE f32x8 row(const Block &b, int i, int k) { return load<f32x8>(&b.x[i][k]); }
    PYROUTE_INLINE f32x8 place(__m128i codes) {
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepi8_epi32(codes), exponent_shift);
        return bit_cast<f32x8>(
            _mm256_and_si256(wide, _mm256_set1_epi32(static_cast<int>(0x80000000u | 0x7fu << exponent_shift))));
    }
    PYROUTE_INLINE f32x8 widen(const Storage *from) {
        return place(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
    }
    PYROUTE_INLINE f32x8 widen(const Storage *from, int count) {
        uint64_t codes = 0;
        memcpy(&codes, from, static_cast<size_t>(count));
        return place(_mm_cvtsi64_si128(static_cast<int64_t>(codes)));
    }
    PYROUTE_INLINE f32x8 finish(const Block &b, const f32x8 &partial) {
        return partial * broadcast<f32x8>(b.powers.undo);
    }
    PYROUTE_INLINE f32x8 finish(const Run &r, const f32x8 &partial) {
        return partial * broadcast<f32x8>(r.powers.undo);
    }

    // A code that is no number among those of these columns.
    PYROUTE_INLINE bool any_special(const Block &b, int col, int cols) {
        __m256i largest = _mm256_setzero_si256();
        const __m256i sign = _mm256_set1_epi8(-128);
        for (int j = 0; j < cols; ++j) {
            const uint8_t *y = static_cast<const uint8_t *>(b.y) + (col + j) * b.y_stride;
            int k = 0;
            for (; k + 32 <= b.length; k += 32)
                largest = _mm256_max_epu8(
                    largest, _mm256_or_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(y + k)), sign));
            for (; k < b.length; ++k)
                if ((y[k] | 0x80) >= special_code)
                    return true;
        }
        const __m256i limit = _mm256_set1_epi8(static_cast<char>(special_code));
        return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(largest, limit), largest)) != 0;
    }
};

// The same columns with the rows as they were: a multiplication back is exact.
template <class Type> struct Restored : Exact<Type> {
    PYROUTE_INLINE f32x8 row(const Block &b, int i, int k) {
        return load<f32x8>(&b.x[i][k]) * broadcast<f32x8>(b.powers.restore);
    }
};

// A power of two for rows of float32 such that their products with Shifted weights, summed, are 2^-32 times (`undo`) or
// once the sums of the plain values, bit for bit; false where there is none. `num_rows` runs of `length` elements, a
// multiple of eight, `stride` apart.
//
// A product w' x' with w' = w 2^-bias and x' = x 2^bias is the real number w x, and x' is exact unless it overflows:
// |x| < 2^(128 - bias) is all that the first power asks for. With x' = x 2^(bias - 32) every sum is 2^-32 times what
// it was as long as nothing is lost at the lower end: float32 x is a multiple of 2^(e - 23) where 2^e is the smallest
// magnitude beside zero, w of 2^(min_exponent - mantissa_bits); if 2^-32 times their product is no less than 2^-149,
// the smallest subnormal, then sums round where they rounded before. At the upper end sums stay far below 2^128.
template <class Format> bool choose_power(const float *x, int num_rows, int length, int stride, Powers &to) {
    constexpr int bias = Shifted<Format>::bias, smallest_exponent = -94 + Format::mantissa_bits - Format::min_exponent;
    const __m256i one = _mm256_set1_epi32(1), magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256(), smallest = _mm256_set1_epi32(-1); // less one, so that zero is the largest
    for (int i = 0; i < num_rows; ++i)
        for (int k = 0; k < length; k += lanes) {
            const __m256i bits = _mm256_and_si256(load<__m256i>(x + i * stride + k), magnitude);
            largest = _mm256_max_epu32(largest, bits);
            smallest = _mm256_min_epu32(smallest, _mm256_sub_epi32(bits, one));
        }
    const u32x8 most = bit_cast<u32x8>(largest), least = bit_cast<u32x8>(smallest);
    uint32_t max = 0, min = 0xffffffff;
    for (int l = 0; l < lanes; ++l) {
        max = most[l] > max ? most[l] : max;
        min = least[l] < min ? least[l] : min;
    }
    int power = bias;
    if (max >= static_cast<uint32_t>(255 - bias) << 23) {
        if (max >= static_cast<uint32_t>(287 - bias) << 23 ||
            min < (static_cast<uint32_t>(127 + smallest_exponent) << 23) - 1)
            return false;
        power = bias - 32;
    }
    const auto power_of_two = [](int exponent) { return bit_cast<float>((127 + exponent) << 23); };
    to = {power_of_two(power), power_of_two(bias - power), power_of_two(-power)};
    return true;
}

PYROUTE_INLINE void multiply_row(float *x, int length, float power) {
    for (int k = 0; k < length; k += lanes)
        store(x + k, load<f32x8>(x + k) * broadcast<f32x8>(power));
}

template <class Format, int rows, int cols> PYROUTE_INLINE void multiply_shifted(Block &b, int col) {
    if (__builtin_expect(Shifted<Format>::any_special(b, col, cols), 0))
        for (int j = 0; j < cols; ++j)
            multiply_columns<Restored<Fp8<Format>>, rows, 1>(b, col + j);
    else
        multiply_columns<Shifted<Format>, rows, cols>(b, col);
}

template <class Format, int rows> struct ShiftedBlock {
    static void multiply(Block &b) {
        if (!choose_power<Format>(b.x[0], rows, (b.length + lanes - 1) / lanes * lanes, panel_depth, b.powers))
            return ExactBlock<Fp8<Format>, rows>::multiply(b);
        for (int i = 0; i < rows; ++i)
            multiply_row(b.x[i], b.length, b.powers.power);
        constexpr int cols = columns_at_once(rows);
        int col = 0;
        for (; col + cols <= b.num_cols; col += cols) {
            fetch_next(b, cols * b.length);
            multiply_shifted<Format, rows, cols>(b, col);
        }
        for (; col < b.num_cols; ++col)
            multiply_shifted<Format, rows, 1>(b, col);
    }
};

template <class Format> struct ShiftedRun {
    using Storage = uint8_t;
    static bool place(Run &r) {
        const int length = r.num_blocks * panel_depth;
        if (!choose_power<Format>(r.x, 1, length, length, r.powers))
            return false;
        multiply_row(r.x, length, r.powers.power);
        return true;
    }

    template <int blocks>
    PYROUTE_INLINE void add(const ShiftedRun &, const Run &r, const uint8_t *y, int first, f32x8 &total) {
        if (__builtin_expect(any_special<blocks>(y + first * panel_depth), 0))
            add_restored(r, y, first, blocks, total);
        else
            add_blocks<Shifted<Format>, blocks>(r, y, first, total);
    }

  private:
    // A code that is no number.
    template <int blocks> PYROUTE_INLINE bool any_special(const uint8_t *y) {
        const __m256i limit = _mm256_set1_epi8(static_cast<char>(Shifted<Format>::special_code - 1));
        const __m256i sign = _mm256_set1_epi8(-128);
        __m256i largest[2] = {limit, limit};
#pragma GCC unroll 4
        for (int k = 0; k < blocks * panel_depth; k += 64)
            for (int j = 0; j < 2; ++j)
                largest[j] = _mm256_max_epu8(largest[j], _mm256_or_si256(load<__m256i>(y + k + 32 * j), sign));
        return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(largest[0], largest[1]), limit)) != -1;
    }

    // The same blocks with the row as it was: a multiplication back is exact.
    static __attribute__((noinline)) void add_restored(const Run &r, const uint8_t *y, int first, int blocks,
                                                       f32x8 &total) {
        for (int i = first; i < first + blocks; ++i) {
            f32x8 partial = {};
            for (int k = i * panel_depth; k < (i + 1) * panel_depth; k += lanes)
                partial = fma(load<f32x8>(r.x + k) * broadcast<f32x8>(r.powers.restore),
                              Exact<Fp8<Format>>::widen(y + k), partial);
            total = fma(partial, broadcast<f32x8>(r.scales[i]), total);
        }
    }
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
