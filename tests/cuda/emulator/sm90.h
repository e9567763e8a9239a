// The host bodies of the words in csrc/cuda/sm90/ptx.cuh. The comments are there.
#pragma once

#include "copies.h"
#include "products.h"

namespace pyroute::cuda {

inline SharedAddress shared_address(const void *p) { return emulator::shared_address(p); }

namespace emulated {
template <class T> T &in_shared(SharedAddress address, const char *word) {
    if (address % alignof(T))
        emulator::fail(std::string(word) + " with a misaligned address");
    return *reinterpret_cast<T *>(emulator::shared_pointer(address, sizeof(T), word));
}
} // namespace emulated

inline float shared_f32(SharedAddress from) { return emulated::in_shared<float>(from, "shared_f32"); }
inline FloatPair shared_f32_pair(SharedAddress from) {
    if (from % 8)
        emulator::fail("shared_f32_pair with an address that is no multiple of 8");
    return emulated::in_shared<FloatPair>(from, "shared_f32_pair");
}
inline void set_shared_u32(SharedAddress to, uint32_t value) {
    emulated::in_shared<uint32_t>(to, "set_shared_u32") = value;
    emulator::writes_shared(true);
}

inline void barrier_init(SharedAddress barrier, uint32_t count) { emulator::barrier_init(barrier, count); }
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_arrive(SharedAddress barrier) {
    emulator::barrier_arrive(*emulator::current->block, barrier, 0, "barrier_arrive");
}
inline void barrier_arrive_expecting(SharedAddress barrier, uint32_t bytes) {
    emulator::barrier_arrive(*emulator::current->block, barrier, bytes, "barrier_arrive_expecting");
}
inline void barrier_arrive_at(SharedAddress barrier, uint32_t rank) {
    emulator::maybe_pause();
    emulator::barrier_arrive(emulator::block_of_cluster(rank, "barrier_arrive_at"), barrier, 0, "barrier_arrive_at");
}
inline bool barrier_try_wait(SharedAddress barrier, uint32_t parity) {
    return emulator::barrier_try_wait(barrier, parity);
}

inline void prefetch_map(const TensorMap *map) { emulator::checked_map(map, "prefetch_map"); }
inline void load_tile(SharedAddress to, const TensorMap *map, int32_t x, int32_t y, SharedAddress barrier) {
    emulator::load_tile(to, map, x, y, barrier, 1u << emulator::current->block->rank);
}
inline void load_tile_to(SharedAddress to, const TensorMap *map, int32_t x, int32_t y, SharedAddress barrier,
                         uint16_t ranks) {
    emulator::load_tile(to, map, x, y, barrier, ranks);
}
inline void store_tile(const TensorMap *map, int32_t x, int32_t y, SharedAddress from) {
    emulator::store_tile(map, x, y, from);
}
inline void commit_stores() { emulator::commit_stores(); }
inline void wait_stores_read() { emulator::wait_stores(false); }
inline void wait_stores() { emulator::wait_stores(true); }
inline void fence_shared_for_copies() { emulator::writes_shared(false); }

inline void sync_threads(uint32_t id, uint32_t threads) { emulator::sync_named(id, threads, "sync_threads"); }
inline float shuffle_quad(float value, uint32_t source) {
    return emulator::exchange(all_lanes, value, (lane_id() & 28) | (source & 3));
}
inline bool elect_lane() { return emulator::meet(emulator::Collective::elect_lane, all_lanes, 0, 0) != 0; }
template <uint32_t Count> void give_registers() { emulator::change_registers(Count, true); }
template <uint32_t Count> void take_registers() { emulator::change_registers(Count, false); }
inline uint32_t cluster_rank() { return emulator::current->block->rank; }
inline void sync_cluster() { emulator::sync_cluster(); }
inline uint64_t clock_cycles() { return 0; } // time stands still: what waits for ever is a deadlock, which is reported
inline void fence_system() { fence_device(); }
[[noreturn]] inline void stop_kernel() { emulator::fail("stop_kernel"); }
inline void pin(float &) {}

inline void store_matrices(SharedAddress row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    emulator::store_matrices(row, {m0, m1, m2, m3});
}
inline uint32_t bf16_pair(float low, float high) { return bf16x2_of(low, high); }
inline uint32_t bf16_pair_max_nan(uint32_t a, uint32_t b) {
    const auto larger = [](uint32_t x, uint32_t y) {
        const float p = float_of(x << 16), q = float_of(y << 16);
        if (p != p || q != q)
            return 0x7fffu;
        return p == q ? x & y : p < q ? y : x; // +0 is larger than -0
    };
    return larger(a & 0xffff, b & 0xffff) | larger(a >> 16, b >> 16) << 16;
}

} // namespace pyroute::cuda
