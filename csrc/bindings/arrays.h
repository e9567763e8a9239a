// NumPy arrays as pointers. The Python layer has already judged the caller's arguments; what is checked here keeps
// memory safe even when the extension is called directly. py::array with explicit checks costs 0.3 us for four
// arguments, py::array_t 1 us (and converts silently, which loses writes to outputs).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "float_type.h"

namespace pyroute {

namespace py = pybind11;

// The float type of an array. bfloat16 comes as ml_dtypes' extension type, which NumPy sees as two bytes of kind V.
inline FloatType float_type(const py::array &array, const char *name) {
    const char kind = array.dtype().kind();
    const auto size = array.itemsize();
    if (kind == 'f' && size == 4)
        return FloatType::float32;
    if (kind == 'f' && size == 8)
        return FloatType::float64;
    if (kind == 'f' && size == 2)
        return FloatType::float16;
    if (kind == 'V' && size == 2)
        return FloatType::bfloat16;
    throw std::invalid_argument(std::string("_core: ") + name + " must be float32, bfloat16, float16 or float64");
}

namespace detail {
inline void check_array(const py::array &array, const char *name, size_t item_size, size_t alignment,
                        std::initializer_list<int64_t> shape) {
    // bit 0: items are pointers to Python objects, which raw bytes would turn into wild ones
    const bool plain = (array.dtype().flags() & 1) == 0;
    bool ok = plain && static_cast<size_t>(array.itemsize()) == item_size && (array.flags() & py::array::c_style) &&
              array.ndim() == static_cast<py::ssize_t>(shape.size()) &&
              reinterpret_cast<uintptr_t>(array.data()) % alignment == 0;
    py::ssize_t axis = 0;
    if (ok)
        for (int64_t extent : shape)
            ok = array.shape(axis++) == extent && ok;
    if (!ok) {
        std::string expected;
        for (int64_t extent : shape)
            expected += (expected.empty() ? "" : ", ") + std::to_string(extent);
        throw std::invalid_argument(std::string("_core: ") + name +
                                    " must be an aligned C-contiguous array of shape (" + expected +
                                    ") with items of " + std::to_string(item_size) + " bytes");
    }
}

inline void check_writeable(const py::array &array, const char *name) {
    if (!array.writeable())
        throw std::invalid_argument(std::string("_core: ") + name + " must be writeable");
}
} // namespace detail

// T* of an array that must have exactly this shape.
template <class T> const T *input(const py::array &array, const char *name, std::initializer_list<int64_t> shape) {
    detail::check_array(array, name, sizeof(T), alignof(T), shape);
    return static_cast<const T *>(array.data());
}

template <class T> T *output(py::array &array, const char *name, std::initializer_list<int64_t> shape) {
    detail::check_array(array, name, sizeof(T), alignof(T), shape);
    detail::check_writeable(array, name);
    return static_cast<T *>(array.mutable_data());
}

// The same without a C++ type: of the array's own item size, aligned to `alignment` bytes.
inline const void *bytes_input(const py::array &array, const char *name, size_t alignment,
                               std::initializer_list<int64_t> shape) {
    detail::check_array(array, name, static_cast<size_t>(array.itemsize()), alignment, shape);
    return array.data();
}

inline void *bytes_output(py::array &array, const char *name, size_t alignment, std::initializer_list<int64_t> shape) {
    detail::check_array(array, name, static_cast<size_t>(array.itemsize()), alignment, shape);
    detail::check_writeable(array, name);
    return array.mutable_data();
}

// A float array of any FloatType.
inline const void *float_input(const py::array &array, const char *name, std::initializer_list<int64_t> shape) {
    return bytes_input(array, name, static_cast<size_t>(array.itemsize()), shape);
}

inline void *float_output(py::array &array, const char *name, std::initializer_list<int64_t> shape) {
    return bytes_output(array, name, static_cast<size_t>(array.itemsize()), shape);
}

inline py::array array_of(const py::object &object, const char *name) {
    if (!py::isinstance<py::array>(object))
        throw py::type_error(std::string("_core: ") + name + " must be an array");
    return py::reinterpret_borrow<py::array>(object);
}

// The same for optional arguments: None is a null pointer.
template <class T>
const T *optional_input(const py::object &object, const char *name, std::initializer_list<int64_t> shape) {
    return object.is_none() ? nullptr : input<T>(array_of(object, name), name, shape);
}

template <class T>
T *optional_output(const py::object &object, const char *name, std::initializer_list<int64_t> shape) {
    if (object.is_none())
        return nullptr;
    auto array = array_of(object, name);
    return output<T>(array, name, shape);
}

} // namespace pyroute
