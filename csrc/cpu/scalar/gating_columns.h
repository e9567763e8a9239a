// Columns: a vector holds one number of each of several tokens, so that what would wait for its neighbours along a row
// runs for all of them at once: sorting is a network of exchanges, two instructions each, without a branch.
#pragma once

#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

// Rows of eight as columns, and back.
PYROUTE_INLINE void transpose(f32x8 (&v)[8]) {
#if defined(__AVX2__)
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(bit_cast<__m256>(v[i]), bit_cast<__m256>(v[i + 1]));
        a[i + 1] = _mm256_unpackhi_ps(bit_cast<__m256>(v[i]), bit_cast<__m256>(v[i + 1]));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
        v[i] = bit_cast<f32x8>(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        v[i + 4] = bit_cast<f32x8>(_mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
#else
    float rows[8][8], columns[8][8];
    memcpy(rows, v, sizeof(rows));
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j)
            columns[j][i] = rows[i][j];
    memcpy(v, columns, sizeof(rows));
#endif
}

// The same of four doubles each.
PYROUTE_INLINE void transpose(f64x4 &a, f64x4 &b, f64x4 &c, f64x4 &d) {
#if defined(__AVX2__)
    const __m256d low0 = _mm256_unpacklo_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b));
    const __m256d high0 = _mm256_unpackhi_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b));
    const __m256d low1 = _mm256_unpacklo_pd(bit_cast<__m256d>(c), bit_cast<__m256d>(d));
    const __m256d high1 = _mm256_unpackhi_pd(bit_cast<__m256d>(c), bit_cast<__m256d>(d));
    a = bit_cast<f64x4>(_mm256_permute2f128_pd(low0, low1, 0x20));
    b = bit_cast<f64x4>(_mm256_permute2f128_pd(high0, high1, 0x20));
    c = bit_cast<f64x4>(_mm256_permute2f128_pd(low0, low1, 0x31));
    d = bit_cast<f64x4>(_mm256_permute2f128_pd(high0, high1, 0x31));
#else
    const f64x4 rows[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
        a[i] = rows[i][0];
        b[i] = rows[i][1];
        c[i] = rows[i][2];
        d[i] = rows[i][3];
    }
#endif
}

// --- networks, largest first; Knuth, TAOCP 3, 5.3.4 -----------------------------------------------------------------

#if !defined(__AVX2__)
struct DoubleHalves {
    double __attribute__((vector_size(16))) low, high;
};
// By halves, as in lanes.h: maxima of four doubles GCC 12 takes apart into single ones.
PYROUTE_INLINE f64x4 larger(const f64x4 &a, const f64x4 &b) {
    const auto x = bit_cast<DoubleHalves>(a), y = bit_cast<DoubleHalves>(b);
    return bit_cast<f64x4>(DoubleHalves{x.low > y.low ? x.low : y.low, x.high > y.high ? x.high : y.high});
}
PYROUTE_INLINE f64x4 smaller(const f64x4 &a, const f64x4 &b) {
    const auto x = bit_cast<DoubleHalves>(a), y = bit_cast<DoubleHalves>(b);
    return bit_cast<f64x4>(DoubleHalves{x.low < y.low ? x.low : y.low, x.high < y.high ? x.high : y.high});
}
#endif

template <class V> PYROUTE_INLINE void exchange(V &first, V &second) {
    const V least = smaller(first, second);
    first = larger(first, second);
    second = least;
}

// Of a sequence that falls and then rises, or the other way round.
template <int n, class V> PYROUTE_INLINE void sort_bitonic(V *v) {
#pragma GCC unroll 16
    for (int half = n / 2; half >= 1; half /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i)
            if (!(i & half))
                exchange(v[i], v[i + half]);
}

template <int n, class V> PYROUTE_INLINE void sort_columns(V *v) {
    if constexpr (n == 8) { // Batcher's 19 exchanges
        constexpr int pairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                      {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 32
        for (int i = 0; i < 19; ++i)
            exchange(v[pairs[i][0]], v[pairs[i][1]]);
    } else {
        sort_columns<n / 2>(v);
        sort_columns<n / 2>(v + n / 2);
#pragma GCC unroll 16
        for (int i = 0; i < n / 2; ++i)
            exchange(v[i], v[n - 1 - i]);
        sort_bitonic<n / 2>(v);
        sort_bitonic<n / 2>(v + n / 2);
    }
}

// The n largest of the 2 n in v, sorted, in its first half.
template <int n, class V> PYROUTE_INLINE void sort_larger_half(V *v) {
    sort_columns<n>(v);
    sort_columns<n>(v + n);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
        v[i] = larger(v[i], v[2 * n - 1 - i]);
    sort_bitonic<n>(v);
}

} // namespace pyroute::cpu::PYROUTE_ISA
