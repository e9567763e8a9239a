// The host bodies of the words in csrc/cuda/device.cuh. The comments are there.
#pragma once

#include <math.h>
#include <string.h>

#include "machine.h"
#include "registry.h"

#define PYROUTE_DEVICE inline

#define PYROUTE_KERNEL(kernel, max_threads, min_blocks, Args)                                                          \
    static void entry_point_##kernel(const Args &args);                                                                \
    static const ::emulator::Registration registration_of_##kernel{                                                    \
        {#kernel, max_threads, min_blocks, sizeof(Args),                                                               \
         [](const void *args) { entry_point_##kernel(*static_cast<const Args *>(args)); }}};                           \
    static_assert((max_threads) <= 1024 && (max_threads) * (min_blocks) <= 2048, "launch bounds");                     \
    static void entry_point_##kernel([[maybe_unused]] const Args &args)

// The lambda's type is the declaration's own, in every instance of a template.
#define PYROUTE_SHARED(Type, name) Type &name = ::emulator::shared<Type>([] {})
#define PYROUTE_DYNAMIC_SHARED(name) char *const name = ::emulator::dynamic_shared()

#define PYROUTE_UNROLL
#define PYROUTE_KEEP_LOOP
#define PYROUTE_UNROLL_BY(count)

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::Index3{::emulator::current_threads(), 1, 1})
#define gridDim (::emulator::grid())

namespace emulator {

// What the machine keeps for itself is not watched.
EMULATOR_UNWATCHED inline Index3 thread_index() { return current->index; }
EMULATOR_UNWATCHED inline Index3 block_index() { return current->block_index; }
EMULATOR_UNWATCHED inline uint32_t current_threads() { return current_shape.threads; }
EMULATOR_UNWATCHED inline uint32_t arch() { return current_shape.arch; }
EMULATOR_UNWATCHED inline Index3 grid() { return current_shape.grid; }
EMULATOR_UNWATCHED inline char *dynamic_shared() { return current->block->memory; }

template <class Type, class Key> EMULATOR_UNWATCHED Type &shared(Key) {
    static const uint32_t slot = new_slot();
    return *reinterpret_cast<Type *>(shared_object(slot, sizeof(Type), alignof(Type)));
}

inline void begin_atomic(const void *place) {
    maybe_pause();
    watch(place, 4, Access::atomic);
    order_blocks(place);
}

template <class T> T exchange(uint32_t mask, T value, uint32_t source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet(Collective::shuffle, mask, bits, source);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class To, class From> To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

} // namespace emulator

namespace pyroute::cuda {

constexpr uint32_t all_lanes = 0xffffffffu;

inline uint32_t lane_id() { return threadIdx.x & 31; }
inline uint32_t warp_id() { return threadIdx.x >> 5; }

inline void sync_block() { emulator::sync_named(0, emulator::current_threads(), "sync_block"); }
inline void sync_warp(uint32_t mask = all_lanes) { emulator::meet(emulator::Collective::sync_warp, mask, 0, 0); }

template <class T> T shuffle(T value, uint32_t source, uint32_t mask = all_lanes) {
    return emulator::exchange(mask, value, source & 31);
}
template <class T> T shuffle_xor(T value, uint32_t distance, uint32_t mask = all_lanes) {
    return emulator::exchange(mask, value, (lane_id() ^ distance) & 31);
}
template <class T> T shuffle_up(T value, uint32_t distance, uint32_t mask = all_lanes) {
    return emulator::exchange(mask, value, distance > lane_id() ? lane_id() : lane_id() - distance);
}
inline uint32_t ballot(bool value, uint32_t mask = all_lanes) {
    return static_cast<uint32_t>(emulator::meet(emulator::Collective::ballot, mask, value, 0));
}
inline uint32_t match_any(uint32_t value, uint32_t mask = all_lanes) {
    return static_cast<uint32_t>(emulator::meet(emulator::Collective::match_any, mask, value, 0));
}
inline uint32_t reduce_max(uint32_t value, uint32_t mask = all_lanes) {
    return static_cast<uint32_t>(emulator::meet(emulator::Collective::reduce_max, mask, value, 0));
}
inline uint32_t reduce_min(uint32_t value, uint32_t mask = all_lanes) {
    return static_cast<uint32_t>(emulator::meet(emulator::Collective::reduce_min, mask, value, 0));
}
inline uint32_t reduce_add(uint32_t value, uint32_t mask = all_lanes) {
    return static_cast<uint32_t>(emulator::meet(emulator::Collective::reduce_add, mask, value, 0));
}

EMULATOR_UNWATCHED inline uint32_t atomic_add(uint32_t *to, uint32_t value) {
    emulator::begin_atomic(to);
    const uint32_t old = *to;
    *to = old + value;
    return old;
}
inline int32_t atomic_add(int32_t *to, int32_t value) {
    return static_cast<int32_t>(atomic_add(reinterpret_cast<uint32_t *>(to), static_cast<uint32_t>(value)));
}
EMULATOR_UNWATCHED inline uint32_t atomic_max(uint32_t *to, uint32_t value) {
    emulator::begin_atomic(to);
    const uint32_t old = *to;
    *to = value > old ? value : old;
    return old;
}
EMULATOR_UNWATCHED inline int32_t atomic_compare_swap(int32_t *at, int32_t expected, int32_t desired) {
    emulator::begin_atomic(at);
    const int32_t old = *at;
    *at = old == expected ? desired : old;
    return old;
}
template <class T> EMULATOR_UNWATCHED void store_same(T *to, T value) {
    emulator::watch(to, sizeof(T), emulator::Access::atomic); // not a race with itself
    *to = value;
}
inline void fence_device() {
    emulator::fence_blocks();
    emulator::maybe_pause();
}

inline uint32_t count_bits(uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); }
inline uint32_t leading_zeros(uint32_t x) { return x ? static_cast<uint32_t>(__builtin_clz(x)) : 32; }
inline uint32_t first_bit(uint32_t x) { return static_cast<uint32_t>(__builtin_ffs(static_cast<int>(x)) - 1); }

inline uint32_t bits_of(float x) { return emulator::same_bits<uint32_t>(x); }
inline float float_of(uint32_t bits) { return emulator::same_bits<float>(bits); }
inline uint64_t bits_of(double x) { return emulator::same_bits<uint64_t>(x); }
inline double double_of(uint64_t bits) { return emulator::same_bits<double>(bits); }

inline float approximate_reciprocal(float x) { return 1.0f / x; }
inline float approximate_rsqrt(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }

struct alignas(16) Words {
    uint32_t w[4];
};
inline Words load_words(const void *from) {
    if (reinterpret_cast<uintptr_t>(from) % 16)
        emulator::fail("load_words of an address that is no multiple of 16");
    Words words;
    memcpy(&words, from, sizeof(words));
    return words;
}
inline void store_words(void *to, const Words &words) {
    if (reinterpret_cast<uintptr_t>(to) % 16)
        emulator::fail("store_words to an address that is no multiple of 16");
    memcpy(to, &words, sizeof(words));
}
inline Words load_words_once(const void *from) { return load_words(from); }
inline void store_words_once(void *to, const Words &words) { store_words(to, words); }

} // namespace pyroute::cuda
