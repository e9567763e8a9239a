// Which groups a token keeps, and their experts' values side by side. No value is NaN.
//
// A group's largest and second largest value are found lane by lane, its lanes then folded in halves; with AVX2 eight
// groups at once, so that they end up in the lanes of one vector. Groups are ranked by counting those that beat them.
#pragma once

#include "cpu/scalar/gating_select.h"

namespace pyroute::cpu::PYROUTE_ISA {

constexpr int64_t groups_most = 64;

template <class V> struct BestTwo {
    V first, second;
};

template <class V> PYROUTE_INLINE BestTwo<V> merge_two(const BestTwo<V> &a, const BestTwo<V> &b) {
    return {larger(a.first, b.first), larger(smaller(a.first, b.first), larger(a.second, b.second))};
}

// Lane by lane over a group; `last` marks the lanes of a last vector that is not full.
template <class Scalar>
PYROUTE_INLINE BestTwo<Wide<Scalar>> best_two(const Scalar *values, int64_t size,
                                              const typename Lane<Wide<Scalar>>::Int &last) {
    using V = Wide<Scalar>;
    const V lowest = broadcast<V>(-WideOf<Scalar>::infinity);
    BestTwo<V> best{lowest, lowest};
    int64_t i = 0;
    for (; i + Lane<V>::width <= size; i += Lane<V>::width) {
        const V v = load<V>(values + i);
        best = {larger(v, best.first), larger(smaller(v, best.first), best.second)};
    }
    if (i < size) {
        const V v = blend(last, load<V>(values + i), lowest);
        best = {larger(v, best.first), larger(smaller(v, best.first), best.second)};
    }
    return best;
}

#if defined(__AVX2__)
// Lanes of a beside lanes of b: whole halves, pairs inside halves, single lanes; `upper` takes the other ones of both.
template <bool upper> PYROUTE_INLINE f32x8 halves_of(const f32x8 &a, const f32x8 &b) {
    return bit_cast<f32x8>(_mm256_permute2f128_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), upper ? 0x31 : 0x20));
}
template <bool upper> PYROUTE_INLINE f32x8 pairs_of(const f32x8 &a, const f32x8 &b) {
    return bit_cast<f32x8>(_mm256_shuffle_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), upper ? 0xee : 0x44));
}
template <bool upper> PYROUTE_INLINE f32x8 lanes_of(const f32x8 &a, const f32x8 &b) {
    if constexpr (upper)
        return bit_cast<f32x8>(_mm256_blend_ps(_mm256_movehdup_ps(bit_cast<__m256>(a)), bit_cast<__m256>(b), 0xaa));
    else
        return bit_cast<f32x8>(_mm256_blend_ps(bit_cast<__m256>(a), _mm256_moveldup_ps(bit_cast<__m256>(b)), 0xaa));
}
#define PYROUTE_FOLD(lanes, a, b)                                                                                      \
    merge_two<f32x8>({lanes<false>(a.first, b.first), lanes<false>(a.second, b.second)},                               \
                     {lanes<true>(a.first, b.first), lanes<true>(a.second, b.second)})

// The best two of eight groups, group g in lane g.
PYROUTE_INLINE BestTwo<f32x8> fold_groups(const BestTwo<f32x8> (&groups)[8]) {
    BestTwo<f32x8> half[4], pair[2];
    for (int i = 0; i < 4; ++i)
        half[i] = PYROUTE_FOLD(halves_of, groups[i], groups[i + 4]);
    for (int i = 0; i < 2; ++i)
        pair[i] = PYROUTE_FOLD(pairs_of, half[i], half[i + 2]);
    return PYROUTE_FOLD(lanes_of, pair[0], pair[1]);
}
#undef PYROUTE_FOLD
#endif

template <class V> PYROUTE_INLINE BestTwo<V> fold_groups(const BestTwo<V> (&groups)[Lane<V>::width]) {
    using Scalar = typename Lane<V>::Scalar;
    BestTwo<V> result;
    for (int g = 0; g < Lane<V>::width; ++g) {
        BestTwo<Scalar> best{groups[g].first[0], groups[g].second[0]};
        for (int lane = 1; lane < Lane<V>::width; ++lane)
            best = merge_two<Scalar>(best, {groups[g].first[lane], groups[g].second[lane]});
        result.first[g] = best.first;
        result.second[g] = best.second;
    }
    return result;
}

// One bit per group that is kept, from what ranks the experts; 0 if two values add up to NaN. At most groups_most
// groups, ranked by their best or their best two. Reads a vector past the last expert.
template <class Scalar> PYROUTE_INLINE uint64_t kept_groups(const Router &router, const Scalar *values) {
    using V = Wide<Scalar>;
    using Int = typename Lane<V>::Int;
    constexpr int width = Lane<V>::width;
    const int64_t num_groups = router.num_groups, size = router.num_experts / num_groups;
    const Int last = ~lanes_after<Scalar>(static_cast<int>(size % width) - 1);
    Scalar scores[groups_most];
    Int ordered = ~Int{};
    for (int64_t begin = 0; begin < num_groups; begin += width) {
        BestTwo<V> groups[width];
        for (int g = 0; g < width; ++g) {
            const int64_t group = begin + g < num_groups ? begin + g : begin;
            groups[g] = best_two(values + group * size, size, last);
        }
        const BestTwo<V> best = fold_groups(groups);
        const V score = router.group_topn == 1 ? best.first : best.first + best.second;
        ordered &= score == score;
        store(scores + begin, score);
        for (int64_t g = num_groups; g < begin + width; ++g)
            scores[g] = -WideOf<Scalar>::infinity;
    }
    if (any_lane(~ordered))
        return 0;
    uint64_t kept = 0;
    const Int most = Int{} + static_cast<typename Lane<Scalar>::Int>(router.topk_groups);
    for (int64_t begin = 0; begin < num_groups; begin += width) {
        const V mine = load<V>(scores + begin);
        Int rank = {};
        int64_t g = 0;
        for (; g < begin; ++g)
            rank -= reaches(broadcast<V>(scores[g]), mine);
        for (int lane = 0; lane < width; ++lane, ++g) {
            const V other = broadcast<V>(scores[g]);
            rank -= blend(lanes_after<Scalar>(lane), reaches(other, mine), above(other, mine));
        }
        for (; g < num_groups; ++g)
            rank -= above(broadcast<V>(scores[g]), mine);
        kept |= static_cast<uint64_t>(lane_bits((Int)(rank < most))) << begin;
    }
    return num_groups == 64 ? kept : kept & ((uint64_t(1) << num_groups) - 1);
}

// Copies the kept groups' values to `to`, padded with -inf to a full vector, and returns how many they are; expert =
// position + base[position / size].
template <class Scalar>
PYROUTE_INLINE int64_t gather_groups(const Scalar *values, int64_t size, uint64_t kept, Scalar *to, int32_t *base) {
    using V = Wide<Scalar>;
    constexpr int width = Lane<V>::width;
    int64_t count = 0;
    for (; kept; kept &= kept - 1) {
        const int64_t first = __builtin_ctzll(kept) * size;
        *base++ = static_cast<int32_t>(first - count);
        int64_t i = 0;
        for (; i + width <= size; i += width)
            store(to + count + i, load<V>(values + first + i));
        for (; i < size; ++i)
            to[count + i] = values[first + i];
        count += size;
    }
    store(to + count, broadcast<V>(-WideOf<Scalar>::infinity));
    return count;
}

} // namespace pyroute::cpu::PYROUTE_ISA
