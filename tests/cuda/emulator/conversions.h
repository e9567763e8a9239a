// The conversions of csrc/cuda/device.cuh on the host: what the instructions give, computed in double and by value,
// unlike the integer programs in csrc that they are compared with. NaN gives the instructions' NaN, which the
// contract's is not, and infinities saturate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pyroute::cuda {

namespace emulated {

// The magnitude's code in a format of M mantissa bits and smallest normal exponent `least`: the number of steps from 0,
// which runs on past the largest finite code.
template <int M, int least> inline uint32_t nearest_code(double magnitude) {
    if (magnitude == 0)
        return 0;
    const int exponent = std::max(std::ilogb(magnitude), least);
    const double steps = std::nearbyint(std::ldexp(magnitude, M - exponent)); // even where two are as near
    return static_cast<uint32_t>(steps) + static_cast<uint32_t>((exponent - least) << M);
}

template <int M, int least>
inline uint32_t code_of(float x, uint32_t sign_bit, uint32_t largest_code, uint32_t nan_code) {
    if (x != x)
        return nan_code;
    const uint32_t code = std::isinf(x) ? largest_code : nearest_code<M, least>(std::fabs(double{x}));
    return (code < largest_code ? code : largest_code) | (std::signbit(x) ? sign_bit : 0);
}

} // namespace emulated

inline uint32_t bf16x2_of(float low, float high) {
    const auto one = [](float x) { return emulated::code_of<7, -126>(x, 0x8000, 0x7f80, 0x7fff); };
    return one(low) | one(high) << 16;
}
inline uint16_t f16_of(float x) { return static_cast<uint16_t>(emulated::code_of<10, -14>(x, 0x8000, 0x7c00, 0x7fff)); }
inline float f16_to_f32(uint16_t half) {
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    float x = static_cast<float>(exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
    if (exponent == 31)
        x = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    return half & 0x8000 ? -x : x;
}
inline bool converts_fp8() { return emulator::arch() >= 89; }
inline uint32_t e4m3x2_of(float low, float high) {
    const auto one = [](float x) { return emulated::code_of<3, -6>(x, 0x80, 0x7e, 0x7f); };
    return one(low) | one(high) << 8;
}
inline uint32_t e5m2x2_of(float low, float high) {
    const auto one = [](float x) { return emulated::code_of<2, -14>(x, 0x80, 0x7b, 0x7f); };
    return one(low) | one(high) << 8;
}

} // namespace pyroute::cuda
