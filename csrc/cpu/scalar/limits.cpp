// The probes behind the measured limits; see cpu/limits.h. Each uses the widest registers of its instruction set:
// these are the machine's limits, so they do not share the 8-lane rule of the kernels.
#include "cpu/limits.h"
#include "cpu/lanes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int bytes_wide = 64;
#elif defined(__AVX2__)
constexpr int bytes_wide = 32;
#else
constexpr int bytes_wide = 16;
#endif
constexpr int lanes_wide = bytes_wide / 4;
using Floats = float __attribute__((vector_size(bytes_wide)));
using Words = uint64_t __attribute__((vector_size(bytes_wide)));

// Without FMA hardware a multiply and an add, which is what the kernels can use there at best.
PYROUTE_INLINE Floats multiply_add(const Floats &a, const Floats &b, const Floats &c) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
    return bit_cast<Floats>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

PYROUTE_INLINE void store_streaming(uint8_t *to, const Words &words) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to), bit_cast<__m512i>(words));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to), bit_cast<__m256i>(words));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i *>(to), bit_cast<__m128i>(words));
#else
    memcpy(to, &words, sizeof(words));
#endif
}

constexpr int chains = 12;
constexpr int steps_per_round = 64;

float fma_rounds(int64_t rounds, float seed) {
    // c = c * 0.5 + 0.5 converges to 1: no denormals, no infinities
    const Floats half = Floats{} + 0.5f;
    Floats chain[chains];
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i)
        chain[i] = Floats{} + (seed + static_cast<float>(i));
    for (int64_t step = 0; step < rounds * steps_per_round; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < chains; ++i)
            chain[i] = multiply_add(chain[i], half, half);
    }
    Floats sum = chain[0];
#pragma GCC unroll 12
    for (int i = 1; i < chains; ++i)
        sum += chain[i];
    float total = 0.0f;
    for (int lane = 0; lane < lanes_wide; ++lane)
        total += sum[lane];
    return total;
}

uint64_t read_bytes(const uint8_t *from, int64_t bytes) {
    constexpr int words_per_block = 256 / bytes_wide;
    Words sum[words_per_block] = {};
    for (int64_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 16
        for (int i = 0; i < words_per_block; ++i)
            sum[i] |= load<Words>(from + at + i * bytes_wide);
    }
    Words all = sum[0];
    for (int i = 1; i < words_per_block; ++i)
        all |= sum[i];
    uint64_t total = 0;
    for (int lane = 0; lane < bytes_wide / 8; ++lane)
        total |= all[lane];
    return total;
}

void write_bytes(uint8_t *to, int64_t bytes) {
    const Words ones = ~Words{}; // zeros have instructions of their own, which send no data
    for (int64_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 16
        for (int offset = 0; offset < 256; offset += bytes_wide)
            store_streaming(to + at + offset, ones);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void copy_bytes(uint8_t *to, const uint8_t *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 16
        for (int offset = 0; offset < 256; offset += bytes_wide)
            store_streaming(to + at + offset, load<Words>(from + at + offset));
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

} // namespace

extern const LimitKernels limit_kernels = {2 * chains * steps_per_round * lanes_wide, fma_rounds, read_bytes,
                                           write_bytes, copy_bytes};

} // namespace pyroute::cpu::PYROUTE_ISA
