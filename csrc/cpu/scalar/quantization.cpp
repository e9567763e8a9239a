// FP8 with block scales, one row of blocks per call.
//
//   amax   the largest finite magnitude of the block; magnitudes are compared as integers, which order like the floats
//   scale  amax / max_value in one division, or 1; the inverse in one more
//   codes  cast(x * inverse), eight at a time
//
// A block is read twice, the second time from cache: 64 KiB at most for 128x128 of float32. Memory traffic per element:
// the input once, one byte of code. Source: DeepSeek-V3 technical report, section 3.3.2.
#include "cpu/quantization.h"
#include "cpu/elements.h"
#include "cpu/fp8.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

constexpr int32_t infinity_bits = 0x7f800000;

// A block scale is computed in float32 whatever the type: float64 is rounded first.
PYROUTE_INLINE f32x8 as_f32(const f32x8 &v) { return v; }
PYROUTE_INLINE f32x8 as_f32(const f64x8 &v) { return __builtin_convertvector(v, f32x8); }

template <class Type> PYROUTE_INLINE f32x8 load_f32(const typename Type::Storage *from) {
    return as_f32(load_elements<Type>(from));
}
template <class Type> PYROUTE_INLINE f32x8 load_f32(const typename Type::Storage *from, int64_t count) {
    return as_f32(load_elements<Type>(from, count));
}

PYROUTE_INLINE i32x8 magnitude_bits(const f32x8 &x) { return bit_cast<i32x8>(x) & 0x7fffffff; }

// Only finite magnitudes, the others as 0, if `finite_only`.
template <bool finite_only> PYROUTE_INLINE i32x8 counted(const f32x8 &x) {
    const i32x8 bits = magnitude_bits(x);
    return finite_only ? bits & less(bits, i32x8{} + infinity_bits) : bits;
}

template <class Format> PYROUTE_INLINE f32x8 scale_of(const i32x8 &amax_bits, bool power_of_two) {
    const f32x8 amax = bit_cast<f32x8>(amax_bits);
    const i32x8 tiny = less(amax, broadcast<f32x8>(Format::max_value * 0x1p-126f));
    f32x8 scale = select(tiny, broadcast<f32x8>(1.0f), amax / Format::max_value);
    if (power_of_two)
        scale = bit_cast<f32x8>((bit_cast<u32x8>(scale) + 0x7fffff) & 0x7f800000);
    return scale;
}

// Largest magnitude, as bits, of `rows` rows of `n` elements that are `pitch` apart.
template <class Type, bool finite_only>
int32_t largest(const typename Type::Storage *x, int64_t rows, int64_t n, int64_t pitch) {
    i32x8 most = {};
    for (int64_t row = 0; row < rows; ++row, x += pitch) {
        int64_t c = 0;
        for (; c + 8 <= n; c += 8)
            most = max_lanes(most, counted<finite_only>(load_f32<Type>(x + c)));
        if (c < n)
            most = max_lanes(most, counted<finite_only>(load_f32<Type>(x + c, n - c)));
    }
    int32_t result = 0;
    for (int lane = 0; lane < 8; ++lane)
        result = most[lane] > result ? most[lane] : result;
    return result;
}

template <class Type, class Format>
void quantize_block(const typename Type::Storage *x, int64_t rows, int64_t n, int64_t pitch, bool power_of_two,
                    uint8_t *codes, float *scale_out) {
    int32_t amax = largest<Type, false>(x, rows, n, pitch);
    if (amax >= infinity_bits) // rare: look again at the finite ones
        amax = largest<Type, true>(x, rows, n, pitch);
    const f32x8 scale = scale_of<Format>(i32x8{} + amax, power_of_two);
    const f32x8 inverse = 1.0f / scale;
    *scale_out = scale[0];
    for (int64_t row = 0; row < rows; ++row, x += pitch, codes += pitch) {
        int64_t c = 0;
        for (; c + 8 <= n; c += 8)
            store(codes + c, fp8_encode<Format>(load_f32<Type>(x + c) * inverse));
        if (c < n) {
            const u8x8 last = fp8_encode<Format>(load_f32<Type>(x + c, n - c) * inverse);
            memcpy(codes + c, &last, static_cast<size_t>(n - c));
        }
    }
}

// Blocks of one column: `vectors` times eight of them, or the last `count` < 8.
template <class Type, class Format, int vectors, bool partial>
void quantize_columns(const typename Type::Storage *x, int64_t rows, int64_t count, int64_t pitch, bool power_of_two,
                      uint8_t *codes, float *scales) {
    const auto load_at = [&](int64_t row, int v) {
        const typename Type::Storage *from = x + row * pitch + v * 8;
        return partial ? load_f32<Type>(from, count) : load_f32<Type>(from);
    };
    i32x8 most[vectors] = {};
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
            most[v] = max_lanes(most[v], counted<true>(load_at(row, v)));
    f32x8 inverse[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        const f32x8 scale = scale_of<Format>(most[v], power_of_two);
        inverse[v] = 1.0f / scale;
        memcpy(scales + v * 8, &scale, partial ? static_cast<size_t>(count) * sizeof(float) : sizeof(scale));
    }
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const u8x8 result = fp8_encode<Format>(load_at(row, v) * inverse[v]);
            memcpy(codes + row * pitch + v * 8, &result, partial ? static_cast<size_t>(count) : sizeof(result));
        }
}

template <class Type, class Format> void quantize_strip(const QuantizeStrip &s) {
    const auto *x = static_cast<const typename Type::Storage *>(s.x);
    if (s.block_cols == 1) {
        const auto columns = [&](auto quantize, int64_t c, int64_t count) {
            quantize(x + c, s.rows, count, s.cols, s.power_of_two, s.codes + c, s.scales + c);
        };
        int64_t c = 0;
        for (; c + 32 <= s.cols; c += 32) // 64 to 256 consecutive bytes of every row
            columns(quantize_columns<Type, Format, 4, false>, c, 32);
        for (; c + 8 <= s.cols; c += 8)
            columns(quantize_columns<Type, Format, 1, false>, c, 8);
        if (c < s.cols)
            columns(quantize_columns<Type, Format, 1, true>, c, s.cols - c);
        return;
    }
    for (int64_t c = 0, block = 0; c < s.cols; c += s.block_cols, ++block) {
        const int64_t n = s.cols - c < s.block_cols ? s.cols - c : s.block_cols;
        quantize_block<Type, Format>(x + c, s.rows, n, s.cols, s.power_of_two, s.codes + c, s.scales + block);
    }
}

template <class Type> PYROUTE_INLINE typename Type::Wide as_wide(const f32x8 &v) {
    return __builtin_convertvector(v, typename Type::Wide);
}

// `n` elements of a row; scale_at(c) gives the scales of elements c to c + 7.
template <class Type, class Format, class Scales>
PYROUTE_INLINE void dequantize_run(const uint8_t *codes, int64_t n, typename Type::Storage *out,
                                   const Scales &scale_at) {
    int64_t c = 0;
    for (; c + 8 <= n; c += 8) {
        const f32x8 value = Format::decode(load<u8x8>(codes + c)) * scale_at(c, 8);
        store_elements<Type>(out + c, as_wide<Type>(value));
    }
    if (c < n) {
        u8x8 last = {};
        memcpy(&last, codes + c, static_cast<size_t>(n - c));
        const f32x8 value = Format::decode(last) * scale_at(c, n - c);
        store_elements<Type>(out + c, as_wide<Type>(value), n - c);
    }
}

template <class Type, class Format> void dequantize_strip(const DequantizeStrip &s) {
    auto *out = static_cast<typename Type::Storage *>(s.out);
    for (int64_t row = 0; row < s.rows; ++row) {
        const uint8_t *codes = s.codes + row * s.cols;
        typename Type::Storage *to = out + row * s.cols;
        if (s.block_cols == 1) {
            dequantize_run<Type, Format>(codes, s.cols, to, [&](int64_t c, int64_t count) {
                return count < 8 ? load_partial(s.scales + c, static_cast<int>(count), 0.0f)
                                 : load<f32x8>(s.scales + c);
            });
            continue;
        }
        for (int64_t c = 0, block = 0; c < s.cols; c += s.block_cols, ++block) {
            const int64_t n = s.cols - c < s.block_cols ? s.cols - c : s.block_cols;
            const f32x8 scale = broadcast<f32x8>(s.scales[block]);
            dequantize_run<Type, Format>(codes + c, n, to + c, [&](int64_t, int64_t) { return scale; });
        }
    }
}

} // namespace

extern const QuantizationKernels quantization_kernels = {
    {{quantize_strip<Float32, E4m3>, quantize_strip<Float32, E5m2>},
     {quantize_strip<Bfloat16, E4m3>, quantize_strip<Bfloat16, E5m2>},
     {quantize_strip<Float16, E4m3>, quantize_strip<Float16, E5m2>},
     {quantize_strip<Float64, E4m3>, quantize_strip<Float64, E5m2>}},
    {{dequantize_strip<Float32, E4m3>, dequantize_strip<Float32, E5m2>},
     {dequantize_strip<Bfloat16, E4m3>, dequantize_strip<Bfloat16, E5m2>},
     {dequantize_strip<Float16, E4m3>, dequantize_strip<Float16, E5m2>},
     {dequantize_strip<Float64, E4m3>, dequantize_strip<Float64, E5m2>}}};

} // namespace pyroute::cpu::PYROUTE_ISA
