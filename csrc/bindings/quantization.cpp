#include "bindings/arrays.h"

#include <vector>

#include "cpu/quantization.h"

namespace pyroute {

void bind_quantization(py::module_ &module);

namespace {

using Block = std::pair<int64_t, int64_t>;

Fp8Format format_of(const std::string &name) {
    if (name == "e4m3")
        return Fp8Format::e4m3;
    if (name == "e5m2")
        return Fp8Format::e5m2;
    throw std::invalid_argument("_core: format must be e4m3 or e5m2");
}

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The block layout of a stack [num_matrices, rows, cols], checked so that every row of scales it names exists.
struct CheckedBlocks {
    CheckedBlocks(const py::array &codes, const Block &block, const std::string &format, const py::object &offsets) {
        if (codes.ndim() != 3 || block.first < 1 || block.second < 1)
            throw std::invalid_argument("_core: codes must be [num_matrices, rows, cols], blocks at least 1");
        layout = {codes.shape(0),   codes.shape(1), codes.shape(2), block.first, block.second, nullptr, nullptr, 1,
                  format_of(format)};
        row_blocks = ceil_div(layout.rows, layout.block_rows);
        if (!offsets.is_none()) {
            const py::array array = array_of(offsets, "expert_offsets");
            use_offsets(input<int64_t>(array, "expert_offsets", {array.size()}), array.size() - 1);
        }
    }

    void use_offsets(const int64_t *offsets, int64_t num_segments) {
        if (layout.num_matrices != 1 || num_segments < 1 || offsets[0] != 0 || offsets[num_segments] > layout.rows)
            throw std::invalid_argument("_core: expert_offsets must run from 0 to at most rows, for one matrix");
        starts.assign(1, 0);
        for (int64_t segment = 0; segment < num_segments; ++segment) {
            const int64_t rows = offsets[segment + 1] - offsets[segment];
            if (rows < 0)
                throw std::invalid_argument("_core: expert_offsets must not decrease");
            starts.push_back(starts.back() + ceil_div(rows, layout.block_rows));
        }
        layout.expert_offsets = offsets;
        layout.row_block_starts = starts.data();
        layout.num_segments = num_segments;
        row_blocks = starts.back();
    }

    int64_t col_blocks() const { return ceil_div(layout.cols, layout.block_cols); }

    Fp8Blocks layout;
    int64_t row_blocks;
    std::vector<int64_t> starts;
};

void quantize_fp8(const py::array &x, const Block &block, const std::string &format, bool power_of_two,
                  const py::object &expert_offsets, py::array codes, py::array scales) {
    CheckedBlocks blocks(codes, block, format, expert_offsets);
    const Fp8Blocks &b = blocks.layout;
    QuantizeFp8Args args = {};
    args.blocks = b;
    args.x_type = float_type(x, "x");
    args.x = float_input(x, "x", {b.num_matrices, b.rows, b.cols});
    args.power_of_two = power_of_two;
    args.codes = output<uint8_t>(codes, "codes", {b.num_matrices, b.rows, b.cols});
    args.scales = output<float>(scales, "scales", {b.num_matrices, blocks.row_blocks, blocks.col_blocks()});
    py::gil_scoped_release release;
    cpu::quantize_fp8(args);
}

void dequantize_fp8(const py::array &codes, const py::array &scales, const Block &block, const std::string &format,
                    const py::object &expert_offsets, py::array out) {
    CheckedBlocks blocks(codes, block, format, expert_offsets);
    const Fp8Blocks &b = blocks.layout;
    DequantizeFp8Args args = {};
    args.blocks = b;
    args.codes = input<uint8_t>(codes, "codes", {b.num_matrices, b.rows, b.cols});
    args.scales = input<float>(scales, "scales", {b.num_matrices, blocks.row_blocks, blocks.col_blocks()});
    args.out_type = float_type(out, "out");
    args.out = float_output(out, "out", {b.num_matrices, b.rows, b.cols});
    py::gil_scoped_release release;
    cpu::dequantize_fp8(args);
}

} // namespace

void bind_quantization(py::module_ &module) {
    module.def("quantize_fp8", &quantize_fp8, py::arg("x"), py::arg("block"), py::arg("format"),
               py::arg("power_of_two"), py::arg("expert_offsets"), py::arg("codes"), py::arg("scales"));
    module.def("dequantize_fp8", &dequantize_fp8, py::arg("codes"), py::arg("scales"), py::arg("block"),
               py::arg("format"), py::arg("expert_offsets"), py::arg("out"));
}

} // namespace pyroute
