// What Python hands over: addresses as integers, 0 for null. Shapes and types have been judged there.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

#include "cuda/launch.h"

namespace pyroute::cuda {

namespace py = pybind11;

inline Stream stream_of(int device, uintptr_t stream) { return {device, reinterpret_cast<void *>(stream)}; }

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

} // namespace pyroute::cuda
