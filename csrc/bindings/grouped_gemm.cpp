#include "../grouped_gemm.h"

#include <vector>

#include "bindings/arrays.h"
#include "cpu/grouped_gemm.h"

namespace pyroute {
namespace {

ElementType element_type(const std::string &name) {
    const char *const names[] = {"float32", "bfloat16", "e4m3", "e5m2"};
    for (int i = 0; i < 4; ++i)
        if (name == names[i])
            return static_cast<ElementType>(i);
    throw std::invalid_argument("_core: no element type named " + name);
}

const void *elements(const py::array &array, ElementType type, const char *name, std::initializer_list<int64_t> shape) {
    switch (type) {
    case ElementType::float32:
        return input<float>(array, name, shape);
    case ElementType::bfloat16:
        return input<uint16_t>(array, name, shape);
    default:
        return input<uint8_t>(array, name, shape);
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t extent(const py::array &array, int axis) { return axis < array.ndim() ? array.shape(axis) : -1; }

struct Offsets {
    const int64_t *data;
    int64_t num_experts;
};

Offsets offsets_of(const py::array &array, int64_t num_rows) {
    const int64_t num_experts = extent(array, 0) - 1;
    const auto *data = input<int64_t>(array, "expert_offsets", {num_experts + 1});
    bool ok = num_experts >= 0 && data[0] == 0 && data[num_experts] <= num_rows;
    for (int64_t e = 0; ok && e < num_experts; ++e)
        ok = data[e] <= data[e + 1];
    if (!ok)
        throw std::invalid_argument("_core: expert_offsets must go from 0, not decreasing, to at most the rows");
    return {data, num_experts};
}

// (codes or values, type, scales or None, block rows, block cols, whether blocks restart at each segment)
class Operand {
  public:
    Operand(const py::tuple &tuple, const char *name, const Offsets &offsets)
        : name_(name), array_(tuple[0].cast<py::array>()), scales_(tuple[2]) {
        operand_.type = element_type(tuple[1].cast<std::string>());
        operand_.block_rows = tuple[3].cast<int64_t>();
        operand_.block_cols = tuple[4].cast<int64_t>();
        if (operand_.block_rows < 1 || operand_.block_cols < 1)
            throw std::invalid_argument("_core: scale blocks must be at least 1 x 1");
        if (!scales_.is_none() && tuple[5].cast<bool>()) {
            block_starts_.push_back(0);
            for (int64_t e = 0; e < offsets.num_experts; ++e)
                block_starts_.push_back(block_starts_.back() +
                                        divide_up(offsets.data[e + 1] - offsets.data[e], operand_.block_rows));
            operand_.expert_block_starts = block_starts_.data();
        }
    }
    Operand(const Operand &) = delete;
    Operand &operator=(const Operand &) = delete;

    int64_t axis(int axis) const { return extent(array_, axis); }

    const GemmOperand &rows(int64_t rows, int64_t cols) { // [rows, cols]
        operand_.data = elements(array_, operand_.type, name_, {rows, cols});
        operand_.scale_rows = block_starts_.empty() ? divide_up(rows, operand_.block_rows) : block_starts_.back();
        operand_.scales = optional_input<float>(scales_, "scales", {operand_.scale_rows, scale_cols(cols)});
        return operand_;
    }
    const GemmOperand &stack(int64_t count, int64_t rows, int64_t cols) { // [count, rows, cols]
        operand_.data = elements(array_, operand_.type, name_, {count, rows, cols});
        operand_.scale_rows = divide_up(rows, operand_.block_rows);
        operand_.scales = optional_input<float>(scales_, "scales", {count, operand_.scale_rows, scale_cols(cols)});
        return operand_;
    }

  private:
    int64_t scale_cols(int64_t cols) const { return divide_up(cols, operand_.block_cols); }

    const char *name_;
    py::array array_;
    py::object scales_;
    std::vector<int64_t> block_starts_;
    GemmOperand operand_{};
};

void *result(py::array &out, ElementType type, std::initializer_list<int64_t> shape) {
    if (type == ElementType::float32)
        return output<float>(out, "out", shape);
    if (type == ElementType::bfloat16)
        return output<uint16_t>(out, "out", shape);
    throw std::invalid_argument("_core: out must be float32 or bfloat16");
}

void grouped_gemm(const py::tuple &a, const py::tuple &b, const py::array &expert_offsets, py::array &out,
                  const std::string &out_type, bool transposed) {
    const int64_t num_rows = extent(a[0].cast<py::array>(), 0);
    const Offsets offsets = offsets_of(expert_offsets, num_rows);
    Operand x(a, transposed ? "grad_out" : "a", offsets), weights(b, "b", offsets);
    GroupedGemmArgs args{};
    args.num_rows = num_rows;
    args.num_experts = offsets.num_experts;
    args.n = weights.axis(1);
    args.k = weights.axis(2);
    args.a = x.rows(num_rows, transposed ? args.n : args.k);
    args.b = weights.stack(args.num_experts, args.n, args.k);
    args.expert_offsets = offsets.data;
    args.out_type = element_type(out_type);
    args.out = result(out, args.out_type, {num_rows, transposed ? args.k : args.n});
    py::gil_scoped_release release;
    transposed ? cpu::grouped_gemm_dgrad(args) : cpu::grouped_gemm(args);
}

void grouped_gemm_masked(const py::tuple &a, const py::tuple &b, const py::array &tokens_per_expert, py::array &out,
                         const std::string &out_type) {
    const py::array codes = a[0].cast<py::array>();
    const Offsets none{nullptr, extent(codes, 0)};
    Operand x(a, "a", none), weights(b, "b", none);
    GroupedGemmArgs args{};
    args.num_experts = none.num_experts;
    args.rows_per_expert = x.axis(1);
    args.num_rows = args.num_experts * args.rows_per_expert;
    args.n = weights.axis(1);
    args.k = weights.axis(2);
    args.a = x.stack(args.num_experts, args.rows_per_expert, args.k);
    args.b = weights.stack(args.num_experts, args.n, args.k);
    args.tokens_per_expert = input<int32_t>(tokens_per_expert, "tokens_per_expert", {args.num_experts});
    for (int64_t e = 0; e < args.num_experts; ++e)
        if (args.tokens_per_expert[e] < 0 || args.tokens_per_expert[e] > args.rows_per_expert)
            throw std::invalid_argument("_core: tokens_per_expert must be in 0 to the rows of an expert");
    args.out_type = element_type(out_type);
    args.out = result(out, args.out_type, {args.num_experts, args.rows_per_expert, args.n});
    py::gil_scoped_release release;
    cpu::grouped_gemm(args);
}

void grouped_gemm_wgrad(const py::tuple &grad_out, const py::tuple &a, const py::array &expert_offsets, py::array &out,
                        bool accumulate) {
    const int64_t num_rows = extent(a[0].cast<py::array>(), 0);
    const Offsets offsets = offsets_of(expert_offsets, num_rows);
    Operand gradients(grad_out, "grad_out", offsets), rows(a, "a", offsets);
    GroupedGemmWgradArgs args{};
    args.num_rows = num_rows;
    args.num_experts = offsets.num_experts;
    args.n = gradients.axis(1);
    args.k = rows.axis(1);
    args.grad_out = gradients.rows(num_rows, args.n);
    args.a = rows.rows(num_rows, args.k);
    args.expert_offsets = offsets.data;
    args.out = output<float>(out, "out", {args.num_experts, args.n, args.k});
    args.accumulate = accumulate;
    py::gil_scoped_release release;
    cpu::grouped_gemm_wgrad(args);
}

} // namespace

void bind_grouped_gemm(py::module_ &module);
void bind_grouped_gemm(py::module_ &module) {
    module.def("grouped_gemm", &grouped_gemm, py::arg("a"), py::arg("b"), py::arg("expert_offsets"), py::arg("out"),
               py::arg("out_type"), py::arg("transposed"));
    module.def("grouped_gemm_masked", &grouped_gemm_masked, py::arg("a"), py::arg("b"), py::arg("tokens_per_expert"),
               py::arg("out"), py::arg("out_type"));
    module.def("grouped_gemm_wgrad", &grouped_gemm_wgrad, py::arg("grad_out"), py::arg("a"), py::arg("expert_offsets"),
               py::arg("out"), py::arg("accumulate"));
}

} // namespace pyroute
