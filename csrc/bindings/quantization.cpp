#include "bindings/arrays.h"

namespace pyroute {
void bind_quantization(py::module_ &module);
void bind_quantization(py::module_ &) {}
} // namespace pyroute
