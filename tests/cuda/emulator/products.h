// Tensor cores: what a warp's lanes, or a warpgroup's, compute together. Sums are float32, one rounding per addition,
// in the order of the depth. Hardware adds in another order and keeps fewer bits of FP8 products; with
// PYROUTE_EMULATED_FP8_BITS=14 as few as were measured on Hopper.
#pragma once

#include "machine.h"

namespace emulator {

enum class Items { bf16, f16, e4m3, e5m2_by_e4m3, e4m3_by_e5m2, e5m2 };

constexpr Items fp8_items(bool a_e5m2, bool b_e5m2) {
    return a_e5m2 ? (b_e5m2 ? Items::e5m2 : Items::e5m2_by_e4m3) : b_e5m2 ? Items::e4m3_by_e5m2 : Items::e4m3;
}

// D[16, 8] += A[16, K] B[K, 8], K = 32 bytes, in the fragments of csrc/cuda/mma.cuh.
void multiply(Items items, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrices(uint32_t (&d)[4], const void *row, bool transposed);
void store_matrices(uint32_t row, const uint32_t (&m)[4]);

// wgmma: until matrix_wait the sums are NaN, and the operands are read only then.
void matrix_fence();
void queue_product(Items items, float *d, uint32_t columns, uint64_t a, uint64_t b, bool transposed_a,
                   bool transposed_b, bool add);
void matrix_commit();
void matrix_wait(uint32_t pending);

// setmaxnreg: the block's registers are a pool.
void change_registers(uint32_t count, bool gives);

} // namespace emulator
