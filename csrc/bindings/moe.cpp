#include "bindings/arrays.h"

namespace pyroute {
void bind_moe(py::module_ &module);
void bind_moe(py::module_ &) {}
} // namespace pyroute
