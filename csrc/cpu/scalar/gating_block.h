// The k <= 16 best of the rows of eight tokens, step by step for all eight, so that one token's waiting is filled with
// the others' work.
//
//   threshold   as in gating_select.h: a row is dealt out to 16 lanes (32 for k > 8), the k-th largest of their maxima
//               is reached by k values and few more. Eight tokens' maxima are columns of a sorting network
//   shortlist   what reaches it, in order of position, without a branch
//   order       a double holds a value's 32-bit key and, below it, its position from the end of the row: a network of
//               maxima and minima of doubles sorts the columns of four tokens, equal values by position
//
// One token at a time 8 of 128 took 97 ns on Zen 4, of which its steps side by side need 51.
#pragma once

#include "cpu/scalar/gating_choice.h"
#include "cpu/scalar/gating_columns.h"
#include "cpu/scalar/gating_scores.h"
#include "cpu/scalar/gating_select.h"

namespace pyroute::cpu::PYROUTE_ISA {

constexpr int block_tokens = 8, block_slots_most = 16;
constexpr int64_t block_experts_most = 4096;

// What a block of tokens chooses from, and where it stands. Rows are padded with -inf to a full vector.
struct Block {
    const float *logits[block_tokens], *values[block_tokens];
    float largest[block_tokens], smallest[block_tokens], threshold[block_tokens]; // of the values
    int32_t ids[block_slots_most][block_tokens];
    float chosen[block_slots_most][block_tokens], weights[block_slots_most][block_tokens]; // logits of the ids
    float most[block_tokens], sum[block_tokens]; // of softmax: the largest logit and the sum of exp(logit - most)
    unsigned odd = 0;                            // tokens that have to go one by one, a bit each
};

// --- threshold ----------------------------------------------------------------------------------------------------

// Of the lanes of a row: the minimum, without a last vector that is not full, and the sum, which is NaN if a value is.
// (10 of 512 with AVX2: 304 ns a token; comparing each value with itself 319; neither 297.)
struct LaneRange {
    f32x8 least, sum;
};

// Stores the maxima of `lanes` lanes.
template <int lanes> PYROUTE_INLINE LaneRange lane_maxima(const float *row, int64_t count, float *maxima) {
    constexpr int vectors = lanes / 8;
    f32x8 best[vectors], least[2], sum[2] = {};
    least[0] = least[1] = broadcast<f32x8>(WideOf<float>::infinity);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
        best[j] = broadcast<f32x8>(-WideOf<float>::infinity);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            const f32x8 v = load<f32x8>(row + i + j * 8);
            best[j] = larger(v, best[j]);
            least[j & 1] = smaller(v, least[j & 1]);
            sum[j & 1] += v;
        }
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
        if (i + j * 8 < count) {
            const f32x8 v = load<f32x8>(row + i + j * 8);
            best[j] = larger(v, best[j]);
            sum[j & 1] += v;
            if (i + j * 8 + 8 <= count)
                least[j & 1] = smaller(v, least[j & 1]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
        store(maxima + j * 8, best[j]);
    return {smaller(least[0], least[1]), sum[0] + sum[1]};
}

// Returns a bit for each token that has a NaN among its values; infinities of both signs, and sums that overflow to
// them, have one too.
template <int slots> PYROUTE_INLINE unsigned find_thresholds(Block &block, int64_t count, int64_t top_k) {
    constexpr int lanes = 2 * slots;
    alignas(32) float maxima[block_tokens][lanes];
    f32x8 least[8], sums[8];
#pragma GCC unroll 8
    for (int t = 0; t < block_tokens; ++t) {
        const LaneRange range = lane_maxima<lanes>(block.values[t], count, maxima[t]);
        least[t] = range.least;
        sums[t] = range.sum;
    }
    transpose(least);
    transpose(sums);
    f32x8 smallest = least[0], sum = sums[0];
#pragma GCC unroll 8
    for (int t = 1; t < 8; ++t) {
        smallest = smaller(least[t], smallest);
        sum += sums[t];
    }
    store(block.smallest, smallest);
    f32x8 columns[lanes];
#pragma GCC unroll 4
    for (int part = 0; part < lanes; part += 8) {
        f32x8 v[8];
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t)
            v[t] = load<f32x8>(maxima[t] + part);
        transpose(v);
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t)
            columns[part + t] = v[t];
    }
    sort_larger_half<slots>(columns);
    float sorted[slots][block_tokens];
#pragma GCC unroll 16
    for (int j = 0; j < slots; ++j)
        store(sorted[j], columns[j]);
    memcpy(block.largest, sorted[0], sizeof(block.largest));
    memcpy(block.threshold, sorted[top_k - 1], sizeof(block.threshold));
    return lane_bits((i32x8)(sum != sum));
}

// --- shortlist ----------------------------------------------------------------------------------------------------

constexpr int place_bits = 19, last_place = (1 << place_bits) - 1; // the place of position i is last_place - i

// Appends values and places of what reaches the threshold and returns how many there are; both lists have room for the
// row and a vector more, whose entries past the end are arbitrary.
#if defined(__AVX512F__)
PYROUTE_INLINE int64_t list_reaching(const float *row, int64_t count, float threshold, float *values, int32_t *places) {
    const __m512 least = _mm512_set1_ps(threshold);
    const __m512i step = _mm512_set1_epi32(16);
    __m512i place = _mm512_sub_epi32(_mm512_set1_epi32(last_place),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int64_t listed = 0;
    const auto append = [&](__m512 v, __mmask16 reaching) PYROUTE_INLINED {
        _mm512_storeu_ps(values + listed, _mm512_maskz_compress_ps(reaching, v));
        _mm512_storeu_si512(places + listed, _mm512_maskz_compress_epi32(reaching, place));
        listed += __builtin_popcount(reaching);
        place = _mm512_sub_epi32(place, step);
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512 v = _mm512_loadu_ps(row + i);
        append(v, _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ));
    }
    if (i < count) {
        const auto rest = static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(rest, row + i);
        append(v, _mm512_mask_cmp_ps_mask(rest, v, least, _CMP_GE_OQ));
    }
    return listed;
}
#else
PYROUTE_INLINE int64_t list_reaching(const float *row, int64_t count, float threshold, float *values, int32_t *places) {
    int64_t listed = 0;
    const f32x8 least = broadcast<f32x8>(threshold);
    for (int64_t begin = 0; begin < count; begin += 64) {
        uint64_t bits = 0;
        const int64_t end = count - begin < 64 ? count - begin : 64;
        for (int64_t i = 0; i < end; i += 8) {
            const f32x8 v = load<f32x8>(row + begin + i);
            bits |= static_cast<uint64_t>(lane_bits(reaches(v, least))) << i;
        }
        if (end < 64)
            bits &= (uint64_t(1) << end) - 1;
        for (; bits; bits &= bits - 1) {
            const int64_t at = begin + __builtin_ctzll(bits);
            values[listed] = row[at];
            places[listed++] = static_cast<int32_t>(last_place - at);
        }
    }
    return listed;
}
#endif

// --- order --------------------------------------------------------------------------------------------------------

// Integers in doubles: key * 2^19 + place, below 2^51 in magnitude. What is not listed has a key less than all others.
constexpr double integer_magic = 6755399441055744.0; // 2^52 + 2^51

using i32x4 = int32_t __attribute__((vector_size(16)));

template <int lanes>
PYROUTE_INLINE void write_entries(const float *values, const int32_t *places, int64_t listed, double *entries) {
    i32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
#pragma GCC unroll 4
    for (int i = 0; i < lanes; i += 8, lane += 8) {
        struct Halves {
            i32x4 part[2];
        };
        const i32x8 is_listed = less(lane, i32x8{} + static_cast<int32_t>(listed));
        const auto keys =
            bit_cast<Halves>(select(is_listed, keys_of_ordered(load<f32x8>(values + i)), i32x8{} + no_key<int32_t>));
        const auto mine = load<Halves>(places + i);
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part)
            store(entries + i + part * 4, __builtin_convertvector(keys.part[part], f64x4) * double(1 << place_bits) +
                                              __builtin_convertvector(mine.part[part], f64x4));
    }
}

// Expert ids by slot, of four tokens with `lanes` entries each.
template <int slots, int lanes>
PYROUTE_INLINE void order_entries(const double (*entries)[2 * slots], int32_t (*ids)[block_tokens]) {
    f64x4 v[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes; i += 4) {
        f64x4 a = load<f64x4>(entries[0] + i), b = load<f64x4>(entries[1] + i);
        f64x4 c = load<f64x4>(entries[2] + i), d = load<f64x4>(entries[3] + i);
        transpose(a, b, c, d);
        v[i] = a;
        v[i + 1] = b;
        v[i + 2] = c;
        v[i + 3] = d;
    }
    if constexpr (lanes == slots)
        sort_columns<slots>(v);
    else
        sort_larger_half<slots>(v);
#pragma GCC unroll 16
    for (int j = 0; j < slots; ++j) {
        const i64x4 bits = bit_cast<i64x4>(v[j] + integer_magic);
        const i32x4 position = __builtin_convertvector(last_place - (bits & last_place), i32x4);
        store(ids[j], position);
    }
}

// block.ids of the values, as positions. A token with a longer list is odd.
template <int slots>
PYROUTE_INLINE void order_block(Block &block, int64_t count, int64_t top_k, float *values, int32_t *places) {
    constexpr int lanes = 2 * slots;
    alignas(32) double entries[block_tokens][lanes];
    int64_t longest = 0;
    for (int t = 0; t < block_tokens; ++t) {
        const int64_t listed = list_reaching(block.values[t], count, block.threshold[t], values, places);
        if (listed > lanes || listed < top_k)
            block.odd |= 1u << t;
        longest = listed > longest ? listed : longest;
        write_entries<lanes>(values, places, listed, entries[t]);
    }
    for (int half = 0; half < block_tokens; half += 4) {
        auto *const ids = reinterpret_cast<int32_t (*)[block_tokens]>(&block.ids[0][half]);
        if (longest <= slots)
            order_entries<slots, slots>(entries + half, ids);
        else
            order_entries<slots, lanes>(entries + half, ids);
    }
}

} // namespace pyroute::cpu::PYROUTE_ISA
