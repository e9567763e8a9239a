#include "cpu/moe.h"

#include <algorithm>

#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {

template <class Row> const MoeRowKernels<Row> &kernels();
template <> const MoeRowKernels<float> &kernels<float>() { return current_moe_kernels().f32; }
template <> const MoeRowKernels<uint16_t> &kernels<uint16_t>() { return current_moe_kernels().bf16; }

// Rows that hold 20 us of work, at about 1 ns for each of their elements.
int64_t grain(int64_t elements_per_row) { return 20000 / std::max<int64_t>(1, elements_per_row); }

} // namespace

template <class Row> void activate(const ExpertRows &experts, const ActivationArgs<Row> &args) {
    parallel_ranges(experts.num_rows, grain(args.intermediate),
                    [&](int64_t begin, int64_t end) { kernels<Row>().activate(experts, args, begin, end); });
}

template <class Row> void activate_backward(const ExpertRows &experts, const ActivationBackwardArgs<Row> &args) {
    parallel_ranges(experts.num_rows, grain(args.forward.intermediate),
                    [&](int64_t begin, int64_t end) { kernels<Row>().activate_backward(experts, args, begin, end); });
}

template <class Row> void add_bias(const ExpertRows &experts, const AddBiasArgs<Row> &args) {
    parallel_ranges(experts.num_rows, grain(args.columns),
                    [&](int64_t begin, int64_t end) { kernels<Row>().add_bias(experts, args, begin, end); });
}

template <class Row> void add_bias_dots(const ExpertRows &experts, const BiasDotArgs<Row> &args) {
    parallel_ranges(experts.num_rows, grain(args.columns),
                    [&](int64_t begin, int64_t end) { kernels<Row>().add_bias_dots(experts, args, begin, end); });
}

// Experts hold unequal numbers of rows, so blocks go to whichever thread is free.
template <class Row> void bias_grad(const ExpertRows &experts, const BiasGradArgs<Row> &args) {
    parallel_chunks(experts.num_experts * bias_blocks(args.columns), 16,
                    [&](int64_t begin, int64_t end) { kernels<Row>().bias_grad(experts, args, begin, end); });
}

template void activate(const ExpertRows &, const ActivationArgs<float> &);
template void activate(const ExpertRows &, const ActivationArgs<uint16_t> &);
template void activate_backward(const ExpertRows &, const ActivationBackwardArgs<float> &);
template void activate_backward(const ExpertRows &, const ActivationBackwardArgs<uint16_t> &);
template void add_bias(const ExpertRows &, const AddBiasArgs<float> &);
template void add_bias(const ExpertRows &, const AddBiasArgs<uint16_t> &);
template void add_bias_dots(const ExpertRows &, const BiasDotArgs<float> &);
template void add_bias_dots(const ExpertRows &, const BiasDotArgs<uint16_t> &);
template void bias_grad(const ExpertRows &, const BiasGradArgs<float> &);
template void bias_grad(const ExpertRows &, const BiasGradArgs<uint16_t> &);

} // namespace pyroute::cpu
