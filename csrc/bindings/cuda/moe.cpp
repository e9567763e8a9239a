#include "cuda/moe.h"
#include "bindings/cuda/pointers.h"

#include <array>

#include <pybind11/stl.h>

namespace pyroute::cuda {

void bind_moe(py::module_ &module);

namespace {

using Place = std::pair<int, uintptr_t>;              // device, stream
using Experts = std::array<int64_t, 4>;               // num_rows, num_experts, expert_offsets, row_to_token
using Program = std::tuple<int, float, float, float>; // kind, alpha, limit, up_offset
using Bias = std::pair<uintptr_t, uintptr_t>;         // float32, bfloat16
using Maps = std::tuple<int64_t, int64_t, int64_t, uintptr_t, uintptr_t>; // tokens, slots, rows, both maps

Stream queue_of(const Place &place) { return stream_of(place.first, place.second); }
ExpertRows experts_of(const Experts &e) {
    return {pointer<const int64_t>(static_cast<uintptr_t>(e[2])), pointer<const int32_t>(static_cast<uintptr_t>(e[3])),
            e[0], e[1]};
}
ActivationProgram program_of(const Program &program) {
    const auto [kind, alpha, limit, up_offset] = program;
    return {static_cast<ActivationProgram::Kind>(kind), alpha, limit, up_offset};
}
ExpertBias bias_of(const Bias &bias) {
    return {pointer<const float>(bias.first), pointer<const uint16_t>(bias.second)};
}

template <class Row>
ActivationArgs<Row> activation_of(uintptr_t gate_up, const Bias &bias, uintptr_t row_weights, uintptr_t hidden,
                                  int64_t intermediate, const Program &program) {
    return {pointer<const Row>(gate_up), bias_of(bias), pointer<const float>(row_weights),
            pointer<Row>(hidden),        intermediate,  program_of(program)};
}

// Calls body with a Row of the rows' type.
template <class Body> void with_row_type(bool bfloat16, Body &&body) { bfloat16 ? body(uint16_t{}) : body(float{}); }

void activate_of(const Place &place, const Experts &experts, bool bfloat16, uintptr_t gate_up, const Bias &bias,
                 uintptr_t row_weights, uintptr_t hidden, int64_t intermediate, const Program &program) {
    with_row_type(bfloat16, [&](auto row) {
        const auto args = activation_of<decltype(row)>(gate_up, bias, row_weights, hidden, intermediate, program);
        activate(queue_of(place), experts_of(experts), args);
    });
}

void activate_quantize_of(const Place &place, const Experts &experts, bool bfloat16, uintptr_t gate_up,
                          const Bias &bias, uintptr_t row_weights, int64_t intermediate, const Program &program,
                          bool power_of_two, uintptr_t codes, uintptr_t scales) {
    with_row_type(bfloat16, [&](auto row) {
        const auto args = activation_of<decltype(row)>(gate_up, bias, row_weights, 0, intermediate, program);
        activate_quantize(queue_of(place), experts_of(experts), args,
                          {power_of_two, pointer<uint8_t>(codes), pointer<float>(scales)});
    });
}

void activate_backward_of(const Place &place, const Experts &experts, bool bfloat16, uintptr_t gate_up,
                          const Bias &bias, uintptr_t row_weights, uintptr_t hidden, int64_t intermediate,
                          const Program &program, uintptr_t grad_hidden, uintptr_t grad_gate_up,
                          uintptr_t grad_row_weights) {
    with_row_type(bfloat16, [&](auto row) {
        using Row = decltype(row);
        const ActivationBackwardArgs<Row> args{
            activation_of<Row>(gate_up, bias, row_weights, hidden, intermediate, program),
            pointer<const Row>(grad_hidden), pointer<Row>(grad_gate_up), pointer<float>(grad_row_weights)};
        activate_backward(queue_of(place), experts_of(experts), args);
    });
}

void add_bias_of(const Place &place, const Experts &experts, bool bfloat16, uintptr_t rows, const Bias &bias,
                 uintptr_t row_weights, int64_t columns) {
    with_row_type(bfloat16, [&](auto row) {
        using Row = decltype(row);
        add_bias(queue_of(place), experts_of(experts),
                 AddBiasArgs<Row>{pointer<Row>(rows), bias_of(bias), pointer<const float>(row_weights), columns});
    });
}

void add_bias_dots_of(const Place &place, const Experts &experts, bool bfloat16, uintptr_t rows, const Bias &bias,
                      uintptr_t dots, int64_t columns) {
    with_row_type(bfloat16, [&](auto row) {
        using Row = decltype(row);
        add_bias_dots(queue_of(place), experts_of(experts),
                      BiasDotArgs<Row>{pointer<const Row>(rows), bias_of(bias), pointer<float>(dots), columns});
    });
}

void bias_grad_of(const Place &place, const Experts &experts, bool bfloat16, uintptr_t rows, uintptr_t row_weights,
                  uintptr_t grad_bias, int64_t columns, bool accumulate) {
    with_row_type(bfloat16, [&](auto row) {
        using Row = decltype(row);
        bias_grad(queue_of(place), experts_of(experts),
                  BiasGradArgs<Row>{pointer<const Row>(rows), pointer<const float>(row_weights),
                                    pointer<float>(grad_bias), columns, accumulate});
    });
}

SlotValuesLaunch slot_values_of(const Maps &maps, uintptr_t from, uintptr_t to) {
    const auto [num_tokens, top_k, num_rows, row_to_token, token_to_row] = maps;
    return {{num_tokens, top_k, num_rows, pointer<const int32_t>(row_to_token), pointer<const int32_t>(token_to_row)},
            pointer<const float>(from),
            pointer<float>(to)};
}

} // namespace

void bind_moe(py::module_ &module) {
    module.def("moe_activate", &activate_of);
    module.def("moe_activate_quantize", &activate_quantize_of);
    module.def("moe_activate_backward", &activate_backward_of);
    module.def("moe_add_bias", &add_bias_of);
    module.def("moe_add_bias_dots", &add_bias_dots_of);
    module.def("moe_bias_grad", &bias_grad_of);
    module.def("moe_row_values", [](const Place &place, const Maps &maps, uintptr_t from, uintptr_t to) {
        row_values(queue_of(place), slot_values_of(maps, from, to));
    });
    module.def("moe_slot_values", [](const Place &place, const Maps &maps, uintptr_t from, uintptr_t to) {
        slot_values(queue_of(place), slot_values_of(maps, from, to));
    });
}

} // namespace pyroute::cuda
