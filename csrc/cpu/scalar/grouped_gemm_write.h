// Sums of a tile to rows of the result.
#pragma once

#include "cpu/elements.h"
#include "cpu/scalar/grouped_gemm_tile.h"
#include "cpu/streaming.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

PYROUTE_INLINE void stream(float *to, const Wide &v) { // past the caches; `to` aligned to the vector
#if defined(__AVX512F__)
    _mm512_stream_ps(to, bit_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_stream_ps(to, bit_cast<__m256>(v));
#elif defined(__SSE2__)
    for (int i = 0; i < width; i += 4)
        _mm_stream_ps(to + i, load<__m128>(reinterpret_cast<const float *>(&v) + i));
#else
    store(to, v);
#endif
}

#if defined(__AVX512F__)
PYROUTE_INLINE Wide canonical(const Wide &v) { // beside that of eight lanes in elements.h
    const __m512 lanes = bit_cast<__m512>(v);
    return bit_cast<Wide>(_mm512_mask_mov_ps(lanes, _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q),
                                             _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))));
}
#endif

// The lines of out that will be written, on their way while the sums are computed.
PYROUTE_INLINE void fetch_out(const PanelProduct &p, int64_t row, int num_rows, int64_t col) {
    const int64_t item = item_size(p.out_type);
    const char *out = static_cast<const char *>(p.out) + (row * p.out_stride + col) * item;
    for (int i = 0; i < num_rows && !p.streams; ++i)
        __builtin_prefetch(out + i * p.out_stride * item, 1);
}

// Sums that have no simpler place: the last columns of a result, or elements that are rounded.
template <int rows>
void write_some(const PanelProduct &p, int64_t row, int num_rows, int64_t col, int num_cols,
                const float (&sums)[rows][strip_cols]) {
    for (int i = 0; i < rows && i < num_rows; ++i)
        for (int j = 0; j < num_cols; j += 8) {
            const int count = num_cols - j < 8 ? num_cols - j : 8;
            const int64_t at = (row + i) * p.out_stride + col + j;
            f32x8 value = load<f32x8>(&sums[i][j]);
            if (p.out_type == ElementType::bfloat16) {
                store_elements<Bfloat16>(static_cast<uint16_t *>(p.out) + at, value, count);
                continue;
            }
            float *out = static_cast<float *>(p.out) + at;
            if (p.accumulate)
                value = load_elements<Float32>(out, count) + value;
            store_elements<Float32>(out, value, count);
        }
}

// The first `num_rows` rows of a tile, all of them if it is more.
template <int rows>
PYROUTE_INLINE void write(const PanelProduct &p, int64_t row, int num_rows, int64_t col, const Sums<rows> &sums) {
    const int num_cols = p.num_cols - col < strip_cols ? static_cast<int>(p.num_cols - col) : strip_cols;
    if (num_cols < strip_cols || p.out_type != ElementType::float32) {
        float square[rows][strip_cols];
        memcpy(square, sums, sizeof(square));
        write_some<rows>(p, row, num_rows, col, num_cols, square);
        return;
    }
    float *out = static_cast<float *>(p.out) + row * p.out_stride + col;
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i, out += p.out_stride) {
        if (i == num_rows)
            return;
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) {
            float *const to = out + j * width;
            if (p.streams)
                stream(to, canonical(sums[i][j]));
            else
                store(to, canonical(p.accumulate ? load<Wide>(to) + sums[i][j] : sums[i][j]));
        }
    }
}

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
