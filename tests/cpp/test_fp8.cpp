// The 8- and 16-bit conversions of every instruction set against the definition: the nearer of the two neighbours in a
// table of all values, the even one of two equally near. float32 patterns are taken in steps of 4099, a prime; with
// PYROUTE_FULL_SWEEP in the environment all 2^32 are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/isa.h"

using namespace pyroute::cpu;

#define PROBES(isa)                                                                                                    \
    namespace pyroute::cpu::isa {                                                                                      \
    void encode_e4m3(const float *, uint8_t *);                                                                        \
    void encode_e5m2(const float *, uint8_t *);                                                                        \
    void encode_run_e4m3(const float *, int64_t, uint8_t *);                                                           \
    void encode_run_e5m2(const float *, int64_t, uint8_t *);                                                           \
    void encode_run_bf16(const uint16_t *, int64_t, uint8_t *);                                                        \
    void decode_e4m3(const uint8_t *, float *);                                                                        \
    void decode_e5m2(const uint8_t *, float *);                                                                        \
    void decode32_e4m3(const uint8_t *, float *);                                                                      \
    void decode32_e5m2(const uint8_t *, float *);                                                                      \
    void encode_f16(const float *, uint16_t *);                                                                        \
    void decode_f16(const uint16_t *, float *);                                                                        \
    }
PROBES(scalar)
#if defined(PYROUTE_X86)
PROBES(avx2)
PROBES(avx512)
#endif

namespace {

struct Format {
    int mantissa_bits, exponent_bias;
    uint32_t max_code, over_code, nan_code; // largest finite code; what overflow gives; what NaN gives
    bool infinity_is_nan, nan_keeps_sign;
    uint32_t sign;
};
constexpr Format e4m3 = {3, 7, 0x7e, 0x7e, 0x7f, true, false, 0x80};
constexpr Format e5m2 = {2, 15, 0x7b, 0x7b, 0x7e, true, false, 0x80};
constexpr Format f16 = {10, 15, 0x7bff, 0x7c00, 0x7e00, false, true, 0x8000};

std::vector<double> table(const Format &f) {
    std::vector<double> values;
    for (uint32_t code = 0; code <= f.max_code + 1; ++code) {
        const int exponent = static_cast<int>(code >> f.mantissa_bits);
        const double fraction = code & ((1u << f.mantissa_bits) - 1);
        const double unit = std::ldexp(1.0, -f.mantissa_bits);
        values.push_back(exponent ? std::ldexp(1 + fraction * unit, exponent - f.exponent_bias)
                                  : std::ldexp(fraction * unit, 1 - f.exponent_bias));
    }
    return values;
}

uint32_t nearest(const Format &f, const std::vector<double> &values, float x) {
    const double magnitude = std::fabs(static_cast<double>(x));
    const uint32_t sign = std::signbit(x) ? f.sign : 0;
    if (std::isnan(x))
        return f.nan_code | (f.nan_keeps_sign ? sign : 0);
    if (std::isinf(x))
        return f.infinity_is_nan ? f.nan_code : f.over_code | sign;
    uint32_t low = 0, high = f.max_code + 1; // values[low] <= magnitude < values[high], unless it is beyond the table
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        (values[middle] <= magnitude ? low : high) = middle;
    }
    const double down = magnitude - values[low], up = values[high] - magnitude;
    const uint32_t code = up < down || (up == down && low % 2) ? high : low;
    return (code > f.max_code ? f.over_code : code) | sign;
}

float float_of(uint64_t bits) {
    const auto word = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

template <class Code> void check_encode(const Format &f, void (*encode)(const float *, Code *)) {
    const std::vector<double> values = table(f);
    const uint64_t step = std::getenv("PYROUTE_FULL_SWEEP") ? 1 : 4099;
    float x[8];
    Code codes[8];
    const auto check = [&] {
        encode(x, codes);
        for (int i = 0; i < 8; ++i) {
            uint32_t expected = nearest(f, values, x[i]);
            if (std::isnan(x[i]) && f.nan_keeps_sign) { // the payload's upper bits stay too
                uint32_t bits;
                std::memcpy(&bits, &x[i], 4);
                expected |= (bits >> 13) & 0x3ff;
            }
            CHECK(codes[i] == expected);
        }
    };
    for (uint64_t bits = 0; bits < (1ull << 32); bits += 8 * step) {
        for (uint64_t i = 0; i < 8; ++i)
            x[i] = float_of(bits + i * step);
        check();
    }
    for (uint32_t code = 0; code <= f.max_code; ++code) { // every value, every tie, and the neighbours of both
        const auto value = static_cast<float>(values[code]);
        const auto tie = static_cast<float>((values[code] + values[code + 1]) / 2);
        const float around[4] = {value, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e30f)};
        for (int i = 0; i < 4; ++i) {
            x[i] = around[i];
            x[i + 4] = -around[i];
        }
        check();
    }
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const float disputed[8] = {448.0f, 449.0f, 464.0f, 465.0f, 480.0f, 1e9f, infinity, nan};
    for (float sign : {1.0f, -1.0f}) {
        for (int i = 0; i < 8; ++i)
            x[i] = std::copysign(disputed[i], sign);
        check();
    }
}

// Runs of values that the largest finite code bounds, every length of tail.
void check_encode_run(const Format &f, float largest, void (*encode)(const float *, int64_t, uint8_t *)) {
    const std::vector<double> values = table(f);
    const uint64_t step = std::getenv("PYROUTE_FULL_SWEEP") ? 1 : 4099;
    float x[192] = {};
    uint8_t codes[192];
    int64_t filled = 0, n = 65;
    const auto check = [&] {
        encode(x, filled, codes);
        for (int64_t i = 0; i < filled; ++i)
            CHECK(codes[i] == nearest(f, values, x[i]));
        filled = 0;
        n = n < 192 ? n + 1 : 1;
    };
    const auto add = [&](float value) {
        x[filled++] = value;
        if (filled == n)
            check();
    };
    for (uint64_t bits = 0; bits < (1ull << 32); bits += step)
        if (const float value = float_of(bits); std::fabs(value) <= largest)
            add(value);
    for (uint32_t code = 0; code < f.max_code; ++code) // every value, every tie, and the neighbours of both
        for (float sign : {1.0f, -1.0f}) {
            const auto value = static_cast<float>(values[code]);
            const auto tie = static_cast<float>((values[code] + values[code + 1]) / 2);
            for (float near : {value, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e30f)})
                add(sign * near);
        }
    check();
}

// Every finite bfloat16 that e4m3 holds.
void check_encode_run_bf16(void (*encode)(const uint16_t *, int64_t, uint8_t *)) {
    const std::vector<double> values = table(e4m3);
    std::vector<uint16_t> x;
    for (uint32_t bits = 0; bits < 0x10000; ++bits)
        if (std::fabs(float_of(bits << 16)) <= 448.0f)
            x.push_back(static_cast<uint16_t>(bits));
    std::vector<uint8_t> codes(128);
    for (size_t first = 0; first < x.size(); first += 111) {
        const size_t count = std::min<size_t>(111, x.size() - first);
        encode(x.data() + first, static_cast<int64_t>(count), codes.data());
        for (size_t i = 0; i < count; ++i)
            CHECK(codes[i] == nearest(e4m3, values, float_of(static_cast<uint64_t>(x[first + i]) << 16)));
    }
}

// `decode` converts `count` codes at a time.
template <class Code, uint32_t count = 8> void check_decode(const Format &f, void (*decode)(const Code *, float *)) {
    const std::vector<double> values = table(f);
    const uint32_t infinity = f.mantissa_bits == 3 ? ~0u : f.max_code + 1;
    for (uint32_t first = 0; first < 2 * f.sign; first += count) {
        Code codes[count];
        float x[count];
        for (uint32_t i = 0; i < count; ++i)
            codes[i] = static_cast<Code>(first + i);
        decode(codes, x);
        for (uint32_t i = 0; i < count; ++i) {
            const uint32_t magnitude = (first + i) & (f.sign - 1);
            const bool negative = (first + i) & f.sign;
            if (magnitude == infinity)
                CHECK(std::isinf(x[i]) && std::signbit(x[i]) == negative);
            else if (magnitude > f.max_code)
                CHECK(std::isnan(x[i]));
            else
                CHECK(static_cast<double>(std::fabs(x[i])) == values[magnitude] && std::signbit(x[i]) == negative);
        }
    }
}

#define CHECK_ISA(isa)                                                                                                 \
    if (isa_available(Isa::isa)) {                                                                                     \
        check_encode<uint8_t>(e4m3, isa::encode_e4m3);                                                                 \
        check_encode<uint8_t>(e5m2, isa::encode_e5m2);                                                                 \
        check_encode<uint16_t>(f16, isa::encode_f16);                                                                  \
        check_encode_run(e4m3, 448.0f, isa::encode_run_e4m3);                                                          \
        check_encode_run(e5m2, 57344.0f, isa::encode_run_e5m2);                                                        \
        check_encode_run_bf16(isa::encode_run_bf16);                                                                   \
        check_decode<uint8_t>(e4m3, isa::decode_e4m3);                                                                 \
        check_decode<uint8_t>(e5m2, isa::decode_e5m2);                                                                 \
        check_decode<uint8_t, 32>(e4m3, isa::decode32_e4m3);                                                           \
        check_decode<uint8_t, 32>(e5m2, isa::decode32_e5m2);                                                           \
        check_decode<uint16_t>(f16, isa::decode_f16);                                                                  \
    }

} // namespace

int main() {
    CHECK_ISA(scalar)
#if defined(PYROUTE_X86)
    CHECK_ISA(avx2)
    CHECK_ISA(avx512)
#endif
}
