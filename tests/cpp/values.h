// Inputs for kernels. Made by integer arithmetic alone, so that a seed gives the same bytes on every machine. (Two
// draws never stand in one expression that leaves open which comes first.)
#pragma once

#include "check.h"
#include "float_type.h"

namespace pyroute::test {

enum class Values {
    ordinary, // [-2, 2)
    integers, // -4..4: many ties, exact sums
    wide,     // every finite magnitude, subnormals included
    extreme,  // ordinary, and one in four a zero, an infinity, a NaN of any sign and payload, the largest, the smallest
    any_bits,
};

inline uint32_t extreme_bits(Random &random) {
    static const uint32_t magnitudes[] = {0,          0x7f800000, 0x7fc00000, 0x7f800001, 0x7fffffff, 0x7f7fffff,
                                          0x00000001, 0x007fffff, 0x00800000, 0x43e00000, 0x47600000, 0x7fa5a5a5,
                                          0x3f800000, 0x42b17218, 0x42cff1b5, 0x477fff00};
    const uint32_t sign = static_cast<uint32_t>(random.next() >> 63) << 31;
    return random.any_of(magnitudes) | sign;
}

// float32 bits
inline uint32_t float_bits(Random &random, Values values) {
    uint32_t bits;
    float x;
    switch (values) {
    case Values::integers:
        x = static_cast<float>(random.integer(-4, 4));
        break;
    case Values::extreme:
        if (random.one_in(4))
            return extreme_bits(random);
        x = random.real();
        break;
    case Values::wide:
        bits = static_cast<uint32_t>(random.next());
        return (bits & 0x7f800000) == 0x7f800000 ? bits ^ 0x40000000 : bits;
    case Values::any_bits:
        return static_cast<uint32_t>(random.next());
    default:
        x = random.real();
    }
    std::memcpy(&bits, &x, 4);
    return bits;
}

// A float16 of about the same value: the exponent clamped, the mantissa cut, zeros, infinities and NaNs kept.
inline uint16_t half_bits(uint32_t bits) {
    const uint32_t sign = (bits >> 16) & 0x8000, mantissa = (bits >> 13) & 0x3ff;
    const int exponent = static_cast<int>((bits >> 23) & 0xff);
    if (exponent == 255)
        return static_cast<uint16_t>(sign | 0x7c00 | (bits << 9 ? mantissa | 1 : 0));
    const uint32_t clamped = exponent < 113 ? 0 : exponent > 142 ? 30 : static_cast<uint32_t>(exponent - 112);
    return static_cast<uint16_t>(sign | clamped << 10 | (exponent ? mantissa : 0));
}

// The float64 of the same value, a NaN's payload in its upper bits; `low` fills the bits that float32 does not have.
inline double wide_value(uint32_t bits, uint64_t low) {
    const uint64_t sign = static_cast<uint64_t>(bits >> 31) << 63, mantissa = static_cast<uint64_t>(bits & 0x7fffff)
                                                                              << 29;
    const uint64_t exponent = (bits >> 23) & 0xff;
    uint64_t wide = sign | mantissa;
    if (exponent == 255)
        wide |= 0x7ffull << 52;
    else if (exponent)
        wide |= (exponent + 896) << 52 | (low & 0x1fffffff);
    double x;
    std::memcpy(&x, &wide, 8);
    return x;
}

inline void fill(Random &random, Values values, float *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = float_bits(random, values);
        std::memcpy(to + i, &bits, 4);
    }
}
inline void fill_bf16(Random &random, Values values, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<uint16_t>(float_bits(random, values) >> 16);
}
inline void fill_f16(Random &random, Values values, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        to[i] = half_bits(float_bits(random, values));
}
inline void fill(Random &random, Values values, double *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = float_bits(random, values);
        to[i] = wide_value(bits, values == Values::integers ? 0 : random.next());
    }
}
inline void fill_codes(Random &random, uint8_t *to, int64_t n) { // every code, NaN's too
    for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<uint8_t>(random.next() >> 56);
}

inline int64_t item_bytes(FloatType type) {
    return type == FloatType::float32 ? 4 : type == FloatType::float64 ? 8 : 2;
}

constexpr FloatType all_float_types[] = {FloatType::float32, FloatType::bfloat16, FloatType::float16,
                                         FloatType::float64};
constexpr Values all_values[] = {Values::ordinary, Values::integers, Values::wide, Values::extreme, Values::any_bits};

// n numbers of a type that is known at run time.
using Bytes = Buffer<unsigned char>;
inline Bytes random_floats(Random &random, Values values, FloatType type, int64_t n, int64_t skip = 0) {
    Bytes bytes(n * item_bytes(type), skip * item_bytes(type));
    switch (type) {
    case FloatType::float32:
        fill(random, values, reinterpret_cast<float *>(bytes.get()), n);
        break;
    case FloatType::bfloat16:
        fill_bf16(random, values, reinterpret_cast<uint16_t *>(bytes.get()), n);
        break;
    case FloatType::float16:
        fill_f16(random, values, reinterpret_cast<uint16_t *>(bytes.get()), n);
        break;
    case FloatType::float64:
        fill(random, values, reinterpret_cast<double *>(bytes.get()), n);
        break;
    }
    return bytes;
}

// Sizes at which loops over 4, 8, 32 and 128 items begin and end.
inline int64_t odd_size(Random &random, int64_t most) {
    static const int64_t edges[] = {1,  2,  3,  4,  5,  7,   8,   9,   15,  16,  17,  31,
                                    32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257};
    int64_t size = 0;
    do
        size = random.one_in(3) ? random.integer(1, most) : random.any_of(edges);
    while (size > most);
    return size;
}

// Exact comparisons of memory.
inline bool all_bytes(const void *from, int64_t count, int value) {
    for (int64_t i = 0; i < count; ++i)
        if (static_cast<const unsigned char *>(from)[i] != value)
            return false;
    return true;
}
inline bool same_bytes(const void *a, const void *b, int64_t count) {
    return std::memcmp(a, b, static_cast<size_t>(count)) == 0;
}

} // namespace pyroute::test
