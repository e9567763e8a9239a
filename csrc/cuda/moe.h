// The MoE layer's own kernels on the GPU: the launchers. Every one queues work on the stream and returns. The layer is
// a composition of rooms and lives in pyroute/_device/moe.py.
#pragma once

#include "../moe.h"
#include "cuda/launch.h"
#include "cuda/moe_args.h"

namespace pyroute::cuda {

template <class Row> void activate(const Stream &stream, const ExpertRows &experts, const ActivationArgs<Row> &args);

// Codes (e4m3, in 1x128 blocks) in place of args.hidden, for rows of a multiple of 16 elements at addresses that are
// multiples of 16.
struct QuantizedHidden {
    bool power_of_two;
    uint8_t *codes; // [R, I]
    float *scales;  // [R, ceil(I / 128)]
};
template <class Row>
void activate_quantize(const Stream &stream, const ExpertRows &experts, const ActivationArgs<Row> &args,
                       const QuantizedHidden &hidden);

template <class Row>
void activate_backward(const Stream &stream, const ExpertRows &experts, const ActivationBackwardArgs<Row> &args);
template <class Row> void add_bias(const Stream &stream, const ExpertRows &experts, const AddBiasArgs<Row> &args);
template <class Row> void add_bias_dots(const Stream &stream, const ExpertRows &experts, const BiasDotArgs<Row> &args);
template <class Row> void bias_grad(const Stream &stream, const ExpertRows &experts, const BiasGradArgs<Row> &args);

void row_values(const Stream &stream, const SlotValuesLaunch &args);
void slot_values(const Stream &stream, const SlotValuesLaunch &args);

} // namespace pyroute::cuda
