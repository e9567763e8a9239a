#include "bindings/cuda/pointers.h"

namespace pyroute::cuda {

void bind_quantization(py::module_ &module);

void bind_quantization(py::module_ & /*module*/) {}

} // namespace pyroute::cuda
