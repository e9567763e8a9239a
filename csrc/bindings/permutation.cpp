#include "bindings/arrays.h"

namespace pyroute {
void bind_permutation(py::module_ &module);
void bind_permutation(py::module_ &) {}
} // namespace pyroute
