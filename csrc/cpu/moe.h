#pragma once

#include "../moe.h"
#include "cpu/isa.h"

namespace pyroute::cpu {

// Rows [row_begin, row_end); no result depends on where a range begins.
template <class Row> struct MoeRowKernels {
    void (*activate)(const ExpertRows &, const ActivationArgs<Row> &, int64_t row_begin, int64_t row_end);
    void (*activate_backward)(const ExpertRows &, const ActivationBackwardArgs<Row> &, int64_t row_begin,
                              int64_t row_end);
    void (*add_bias)(const ExpertRows &, const AddBiasArgs<Row> &, int64_t row_begin, int64_t row_end);
    void (*add_bias_dots)(const ExpertRows &, const BiasDotArgs<Row> &, int64_t row_begin, int64_t row_end);
    // Blocks [block_begin, block_end) of E * bias_blocks(columns): one expert, bias_block columns.
    void (*bias_grad)(const ExpertRows &, const BiasGradArgs<Row> &, int64_t block_begin, int64_t block_end);
};

constexpr int64_t bias_block = 64; // columns: their float64 sums stay in the first-level cache
static constexpr int64_t bias_blocks(int64_t columns) { return (columns + bias_block - 1) / bias_block; }

struct MoeKernels {
    MoeRowKernels<float> f32;
    MoeRowKernels<uint16_t> bf16;
};

PYROUTE_DECLARE_KERNELS(MoeKernels, moe_kernels)

// The whole op over all threads.
template <class Row> void activate(const ExpertRows &, const ActivationArgs<Row> &);
template <class Row> void activate_backward(const ExpertRows &, const ActivationBackwardArgs<Row> &);
template <class Row> void add_bias(const ExpertRows &, const AddBiasArgs<Row> &);
template <class Row> void add_bias_dots(const ExpertRows &, const BiasDotArgs<Row> &);
template <class Row> void bias_grad(const ExpertRows &, const BiasGradArgs<Row> &);

} // namespace pyroute::cpu
