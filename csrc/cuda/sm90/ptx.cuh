// Hopper's instructions as words: barriers in shared memory, the copy engine, clusters, register hand-over.
//
// Same scheme as device.cuh: bodies of inline PTX for nvcc and NVRTC (sm_90a), host bodies in tests/cuda/emulator for
// the tests. The comment of a word is its contract: kernels rely on nothing else. Words that multiply: wgmma.cuh.
//
// Shared memory is addressed by 32-bit byte addresses (SharedAddress), as the instructions and the matrix descriptors
// take them; bits 0-17 of an address are its place in the block's window, and 1024-byte alignment of the address is
// that of the window, which the 128-byte swizzle works on.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tensor_map.h"

namespace pyroute::cuda {

using SharedAddress = uint32_t;
struct alignas(8) FloatPair {
    float x, y;
};

} // namespace pyroute::cuda

#if defined(PYROUTE_EMULATOR)
#include "emulator/sm90.h"
#else

namespace pyroute::cuda {

// The address of something in this block's shared memory.
PYROUTE_DEVICE SharedAddress shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

PYROUTE_DEVICE float shared_f32(SharedAddress from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from));
    return value;
}
PYROUTE_DEVICE FloatPair shared_f32_pair(SharedAddress from) { // a multiple of 8
    FloatPair v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from));
    return v;
}
PYROUTE_DEVICE void set_shared_u32(SharedAddress to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// ---- Barriers (mbarrier): 8 bytes of shared memory, 8-byte aligned. A barrier is in a phase, numbered from 0, with a
// count of arrivals and a count of bytes still to come. The phase ends when both are 0: the phase number grows by 1,
// the arrivals are reset to the initial count, and everything written before the arrivals, or by the copies that were
// counted, is visible to who sees the end.

// One thread, before any other use. `count`: arrivals per phase.
PYROUTE_DEVICE void barrier_init(SharedAddress barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// By the thread that initialised barriers, after the last one: the cluster and the copy engine see them once the block
// (or the cluster) has met at a sync.
PYROUTE_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival.
PYROUTE_DEVICE void barrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// `bytes` more to come in this phase, then one arrival. Bytes of copies that complete before they are expected make the
// count negative in between: the missing arrival keeps the phase open.
PYROUTE_DEVICE void barrier_arrive_expecting(SharedAddress barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// One arrival at the barrier of the same address in block `rank` of this cluster (may be this block).
PYROUTE_DEVICE void barrier_arrive_at(SharedAddress barrier, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}\n" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}
// Whether the phase of this parity has ended: true if the barrier's current phase has the other parity (so parity 1 is
// true on a fresh barrier, in phase 0). False after waiting a while in hardware: call it in a loop.
PYROUTE_DEVICE bool barrier_try_wait(SharedAddress barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}\n"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

// ---- The copy engine (TMA). One thread asks; the copy runs on its own. A tile is the map's box, innermost axis first,
// stored row after row, 16-byte chunks permuted by the map's swizzle (128 bytes: chunk ^ (address / 128 % 8) on the
// shared address). `x` is the element of the inner axis, `y` of the outer one, at which the box starts; both may lie
// outside. What lies outside the array reads as zero and is not written; a load counts the bytes of the whole box.

PYROUTE_DEVICE void prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Global to this block's shared memory; completes the box's bytes on `barrier`.
PYROUTE_DEVICE void load_tile(SharedAddress to, const TensorMap *map, int32_t x, int32_t y, SharedAddress barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}
// The same into every block of the cluster whose rank's bit is set in `ranks`, at the same address there, completing
// the box's bytes on the barrier of the same address there.
PYROUTE_DEVICE void load_tile_to(SharedAddress to, const TensorMap *map, int32_t x, int32_t y, SharedAddress barrier,
                                 uint16_t ranks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(ranks)
                 : "memory");
}
// Shared memory to global. Belongs to the thread's open group of stores.
PYROUTE_DEVICE void store_tile(const TensorMap *map, int32_t x, int32_t y, SharedAddress from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x),
                 "r"(y), "r"(from)
                 : "memory");
}
// Closes the thread's open group of stores.
PYROUTE_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All of the thread's committed stores have read their shared memory: it may be written again.
PYROUTE_DEVICE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// All of the thread's committed stores are done.
PYROUTE_DEVICE void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// This thread's earlier writes to shared memory by ordinary stores (store_matrices too) are seen by copies and by
// matrix products that are asked for after the block's (or the named) barrier that follows.
PYROUTE_DEVICE void fence_shared_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Threads, registers, clusters.

// `threads` threads (whole warps, a multiple of 32) meet at barrier `id`, 1 to 15; what they wrote before is seen
// after.
PYROUTE_DEVICE void sync_threads(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// What lane `source`, 0 to 3, of this lane's quad has; every lane of the warp takes part.
PYROUTE_DEVICE float shuffle_quad(float value, uint32_t source) {
    return __shfl_sync(all_lanes, value, static_cast<int>(source), 4);
}
// True in exactly one lane of a converged warp.
PYROUTE_DEVICE bool elect_lane() {
    uint32_t elected;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}\n"
                 : "=r"(elected));
    return elected != 0;
}
// Registers per thread of a warpgroup, by all of its four warps: hand back down to Count, or take up to Count (waits
// until they are free). A multiple of 8, 24 to 240.
template <uint32_t Count> PYROUTE_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <uint32_t Count> PYROUTE_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
// This block's place in its cluster: 0 without clusters.
PYROUTE_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Every thread of the cluster; what was written before, barriers included, is seen after.
PYROUTE_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// Cycles of this SM's clock.
PYROUTE_DEVICE uint64_t clock_cycles() {
    uint64_t cycles;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
    return cycles;
}
// Writes before it are seen before those after it, by the host too.
PYROUTE_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// Ends the kernel with an error.
[[noreturn]] PYROUTE_DEVICE void stop_kernel() {
    asm volatile("trap;");
    __builtin_unreachable();
}
// Nothing: the value is taken to be made here, so its uses stay after the words before this.
PYROUTE_DEVICE void pin(float &value) { asm volatile("" : "+f"(value)::"memory"); }

// ---- Epilogue.

// Four 8x8 matrices of 16-bit elements from the registers of a converged warp: lane l gives elements 2(l%4), 2(l%4)+1
// of row l/4 of each matrix, the lower half first; lane 8i + r gives the address (a multiple of 16) of row r of matrix
// i.
PYROUTE_DEVICE void store_matrices(SharedAddress row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}
// Two floats rounded to bfloat16, to nearest even; `low` in bits 0-15. A NaN gives 0x7fff.
PYROUTE_DEVICE uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// The larger of each half, as bfloat16; 0x7fff if either is NaN.
PYROUTE_DEVICE uint32_t bf16_pair_max_nan(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
}

} // namespace pyroute::cuda

#endif
