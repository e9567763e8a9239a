// The host bodies of the words in csrc/cuda/mma.cuh. The comments are there.
#pragma once

#include "copies.h"
#include "products.h"

namespace pyroute::cuda {

inline void copy_async_16(void *to, const void *from, bool valid) { emulator::copy_async(to, from, 16, valid); }
inline void copy_async_4(void *to, const void *from, bool valid) { emulator::copy_async(to, from, 4, valid); }
inline void end_copies() { emulator::end_copies(); }
template <int pending> void wait_copies() { emulator::wait_copies(pending); }

inline void load_matrices(uint32_t (&d)[4], const void *row) { emulator::load_matrices(d, row, false); }
inline void load_matrices_transposed(uint32_t (&d)[4], const void *row) { emulator::load_matrices(d, row, true); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply(emulator::Items::bf16, d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply(emulator::Items::f16, d, a, b);
}
inline bool native_fp8() { return emulator::arch() == 89 || emulator::arch() >= 120; }
template <bool a_e5m2, bool b_e5m2> void mma_fp8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply(emulator::fp8_items(a_e5m2, b_e5m2), d, a, b);
}

inline uint32_t f16_pair_of_e4m3(uint32_t codes) {
    const auto one = [](uint32_t code) -> uint32_t {
        const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
        const double magnitude =
            exponent ? std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10) : std::ldexp(mantissa, -9);
        return (code & 0x80) << 8 | ((code & 0x7f) == 0x7f ? 0x7fff : f16_of(static_cast<float>(magnitude)));
    };
    return one(codes & 0xff) | one(codes >> 8 & 0xff) << 16;
}

inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    return result;
}
inline uint32_t select_top_bits(uint32_t bytes, uint32_t selector) {
    uint32_t mask = 0;
    for (uint32_t i = 0; i < 4; ++i)
        mask |= (bytes >> ((selector >> (4 * i) & 3) * 8 + 7) & 1) * (0xffu << (8 * i));
    return mask;
}
inline uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
    const auto widen = [](uint32_t half) { return float_of(half << 16); };
    return bf16x2_of(widen(a & 0xffff) * widen(b & 0xffff), widen(a >> 16) * widen(b >> 16));
}

} // namespace pyroute::cuda
