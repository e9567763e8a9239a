// The little that the C++ tests need: CHECK, exact buffers, a seeded generator, every instruction set in turn.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/isa.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                       \
            std::exit(1);                                                                                              \
        }                                                                                                              \
    } while (0)

namespace pyroute::test {

// A heap block of exactly n items, so that the address sanitizer sees the first byte past it, filled with 0x7f bytes.
template <class T> struct Buffer {
    explicit Buffer(int64_t n) : size(n), data(new T[static_cast<size_t>(n)]) {
        std::memset(static_cast<void *>(data.get()), 0x7f, bytes());
    }
    size_t bytes() const { return sizeof(T) * static_cast<size_t>(size); }
    T *get() { return data.get(); }
    const T *get() const { return data.get(); }
    T &operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
    const T &operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
    bool operator==(const Buffer &other) const {
        return size == other.size && std::memcmp(data.get(), other.data.get(), bytes()) == 0;
    }

    int64_t size;
    std::unique_ptr<T[]> data;
};

// SplitMix64
struct Random {
    explicit Random(uint64_t seed) : state(seed) {}
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t integer(int64_t low, int64_t high) { // inclusive
        return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
    }
    float real() { return static_cast<float>(static_cast<int64_t>(next() >> 40)) * 0x1p-22f - 2.0f; } // [-2, 2)

    uint64_t state;
};

template <class Body> void for_each_isa(Body &&body) {
    const cpu::Isa before = cpu::current_isa();
    for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512})
        if (cpu::isa_available(isa)) {
            cpu::set_isa(isa);
            body(isa);
        }
    cpu::set_isa(before);
}

} // namespace pyroute::test
