#include "cpu/moe_layer.h"

#include <algorithm>

#include "bindings/arrays.h"

namespace pyroute {

void bind_moe_layer(py::module_ &module);

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FloatType row_type(const py::array &array, const char *name) {
    const FloatType type = float_type(array, name);
    if (type != FloatType::float32 && type != FloatType::bfloat16)
        throw std::invalid_argument(std::string("_core: ") + name + " must be float32 or bfloat16");
    return type;
}

// The elements of an array of this type and shape, as bytes.
const void *typed_input(const py::array &array, const char *name, FloatType type,
                        std::initializer_list<int64_t> shape) {
    if (float_type(array, name) != type)
        throw std::invalid_argument(std::string("_core: ") + name + " must have the type of x");
    return float_input(array, name, shape);
}

// The same to write to; None is a null pointer.
void *typed_output(const py::object &object, const char *name, FloatType type, std::initializer_list<int64_t> shape) {
    if (object.is_none())
        return nullptr;
    auto array = array_of(object, name);
    typed_input(array, name, type, shape);
    return float_output(array, name, shape);
}

// An array, or (codes, format, scales, block rows, block cols) of an Fp8Array: matrices [count, rows, cols].
GemmOperand weights(const py::object &given, const char *name, int64_t count, int64_t rows, int64_t cols) {
    GemmOperand operand{};
    operand.block_rows = operand.block_cols = 1;
    if (!py::isinstance<py::tuple>(given)) {
        const auto array = array_of(given, name);
        operand.type = row_type(array, name) == FloatType::float32 ? ElementType::float32 : ElementType::bfloat16;
        operand.data = float_input(array, name, {count, rows, cols});
        return operand;
    }
    const auto fp8 = py::reinterpret_borrow<py::tuple>(given);
    const auto format = fp8[1].cast<std::string>();
    if (format != "e4m3" && format != "e5m2")
        throw std::invalid_argument("_core: format must be e4m3 or e5m2");
    operand.type = format == "e4m3" ? ElementType::e4m3 : ElementType::e5m2;
    operand.block_rows = fp8[3].cast<int64_t>();
    operand.block_cols = fp8[4].cast<int64_t>();
    if (operand.block_rows < 1 || operand.block_cols < 1)
        throw std::invalid_argument("_core: scale blocks must be at least 1 x 1");
    operand.data = input<uint8_t>(array_of(fp8[0], name), name, {count, rows, cols});
    operand.scale_rows = divide_up(rows, operand.block_rows);
    operand.scales = input<float>(array_of(fp8[2], "scales"), "scales",
                                  {count, operand.scale_rows, divide_up(cols, operand.block_cols)});
    return operand;
}

ExpertBias expert_bias(const py::object &given, const char *name, int64_t num_experts, int64_t columns) {
    if (given.is_none())
        return {nullptr, nullptr};
    const auto array = array_of(given, name);
    const void *data = float_input(array, name, {num_experts, columns});
    if (row_type(array, name) == FloatType::float32)
        return {static_cast<const float *>(data), nullptr};
    return {nullptr, static_cast<const uint16_t *>(data)};
}

void check_map(const int32_t *map, int64_t count, int64_t limit) {
    int32_t least = -1, most = -1;
    for (int64_t i = 0; i < count; ++i) {
        least = map[i] < least ? map[i] : least;
        most = map[i] > most ? map[i] : most;
    }
    if (least < -1 || most >= limit)
        throw std::out_of_range("_core: a route map has an entry that is not a row or token of its arrays");
}

// The values of the plan bound every access, so they are checked as well.
void use_plan(MoeLayer &layer, const py::array &offsets, const py::array &tokens, const py::array &rows,
              int64_t x_rows) {
    if (rows.ndim() != 2 || rows.shape(1) < 1 || offsets.size() < 2)
        throw std::invalid_argument("_core: a plan must have at least one expert and one slot");
    const int64_t num_rows = tokens.size(), num_tokens = rows.shape(0), top_k = rows.shape(1);
    const int64_t num_experts = offsets.size() - 1;
    layer.expert_offsets = input<int64_t>(offsets, "expert_offsets", {num_experts + 1});
    bool ok = layer.expert_offsets[0] == 0 && layer.expert_offsets[num_experts] == num_rows;
    for (int64_t e = 0; ok && e < num_experts; ++e)
        ok = layer.expert_offsets[e] <= layer.expert_offsets[e + 1];
    if (!ok)
        throw std::invalid_argument("_core: expert_offsets must rise from 0 to the number of rows");
    layer.num_experts = num_experts;
    layer.maps = {num_tokens, top_k, num_rows, input<int32_t>(tokens, "row_to_token", {num_rows}),
                  input<int32_t>(rows, "token_to_row", {num_tokens, top_k})};
    layer.x_rows = x_rows;
    check_map(layer.maps.row_to_token, num_rows, x_rows);
    check_map(layer.maps.token_to_row, num_tokens * top_k, num_rows);
}

// (kind, alpha, limit, up_offset)
ActivationProgram program(const py::tuple &items) {
    const auto kind = items[0].cast<int32_t>();
    if (kind < ActivationProgram::swish_gate || kind > ActivationProgram::relu2)
        throw std::invalid_argument("_core: program names no activation");
    return {static_cast<ActivationProgram::Kind>(kind), items[1].cast<float>(), items[2].cast<float>(),
            items[3].cast<float>()};
}

WeightOn weight_on(const std::string &name) {
    const char *const names[] = {"output", "pre_down", "input"};
    for (int i = 0; i < 3; ++i)
        if (name == names[i])
            return static_cast<WeightOn>(i);
    throw std::invalid_argument("_core: weight_on must be output, pre_down or input");
}

// (x, topk_weights, w_gate_up, w_down, b_gate_up, b_down, program, weight_on, scale_format or None, part_bytes)
MoeLayer layer_of(const py::tuple &given, const py::array &expert_offsets, const py::array &row_to_token,
                  const py::array &token_to_row) {
    MoeLayer layer{};
    const auto x = array_of(given[0], "x");
    const auto w_down = given[3].cast<py::object>();
    const auto down = array_of(py::isinstance<py::tuple>(w_down) ? w_down.cast<py::tuple>()[0] : w_down, "w_down");
    if (x.ndim() != 2 || down.ndim() != 3)
        throw std::invalid_argument("_core: x must have two axes, w_down three");
    use_plan(layer, expert_offsets, row_to_token, token_to_row, x.shape(0));
    layer.hidden = x.shape(1);
    layer.intermediate = down.shape(2);
    layer.program = program(given[6].cast<py::tuple>());
    layer.pre_activations = layer.intermediate * (layer.program.kind == ActivationProgram::relu2 ? 1 : 2);
    layer.row_type = row_type(x, "x");
    layer.x = float_input(x, "x", {layer.x_rows, layer.hidden});
    layer.topk_weights =
        input<float>(array_of(given[1], "topk_weights"), "topk_weights", {layer.maps.num_tokens, layer.maps.top_k});
    layer.w_gate_up = weights(given[2], "w_gate_up", layer.num_experts, layer.pre_activations, layer.hidden);
    layer.w_down = weights(w_down, "w_down", layer.num_experts, layer.hidden, layer.intermediate);
    layer.b_gate_up = expert_bias(given[4], "b_gate_up", layer.num_experts, layer.pre_activations);
    layer.b_down = expert_bias(given[5], "b_down", layer.num_experts, layer.hidden);
    layer.weight_on = weight_on(given[7].cast<std::string>());
    if (layer.weight_on == WeightOn::input && layer.x_rows != layer.maps.num_tokens)
        throw std::invalid_argument("_core: with weights on the input x must have a row for every token");
    layer.quantize = !given[8].is_none();
    layer.power_of_two = layer.quantize && given[8].cast<std::string>() == "ue8m0";
    layer.part_bytes = std::min<int64_t>(given[9].cast<int64_t>(), int64_t{1} << 60);
    return layer;
}

void moe_forward(const py::tuple &layer, const py::array &expert_offsets, const py::array &row_to_token,
                 const py::array &token_to_row, const py::object &gate_up, const py::object &y) {
    MoeForwardArgs args{};
    const MoeLayer &of = args.layer = layer_of(layer, expert_offsets, row_to_token, token_to_row);
    args.gate_up = typed_output(gate_up, "gate_up", of.row_type, {of.maps.num_rows, of.pre_activations});
    args.y = typed_output(array_of(y, "y"), "y", of.row_type, {of.maps.num_tokens, of.hidden});
    py::gil_scoped_release release;
    cpu::moe_forward(args);
}

// grads: x, topk_weights, w_gate_up, w_down, b_gate_up, b_down, each an array or None
void moe_backward(const py::tuple &layer, const py::array &expert_offsets, const py::array &row_to_token,
                  const py::array &token_to_row, const py::array &gate_up, const py::array &grad_y,
                  const py::tuple &grads, bool accumulate) {
    MoeBackwardArgs args{};
    const MoeLayer &of = args.layer = layer_of(layer, expert_offsets, row_to_token, token_to_row);
    const int64_t tokens = of.maps.num_tokens, experts = of.num_experts;
    args.gate_up = typed_input(gate_up, "gate_up", of.row_type, {of.maps.num_rows, of.pre_activations});
    args.grad_y = typed_input(grad_y, "grad_y", of.row_type, {of.x_rows, of.hidden});
    args.accumulate = accumulate;
    args.x = typed_output(grads[0], "x", of.row_type, {tokens, of.hidden});
    const auto float32 = [&](size_t i, const char *name, std::initializer_list<int64_t> shape) {
        return static_cast<float *>(typed_output(grads[i], name, FloatType::float32, shape));
    };
    args.topk_weights = float32(1, "topk_weights", {tokens, of.maps.top_k});
    args.w_gate_up = float32(2, "w_gate_up", {experts, of.pre_activations, of.hidden});
    args.w_down = float32(3, "w_down", {experts, of.hidden, of.intermediate});
    args.b_gate_up = float32(4, "b_gate_up", {experts, of.pre_activations});
    args.b_down = float32(5, "b_down", {experts, of.hidden});
    py::gil_scoped_release release;
    cpu::moe_backward(args);
}

} // namespace

void bind_moe_layer(py::module_ &module) {
    module.def("moe_forward", &moe_forward);
    module.def("moe_backward", &moe_backward);
}

} // namespace pyroute
