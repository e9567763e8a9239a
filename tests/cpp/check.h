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
        if (!(condition))                                                                                              \
            ::pyroute::test::fail(__FILE__, __LINE__, #condition);                                                     \
    } while (0)

namespace pyroute::test {

// What to print beside a failure: the fuzz case, if one is running.
inline char running[200] = "";

[[noreturn]] inline void fail(const char *file, int line, const char *what) {
    std::fprintf(stderr, "%s:%d: %s%s\n", file, line, what, running);
    std::fflush(stderr);
    std::_Exit(1);
}

// A heap block of n items that ends where the block ends, so that the address sanitizer sees the first byte past it,
// filled with one byte. With skip > 0 it starts that many items into the block: aligned to its items and no further.
template <class T> struct Buffer {
    explicit Buffer(int64_t n, int64_t skip = 0, int fill = 0x7f)
        : size(n), block(new unsigned char[sizeof(T) * static_cast<size_t>(n + skip)]),
          data(reinterpret_cast<T *>(block.get()) + skip) {
        std::memset(block.get(), fill, sizeof(T) * static_cast<size_t>(n + skip));
    }
    size_t bytes() const { return sizeof(T) * static_cast<size_t>(size); }
    T *get() { return data; }
    const T *get() const { return data; }
    T &operator[](int64_t i) { return data[i]; }
    const T &operator[](int64_t i) const { return data[i]; }
    bool operator==(const Buffer &other) const {
        return size == other.size && std::memcmp(data, other.data, bytes()) == 0;
    }

    int64_t size;

  private:
    std::unique_ptr<unsigned char[]> block;
    T *data;
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
    bool one_in(int64_t n) { return integer(1, n) == 1; }
    // Not inlined: GCC 12 for arm64 lets two lists of different types share their place on the stack, and then reads
    // one before it is written.
    template <class T, size_t n> [[gnu::noinline]] T any_of(const T (&choices)[n]) {
        return choices[static_cast<size_t>(integer(0, static_cast<int64_t>(n) - 1))];
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
