// The k best of a row of values without NaN, best first; ties go to the lower position.
//
//   threshold   the row is dealt out to 16, 32 or 64 lanes (k up to 8, 16, 32). At least k values reach the k-th
//               largest of the lanes' maxima, and of random values few more: 11 for k = 8, with 8 lanes 22
//               k of 33 to 96: halving what lies between the row's ends, until few more than k values reach it
//   shortlist   what reaches it, in order of position, found by one comparison a vector
//   order       a value's rank is the number of those that beat it: no branch, no list kept sorted
//
// Longer shortlists come from ties; the caller then has gating_choice.h, which inserts or sorts keys: 3.5 us for k > 32
// of 256, which take 0.74 (k = 33), 1.3 (64) and 2.1 (96) here (Zen 4, one thread).
#pragma once

#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

constexpr int64_t select_most = 96; // largest k
constexpr int64_t shortlist_room = 112;

// a > b and a >= b as masks.
template <class V> PYROUTE_INLINE typename Lane<V>::Int above(const V &a, const V &b) { return a > b; }
template <class V> PYROUTE_INLINE typename Lane<V>::Int reaches(const V &a, const V &b) { return a >= b; }
#if defined(__AVX2__)
PYROUTE_INLINE i32x8 above(const f32x8 &a, const f32x8 &b) {
    return bit_cast<i32x8>(_mm256_cmp_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), _CMP_GT_OQ));
}
PYROUTE_INLINE i32x8 reaches(const f32x8 &a, const f32x8 &b) {
    return bit_cast<i32x8>(_mm256_cmp_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), _CMP_GE_OQ));
}
#else
PYROUTE_INLINE i32x8 above(const f32x8 &a, const f32x8 &b) { return less(b, a); }
PYROUTE_INLINE i32x8 reaches(const f32x8 &a, const f32x8 &b) { return ~less(a, b); } // no NaN here
#endif

// --- threshold ----------------------------------------------------------------------------------------------------

// The k-th largest of the maxima of `vectors` vectors' lanes; the row is padded with -inf to a full vector.
template <int vectors, class Scalar> PYROUTE_INLINE Scalar threshold_of(const Scalar *row, int64_t count, int64_t k) {
    using V = Wide<Scalar>;
    using Int = typename Lane<V>::Int;
    constexpr int width = Lane<V>::width;
    V best[vectors];
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        best[j] = broadcast<V>(-WideOf<Scalar>::infinity);
    int64_t i = 0;
    for (; i + vectors * width <= count; i += vectors * width)
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j)
            best[j] = larger(load<V>(row + i + j * width), best[j]);
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        if (i + j * width < count)
            best[j] = larger(load<V>(row + i + j * width), best[j]);
    if (k == 1) {
#pragma GCC unroll 16
        for (int j = 1; j < vectors; ++j)
            best[0] = larger(best[j], best[0]);
        return over_lanes(best[0], [](Scalar a, Scalar b) { return a > b ? a : b; });
    }
    Scalar values[vectors * width];
    Int ahead[vectors] = {}; // minus how many maxima are larger
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        store(values + j * width, best[j]);
#pragma GCC unroll 16
    for (int other = 0; other < vectors * width; ++other)
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j)
            ahead[j] += above(broadcast<V>(values[other]), best[j]);
    const V infinity = broadcast<V>(WideOf<Scalar>::infinity);
    V least = infinity;
    const Int most = Int{} - static_cast<typename Lane<Scalar>::Int>(k);
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        least = smaller(blend((Int)(ahead[j] > most), best[j], infinity), least);
    return over_lanes(least, [](Scalar a, Scalar b) { return a < b ? a : b; });
}

// Finds a value that k to `most` values of the row reach; false if sixteen halvings do not tell them apart.
template <class Scalar>
PYROUTE_INLINE bool threshold_between(const Scalar *row, int64_t count, int64_t k, int64_t most, Scalar &threshold) {
    using V = Wide<Scalar>;
    using Int = typename Lane<V>::Int;
    const RowRange<Scalar> range = range_of_row(row, count);
    Scalar low = range.smallest, high = range.largest;
    if (!(high - low < WideOf<Scalar>::infinity))
        return false;
    for (int step = 0; step < 16; ++step) {
        threshold = low + (high - low) / 2;
        const V least = broadcast<V>(threshold);
        Int reaching[2] = {};
        int64_t i = 0;
        for (; i + 2 * Lane<V>::width <= count; i += 2 * Lane<V>::width) {
            reaching[0] -= reaches(load<V>(row + i), least);
            reaching[1] -= reaches(load<V>(row + i + Lane<V>::width), least);
        }
        for (; i < count; i += Lane<V>::width)
            reaching[0] -= reaches(load<V>(row + i), least);
        const Int all = reaching[0] + reaching[1];
        int64_t number = 0;
        for (int lane = 0; lane < Lane<V>::width; ++lane)
            number += all[lane];
        if (number >= k && number <= most)
            return true;
        (number < k ? high : low) = threshold;
    }
    return false;
}

// --- shortlist ----------------------------------------------------------------------------------------------------

template <class Scalar> struct Shortlist {
    alignas(32) Scalar keys[shortlist_room];
    alignas(32) int32_t ids[shortlist_room];
    int64_t count = 0;
};

// Positions below `count` whose value reaches the threshold; false if they are too many.
template <class Scalar>
PYROUTE_INLINE bool list_above(const Scalar *row, int64_t count, Scalar threshold, Shortlist<Scalar> &list) {
    using V = Wide<Scalar>;
    constexpr int width = Lane<V>::width;
    const V least = broadcast<V>(threshold);
    for (int64_t begin = 0; begin < count; begin += 64) {
        uint64_t bits = 0;
        if (count - begin >= 64) {
            for (int i = 0; i < 64; i += width)
                bits |= static_cast<uint64_t>(lane_bits(reaches(load<V>(row + begin + i), least))) << i;
        } else {
            for (int i = 0; begin + i < count; i += width)
                bits |= static_cast<uint64_t>(lane_bits(reaches(load<V>(row + begin + i), least))) << i;
            bits &= (uint64_t(1) << (count - begin)) - 1;
        }
        for (; bits; bits &= bits - 1) {
            if (list.count == shortlist_room)
                return false;
            const int64_t at = begin + __builtin_ctzll(bits);
            list.keys[list.count] = row[at];
            list.ids[list.count++] = static_cast<int32_t>(at);
        }
    }
    return true;
}

// --- order --------------------------------------------------------------------------------------------------------

template <class Scalar> PYROUTE_INLINE typename Lane<Wide<Scalar>>::Int lanes_after(int lane) {
    typename Lane<Wide<Scalar>>::Int index;
    for (int i = 0; i < Lane<Wide<Scalar>>::width; ++i)
        index[i] = i;
    return index > static_cast<typename Lane<Scalar>::Int>(lane);
}

// ids[j] = the position with rank j, j < k, among `vectors` vectors of keys, of which those past the k-th best may be
// padding with -inf at the end.
template <int vectors, class Scalar>
PYROUTE_INLINE void order_vectors(const Scalar *keys, const int32_t *positions, int64_t k, int32_t *ids) {
    using V = Wide<Scalar>;
    using Int = typename Lane<V>::Int;
    constexpr int width = Lane<V>::width;
    V mine[vectors];
    Int rank[vectors] = {};
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        mine[j] = load<V>(keys + j * width);
#pragma GCC unroll 16
    for (int block = 0; block < vectors; ++block)
#pragma GCC unroll 16
        for (int lane = 0; lane < width; ++lane) {
            const V other = broadcast<V>(keys[block * width + lane]);
#pragma GCC unroll 16
            for (int j = 0; j < vectors; ++j)
                rank[j] -= j > block ? reaches(other, mine[j])
                           : j < block
                               ? above(other, mine[j])
                               : blend(lanes_after<Scalar>(lane), reaches(other, mine[j]), above(other, mine[j]));
        }
    typename Lane<Scalar>::Int ranks[vectors * width];
    int32_t order[vectors * width];
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j)
        store(ranks + j * width, rank[j]);
    for (int i = 0; i < vectors * width; ++i)
        order[ranks[i]] = positions[i];
    for (int64_t j = 0; j < k; ++j)
        ids[j] = order[j];
}

// The same for any number of keys up to shortlist_room.
template <class Scalar> PYROUTE_INLINE void order_list(const Shortlist<Scalar> &list, int64_t k, int32_t *ids) {
    using V = Wide<Scalar>;
    using Int = typename Lane<V>::Int;
    constexpr int width = Lane<V>::width;
    for (int64_t begin = 0; begin < list.count; begin += width) {
        const V mine = load<V>(list.keys + begin);
        Int rank = {};
        int64_t i = 0;
        for (; i < begin; ++i)
            rank -= reaches(broadcast<V>(list.keys[i]), mine);
        for (int lane = 0; lane < width; ++lane, ++i) {
            const V other = broadcast<V>(list.keys[i]);
            rank -= blend(lanes_after<Scalar>(lane), reaches(other, mine), above(other, mine));
        }
        for (; i < list.count; ++i)
            rank -= above(broadcast<V>(list.keys[i]), mine);
        for (int lane = 0; lane < width; ++lane)
            if (rank[lane] < k)
                ids[rank[lane]] = list.ids[begin + lane];
    }
}

// --- the k best ---------------------------------------------------------------------------------------------------

template <class Scalar>
PYROUTE_INLINE bool select_reaching(Scalar threshold, const Scalar *row, int64_t count, int64_t k, int32_t *ids) {
    constexpr int width = Lane<Wide<Scalar>>::width;
    Shortlist<Scalar> list;
    constexpr int first = 16;
    for (int i = 0; i < first; ++i) {
        list.keys[i] = -WideOf<Scalar>::infinity;
        list.ids[i] = 0;
    }
    if (!list_above(row, count, threshold, list))
        return false;
    if (k == 1) {
        ids[0] = list.ids[0];
    } else if (list.count <= first) {
        order_vectors<first / width>(list.keys, list.ids, k, ids);
    } else {
        for (int64_t i = list.count; i % width; ++i)
            list.keys[i] = -WideOf<Scalar>::infinity;
        order_list(list, k, ids);
    }
    return true;
}

// Writes the positions of the k best of `count` values, k <= select_most and the row padded with -inf to a full
// vector, or returns false.
template <class Scalar>
__attribute__((noinline)) bool select_best(const Scalar *row, int64_t count, int64_t k, int32_t *ids) {
    constexpr int width = Lane<Wide<Scalar>>::width;
    Scalar threshold;
    if (k <= 8)
        threshold = threshold_of<16 / width>(row, count, k);
    else if (k <= 16)
        threshold = threshold_of<32 / width>(row, count, k);
    else if (k <= 32)
        threshold = threshold_of<64 / width>(row, count, k);
    else if (!threshold_between(row, count, k, k + 16, threshold))
        return false;
    return select_reaching(threshold, row, count, k, ids);
}

} // namespace pyroute::cpu::PYROUTE_ISA
