#include "bindings/memory.h"

#include "cpu/permutation.h"
#include "cpu/route_plan.h"

namespace pyroute {

void bind_permutation(py::module_ &module);

namespace {

RouteMaps maps_of(const py::array &row_to_token, const py::array &token_to_row) {
    if (token_to_row.ndim() != 2)
        throw std::invalid_argument("_core: token_to_row must be [num_tokens, top_k]");
    RouteMaps maps = {token_to_row.shape(0), token_to_row.shape(1), row_to_token.size(), nullptr, nullptr};
    maps.row_to_token = input<int32_t>(row_to_token, "row_to_token", {maps.num_rows});
    maps.token_to_row = input<int32_t>(token_to_row, "token_to_row", {maps.num_tokens, maps.top_k});
    return maps;
}

int64_t columns_of(const py::array &array, const char *name) {
    if (array.ndim() != 2)
        throw std::invalid_argument(std::string("_core: ") + name + " must have two axes");
    return array.shape(1);
}

void check_same_type(const py::array &array, const char *name, FloatType type) {
    if (float_type(array, name) != type)
        throw std::invalid_argument(std::string("_core: ") + name + " must have the type of the rows");
}

// Weights and their gradients are float64 beside float64 rows, else float32.
void check_weight_type(const py::array &array, const char *name, FloatType rows) {
    const FloatType expected = rows == FloatType::float64 ? FloatType::float64 : FloatType::float32;
    if (float_type(array, name) != expected)
        throw std::invalid_argument(std::string("_core: ") + name + " must be float32, or float64 beside float64 rows");
}

// The number of rows is known only after counting, so this one allocates its results.
template <class Id> py::tuple plan_routes_of(const py::array &topk_idx, int64_t num_experts, int64_t alignment) {
    const int64_t num_tokens = topk_idx.shape(0), top_k = topk_idx.shape(1);
    const Id *ids = input<Id>(topk_idx, "topk_idx", {num_tokens, top_k});
    const py::dtype int32 = py::dtype::of<int32_t>();
    py::array tokens_per_expert = empty_array(int32, {num_experts});
    py::array expert_offsets = empty_array(py::dtype::of<int64_t>(), {num_experts + 1});
    py::array token_to_row = empty_array(int32, {num_tokens, top_k});
    auto *counts = static_cast<int32_t *>(tokens_per_expert.mutable_data());
    auto *offsets = static_cast<int64_t *>(expert_offsets.mutable_data());
    const int64_t nanoseconds = num_tokens * top_k + num_experts;
    cpu::RoutePlanner<Id> planner(ids, num_tokens, top_k, num_experts, alignment);
    int64_t num_rows = 0;
    {
        const ReleaseGil release(nanoseconds);
        num_rows = planner.count(counts, offsets);
    }
    py::array row_to_token = empty_array(int32, {num_rows});
    auto *tokens = static_cast<int32_t *>(row_to_token.mutable_data());
    auto *rows = static_cast<int32_t *>(token_to_row.mutable_data());
    {
        const ReleaseGil release(nanoseconds + num_rows);
        planner.place(tokens, rows);
    }
    return py::make_tuple(tokens_per_expert, expert_offsets, row_to_token, token_to_row);
}

py::tuple plan_routes(const py::array &topk_idx, int64_t num_experts, int64_t alignment) {
    constexpr int64_t most = INT32_MAX;
    if (topk_idx.ndim() != 2 || topk_idx.dtype().kind() != 'i' || topk_idx.size() > most || num_experts < 1 ||
        num_experts > most || alignment < 1 || alignment > most)
        throw std::invalid_argument("_core: plan_routes takes signed ids [num_tokens, top_k] and positive sizes");
    return topk_idx.itemsize() == 4 ? plan_routes_of<int32_t>(topk_idx, num_experts, alignment)
                                    : plan_routes_of<int64_t>(topk_idx, num_experts, alignment);
}

void permute(const py::array &x, const py::array &row_to_token, const py::array &token_to_row, py::array rows) {
    const int64_t hidden = columns_of(x, "x");
    PermuteArgs args = {};
    args.maps = maps_of(row_to_token, token_to_row);
    args.row_bytes = hidden * x.itemsize();
    args.x = static_cast<const uint8_t *>(bytes_input(x, "x", 1, {args.maps.num_tokens, hidden}));
    if (rows.itemsize() != x.itemsize())
        throw std::invalid_argument("_core: rows must have the item size of x");
    args.rows = static_cast<uint8_t *>(bytes_output(rows, "rows", 1, {args.maps.num_rows, hidden}));
    const ReleaseGil release((args.maps.num_rows + args.maps.num_tokens) * (args.row_bytes / 16 + 4));
    cpu::permute(args);
}

void permute_quantize(const py::array &x, const py::array &row_to_token, const py::array &token_to_row,
                      int64_t block_cols, bool power_of_two, py::array codes, py::array scales) {
    if (block_cols < 1)
        throw std::invalid_argument("_core: block_cols must be at least 1");
    PermuteQuantizeArgs args = {};
    args.maps = maps_of(row_to_token, token_to_row);
    args.hidden = columns_of(x, "x");
    args.block_cols = block_cols;
    args.x_type = float_type(x, "x");
    args.x = float_input(x, "x", {args.maps.num_tokens, args.hidden});
    args.power_of_two = power_of_two;
    args.codes = output<uint8_t>(codes, "codes", {args.maps.num_rows, args.hidden});
    args.scales = output<float>(scales, "scales",
                                {args.maps.num_rows, args.hidden / block_cols + (args.hidden % block_cols != 0)});
    py::gil_scoped_release release;
    cpu::permute_quantize(args);
}

void unpermute(const py::array &rows, const py::array &row_to_token, const py::array &token_to_row,
               const py::object &topk_weights, py::array out) {
    UnpermuteArgs args = {};
    args.maps = maps_of(row_to_token, token_to_row);
    args.hidden = columns_of(rows, "rows");
    args.type = float_type(rows, "rows");
    args.rows = float_input(rows, "rows", {args.maps.num_rows, args.hidden});
    if (!topk_weights.is_none()) {
        const py::array weights = array_of(topk_weights, "topk_weights");
        check_weight_type(weights, "topk_weights", args.type);
        args.topk_weights = float_input(weights, "topk_weights", {args.maps.num_tokens, args.maps.top_k});
    }
    check_same_type(out, "out", args.type);
    args.out = float_output(out, "out", {args.maps.num_tokens, args.hidden});
    const ReleaseGil release((args.maps.num_rows + args.maps.num_tokens) * (args.hidden / 4 + 4));
    cpu::unpermute(args);
}

void unpermute_backward(const py::array &grad_y, const py::array &rows, const py::array &row_to_token,
                        const py::array &token_to_row, const py::array &topk_weights, py::array grad_rows,
                        py::array grad_topk_weights) {
    UnpermuteBackwardArgs args = {};
    args.maps = maps_of(row_to_token, token_to_row);
    args.hidden = columns_of(rows, "rows");
    args.type = float_type(rows, "rows");
    args.rows = float_input(rows, "rows", {args.maps.num_rows, args.hidden});
    check_same_type(grad_y, "grad_y", args.type);
    args.grad_y = float_input(grad_y, "grad_y", {args.maps.num_tokens, args.hidden});
    check_weight_type(topk_weights, "topk_weights", args.type);
    args.topk_weights = float_input(topk_weights, "topk_weights", {args.maps.num_tokens, args.maps.top_k});
    check_same_type(grad_rows, "grad_rows", args.type);
    args.grad_rows = float_output(grad_rows, "grad_rows", {args.maps.num_rows, args.hidden});
    check_weight_type(grad_topk_weights, "grad_topk_weights", args.type);
    args.grad_topk_weights =
        float_output(grad_topk_weights, "grad_topk_weights", {args.maps.num_tokens, args.maps.top_k});
    py::gil_scoped_release release;
    cpu::unpermute_backward(args);
}

} // namespace

void bind_permutation(py::module_ &module) {
    module.def("plan_routes", &plan_routes, py::arg("topk_idx"), py::arg("num_experts"), py::arg("alignment"));
    module.def("permute", &permute, py::arg("x"), py::arg("row_to_token"), py::arg("token_to_row"), py::arg("rows"));
    module.def("permute_quantize", &permute_quantize, py::arg("x"), py::arg("row_to_token"), py::arg("token_to_row"),
               py::arg("block_cols"), py::arg("power_of_two"), py::arg("codes"), py::arg("scales"));
    module.def("unpermute", &unpermute, py::arg("rows"), py::arg("row_to_token"), py::arg("token_to_row"),
               py::arg("topk_weights"), py::arg("out"));
    module.def("unpermute_backward", &unpermute_backward, py::arg("grad_y"), py::arg("rows"), py::arg("row_to_token"),
               py::arg("token_to_row"), py::arg("topk_weights"), py::arg("grad_rows"), py::arg("grad_topk_weights"));
}

} // namespace pyroute
