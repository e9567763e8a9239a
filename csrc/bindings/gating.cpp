#include "bindings/arrays.h"

namespace pyroute {
void bind_gating(py::module_ &module);
void bind_gating(py::module_ &) {}
} // namespace pyroute
