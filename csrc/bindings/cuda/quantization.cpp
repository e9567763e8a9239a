#include "cuda/quantization.h"
#include "bindings/cuda/pointers.h"

#include <pybind11/stl.h>

namespace pyroute::cuda {

void bind_quantization(py::module_ &module);

namespace {

using Shape = std::array<int64_t, 3>; // num_matrices, rows, cols
using Block = std::pair<int64_t, int64_t>;

Fp8Blocks blocks_of(const Shape &shape, const Block &block, const std::string &format, uintptr_t expert_offsets,
                    int64_t num_experts) {
    Fp8Blocks blocks{};
    blocks.num_matrices = shape[0], blocks.rows = shape[1], blocks.cols = shape[2];
    blocks.block_rows = block.first, blocks.block_cols = block.second;
    blocks.expert_offsets = pointer<const int64_t>(expert_offsets);
    blocks.num_segments = expert_offsets ? num_experts : 1;
    blocks.format = format == "e4m3" ? Fp8Format::e4m3 : Fp8Format::e5m2;
    return blocks;
}

} // namespace

void bind_quantization(py::module_ &module) {
    module.def(
        "quantize_fp8",
        [](int device, uintptr_t stream, uintptr_t x, int x_type, const Shape &shape, const Block &block,
           const std::string &format, bool power_of_two, uintptr_t expert_offsets, int64_t num_experts,
           int64_t scale_rows, uintptr_t codes, uintptr_t scales, bool segments_only) {
            QuantizeFp8Args args{};
            args.blocks = blocks_of(shape, block, format, expert_offsets, num_experts);
            args.x_type = static_cast<FloatType>(x_type);
            args.x = pointer<const void>(x);
            args.power_of_two = power_of_two;
            args.codes = pointer<uint8_t>(codes);
            args.scales = pointer<float>(scales);
            quantize_fp8(stream_of(device, stream), args, scale_rows, segments_only);
        },
        py::arg("device"), py::arg("stream"), py::arg("x"), py::arg("x_type"), py::arg("shape"), py::arg("block"),
        py::arg("format"), py::arg("power_of_two"), py::arg("expert_offsets"), py::arg("num_experts"),
        py::arg("scale_rows"), py::arg("codes"), py::arg("scales"), py::arg("segments_only") = false);
    module.def(
        "dequantize_fp8",
        [](int device, uintptr_t stream, uintptr_t codes, uintptr_t scales, const Shape &shape, const Block &block,
           const std::string &format, uintptr_t expert_offsets, int64_t num_experts, int64_t scale_rows, uintptr_t out,
           int out_type) {
            DequantizeFp8Args args{};
            args.blocks = blocks_of(shape, block, format, expert_offsets, num_experts);
            args.codes = pointer<const uint8_t>(codes);
            args.scales = pointer<const float>(scales);
            args.out_type = static_cast<FloatType>(out_type);
            args.out = pointer<void>(out);
            dequantize_fp8(stream_of(device, stream), args, scale_rows);
        },
        py::arg("device"), py::arg("stream"), py::arg("codes"), py::arg("scales"), py::arg("shape"), py::arg("block"),
        py::arg("format"), py::arg("expert_offsets"), py::arg("num_experts"), py::arg("scale_rows"), py::arg("out"),
        py::arg("out_type"));
    module.def(
        "transpose",
        [](int device, uintptr_t stream, uintptr_t from, const Shape &shape, int64_t item_bytes, int64_t pitch,
           uintptr_t to) {
            transpose(stream_of(device, stream),
                      {shape[0], shape[1], shape[2], pitch, pointer<const void>(from), pointer<void>(to)}, item_bytes);
        },
        py::arg("device"), py::arg("stream"), py::arg("from"), py::arg("shape"), py::arg("item_bytes"),
        py::arg("pitch"), py::arg("to"));
}

} // namespace pyroute::cuda
