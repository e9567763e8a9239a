// The words of tensor-core kernels that every card from sm_80 on has: asynchronous copies into shared memory, loads of
// fragments, and products of one warp. As in device.cuh the bodies here are the GPU's; the emulator has host bodies of
// the same names (tests/cuda/emulator/mma.h).
//
// Fragments. Lane l of a warp, q = l % 4, r = l / 4, holds of a product D[16, 8] += A[16, K] B[K, 8] with elements of
// 2 bytes (K = 16, pairs of elements in a register, the lower k in the lower half):
//   a[0] row r, k 2q..2q+1    a[1] row r + 8, same k    a[2] row r, k 8 + 2q..    a[3] row r + 8, k 8 + 2q..
//   b[0] column r, k 2q..2q+1                           b[1] column r, k 8 + 2q..
// with elements of 1 byte (K = 32, four to a register, the lowest k in the lowest byte):
//   a[0] row r, k 4q..4q+3    a[1] row r + 8, same k    a[2] row r, k 16 + 4q..   a[3] row r + 8, k 16 + 4q..
//   b[0] column r, k 4q..4q+3                           b[1] column r, k 16 + 4q..
// and either way
//   d[0..1] row r, columns 2q, 2q + 1                   d[2..3] row r + 8, the same columns
#pragma once

#include "cuda/device.cuh"

#if defined(PYROUTE_EMULATOR)
#include "emulator/mma.h"
#else

namespace pyroute::cuda {

PYROUTE_DEVICE uint32_t address_in_shared(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- copies from global to shared memory that the thread does not wait for ------------------------------------------

// 16 bytes between addresses that are multiples of 16, past the first-level cache; zeros, and `from` is not read, if
// not `valid`.
PYROUTE_DEVICE void copy_async_16(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address_in_shared(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
// The same for 4 bytes, through the first-level cache.
PYROUTE_DEVICE void copy_async_4(void *to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(address_in_shared(to)), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}
// Ends a group: this thread's copies since the last end, possibly none.
PYROUTE_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all of this thread's groups but the latest `pending` have arrived and are visible to the thread itself; a
// sync_block after it makes them visible to the block.
template <int pending> PYROUTE_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- fragments from shared memory -----------------------------------------------------------------------------------

// Four matrices of 8 rows of 16 bytes. Lane i gives the address, a multiple of 16, of row i % 8 of matrix i / 8; d[m]
// is, of matrix m, bytes 4q..4q+3 of row r. All 32 lanes take part.
PYROUTE_DEVICE void load_matrices(uint32_t (&d)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address_in_shared(row))
                 : "memory");
}
// Transposed as matrices of 8 x 8 items of 2 bytes: d[m] is item r of row 2q (lower half) and of row 2q + 1.
PYROUTE_DEVICE void load_matrices_transposed(uint32_t (&d)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address_in_shared(row))
                 : "memory");
}

// --- products: d += a b, float32 sums, in the fragments above; all 32 lanes take part -------------------------------

PYROUTE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PYROUTE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Whether the card multiplies FP8 codes at more than the rate of float16 (sm_90 and sm_100 take mma_fp8 too, as
// conversions of every fragment for every product); where it is false, kernels convert and use mma_f16.
PYROUTE_DEVICE constexpr bool native_fp8() {
#if __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
    return true;
#else
    return false;
#endif
}
// A and B of e5m2 codes where that is said, else e4m3. K = 32. Not to be reached below sm_89.
template <bool a_e5m2, bool b_e5m2>
PYROUTE_DEVICE void mma_fp8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 890
#define PYROUTE_MMA(types)                                                                                             \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
                 "{%0, %1, %2, %3};"                                                                                   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (a_e5m2 && b_e5m2)
        PYROUTE_MMA("e5m2.e5m2");
    else if constexpr (a_e5m2)
        PYROUTE_MMA("e5m2.e4m3");
    else if constexpr (b_e5m2)
        PYROUTE_MMA("e4m3.e5m2");
    else
        PYROUTE_MMA("e4m3.e4m3");
#undef PYROUTE_MMA
#endif
}

// --- bytes and pairs -------------------------------------------------------------------------------------------------

// Byte i of the result is the byte of high:low (low has numbers 0 to 3, high 4 to 7) that nibble i of `selector` names.
PYROUTE_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector);
}
// Byte i of the result is 0xff where the byte of `bytes` that nibble i of `selector` names (0 to 3) has its top bit,
// else 0.
PYROUTE_DEVICE uint32_t select_top_bits(uint32_t bytes, uint32_t selector) {
    uint32_t mask; // a nibble's own top bit asks for copies of the byte's
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(mask) : "r"(bytes), "r"(selector | 0x8888u));
    return mask;
}
// The two codes in the low half as float16: exact, NaN codes as some NaN. Where converts_fp8().
PYROUTE_DEVICE uint32_t f16_pair_of_e4m3(uint32_t codes) {
    uint32_t pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes)));
#endif
    return pair;
}
// Products of two pairs of bfloat16, each rounded once, subnormal numbers kept.
PYROUTE_DEVICE uint32_t multiply_bf16_pairs(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u)); // plus -0 keeps the product
    return d;
}

} // namespace pyroute::cuda

#endif

namespace pyroute::cuda {

struct alignas(8) WordPair {
    uint32_t w[2];
};
PYROUTE_DEVICE WordPair load_word_pair(const void *from) { return *static_cast<const WordPair *>(from); }
struct alignas(8) Float2 {
    float x, y;
};

} // namespace pyroute::cuda
