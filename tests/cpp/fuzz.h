// Differential fuzzing: a random case is run on every instruction set and on 1, 2 and 5 threads, into memory of the
// right size that is filled with another byte each time, and every run must leave the same bytes. A byte that nobody
// writes differs; a byte too far belongs to the sanitizer; a result that depends on where a thread's share begins
// differs too, because eager_threads.cpp cuts every range, however short.
//
// PYROUTE_FUZZ_CASES sets the number of cases, PYROUTE_FUZZ_SEED the first one's seed. A failure prints its own.
// Without either, the hash of all outputs is compared with a constant: what was computed here is computed on every
// machine.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/threads.h"
#include "values.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace pyroute::test {

// What one run wrote.
class Outputs {
  public:
    Outputs(int fill, int64_t skip) : fill_(fill), skip_(skip) {}

    template <class T> T *poisoned(int64_t n) { return static_cast<T *>(poisoned_items(n, sizeof(T))); }
    void *poisoned_items(int64_t n, int64_t item) {
        blocks_.emplace_back(n * item, skip_ * item, fill_);
        return blocks_.back().get();
    }
    template <class T> T *copy_of(const Buffer<T> &from) { // of an argument that is changed in place
        T *to = poisoned<T>(from.size);
        std::memcpy(to, from.get(), from.bytes());
        return to;
    }
    template <class T> const T *get(size_t i) const { return reinterpret_cast<const T *>(blocks_[i].get()); }
    size_t size() const { return blocks_.size(); }
    const Buffer<unsigned char> &block(size_t i) const { return blocks_[i]; }

    void check_equal(const Outputs &other, const char *what) const {
        CHECK(size() == other.size());
        for (size_t i = 0; i < size(); ++i)
            for (int64_t byte = 0; byte < blocks_[i].size; ++byte)
                if (blocks_[i][byte] != other.blocks_[i][byte]) {
                    std::fprintf(stderr, "output %zu differs from byte %lld of %lld on, %s\n", i,
                                 static_cast<long long>(byte), static_cast<long long>(blocks_[i].size), what);
                    fail(__FILE__, __LINE__, "outputs differ");
                }
    }

  private:
    int fill_;
    int64_t skip_;
    std::vector<Buffer<unsigned char>> blocks_;
};

// FNV-1a of all that same_everywhere returned since the last call.
inline uint64_t &written() {
    static uint64_t hash = 0xcbf29ce484222325;
    return hash;
}

// Calls body(random) once per case. `expected` is written() at the end of the default cases: the same on every
// instruction set, compiler and machine, so a change of it is a change of results (or of the cases).
template <class Body> void fuzz(const char *name, uint64_t cases, uint64_t expected, Body &&body) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    __sanitizer_set_death_callback([] { std::fprintf(stderr, "%s\n", running); });
#endif
    const char *seed_text = std::getenv("PYROUTE_FUZZ_SEED"), *cases_text = std::getenv("PYROUTE_FUZZ_CASES");
    const uint64_t first = seed_text ? std::strtoull(seed_text, nullptr, 10) : 1;
    cases = cases_text ? std::strtoull(cases_text, nullptr, 10) : cases;
    for (uint64_t seed = first; seed != first + cases; ++seed) {
        std::snprintf(running, sizeof running, "\n  in %s: repeat with PYROUTE_FUZZ_SEED=%llu PYROUTE_FUZZ_CASES=1",
                      name, static_cast<unsigned long long>(seed));
        Random random(seed);
        body(random);
    }
    running[0] = 0;
    if (!seed_text && !cases_text && written() != expected) {
        std::fprintf(stderr, "%s: the outputs' hash is 0x%016llx, expected 0x%016llx\n", name,
                     static_cast<unsigned long long>(written()), static_cast<unsigned long long>(expected));
        std::exit(1);
    }
}

// What op(outputs) writes on every instruction set with every number of threads; all the same, or the test fails.
template <class Op> Outputs same_everywhere(Random &random, Op &&op) {
    Random placement(random.next()); // its own, so that the cases do not depend on how many runs there are
    const auto skip = [&] { return placement.one_in(2) ? 0 : placement.integer(1, 3); };
    Outputs first(0x7f, skip());
    bool have_first = false;
    int fill = 0x7f;
    for_each_isa([&](cpu::Isa isa) {
        for (int threads : {1, 2, 5}) {
            cpu::set_num_threads(threads);
            if (!have_first) {
                op(first);
                have_first = true;
                continue;
            }
            fill = (fill + 0x25) & 0xff;
            Outputs now(fill, skip());
            op(now);
            char what[80];
            std::snprintf(what, sizeof what, "%s on %d threads against scalar on 1", cpu::isa_name(isa), threads);
            now.check_equal(first, what);
        }
    });
    cpu::set_num_threads(1);
    for (size_t i = 0; i < first.size(); ++i)
        for (int64_t byte = 0; byte < first.block(i).size; ++byte)
            written() = (written() ^ first.block(i)[byte]) * 0x100000001b3;
    return first;
}

} // namespace pyroute::test
