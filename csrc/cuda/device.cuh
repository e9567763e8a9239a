// The words of the device code: what a kernel may use beside the language.
//
// One source, three compilers: nvcc at build time, NVRTC on the user's machine, and g++ for the tests' emulator, where
// every thread is a fiber on the host and these words have host bodies (tests/cuda/emulator/device.h). Kernels
// therefore include nothing but this file, csrc's argument structs and each other, and use no CUDA name that is not
// below.
//
// Bits are part of the contract. All three compile with contraction off, IEEE division and square roots and subnormals
// kept (-fmad=false is the only flag that is not the default), so that plain + - * / and sqrtf are the CPU floor's; a
// fused multiply-add is written fmaf.
#pragma once

#include <stdint.h>

#if defined(PYROUTE_EMULATOR)
#include "emulator/device.h"

#include "emulator/conversions.h"
#define PYROUTE_UNROLL_BY(count)
#else

#define PYROUTE_DEVICE __device__ __forceinline__

// An entry point: PYROUTE_KERNEL(name, threads per block, least blocks per SM, Args) { ... args.x ... }. The arguments
// are one plain struct, read from constant memory; tensor maps in it keep their address.
#define PYROUTE_KERNEL(name, threads, blocks, Args)                                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args)

// Shared memory of a block. PYROUTE_SHARED(Type, name) declares one object, which holds whatever was there before;
// PYROUTE_DYNAMIC_SHARED(name) is the launch's dynamic part, a char *, aligned to 1024 bytes.
#define PYROUTE_SHARED(Type, name) __shared__ Type name
#define PYROUTE_DYNAMIC_SHARED(name)                                                                                   \
    extern __shared__ __align__(1024) char pyroute_dynamic_shared[];                                                   \
    char *const name = pyroute_dynamic_shared

#define PYROUTE_UNROLL _Pragma("unroll")
#define PYROUTE_KEEP_LOOP _Pragma("unroll 1") // one that mostly runs once, with a long body
#define PYROUTE_PRAGMA(text) _Pragma(#text)
#define PYROUTE_UNROLL_BY(count) PYROUTE_PRAGMA(unroll count)

namespace pyroute::cuda {

constexpr uint32_t all_lanes = 0xffffffffu;

// threadIdx, blockIdx, blockDim and gridDim are used as they are.
PYROUTE_DEVICE uint32_t lane_id() { return threadIdx.x & 31; } // blocks are one-dimensional
PYROUTE_DEVICE uint32_t warp_id() { return threadIdx.x >> 5; }

// Barriers. Every thread of the block, or every lane of the mask, arrives.
PYROUTE_DEVICE void sync_block() { __syncthreads(); }
PYROUTE_DEVICE void sync_warp(uint32_t mask = all_lanes) { __syncwarp(mask); }

// Between the lanes of a mask; every lane of it takes part. T has 4 or 8 bytes.
template <class T> PYROUTE_DEVICE T shuffle(T value, uint32_t source, uint32_t mask = all_lanes) {
    return __shfl_sync(mask, value, static_cast<int>(source));
}
template <class T> PYROUTE_DEVICE T shuffle_xor(T value, uint32_t distance, uint32_t mask = all_lanes) {
    return __shfl_xor_sync(mask, value, static_cast<int>(distance));
}
template <class T> PYROUTE_DEVICE T shuffle_up(T value, uint32_t distance, uint32_t mask = all_lanes) {
    return __shfl_up_sync(mask, value, distance); // a lane without a source keeps its own
}
PYROUTE_DEVICE uint32_t ballot(bool value, uint32_t mask = all_lanes) { return __ballot_sync(mask, value); }
PYROUTE_DEVICE uint32_t match_any(uint32_t value, uint32_t mask = all_lanes) { return __match_any_sync(mask, value); }
PYROUTE_DEVICE uint32_t reduce_max(uint32_t value, uint32_t mask = all_lanes) { return __reduce_max_sync(mask, value); }
PYROUTE_DEVICE uint32_t reduce_min(uint32_t value, uint32_t mask = all_lanes) { return __reduce_min_sync(mask, value); }
PYROUTE_DEVICE uint32_t reduce_add(uint32_t value, uint32_t mask = all_lanes) { return __reduce_add_sync(mask, value); }

// Atomics on integers only, in shared or global memory: sums of floats would depend on the order. Return the old value.
PYROUTE_DEVICE uint32_t atomic_add(uint32_t *to, uint32_t value) { return atomicAdd(to, value); }
PYROUTE_DEVICE int32_t atomic_add(int32_t *to, int32_t value) { return atomicAdd(to, value); }
PYROUTE_DEVICE uint32_t atomic_max(uint32_t *to, uint32_t value) { return atomicMax(to, value); }
// Writes `desired` if `expected` is there.
PYROUTE_DEVICE int32_t atomic_compare_swap(int32_t *at, int32_t expected, int32_t desired) {
    return atomicCAS(at, expected, desired);
}
// A store that several threads may make, all of the same value.
template <class T> PYROUTE_DEVICE void store_same(T *to, T value) { *to = value; }
PYROUTE_DEVICE void fence_device() { __threadfence(); } // what was written before it is seen by every block after it

PYROUTE_DEVICE uint32_t count_bits(uint32_t x) { return static_cast<uint32_t>(__popc(static_cast<int>(x))); }
PYROUTE_DEVICE uint32_t leading_zeros(uint32_t x) { return static_cast<uint32_t>(__clz(static_cast<int>(x))); }
PYROUTE_DEVICE uint32_t first_bit(uint32_t x) { return static_cast<uint32_t>(__ffs(static_cast<int>(x)) - 1); }

PYROUTE_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
PYROUTE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
PYROUTE_DEVICE uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
PYROUTE_DEVICE double double_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

// Off by one unit in the last place at most: where Newton's steps begin.
PYROUTE_DEVICE float approximate_reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
PYROUTE_DEVICE float approximate_rsqrt(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Conversions, to nearest even. A NaN gives some NaN of the other type.
PYROUTE_DEVICE uint32_t bf16x2_of(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
PYROUTE_DEVICE float f16_to_f32(uint16_t half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
PYROUTE_DEVICE uint16_t f16_of(float x) {
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
// Whether the card converts to and from FP8 codes; below sm_89 the words that do must not be reached.
PYROUTE_DEVICE constexpr bool converts_fp8() {
#if __CUDA_ARCH__ >= 890
    return true;
#else
    return false;
#endif
}
// Finite numbers to two codes of FP8; too large ones saturate.
PYROUTE_DEVICE uint32_t e4m3x2_of(float low, float high) {
    uint16_t both = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
#endif
    return both;
}
PYROUTE_DEVICE uint32_t e5m2x2_of(float low, float high) {
    uint16_t both = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// 16 bytes at once; addresses are multiples of 16.
struct alignas(16) Words {
    uint32_t w[4];
};
PYROUTE_DEVICE Words load_words(const void *from) { return *static_cast<const Words *>(from); }
PYROUTE_DEVICE void store_words(void *to, const Words &words) { *static_cast<Words *>(to) = words; }
// Read by this kernel only and once: past the first-level cache.
PYROUTE_DEVICE Words load_words_once(const void *from) {
    Words v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(from));
    return v;
}

// Written to global memory and not read by this kernel. Compilers split some plain stores of 16 bytes.
PYROUTE_DEVICE void store_words_once(void *to, const Words &words) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(words.w[0]), "r"(words.w[1]), "r"(words.w[2]), "r"(words.w[3]));
}

} // namespace pyroute::cuda

#endif

namespace pyroute::cuda {

PYROUTE_DEVICE float nan_f32() { return float_of(0x7fc00000u); }
PYROUTE_DEVICE float infinity_f32() { return float_of(0x7f800000u); }

PYROUTE_DEVICE float bf16_to_f32(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

template <class T> PYROUTE_DEVICE T min_of(T a, T b) { return b < a ? b : a; }
template <class T> PYROUTE_DEVICE T max_of(T a, T b) { return a < b ? b : a; }
template <class T> PYROUTE_DEVICE constexpr T divide_up(T a, T b) { return (a + b - 1) / b; }

} // namespace pyroute::cuda
