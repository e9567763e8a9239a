// FP8 with block scales, one row of blocks per call.
//
//   amax   the largest finite magnitude of the block; magnitudes are compared as integers, which order like the floats
//   scale  amax / max_value in one division, or 1; the inverse in one more
//   codes  cast(x * inverse): fp8_encode.h
//
// Blocks are taken in groups that stay in cache between the two passes over them: 1024 elements of one row, 256 KiB of
// several. While a group is encoded the next one of its rows is fetched, a line for every line. Memory traffic per
// element: the input once, one byte of code; large results pass the caches in whole lines.
//
// 4096 x 7168 in 1x128 blocks, AVX-512 on Zen 4, two threads, in GB/s beside a loop that reads and streams the same
// bytes: float32 36 of 35, or 55 of 51 when the machine lets it; bfloat16 33 of 35, then 41 of 79, since 17 ns of work
// for 128 elements bound it. Plain stores and no fetching: 26 and 25 in the first case. Groups of 2048 elements lose a
// tenth, a fetch of the next group but one a fifth.
// Source: DeepSeek-V3 technical report, section 3.3.2.
#include "cpu/quantization.h"
#include "cpu/fp8_encode.h"
#include "cpu/streaming.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

constexpr int32_t infinity_bits = 0x7f800000;
constexpr int64_t most_blocks = 16;          // of a group
constexpr int64_t most_columns = 512;        // of a group, where a column is a block
constexpr int64_t group_of_row = 1024;       // elements
constexpr int64_t group_of_rows = 256 << 10; // bytes of input

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

// Lane-wise largest magnitude of `n` elements.
template <class Type, bool finite_only>
PYROUTE_INLINE i32x8 largest_of_run(const typename Type::Storage *x, int64_t n) {
    i32x8 most[2] = {};
    int64_t c = 0;
    for (; c + 32 <= n; c += 32)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            most[v % 2] = max_lanes(most[v % 2], counted<finite_only>(load_f32<Type>(x + c + 8 * v)));
    for (; c + 8 <= n; c += 8)
        most[0] = max_lanes(most[0], counted<finite_only>(load_f32<Type>(x + c)));
    if (c < n)
        most[0] = max_lanes(most[0], counted<finite_only>(load_f32<Type>(x + c, n - c)));
    return max_lanes(most[0], most[1]);
}

#if defined(__AVX2__)
// bfloat16 magnitudes compare in 16 bits, 32 of them at once.
template <> i32x8 largest_of_run<Bfloat16, false>(const uint16_t *x, int64_t n) {
    const __m256i no_sign = _mm256_set1_epi16(0x7fff);
    __m256i most[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t c = 0;
    for (; c + 32 <= n; c += 32)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            most[v] = _mm256_max_epi16(most[v], _mm256_and_si256(load<__m256i>(x + c + 16 * v), no_sign));
    const i32x8 both = bit_cast<i32x8>(_mm256_max_epi16(most[0], most[1]));
    i32x8 result = max_lanes(both << 16, both & static_cast<int32_t>(0xffff0000));
    for (; c < n; c += 8)
        result = max_lanes(result, magnitude_bits(load_f32<Bfloat16>(x + c, n - c < 8 ? n - c : 8)));
    return result;
}
#endif

PYROUTE_INLINE int32_t largest_lane(const i32x8 &v) {
    using i32x4 = int32_t __attribute__((vector_size(16)));
    struct Halves {
        i32x4 low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
#if defined(__AVX2__)
    const auto larger = [](const i32x4 &a, const i32x4 &b) __attribute__((always_inline)) {
        return bit_cast<i32x4>(_mm_max_epi32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
    };
    const i32x4 four = larger(halves.low, halves.high);
    const i32x4 two = larger(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return larger(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
#else
    int32_t result = 0;
    for (int lane = 0; lane < 4; ++lane) {
        const int32_t a = halves.low[lane], b = halves.high[lane];
        result = a > result ? a : result;
        result = b > result ? b : result;
    }
    return result;
#endif
}

// One row of consecutive blocks, `n` elements from column `c` on.
struct Group {
    int64_t rows, n, pitch, block_cols, num_blocks;
    bool power_of_two, streaming;
};

template <class Type, class Format>
void quantize_group(const Group &g, const typename Type::Storage *x, uint8_t *codes, float *scales) {
    alignas(32) int32_t amax[most_blocks] = {};
    alignas(32) float scale[most_blocks], inverse[most_blocks];
    const auto block_size = [&](int64_t b) { return b + 1 < g.num_blocks ? g.block_cols : g.n - b * g.block_cols; };
    for (int64_t row = 0; row < g.rows; ++row)
        for (int64_t b = 0; b < g.num_blocks; ++b) {
            const int32_t here =
                largest_lane(largest_of_run<Type, false>(x + row * g.pitch + b * g.block_cols, block_size(b)));
            amax[b] = here > amax[b] ? here : amax[b];
        }
    const int32_t largest = largest_lane(max_lanes(load<i32x8>(amax), load<i32x8>(amax + 8)));
    const bool all_finite = largest < infinity_bits;
    bool finite[most_blocks];
    for (int64_t b = 0; b < g.num_blocks && !all_finite; ++b) {
        finite[b] = amax[b] < infinity_bits;
        if (finite[b])
            continue;
        amax[b] = 0; // rare: look again at the finite ones
        for (int64_t row = 0; row < g.rows; ++row) {
            const int32_t here =
                largest_lane(largest_of_run<Type, true>(x + row * g.pitch + b * g.block_cols, block_size(b)));
            amax[b] = here > amax[b] ? here : amax[b];
        }
    }
    for (int64_t b = 0; b < g.num_blocks; b += 8) {
        const f32x8 eight = scale_of<Format>(load<i32x8>(amax + b), g.power_of_two);
        store(scale + b, eight);
        store(inverse + b, 1.0f / eight);
    }
    memcpy(scales, scale, static_cast<size_t>(g.num_blocks) * sizeof(float));
    const bool power = (g.block_cols & (g.block_cols - 1)) == 0;
    const int shift = power ? __builtin_ctzll(static_cast<uint64_t>(g.block_cols)) : 0;
    for (int64_t row = 0; row < g.rows; ++row) {
        const typename Type::Storage *from = x + row * g.pitch;
        uint8_t *to = codes + row * g.pitch;
        if (shift >= 5 && all_finite) {
            const InversePerBlock blocks = {inverse, shift};
            if (g.streaming && (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(g.n)) % 64 == 0)
                encode_run<Type, Format, true>(from, g.n, blocks, to);
            else
                encode_run<Type, Format, false>(from, g.n, blocks, to);
            continue;
        }
        for (int64_t b = 0; b < g.num_blocks; ++b) {
            const InversePerBlock one = {inverse + b, 62};
            const int64_t c = b * g.block_cols;
            if (all_finite || finite[b])
                encode_run<Type, Format, false>(from + c, block_size(b), one, to + c);
            else
                encode_any<Type, Format>(from + c, block_size(b), one, to + c);
        }
    }
}

// Blocks of one column, `n` <= most_columns of them.
template <class Type, class Format>
void quantize_columns(const Group &g, const typename Type::Storage *x, uint8_t *codes, float *scales) {
    constexpr int64_t vectors = most_columns / 8;
    i32x8 most[vectors] = {};
    i32x8 non_finite = {};
    const int64_t whole = g.n / 8;
    for (int64_t row = 0; row < g.rows; ++row) {
        const typename Type::Storage *from = x + row * g.pitch;
        const auto count = [&](const f32x8 &v, int64_t i) {
            const i32x8 bits = magnitude_bits(v), finite = less(bits, i32x8{} + infinity_bits);
            most[i] = max_lanes(most[i], bits & finite);
            non_finite |= ~finite;
        };
        for (int64_t i = 0; i < whole; ++i)
            count(load_f32<Type>(from + 8 * i), i);
        if (g.n % 8)
            count(load_f32<Type>(from + 8 * whole, g.n % 8), whole);
    }
    alignas(32) float scale[most_columns], inverse[most_columns];
    for (int64_t i = 0; i < whole + (g.n % 8 != 0); ++i) {
        const f32x8 eight = scale_of<Format>(most[i], g.power_of_two);
        store(scale + 8 * i, eight);
        store(inverse + 8 * i, 1.0f / eight);
    }
    memcpy(scales, scale, static_cast<size_t>(g.n) * sizeof(float));
    const bool finite = largest_lane(magnitude_bits(bit_cast<f32x8>(non_finite))) == 0;
    for (int64_t row = 0; row < g.rows; ++row) {
        const typename Type::Storage *from = x + row * g.pitch;
        uint8_t *to = codes + row * g.pitch;
        if (finite)
            encode_run<Type, Format, false>(from, g.n, InversePerElement{inverse}, to);
        else
            encode_any<Type, Format>(from, g.n, InversePerElement{inverse}, to);
    }
}

template <class Type, class Format> void quantize_strip(const QuantizeStrip &s) {
    const auto *x = static_cast<const typename Type::Storage *>(s.x);
    const int64_t bytes = s.rows == 1 ? group_of_row * static_cast<int64_t>(sizeof(*x)) : group_of_rows;
    const int64_t column_bytes = s.rows * static_cast<int64_t>(sizeof(*x));
    const bool columns = s.block_cols == 1;
    const int64_t unit = columns ? 8 : s.block_cols < s.cols ? s.block_cols : s.cols;
    const int64_t most = columns ? most_columns / 8 : most_blocks;
    int64_t blocks = bytes / (unit * column_bytes);
    blocks = blocks < 1 ? 1 : blocks < most ? blocks : most;
    for (int64_t c = 0; c < s.cols; c += blocks * unit) {
        const int64_t n = s.cols - c < blocks * unit ? s.cols - c : blocks * unit;
        const Group g = {s.rows, n, s.cols, s.block_cols, (n - 1) / s.block_cols + 1, s.power_of_two, s.streaming};
        if (columns)
            quantize_columns<Type, Format>(g, x + c, s.codes + c, s.scales + c);
        else
            quantize_group<Type, Format>(g, x + c, s.codes + c, s.scales + c / s.block_cols);
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

void finish() { finish_streaming(true); }

} // namespace

extern const QuantizationKernels quantization_kernels = {
    finish,
    {{quantize_strip<Float32, E4m3>, quantize_strip<Float32, E5m2>},
     {quantize_strip<Bfloat16, E4m3>, quantize_strip<Bfloat16, E5m2>},
     {quantize_strip<Float16, E4m3>, quantize_strip<Float16, E5m2>},
     {quantize_strip<Float64, E4m3>, quantize_strip<Float64, E5m2>}},
    {{dequantize_strip<Float32, E4m3>, dequantize_strip<Float32, E5m2>},
     {dequantize_strip<Bfloat16, E4m3>, dequantize_strip<Bfloat16, E5m2>},
     {dequantize_strip<Float16, E4m3>, dequantize_strip<Float16, E5m2>},
     {dequantize_strip<Float64, E4m3>, dequantize_strip<Float64, E5m2>}}};

} // namespace pyroute::cpu::PYROUTE_ISA
