// Hopper's matrix product (wgmma) as words: D += A B^T for a warpgroup, A and B in shared memory, D in registers.
//
// A product of 64 rows of A with N rows of B over Depth elements (32 of FP8, 16 of bfloat16). All 128 threads of a
// warpgroup (warps 4i to 4i + 3) say the same word together. D in registers: warp w of the group, lane l, column group
// j of 8: d[4j], d[4j + 1] are row 16w + l/4, columns 8j + 2(l%4) and the next; d[4j + 2], d[4j + 3] the same of row
// + 8. `add` false: D = A B^T, whatever the registers held.
//
// The descriptor of an operand (matrix_descriptor in layout.h) names its first byte in shared memory, always with the
// 128-byte swizzle: chunk of 16 bytes ^ (address / 128 % 8) on the absolute address.
// * Depth along the rows ("K-major", the only form of FP8): row i of the operand is at start + i/8 * group + i%8 * 128,
//   element k at k * item size. Only 32 bytes of a row are read; the next 32 are the next step of depth.
// * Rows along the depth ("MN-major", bfloat16 only; Transposed): depth k is at start + k/8 * group + k%8 * 128, row i
//   at i/64 * leading + i%64 * 2 from there.
//
// Order in a thread: matrix_fence; products; matrix_commit; matrix_wait. D is read and written between fence and wait
// by the tensor cores alone. Products of one group are added in order.
#pragma once

#include "cuda/sm90/ptx.cuh"

#if defined(PYROUTE_EMULATOR)
#include "emulator/wgmma.h"
#else

namespace pyroute::cuda {

// Registers written before are seen by the products after it.
PYROUTE_DEVICE void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit are one group.
PYROUTE_DEVICE void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most Pending groups, the newest ones, are still running; the others are done with their registers and their shared
// memory.
template <int Pending> PYROUTE_DEVICE void matrix_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#define PYROUTE_SUM(d, i) "+f"((d)[i])
#define PYROUTE_SUMS4(d, i) PYROUTE_SUM(d, i), PYROUTE_SUM(d, i + 1), PYROUTE_SUM(d, i + 2), PYROUTE_SUM(d, i + 3)
#define PYROUTE_SUMS(d, i)                                                                                             \
    PYROUTE_SUMS4(d, i), PYROUTE_SUMS4(d, i + 4), PYROUTE_SUMS4(d, i + 8), PYROUTE_SUMS4(d, i + 12)
#define PYROUTE_64_SUMS(d) PYROUTE_SUMS(d, 0), PYROUTE_SUMS(d, 16), PYROUTE_SUMS(d, 32), PYROUTE_SUMS(d, 48)
#define PYROUTE_64_NAMES                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// FP8, either of the two kinds on either side, N = 128, 32 deep.
#define PYROUTE_MULTIPLY(types)                                                                                        \
    asm volatile("{\n"                                                                                                 \
                 ".reg .pred p;\n"                                                                                     \
                 "setp.ne.b32 p, %66, 0;\n"                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32." types " {" PYROUTE_64_NAMES "}, %64, %65, p, 1, 1;\n"  \
                 "}\n"                                                                                                 \
                 : PYROUTE_64_SUMS(d)                                                                                  \
                 : "l"(a), "l"(b), "r"(add ? 1 : 0))
template <bool A_e5m2, bool B_e5m2> PYROUTE_DEVICE void multiply_fp8(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    if constexpr (A_e5m2 && B_e5m2)
        PYROUTE_MULTIPLY("e5m2.e5m2");
    else if constexpr (A_e5m2)
        PYROUTE_MULTIPLY("e5m2.e4m3");
    else if constexpr (B_e5m2)
        PYROUTE_MULTIPLY("e4m3.e5m2");
    else
        PYROUTE_MULTIPLY("e4m3.e4m3");
}
#undef PYROUTE_MULTIPLY
// e4m3, N = 192, 32 deep.
template <bool A_e5m2, bool B_e5m2> PYROUTE_DEVICE void multiply_fp8(float (&d)[96], uint64_t a, uint64_t b, bool add) {
    static_assert(!A_e5m2 && !B_e5m2, "no kernel has it");
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 "
                 "{" PYROUTE_64_NAMES ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "
                 "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
                 "%96, %97, p, 1, 1;\n"
                 "}\n"
                 : PYROUTE_64_SUMS(d), PYROUTE_SUMS(d, 64), PYROUTE_SUMS(d, 80)
                 : "l"(a), "l"(b), "r"(add ? 1 : 0));
}
// bfloat16, N = 128, 16 deep.
template <bool TransposedA, bool TransposedB>
PYROUTE_DEVICE void multiply_bf16(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PYROUTE_64_NAMES
                 "}, %64, %65, p, 1, 1, %67, %68;\n"
                 "}\n"
                 : PYROUTE_64_SUMS(d)
                 : "l"(a), "l"(b), "r"(add ? 1 : 0), "n"(TransposedA ? 1 : 0), "n"(TransposedB ? 1 : 0));
}

#undef PYROUTE_64_NAMES
#undef PYROUTE_64_SUMS
#undef PYROUTE_SUMS
#undef PYROUTE_SUMS4
#undef PYROUTE_SUM

} // namespace pyroute::cuda

#endif
