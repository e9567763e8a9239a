#include "cpu/moe.h"
#include "bindings/arrays.h"

namespace pyroute {

namespace {

// [R, columns] rows as float or, with 2-byte items, as bfloat16 bits: calls body with a Row of that type.
template <class Body> void with_row_type(const py::array &rows, Body &&body) {
    if (rows.itemsize() == sizeof(uint16_t))
        body(uint16_t{});
    else
        body(float{});
}

int64_t axis(const py::array &array, py::ssize_t i, const char *name) {
    if (array.ndim() != 2)
        throw std::invalid_argument(std::string("_core: ") + name + " must have two axes");
    return array.shape(i);
}

ExpertBias expert_bias(const py::object &bias, int64_t num_experts, int64_t columns) {
    if (bias.is_none())
        return {nullptr, nullptr};
    const py::array array = array_of(bias, "bias");
    if (array.itemsize() == sizeof(uint16_t))
        return {nullptr, input<uint16_t>(array, "bias", {num_experts, columns})};
    return {input<float>(array, "bias", {num_experts, columns}), nullptr};
}

// The offsets bound every access to rows and biases, so their values are checked as well.
ExpertRows expert_rows(const py::array &expert_offsets, const py::array &row_to_token, int64_t num_rows) {
    const int64_t num_experts = static_cast<int64_t>(expert_offsets.size()) - 1;
    const auto *offsets = input<int64_t>(expert_offsets, "expert_offsets", {num_experts + 1});
    bool ok = num_experts >= 0 && offsets[0] == 0 && offsets[num_experts] <= num_rows;
    for (int64_t e = 0; ok && e < num_experts; ++e)
        ok = offsets[e] <= offsets[e + 1];
    if (!ok)
        throw std::invalid_argument("_core: expert_offsets must rise from 0 to at most the number of rows");
    return {offsets, input<int32_t>(row_to_token, "row_to_token", {num_rows}), num_rows, num_experts};
}

struct Program { // kind, alpha, limit, up_offset
    ActivationProgram value;
    int64_t width; // pre-activations per hidden element
};

Program program(const py::tuple &items) {
    const auto kind = items[0].cast<int32_t>();
    if (kind < ActivationProgram::swish_gate || kind > ActivationProgram::relu2)
        throw std::invalid_argument("_core: program names no activation");
    return {{static_cast<ActivationProgram::Kind>(kind), items[1].cast<float>(), items[2].cast<float>(),
             items[3].cast<float>()},
            kind == ActivationProgram::relu2 ? 1 : 2};
}

template <class Row>
ActivationArgs<Row> activation_args(const py::array &gate_up, const py::object &bias, const py::object &row_weights,
                                    py::array &hidden, const Program &activation, const ExpertRows &experts) {
    const int64_t inner = axis(hidden, 1, "hidden"), columns = activation.width * inner;
    return {input<Row>(gate_up, "gate_up", {experts.num_rows, columns}),
            expert_bias(bias, experts.num_experts, columns),
            optional_input<float>(row_weights, "row_weights", {experts.num_rows}),
            output<Row>(hidden, "hidden", {experts.num_rows, inner}),
            inner,
            activation.value};
}

void moe_activate(const py::array &gate_up, const py::object &bias, const py::array &expert_offsets,
                  const py::array &row_to_token, const py::object &row_weights, const py::tuple &activation,
                  py::array hidden) {
    const ExpertRows experts = expert_rows(expert_offsets, row_to_token, axis(gate_up, 0, "gate_up"));
    with_row_type(gate_up, [&](auto row) {
        const auto args =
            activation_args<decltype(row)>(gate_up, bias, row_weights, hidden, program(activation), experts);
        py::gil_scoped_release release;
        cpu::activate(experts, args);
    });
}

void moe_activate_backward(const py::array &gate_up, const py::object &bias, const py::array &expert_offsets,
                           const py::array &row_to_token, const py::object &row_weights, const py::tuple &activation,
                           const py::array &grad_hidden, py::array hidden, py::array grad_gate_up,
                           const py::object &grad_row_weights) {
    const ExpertRows experts = expert_rows(expert_offsets, row_to_token, axis(gate_up, 0, "gate_up"));
    with_row_type(gate_up, [&](auto row) {
        using Row = decltype(row);
        const Program chosen = program(activation);
        const auto forward = activation_args<Row>(gate_up, bias, row_weights, hidden, chosen, experts);
        const ActivationBackwardArgs<Row> args{
            forward, input<Row>(grad_hidden, "grad_hidden", {experts.num_rows, forward.intermediate}),
            output<Row>(grad_gate_up, "grad_gate_up", {experts.num_rows, chosen.width * forward.intermediate}),
            optional_output<float>(grad_row_weights, "grad_row_weights", {experts.num_rows})};
        py::gil_scoped_release release;
        cpu::activate_backward(experts, args);
    });
}

void moe_add_bias(py::array rows, const py::object &bias, const py::array &expert_offsets,
                  const py::array &row_to_token, const py::object &row_weights) {
    const int64_t num_rows = axis(rows, 0, "rows"), columns = axis(rows, 1, "rows");
    const ExpertRows experts = expert_rows(expert_offsets, row_to_token, num_rows);
    with_row_type(rows, [&](auto row) {
        using Row = decltype(row);
        const AddBiasArgs<Row> args{output<Row>(rows, "rows", {num_rows, columns}),
                                    expert_bias(array_of(bias, "bias"), experts.num_experts, columns),
                                    optional_input<float>(row_weights, "row_weights", {num_rows}), columns};
        py::gil_scoped_release release;
        cpu::add_bias(experts, args);
    });
}

void moe_add_bias_dots(const py::array &rows, const py::object &bias, const py::array &expert_offsets,
                       const py::array &row_to_token, py::array dots) {
    const int64_t num_rows = axis(rows, 0, "rows"), columns = axis(rows, 1, "rows");
    const ExpertRows experts = expert_rows(expert_offsets, row_to_token, num_rows);
    with_row_type(rows, [&](auto row) {
        using Row = decltype(row);
        const BiasDotArgs<Row> args{input<Row>(rows, "rows", {num_rows, columns}),
                                    expert_bias(array_of(bias, "bias"), experts.num_experts, columns),
                                    output<float>(dots, "dots", {num_rows}), columns};
        py::gil_scoped_release release;
        cpu::add_bias_dots(experts, args);
    });
}

void moe_bias_grad(const py::array &rows, const py::array &expert_offsets, const py::array &row_to_token,
                   const py::object &row_weights, py::array grad_bias) {
    const int64_t num_rows = axis(rows, 0, "rows"), columns = axis(rows, 1, "rows");
    const ExpertRows experts = expert_rows(expert_offsets, row_to_token, num_rows);
    with_row_type(rows, [&](auto row) {
        using Row = decltype(row);
        const BiasGradArgs<Row> args{input<Row>(rows, "rows", {num_rows, columns}),
                                     optional_input<float>(row_weights, "row_weights", {num_rows}),
                                     output<float>(grad_bias, "grad_bias", {experts.num_experts, columns}), columns,
                                     false};
        py::gil_scoped_release release;
        cpu::bias_grad(experts, args);
    });
}

} // namespace

void bind_moe(py::module_ &module);
void bind_moe(py::module_ &module) {
    module.def("moe_activate", &moe_activate);
    module.def("moe_activate_backward", &moe_activate_backward);
    module.def("moe_add_bias", &moe_add_bias);
    module.def("moe_add_bias_dots", &moe_add_bias_dots);
    module.def("moe_bias_grad", &moe_bias_grad);
}

} // namespace pyroute
