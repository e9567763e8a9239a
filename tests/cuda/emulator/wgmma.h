// The host bodies of the words in csrc/cuda/sm90/wgmma.cuh. The comments are there.
#pragma once

#include "products.h"

namespace pyroute::cuda {

inline void matrix_fence() { emulator::matrix_fence(); }
inline void matrix_commit() { emulator::matrix_commit(); }
template <int Pending> void matrix_wait() { emulator::matrix_wait(Pending); }

template <bool A_e5m2, bool B_e5m2, size_t Sums> void multiply_fp8(float (&d)[Sums], uint64_t a, uint64_t b, bool add) {
    static_assert(Sums == 64 || Sums == 96, "128 or 192 columns");
    emulator::queue_product(emulator::fp8_items(A_e5m2, B_e5m2), d, 2 * Sums, a, b, false, false, add);
}
template <bool TransposedA, bool TransposedB> void multiply_bf16(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    emulator::queue_product(emulator::Items::bf16, d, 128, a, b, TransposedA, TransposedB, add);
}

} // namespace pyroute::cuda
