// float8_e4m3fn and float8_e5m2 to and from float32, and the scale of a block that some lanes hold together.
//
//   block_scale   the largest finite magnitude of the block, as integers, which order like the floats; amax / max_value
//                 in one IEEE division, or 1; the inverse in one more
//   encode        cast(x * inverse): nearest even, NaN and infinities become the one NaN code. A block's scale is made
//                 for its finite values, so these cannot overflow: two conversions per instruction from sm_89 on, else
//                 one float32 addition each. What is not finite is rare and put in afterwards
//   encode_any    any float32: finite values saturate
//   decode        exact; NaN codes give some NaN
//
// The integer cast: with the exponent e of x, at least the smallest normal one, the float32 number added is
// 2^(e + 23 - M) plus as many units as the codes below 2^e count, so that the low byte of the sum is the code.
// csrc/cpu/fp8.h and fp8_encode.h are the same program over lanes; pyroute/_array/quantization.py is it in array code.
#pragma once

#include "../quantization.h"
#include "cuda/device.cuh"

namespace pyroute::cuda {

struct E4m3 {
    static constexpr int mantissa_bits = 3, min_exponent = -6;
    static constexpr uint32_t nan_code = 0x7f;
    static constexpr float max_value = 448.0f;
    static constexpr uint32_t max_value_bits = 0x43e00000;

    PYROUTE_DEVICE static float decode(uint32_t code) {
        // The exponents' biases differ by 120, and a subnormal code is a subnormal float32 of the same number of steps.
        const uint32_t magnitude = code & 0x7f;
        const float value = float_of(magnitude << 20) * 0x1p120f;
        return float_of((magnitude == nan_code ? 0x7fc00000 : bits_of(value)) | ((code & 0x80) << 24));
    }
};

struct E5m2 {
    static constexpr int mantissa_bits = 2, min_exponent = -14;
    static constexpr uint32_t nan_code = 0x7e;
    static constexpr float max_value = 57344.0f;
    static constexpr uint32_t max_value_bits = 0x47600000;

    PYROUTE_DEVICE static float decode(uint32_t code) {
        const uint32_t magnitude = code & 0x7f;
        const float value = float_of(magnitude << 21) * 0x1p112f;
        const uint32_t top = 0x7f800000 | (magnitude & 3) << 21; // infinity, NaN
        return float_of((magnitude < 0x7c ? bits_of(value) : top) | ((code & 0x80) << 24));
    }
};

constexpr uint32_t infinity_bits = 0x7f800000;

PYROUTE_DEVICE uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7fffffff; }

// The code of a magnitude that rounds to a finite one, in the low byte.
template <class Format> PYROUTE_DEVICE uint32_t encode_magnitude(uint32_t magnitude) {
    constexpr int shift = 23 - Format::mantissa_bits;
    constexpr uint32_t smallest = (127 + Format::min_exponent) << 23;
    const uint32_t exponent = max_of(magnitude & infinity_bits, smallest);
    const uint32_t magic = exponent + ((shift << 23) - (smallest >> shift)) + (exponent >> shift);
    return bits_of(float_of(magnitude) + float_of(magic));
}

// Any float32 to its code.
template <class Format> PYROUTE_DEVICE uint32_t encode_any(float x) {
    const uint32_t magnitude = magnitude_bits(x);
    const uint32_t code = encode_magnitude<Format>(min_of(magnitude, Format::max_value_bits)) & 0x7f;
    return magnitude < infinity_bits ? code | ((bits_of(x) >> 24) & 0x80) : Format::nan_code;
}

// Two numbers that round to finite codes, the first in the low byte; the upper half of the result is zero.
template <class Format> PYROUTE_DEVICE uint32_t encode_finite2(float low, float high) {
    if (converts_fp8()) {
        if constexpr (Format::mantissa_bits == 3)
            return e4m3x2_of(low, high);
        else
            return e5m2x2_of(low, high);
    }
    const uint32_t a = encode_magnitude<Format>(magnitude_bits(low)) & 0x7f;
    const uint32_t b = encode_magnitude<Format>(magnitude_bits(high)) & 0x7f;
    return a | ((bits_of(low) >> 24) & 0x80) | (b | ((bits_of(high) >> 24) & 0x80)) << 8;
}

// What a block's elements are multiplied with and what is stored for it.
struct BlockScale {
    float inverse, scale;
    bool finite; // all elements are, or at least those that the caller encodes
};

// Of the largest finite magnitude.
template <class Format> PYROUTE_DEVICE BlockScale scale_of(uint32_t amax, bool finite, bool power_of_two) {
    float scale = float_of(amax) < Format::max_value * 0x1p-126f ? 1.0f : float_of(amax) / Format::max_value;
    if (power_of_two) // rounded up
        scale = float_of((bits_of(scale) + 0x7fffff) & infinity_bits);
    return {1.0f / scale, scale, finite};
}

// The largest magnitude of N elements, among all of them or among the finite ones. Elements are float[N], or anything
// with an operator[].
template <int N, class Elements> PYROUTE_DEVICE uint32_t largest_magnitude(const Elements &x) {
    uint32_t most = 0;
    PYROUTE_UNROLL
    for (int i = 0; i < N; ++i)
        most = max_of(most, magnitude_bits(x[i]));
    return most;
}
PYROUTE_DEVICE uint32_t finite_magnitude(float x) { return magnitude_bits(x) < infinity_bits ? magnitude_bits(x) : 0; }
template <int N, class Elements> PYROUTE_DEVICE uint32_t largest_finite_magnitude(const Elements &x) {
    uint32_t most = 0;
    PYROUTE_UNROLL
    for (int i = 0; i < N; ++i)
        most = max_of(most, finite_magnitude(x[i]));
    return most;
}

// The largest of the values of `lanes` neighbouring lanes, a power of two that starts at a multiple of itself.
template <uint32_t lanes> PYROUTE_DEVICE uint32_t largest_of_lanes(uint32_t value) {
    const uint32_t mask = lanes == 32 ? all_lanes : ((1u << (lanes & 31)) - 1) << (lane_id() & (32 - lanes));
    PYROUTE_UNROLL
    for (uint32_t distance = lanes / 2; distance > 0; distance /= 2)
        value = max_of(value, shuffle_xor(value, distance, mask));
    return value;
}

// The scale of a block that `lanes` lanes hold, N elements each; all of them get it.
template <class Format, uint32_t lanes, int N>
PYROUTE_DEVICE BlockScale block_scale(const float (&x)[N], bool power_of_two) {
    uint32_t amax = largest_of_lanes<lanes>(largest_magnitude<N>(x));
    const bool finite = amax < infinity_bits;
    if (!finite) // the same for all lanes of the block: look again at the finite ones
        amax = largest_of_lanes<lanes>(largest_finite_magnitude<N>(x));
    return scale_of<Format>(amax, finite, power_of_two);
}

// Four products of a block to codes, the first in the low byte. `finite`: all of them are.
template <class Format> PYROUTE_DEVICE uint32_t encode_products(float a, float b, float c, float d, bool finite) {
    uint32_t codes = encode_finite2<Format>(a, b) | encode_finite2<Format>(c, d) << 16;
    if (!finite) {
        const float products[4] = {a, b, c, d};
        PYROUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            if (magnitude_bits(products[i]) >= infinity_bits)
                codes = (codes & ~(0xffu << (8 * i))) | Format::nan_code << (8 * i);
    }
    return codes;
}

// Elements of a block to codes.
template <class Format> PYROUTE_DEVICE uint32_t encode4(float a, float b, float c, float d, const BlockScale &block) {
    const float s = block.inverse;
    return encode_products<Format>(a * s, b * s, c * s, d * s, block.finite);
}
template <class Format, class Elements, int Codes>
PYROUTE_DEVICE void encode(const Elements &x, const BlockScale &block, uint32_t (&codes)[Codes]) {
    PYROUTE_UNROLL
    for (int i = 0; i < 4 * Codes; i += 4)
        codes[i / 4] = encode4<Format>(x[i], x[i + 1], x[i + 2], x[i + 3], block);
}

} // namespace pyroute::cuda
