#include "cuda/permutation.h"
#include "bindings/cuda/pointers.h"

namespace pyroute::cuda {

void bind_permutation(py::module_ &module);

namespace {

void permute_of(int device, uintptr_t stream, uintptr_t x, uintptr_t row_to_token, int64_t num_rows, int64_t row_bytes,
                uintptr_t rows) {
    PermuteArgs args = {};
    args.maps.num_rows = num_rows;
    args.maps.row_to_token = pointer<const int32_t>(row_to_token);
    args.row_bytes = row_bytes;
    args.x = pointer<const uint8_t>(x);
    args.rows = pointer<uint8_t>(rows);
    permute(stream_of(device, stream), args);
}

} // namespace

void bind_permutation(py::module_ &module) {
    module.def("permute", &permute_of, py::arg("device"), py::arg("stream"), py::arg("x"), py::arg("row_to_token"),
               py::arg("num_rows"), py::arg("row_bytes"), py::arg("rows"));
}

} // namespace pyroute::cuda
