#pragma once

#include "../quantization.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

// One row of blocks: `rows` consecutive rows of `cols` elements, and one scale per `block_cols` columns.
struct QuantizeStrip {
    const void *x; // [rows, cols]
    int64_t rows, cols, block_cols;
    bool power_of_two;
    bool streaming; // past the caches; the caller ends it with finish_streaming
    uint8_t *codes; // [rows, cols]
    float *scales;  // [col blocks]
};

struct DequantizeStrip {
    const uint8_t *codes; // [rows, cols]
    const float *scales;  // [col blocks]
    int64_t rows, cols, block_cols;
    void *out; // [rows, cols]
};

struct QuantizationKernels {
    void (*finish_streaming)();
    void (*quantize[4][2])(const QuantizeStrip &);     // by FloatType, Fp8Format
    void (*dequantize[4][2])(const DequantizeStrip &); // by FloatType, Fp8Format
};

PYROUTE_DECLARE_KERNELS(QuantizationKernels, quantization_kernels)

void quantize_fp8(const QuantizeFp8Args &args);
void dequantize_fp8(const DequantizeFp8Args &args);

} // namespace pyroute::cpu
