// Moves between tokens and rows, and the sums of the way back.
//
//   spread              each token is read once and copied to its rows
//   unpermute           64 columns at a time in registers: from +0, slots in order, a product and a sum each, while the
//                       next token's rows are fetched
//   unpermute_backward  per slot one pass over the columns: weight * grad_y to the row, and the dot product <grad_y,
//   row>
//                       in 32 lanes (lane l takes columns l, l + 32, ...), then the tree 16, 8, 4, 2, 1
//
// Products and sums are separate roundings, never fused. Memory traffic per token: permute reads 1 row and writes k,
// unpermute reads k and writes 1, its backward reads k + 1 and writes k.
//
// 4096 tokens of 2048 bfloat16 to 8 rows each, Zen 4, two threads, ms: permute 2.4, which is as long as writing the
// rows takes (4.4 with plain stores at the ends of rows); expert-order copies of the rows 10. Unpermute 3.1; in a probe
// of the same loops 2.7, without fetching ahead 3.1, with plain stores 3.6, one row after the other into a sum in
// L1 5.3. Lost: 128 columns at a time (0.95 to 1.0 times as fast), the next token's rows fetched one after the other
// (0.8 in bfloat16, 1.04 in float32).
#include "cpu/permutation.h"
#include "cpu/elements.h"
#include "cpu/streaming.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

constexpr int vectors = 4; // of 8 lanes: the 32 lanes of a dot product
constexpr int64_t tile = 8 * vectors;

// Streams a row in whole lines. The line that it shares with the row before is written here, with the end of that row;
// its own end is left to the next row, if that one is a token's. Rows of 1023 bfloat16, 2048 tokens to 4 of 64 experts:
// 0.73 ms, with ends of their own 1.35, of 1024 0.67 (Zen 4, two threads, one run).
PYROUTE_INLINE void stream_row(const SpreadArgs &args, int64_t row, const uint8_t *from) {
    uint8_t *to = args.rows + row * args.row_bytes;
    const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64);
    if (head > 0 && row > 0) {
        const int64_t before = args.row_to_token[row - 1];
        stream_joint(to, before < 0 ? nullptr : args.x + (before + 1) * args.row_bytes, from, head);
    } else {
        memcpy(to, from, static_cast<size_t>(head));
    }
    const int64_t whole = (args.row_bytes - head) / 64 * 64;
    stream_bytes(to + head, from + head, whole);
    const int64_t tail = args.row_bytes - head - whole;
    if (tail > 0 && (row + 1 == args.num_rows || args.row_to_token[row + 1] < 0))
        memcpy(to + head + whole, from + head + whole, static_cast<size_t>(tail));
}

void spread(const SpreadArgs &args, int64_t begin, int64_t end) {
    const bool lines = args.streaming && args.row_to_token && args.row_bytes >= 64;
    for (int64_t token = begin; token < end; ++token) {
        const uint8_t *from = args.x + token * args.row_bytes;
        for (int64_t slot = token * args.top_k; slot < (token + 1) * args.top_k; ++slot) {
            const int64_t row = args.token_to_row[slot];
            if (row < 0)
                continue;
            uint8_t *to = args.rows + row * args.row_bytes;
            if (lines)
                stream_row(args, row, from);
            else if (args.streaming)
                stream_bytes(to, from, args.row_bytes);
            else
                memcpy(to, from, static_cast<size_t>(args.row_bytes));
        }
    }
    finish_streaming(args.streaming);
}

template <class Type>
PYROUTE_INLINE void stream_elements(typename Type::Storage *to, const typename Type::Wide &v) { // `to` aligned to 16
#if defined(__SSE2__)
    const auto packed = Type::narrow(v);
    for (size_t i = 0; i < sizeof(packed); i += 16) {
        __m128i part;
        memcpy(&part, reinterpret_cast<const uint8_t *>(&packed) + i, 16);
        _mm_stream_si128(reinterpret_cast<__m128i *>(reinterpret_cast<uint8_t *>(to) + i), part);
    }
#else
    store_elements<Type>(to, v);
#endif
}

// One token's sum.
template <class Type> struct TokenSum {
    const typename Type::Storage *rows;
    int64_t hidden, top_k;
    const int32_t *to_row;                // [top_k]
    const int32_t *next;                  // [top_k], the rows of the next token, fetched meanwhile
    const typename Type::Scalar *weights; // [top_k], or null
    typename Type::Storage *out;          // [hidden]
};

// Columns [column, column + 8 * V) of the sum, of which `count` exist when V is 1.
template <class Type, int V, bool streaming>
PYROUTE_INLINE void sum_columns(const TokenSum<Type> &t, int64_t column, int64_t count) {
    using Storage = typename Type::Storage;
    constexpr int64_t bytes = 8 * V * static_cast<int64_t>(sizeof(Storage));
    typename Type::Wide sum[V] = {};
    for (int64_t slot = 0; slot < t.top_k; ++slot) {
        if (t.next[slot] >= 0)
            for (int64_t line = 0; line < bytes; line += 64)
                __builtin_prefetch(reinterpret_cast<const uint8_t *>(t.rows + t.next[slot] * t.hidden + column) + line,
                                   0, 2);
        if (t.to_row[slot] < 0)
            continue;
        const Storage *row = t.rows + t.to_row[slot] * t.hidden + column;
        const auto weight = broadcast<typename Type::Wide>(t.weights ? t.weights[slot] : 1); // 1 * x is x
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const auto x = V == 1 && count < 8 ? load_elements<Type>(row, count) : load_elements<Type>(row + 8 * v);
            sum[v] += weight * x;
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
        if (V == 1 && count < 8)
            store_elements<Type>(t.out + column, sum[v], count);
        else if (streaming)
            stream_elements<Type>(t.out + column + 8 * v, sum[v]);
        else
            store_elements<Type>(t.out + column + 8 * v, sum[v]);
}

template <class Type, bool streaming> PYROUTE_INLINE void sum_token(const TokenSum<Type> &t) {
#if defined(__AVX2__)
    constexpr int wide = sizeof(typename Type::Wide) == 32 ? 8 : 4; // 8 registers
#else
    constexpr int wide = 4;
#endif
    int64_t column = 0;
    for (; column + 8 * wide <= t.hidden; column += 8 * wide)
        sum_columns<Type, wide, streaming>(t, column, 8 * wide);
    if (!streaming && column > 0 && column < t.hidden) { // the last ones again with those before: the same bytes
        sum_columns<Type, wide, false>(t, t.hidden - 8 * wide, 8 * wide);
        return;
    }
    for (; column < t.hidden; column += 8)
        sum_columns<Type, 1, streaming>(t, column, t.hidden - column);
}

// The one routed slot of a token, or -1 if it has none or several.
PYROUTE_INLINE int64_t only_row(const int32_t *to_row, int64_t top_k) {
    int64_t routed = 0, row = -1;
    for (int64_t slot = 0; slot < top_k; ++slot)
        if (to_row[slot] >= 0) {
            row = to_row[slot];
            ++routed;
        }
    return routed == 1 ? row : -1;
}

template <class Type> void unpermute(const UnpermuteArgs &args, int64_t begin, int64_t end) {
    const auto *weights = static_cast<const typename Type::Scalar *>(args.topk_weights);
    for (int64_t token = begin; token < end; ++token) {
        const int32_t *to_row = args.maps.token_to_row + token * args.maps.top_k;
        auto *out = static_cast<typename Type::Storage *>(args.out) + token * args.hidden;
        if (!weights) {
            const int64_t row = only_row(to_row, args.maps.top_k);
            if (row >= 0) { // bytes move as they are
                memcpy(out, static_cast<const typename Type::Storage *>(args.rows) + row * args.hidden,
                       static_cast<size_t>(args.hidden) * sizeof(*out));
                continue;
            }
        }
        const int64_t top_k = args.maps.top_k;
        const TokenSum<Type> sum = {static_cast<const typename Type::Storage *>(args.rows),
                                    args.hidden,
                                    top_k,
                                    to_row,
                                    token + 1 < end ? to_row + top_k : to_row,
                                    weights ? weights + token * top_k : nullptr,
                                    out};
        if (args.streaming && reinterpret_cast<uintptr_t>(out) % 16 == 0)
            sum_token<Type, true>(sum);
        else
            sum_token<Type, false>(sum);
    }
    finish_streaming(args.streaming);
}

// The tree 16, 8, 4, 2, 1 over 32 lanes.
template <class Wide> PYROUTE_INLINE typename Lane<Wide>::Scalar tree_sum(const Wide (&lanes)[vectors]) {
    const Wide v = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    const auto a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
    return (a + c) + (b + d);
}

template <class Storage> struct BackwardSlot {
    const Storage *grad_y; // [hidden]
    const Storage *row;    // [hidden]
    const Storage *next;   // [hidden], the row after this one, fetched meanwhile
    Storage *grad_row;     // [hidden]
    int64_t hidden;
};

// Writes weight * grad_y to the slot's row and returns <grad_y, row>.
template <class Type, bool streaming>
typename Type::Scalar backward_slot(const BackwardSlot<typename Type::Storage> &s, typename Type::Scalar weight) {
    const auto w = broadcast<typename Type::Wide>(weight);
    typename Type::Wide lanes[vectors] = {};
    int64_t column = 0;
    for (; column + tile <= s.hidden; column += tile) {
        __builtin_prefetch(s.next + column);
        __builtin_prefetch(s.next + column + tile / 2);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const int64_t at = column + 8 * v;
            const auto grad = load_elements<Type>(s.grad_y + at);
            lanes[v] += grad * load_elements<Type>(s.row + at);
            if (streaming)
                stream_elements<Type>(s.grad_row + at, w * grad);
            else
                store_elements<Type>(s.grad_row + at, w * grad);
        }
    }
    // The last, partial 32: missing columns add +0 to lanes that are never -0.
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v, column += 8) {
        if (column >= s.hidden)
            break;
        const int64_t count = s.hidden - column < 8 ? s.hidden - column : 8;
        const auto grad = load_elements<Type>(s.grad_y + column, count);
        lanes[v] += grad * load_elements<Type>(s.row + column, count);
        store_elements<Type>(s.grad_row + column, w * grad, count);
    }
    return tree_sum(lanes);
}

template <class Type> void unpermute_backward(const UnpermuteBackwardArgs &args, int64_t begin, int64_t end) {
    using Storage = typename Type::Storage;
    using Scalar = typename Type::Scalar;
    const auto *rows = static_cast<const Storage *>(args.rows);
    const auto *weights = static_cast<const Scalar *>(args.topk_weights);
    auto *grad_rows = static_cast<Storage *>(args.grad_rows);
    auto *grad_weights = static_cast<Scalar *>(args.grad_topk_weights);
    const int32_t *to_row = args.maps.token_to_row;
    for (int64_t token = begin; token < end; ++token) {
        const Storage *grad_y = static_cast<const Storage *>(args.grad_y) + token * args.hidden;
        for (int64_t slot = token * args.maps.top_k; slot < (token + 1) * args.maps.top_k; ++slot) {
            const int64_t row = to_row[slot];
            if (row < 0) {
                grad_weights[slot] = 0;
                continue;
            }
            const int64_t next = slot + 1 < end * args.maps.top_k && to_row[slot + 1] >= 0 ? to_row[slot + 1] : row;
            const BackwardSlot<Storage> s = {grad_y, rows + row * args.hidden, rows + next * args.hidden,
                                             grad_rows + row * args.hidden, args.hidden};
            const bool streaming = args.streaming && reinterpret_cast<uintptr_t>(s.grad_row) % 16 == 0;
            const Scalar dot =
                streaming ? backward_slot<Type, true>(s, weights[slot]) : backward_slot<Type, false>(s, weights[slot]);
            grad_weights[slot] = canonical(broadcast<typename Type::Wide>(dot))[0];
        }
    }
    finish_streaming(args.streaming);
}

} // namespace

extern const PermutationKernels permutation_kernels = {
    spread,
    {unpermute<Float32>, unpermute<Bfloat16>, unpermute<Float16>, unpermute<Float64>},
    {unpermute_backward<Float32>, unpermute_backward<Bfloat16>, unpermute_backward<Float16>,
     unpermute_backward<Float64>}};

} // namespace pyroute::cpu::PYROUTE_ISA
