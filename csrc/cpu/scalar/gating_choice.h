// The largest keys of a row, best first; ties go to the position met first.
//
// Keys are integers in the order of the values. Up to 32 are kept sorted in vector registers: a key enters by a
// compare, a shift and two selects, without a branch that depends on where. The last of them is the threshold that a
// vector of candidates is compared with, so past the first few vectors most are passed over whole. Of 256 random keys
// about 8 + 8 ln(256 / 8) = 36 enter a list of 8. Longer lists come from
// a radix sort of all keys: a heap took 12 us for 256 of 256.
#pragma once

#include "cpu/scalar/gating_rows.h"

namespace pyroute::cpu::PYROUTE_ISA {

template <class Key> constexpr int sign_shift = sizeof(Key) * 8 - 1;
template <class Key> constexpr Key no_key = static_cast<Key>(uint64_t(1) << 63 >> (63 - sign_shift<Key>));
template <class Key> constexpr Key key_of_nan = no_key<Key> + 1; // that of -inf is greater by half an exponent range

// -inf, ..., -0 equal to +0, ..., +inf.
template <class V> PYROUTE_INLINE typename Lane<V>::Int keys_of_ordered(const V &v) {
    using Key = typename Lane<typename Lane<V>::Scalar>::Int;
    using Keys = typename Lane<V>::Int;
    const Keys bits = bit_cast<Keys>(v + typename Lane<V>::Scalar(0)); // -0 + 0 is +0
    constexpr Key magnitude = ~no_key<Key>;
    return bits ^ ((bits >> sign_shift<Key>)&magnitude);
}

// The same, and NaN lowest; no_key is below them all and no value's.
template <class V> PYROUTE_INLINE typename Lane<V>::Int order_keys(const V &v) {
    using Keys = typename Lane<V>::Int;
    return v == v ? keys_of_ordered(v) : Keys{} + key_of_nan<typename Lane<typename Lane<V>::Scalar>::Int>;
}

template <class Scalar> PYROUTE_INLINE Scalar value_of_key(typename Lane<Scalar>::Int key) {
    using Key = typename Lane<Scalar>::Int;
    constexpr Key magnitude = ~no_key<Key>;
    const auto bits = static_cast<Key>(key ^ ((key >> sign_shift<Key>)&magnitude));
    return key == key_of_nan<Key> ? static_cast<Scalar>(__builtin_nan("")) : bit_cast<Scalar>(bits);
}

// --- lanes ----------------------------------------------------------------------------------------------------------

template <class Keys> struct KeyLane;
template <> struct KeyLane<i32x8> {
    using Key = int32_t;
    using Half = int32_t __attribute__((vector_size(16)));
    static constexpr int width = 8;
};
template <> struct KeyLane<i64x4> {
    using Key = int64_t;
    using Half = int64_t __attribute__((vector_size(16)));
    static constexpr int width = 4;
};

// v moved up by one lane, the last lane of `before` moving in.
PYROUTE_INLINE i32x8 shifted(const i32x8 &before, const i32x8 &v) {
#if defined(__clang__)
    return __builtin_shufflevector(before, v, 7, 8, 9, 10, 11, 12, 13, 14);
#else
    return __builtin_shuffle(before, v, i32x8{7, 8, 9, 10, 11, 12, 13, 14});
#endif
}
PYROUTE_INLINE i64x4 shifted(const i64x4 &before, const i64x4 &v) {
#if defined(__clang__)
    return __builtin_shufflevector(before, v, 3, 4, 5, 6);
#else
    return __builtin_shuffle(before, v, i64x4{3, 4, 5, 6});
#endif
}

// --- lists ----------------------------------------------------------------------------------------------------------

// The best `limit` <= lanes keys, sorted, in the last lanes; the lanes before them hold keys that nothing beats.
template <class Keys, int lanes> struct SortedList {
    using Key = typename KeyLane<Keys>::Key;
    static constexpr int width = KeyLane<Keys>::width, vectors = lanes / width;
    Keys keys[vectors], ids[vectors];

    __attribute__((always_inline)) explicit SortedList(int64_t limit) {
        for (int v = 0; v < vectors; ++v) {
            ids[v] = Keys{};
            for (int lane = 0; lane < width; ++lane)
                keys[v][lane] = v * width + lane < lanes - limit ? ~no_key<Key> : no_key<Key>;
        }
    }

    __attribute__((always_inline)) Key threshold() const { return keys[vectors - 1][width - 1]; }

    __attribute__((always_inline)) void insert(Key key, int64_t id) {
        const Keys key_lanes = Keys{} + key, id_lanes = Keys{} + static_cast<Key>(id);
        Keys keys_before = {}, ids_before = {}, loses_before = {};
        for (int v = 0; v < vectors; ++v) {
            const Keys old_keys = keys[v], old_ids = ids[v], loses = old_keys < key_lanes;
            const Keys moves = shifted(loses_before, loses); // what its place takes is the one before, or the new one
            keys[v] = loses ? (moves ? shifted(keys_before, old_keys) : key_lanes) : old_keys;
            ids[v] = loses ? (moves ? shifted(ids_before, old_ids) : id_lanes) : old_ids;
            keys_before = old_keys;
            ids_before = old_ids;
            loses_before = loses;
        }
    }

    __attribute__((always_inline)) void write(int64_t limit, int32_t *to) const {
        for (int v = 0; v < vectors; ++v)
            for (int lane = 0; lane < width; ++lane)
                if (v * width + lane >= lanes - limit)
                    to[v * width + lane - (lanes - limit)] = static_cast<int32_t>(ids[v][lane]);
    }
};

// --- sort -----------------------------------------------------------------------------------------------------------

// Keys that sort upwards from the best, and their positions.
template <class Key> struct SortBuffer {
    Key *keys[2];
    int32_t *positions[2];
};

template <class Key> PYROUTE_INLINE SortBuffer<Key> take_sort_buffer(Scratch &scratch, int64_t count) {
    SortBuffer<Key> buffer;
    for (int i = 0; i < 2; ++i) {
        buffer.keys[i] = take<Key>(scratch, count);
        buffer.positions[i] = take<int32_t>(scratch, count);
    }
    return buffer;
}

// Stable radix sort of the first `count` entries of buffer 0, a byte at a time; returns the buffer that holds the
// result. A byte that all keys share costs nothing.
template <class Key> PYROUTE_INLINE int sort_keys(const SortBuffer<Key> &buffer, int64_t count) {
    constexpr int digits = sizeof(Key);
    int32_t starts[digits][256] = {};
    for (int64_t i = 0; i < count; ++i)
        for (int digit = 0; digit < digits; ++digit)
            ++starts[digit][(buffer.keys[0][i] >> (8 * digit)) & 255];
    int now = 0;
    for (int digit = 0; digit < digits; ++digit) {
        int32_t *start = starts[digit];
        if (start[(buffer.keys[now][0] >> (8 * digit)) & 255] == count)
            continue;
        int32_t sum = 0;
        for (int value = 0; value < 256; ++value) {
            const int32_t here = start[value];
            start[value] = sum;
            sum += here;
        }
        for (int64_t i = 0; i < count; ++i) {
            const Key key = buffer.keys[now][i];
            const int32_t to = start[(key >> (8 * digit)) & 255]++;
            buffer.keys[1 - now][to] = key;
            buffer.positions[1 - now][to] = buffer.positions[now][i];
        }
        now = 1 - now;
    }
    return now;
}

// --- selection ------------------------------------------------------------------------------------------------------

// Which positions are candidates: all of `count` runs of `size`, or those that `kept` marks.
struct Candidates {
    int64_t count, size;
    const int32_t *kept;
};

template <class Keys, class List, class Key>
PYROUTE_INLINE void offer(List &list, const Key *keys, int64_t begin, int64_t end) {
    constexpr int width = KeyLane<Keys>::width;
    int64_t i = begin;
    for (; i + width <= end; i += width)
        for (unsigned better = lane_bits(load<Keys>(keys + i) > list.threshold()); better; better &= better - 1) {
            const int64_t at = i + __builtin_ctz(better);
            if (keys[at] > list.threshold()) // it may have risen since the comparison
                list.insert(keys[at], at);
        }
    for (; i < end; ++i)
        if (keys[i] > list.threshold())
            list.insert(keys[i], i);
}

template <class Keys, class List, class Key>
PYROUTE_INLINE void offer(List &list, const Key *keys, const Candidates &candidates) {
    for (int64_t run = 0; run < candidates.count; ++run)
        if (!candidates.kept || candidates.kept[run])
            offer<Keys>(list, keys, run * candidates.size, (run + 1) * candidates.size);
}

template <class Keys, int lanes, class Key>
__attribute__((noinline)) void best_in_registers(const Key *keys, const Candidates &candidates, int64_t limit,
                                                 int32_t *ids) {
    SortedList<Keys, lanes> list(limit);
    offer<Keys>(list, keys, candidates);
    list.write(limit, ids);
}

template <class Key>
__attribute__((noinline)) void best_by_sorting(const Key *keys, const Candidates &candidates, int64_t limit,
                                               int32_t *ids, const SortBuffer<Key> &buffer) {
    int64_t count = 0;
    for (int64_t run = 0; run < candidates.count; ++run)
        if (!candidates.kept || candidates.kept[run])
            for (int64_t i = run * candidates.size; i < (run + 1) * candidates.size; ++i) {
                buffer.keys[0][count] = static_cast<Key>(keys[i] ^ ~no_key<Key>); // unsigned, the best is 0
                buffer.positions[0][count++] = static_cast<int32_t>(i);
            }
    memcpy(ids, buffer.positions[sort_keys(buffer, count)], static_cast<size_t>(limit) * sizeof(int32_t));
}

// Positions of the `limit` best keys, best first. There are at least `limit` candidates; the buffer has room for all.
template <class Keys, class Key>
__attribute__((noinline)) void best_positions(const Key *keys, const Candidates &candidates, int64_t limit,
                                              int32_t *ids, const SortBuffer<Key> &buffer) {
    if (limit <= 8)
        return best_in_registers<Keys, 8>(keys, candidates, limit, ids);
    if (limit <= 16)
        return best_in_registers<Keys, 16>(keys, candidates, limit, ids);
    if (limit <= 32)
        return best_in_registers<Keys, 32>(keys, candidates, limit, ids);
    best_by_sorting(keys, candidates, limit, ids, buffer);
}

// --- two of a group -------------------------------------------------------------------------------------------------

// The largest and the second largest, lane by lane.
template <class Keys> struct TopTwo {
    Keys first, second;
};

template <class Keys> PYROUTE_INLINE TopTwo<Keys> merge(const TopTwo<Keys> &a, const TopTwo<Keys> &b) {
    const Keys first = a.first > b.first ? a.first : b.first, loser = a.first > b.first ? b.first : a.first;
    const Keys second = a.second > b.second ? a.second : b.second;
    return {first, loser > second ? loser : second};
}

template <class Keys> PYROUTE_INLINE TopTwo<typename KeyLane<Keys>::Key> over_lanes(const TopTwo<Keys> &lanes) {
    using Key = typename KeyLane<Keys>::Key;
    using Half = typename KeyLane<Keys>::Half;
    struct Halves {
        Half low, high;
    };
    const auto first = bit_cast<Halves>(lanes.first), second = bit_cast<Halves>(lanes.second);
    const TopTwo<Half> half = merge(TopTwo<Half>{first.low, second.low}, TopTwo<Half>{first.high, second.high});
    TopTwo<Key> top{half.first[0], half.second[0]};
    for (int lane = 1; lane < KeyLane<Keys>::width / 2; ++lane)
        top = merge(top, TopTwo<Key>{half.first[lane], half.second[lane]});
    return top;
}

// Of `count` keys; no_key where there is none.
template <class Keys, class Key> PYROUTE_INLINE TopTwo<Key> top_two(const Key *keys, int64_t count) {
    constexpr int width = KeyLane<Keys>::width;
    const Keys none = Keys{} + no_key<Key>;
    TopTwo<Keys> lanes{none, none};
    int64_t i = 0;
    for (; i + width <= count; i += width)
        lanes = merge(lanes, {load<Keys>(keys + i), none});
    if (i < count) {
        Keys rest = none;
        memcpy(&rest, keys + i, static_cast<size_t>(count - i) * sizeof(Key));
        lanes = merge(lanes, {rest, none});
    }
    return over_lanes(lanes);
}

} // namespace pyroute::cpu::PYROUTE_ISA
