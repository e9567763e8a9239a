// The way back: a token's rows, weighted, summed in slot order from +0, rounded once. Products and sums are separate.
//
// A thread has 16 bytes of one token's result. It loads those of eight slots' rows before it uses the first one: 128
// bytes in flight, 96 KiB per SM with 3 blocks of 256 threads. Slots that are not routed are not read. Without weights
// a token with one routed slot gets that row's bytes. Bytes: k + 1 rows per token, 8 per slot.
#pragma once

#include "cuda/float_rows.cuh"
#include "cuda/permutation.cuh"

namespace pyroute::cuda {

// N elements as they lie in memory: 16 bytes of them, or one where addresses are not multiples of 16.
template <class Type, int N> struct RawElements {
    static_assert(N == per_words<Type>, "16 bytes");
    Words words;
    PYROUTE_DEVICE void load(const typename Type::Storage *from) { words = load_words_once(from); }
    PYROUTE_DEVICE void store(typename Type::Storage *to) const { store_words_once(to, words); }
    PYROUTE_DEVICE typename Type::Wide operator[](int i) const { return element_of<Type>(words, i); }
    PYROUTE_DEVICE static RawElements narrowed(const typename Type::Wide (&x)[N]) { return {words_of<Type>(x)}; }
};
template <class Type> struct RawElements<Type, 1> {
    typename Type::Storage element;
    PYROUTE_DEVICE void load(const typename Type::Storage *from) { element = *from; }
    PYROUTE_DEVICE void store(typename Type::Storage *to) const { *to = element; }
    PYROUTE_DEVICE typename Type::Wide operator[](int) const { return Type::widen(element); }
    PYROUTE_DEVICE static RawElements narrowed(const typename Type::Wide (&x)[1]) { return {Type::narrow(x[0])}; }
};

// The one routed slot's row, or -1 if there are none or several.
PYROUTE_DEVICE int64_t only_row(const RouteMaps &maps, int64_t token) {
    int64_t only = -1;
    for (int64_t base = 0; base < maps.top_k; base += rows_at_once) {
        int32_t rows[rows_at_once];
        load_rows(maps, token, base, rows);
        PYROUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i) {
            if (rows[i] >= 0 && only >= 0)
                return -1;
            only = rows[i] >= 0 ? rows[i] : only;
        }
    }
    return only;
}

// Columns of one token's sum. A slot that is not routed adds 0 * 0: from +0, a sum never is -0, which that would
// change.
template <class Type, int N>
PYROUTE_DEVICE RawElements<Type, N> sum_columns(const UnpermuteArgs &args, const typename Type::Storage *from,
                                                int64_t token) {
    using Wide = typename Type::Wide;
    const auto *weights = static_cast<const Wide *>(args.topk_weights);
    Wide sum[N] = {};
    for (int64_t base = 0; base < args.maps.top_k; base += rows_at_once) {
        int32_t rows[rows_at_once];
        load_rows(args.maps, token, base, rows);
        RawElements<Type, N> raw[rows_at_once] = {};
        Wide weight[rows_at_once] = {};
        PYROUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i)
            if (rows[i] >= 0) {
                raw[i].load(from + rows[i] * args.hidden);
                weight[i] = weights ? weights[token * args.maps.top_k + base + i] : Wide{1}; // 1 * x is x
            }
        const auto slots = static_cast<int32_t>(args.maps.top_k - base);
        PYROUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i) {
            if (i >= slots)
                break;
            PYROUTE_UNROLL
            for (int n = 0; n < N; ++n) {
                const Wide product = weight[i] * raw[i][n];
                sum[n] = sum[n] + product;
            }
        }
    }
    return RawElements<Type, N>::narrowed(sum);
}

template <class Type, int N> PYROUTE_DEVICE void unpermute(const SumArgs &args) {
    const UnpermuteArgs &sum = args.sum;
    const Strips strips(sum.maps.num_tokens, sum.hidden / N, 1, args.lanes_log2, gridDim.x);
    for (int64_t strip = strips.first; strip < strips.total; strip += strips.step) {
        const int64_t token = quotient(strip, strips.per_token);
        const int64_t column = ((strip - token * strips.per_token) * strips.lanes + strips.member) * N;
        if (column >= sum.hidden)
            continue;
        const auto *from = static_cast<const typename Type::Storage *>(sum.rows) + column;
        const int64_t only = sum.topk_weights ? -1 : only_row(sum.maps, token);
        auto *to = static_cast<typename Type::Storage *>(sum.out) + token * sum.hidden + column;
        if (only >= 0) {
            RawElements<Type, N> raw;
            raw.load(from + only * sum.hidden);
            raw.store(to);
        } else {
            sum_columns<Type, N>(sum, from, token).store(to);
        }
    }
}

} // namespace pyroute::cuda
