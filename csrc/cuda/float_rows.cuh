// Rows of any float type, as numbers wide enough to compute in: float32 for float32, bfloat16 and float16, float64 for
// float64. Stores round once and write every NaN as the canonical one (0x7fc00000 and what it rounds to).
//
//   load_elements<Type>(from, x)         N elements from an address that is a multiple of 16 bytes
//   load_elements<Type>(from, count, x)  the first `count`, the others zero; any address, nothing past the count is
//   read store_elements                       likewise
//
// x is an array of the type's Wide, or of float: float64 is then rounded first. csrc/cpu/elements.h is the same.
#pragma once

#include "../float_type.h"
#include "cuda/device.cuh"

namespace pyroute::cuda {

PYROUTE_DEVICE float canonical(float x) { return x == x ? x : nan_f32(); }
PYROUTE_DEVICE double canonical(double x) { return x == x ? x : double_of(uint64_t{0x7ff8} << 48); }

struct Float32 {
    using Storage = float;
    using Wide = float;
    PYROUTE_DEVICE static float widen(float x) { return x; }
    PYROUTE_DEVICE static float narrow(float x) { return canonical(x); }
};

struct Bfloat16 {
    using Storage = uint16_t;
    using Wide = float;
    PYROUTE_DEVICE static float widen(uint16_t x) { return bf16_to_f32(x); }
    PYROUTE_DEVICE static uint16_t narrow(float x) {
        return x == x ? static_cast<uint16_t>(bf16x2_of(x, 0.0f)) : uint16_t{0x7fc0};
    }
};

struct Float16 {
    using Storage = uint16_t;
    using Wide = float;
    PYROUTE_DEVICE static float widen(uint16_t x) { return f16_to_f32(x); }
    PYROUTE_DEVICE static uint16_t narrow(float x) { return x == x ? f16_of(x) : uint16_t{0x7e00}; }
};

struct Float64 {
    using Storage = double;
    using Wide = double;
    PYROUTE_DEVICE static double widen(double x) { return x; }
    PYROUTE_DEVICE static double narrow(double x) { return canonical(x); }
};

// Two neighbours of a bfloat16 row, the first in the low half.
PYROUTE_DEVICE uint32_t narrow_bf16x2(float low, float high) {
    const uint32_t both = bf16x2_of(low, high);
    if (low == low && high == high)
        return both;
    return (low == low ? both & 0xffff : 0x7fc0) | (high == high ? both & 0xffff0000 : 0x7fc00000);
}

// The elements of 16 bytes.
template <class Type> constexpr int per_words = 16 / static_cast<int>(sizeof(typename Type::Storage));

template <class Type> PYROUTE_DEVICE typename Type::Wide element_of(const Words &words, int i) {
    if constexpr (sizeof(typename Type::Storage) == 2)
        return Type::widen(static_cast<uint16_t>(words.w[i / 2] >> (16 * (i % 2))));
    else if constexpr (sizeof(typename Type::Storage) == 4)
        return Type::widen(float_of(words.w[i]));
    else
        return Type::widen(double_of(words.w[2 * i] | static_cast<uint64_t>(words.w[2 * i + 1]) << 32));
}
template <> PYROUTE_DEVICE float element_of<Bfloat16>(const Words &words, int i) {
    return float_of(i % 2 ? words.w[i / 2] & 0xffff0000 : words.w[i / 2] << 16);
}

template <class Type, class V, int N> PYROUTE_DEVICE void load_elements(const typename Type::Storage *from, V (&x)[N]) {
    constexpr int n = per_words<Type>;
    static_assert(N % n == 0, "whole 16 bytes");
    Words words[N / n];
    PYROUTE_UNROLL
    for (int i = 0; i < N / n; ++i)
        words[i] = load_words(from + n * i);
    PYROUTE_UNROLL
    for (int i = 0; i < N; ++i)
        x[i] = static_cast<V>(element_of<Type>(words[i / n], i % n));
}

template <class Type, class V, int N>
PYROUTE_DEVICE void load_elements(const typename Type::Storage *from, int64_t count, V (&x)[N]) {
    PYROUTE_UNROLL
    for (int i = 0; i < N; ++i)
        x[i] = i < count ? static_cast<V>(Type::widen(from[i])) : V{0};
}

// N elements held as they lie in memory and widened at each use, to float: half the registers for 16-bit types. float64
// is rounded at once.
template <class Type, int N> struct Held {
    Words words[N / per_words<Type>] = {};
    PYROUTE_DEVICE void load(const typename Type::Storage *from) {
        PYROUTE_UNROLL
        for (int i = 0; i < N / per_words<Type>; ++i)
            words[i] = load_words(from + per_words<Type> * i);
    }
    PYROUTE_DEVICE float operator[](int i) const {
        return element_of<Type>(words[i / per_words<Type>], i % per_words<Type>);
    }
};
template <int N> struct Held<Float64, N> {
    float values[N] = {};
    PYROUTE_DEVICE void load(const double *from) { load_elements<Float64>(from, values); }
    PYROUTE_DEVICE float operator[](int i) const { return values[i]; }
};

template <class Type, class V> PYROUTE_DEVICE Words words_of(const V *x) {
    Words words;
    PYROUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(typename Type::Storage) == 2)
            words.w[i] = Type::narrow(x[2 * i]) | static_cast<uint32_t>(Type::narrow(x[2 * i + 1])) << 16;
        else if constexpr (sizeof(typename Type::Storage) == 4)
            words.w[i] = bits_of(Type::narrow(x[i]));
        else
            words.w[i] = static_cast<uint32_t>(bits_of(Type::narrow(static_cast<double>(x[i / 2]))) >> (32 * (i % 2)));
    }
    return words;
}
template <> PYROUTE_DEVICE Words words_of<Bfloat16, float>(const float *x) {
    return {
        {narrow_bf16x2(x[0], x[1]), narrow_bf16x2(x[2], x[3]), narrow_bf16x2(x[4], x[5]), narrow_bf16x2(x[6], x[7])}};
}

template <class Type, class V, int N> PYROUTE_DEVICE void store_elements(typename Type::Storage *to, const V (&x)[N]) {
    constexpr int n = per_words<Type>;
    static_assert(N % n == 0, "whole 16 bytes");
    PYROUTE_UNROLL
    for (int i = 0; i < N / n; ++i)
        store_words(to + n * i, words_of<Type>(x + n * i));
}

template <class Type, class V, int N>
PYROUTE_DEVICE void store_elements(typename Type::Storage *to, int64_t count, const V (&x)[N]) {
    PYROUTE_UNROLL
    for (int i = 0; i < N; ++i)
        if (i < count)
            to[i] = Type::narrow(static_cast<typename Type::Wide>(x[i]));
}

// body(Type{}) for the type of an array.
template <class Body> PYROUTE_DEVICE void with_float_type(FloatType type, Body &&body) {
    switch (type) {
    case FloatType::float32:
        return body(Float32{});
    case FloatType::bfloat16:
        return body(Bfloat16{});
    case FloatType::float16:
        return body(Float16{});
    case FloatType::float64:
        return body(Float64{});
    }
}

} // namespace pyroute::cuda
