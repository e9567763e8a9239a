// The question that each argument is asked on every call, answered in 0.1 us instead of 1: is this array plainly what
// the contract wants? "No" only means that Python looks closer, so that nothing here needs an error sentence.
#include "bindings/arrays.h"

#include <vector>

namespace pyroute {

void bind_checks(py::module_ &module);

namespace {

// NumPy keeps one object for each of its types, and so does ml_dtypes: arrays of another object of the same type are
// legal, and answered "no".
struct NamedType {
    PyObject *descr, *name;
};
std::vector<NamedType> &named_types() {
    static std::vector<NamedType> &types = *new std::vector<NamedType>;
    return types;
}
PyObject *int64_descr;

void name_dtypes(const py::dict &names) {
    named_types().clear();
    for (const auto &item : names) {
        named_types().push_back({item.first.inc_ref().ptr(), item.second.inc_ref().ptr()});
        if (item.second.cast<std::string>() == "int64")
            int64_descr = item.first.ptr();
    }
}

using Array = const py::detail::PyArray_Proxy;

Array *plain_array(PyObject *object) {
    if (Py_TYPE(object) != py::detail::npy_api::get().PyArray_Type_)
        return nullptr;
    Array *array = py::detail::array_proxy(object);
    constexpr int plain = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    return (array->flags & plain) == plain ? array : nullptr;
}

// Names are compared as objects: those in Python's source are interned.
bool type_is_among(PyObject *descr, PyObject *names) {
    const Py_ssize_t count = PyTuple_GET_SIZE(names);
    if (count == 0)
        return true;
    for (const NamedType &type : named_types())
        if (type.descr == descr) {
            for (Py_ssize_t i = 0; i < count; ++i)
                if (PyTuple_GET_ITEM(names, i) == type.name)
                    return true;
            return false;
        }
    return false;
}

// Axes as _check.Axis: (name, extent or None).
bool shape_is(Array *array, PyObject *axes) {
    if (PyTuple_GET_SIZE(axes) != array->nd)
        return false;
    for (int i = 0; i < array->nd; ++i) {
        PyObject *const axis = PyTuple_GET_ITEM(axes, i);
        if (!PyTuple_CheckExact(axis) || PyTuple_GET_SIZE(axis) != 2)
            return false;
        PyObject *const extent = PyTuple_GET_ITEM(axis, 1);
        if (extent == Py_None)
            continue;
        if (!PyLong_CheckExact(extent))
            return false;
        int overflow = 0;
        const long long wanted = PyLong_AsLongLongAndOverflow(extent, &overflow);
        if (overflow || wanted != array->dimensions[i])
            return false;
    }
    return true;
}

// is_plain(x, dtypes, axes): a C-contiguous, aligned numpy.ndarray itself, of one of these types (any, if there are
// none), with these axes (None: any).
PyObject *is_plain(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count != 3 || !PyTuple_CheckExact(args[1]) || !(args[2] == Py_None || PyTuple_CheckExact(args[2])))
        Py_RETURN_FALSE;
    Array *array = plain_array(args[0]);
    if (array && type_is_among(array->descr, args[1]) && (args[2] == Py_None || shape_is(array, args[2])))
        Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

// are_offsets(x, num_rows, num_experts or None): plain int64 [num_experts + 1], from 0, not decreasing, to num_rows at
// most.
PyObject *are_offsets(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Array *array = count == 3 ? plain_array(args[0]) : nullptr;
    if (!array || array->descr != int64_descr || array->nd != 1 || array->dimensions[0] < 2 ||
        !PyLong_CheckExact(args[1]) || !(args[2] == Py_None || PyLong_CheckExact(args[2])))
        Py_RETURN_FALSE;
    const auto size = static_cast<int64_t>(array->dimensions[0]);
    const auto *offsets = reinterpret_cast<const int64_t *>(array->data);
    int overflow = 0, other = 0;
    const long long num_rows = PyLong_AsLongLongAndOverflow(args[1], &overflow);
    const long long num_experts = args[2] == Py_None ? size - 1 : PyLong_AsLongLongAndOverflow(args[2], &other);
    bool ok = !overflow && !other && num_experts == size - 1 && offsets[0] == 0 && offsets[size - 1] <= num_rows;
    for (int64_t i = 1; i < size && ok; ++i)
        ok = offsets[i] >= offsets[i - 1];
    return PyBool_FromLong(ok);
}

// is_output(out, dtype, axes, inputs): plain and writeable, of this very dtype and with these axes, and before or
// behind every input in memory. Inputs that are not arrays do not count.
PyObject *is_output(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count != 4 || !PyTuple_CheckExact(args[2]) || !PyTuple_CheckExact(args[3]))
        Py_RETURN_FALSE;
    Array *out = plain_array(args[0]);
    if (!out || out->descr != args[1] || !(out->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) ||
        !shape_is(out, args[2]))
        Py_RETURN_FALSE;
    const auto bytes_of = [](Array *array) {
        int64_t bytes = py::reinterpret_borrow<py::dtype>(array->descr).itemsize();
        for (int i = 0; i < array->nd; ++i)
            bytes *= array->dimensions[i];
        return bytes;
    };
    const int64_t out_bytes = bytes_of(out);
    PyTypeObject *const array_type = py::detail::npy_api::get().PyArray_Type_;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[3]); ++i) {
        PyObject *const input = PyTuple_GET_ITEM(args[3], i);
        if (Array *array = plain_array(input)) {
            if (array->data < out->data + out_bytes && out->data < array->data + bytes_of(array))
                Py_RETURN_FALSE;
        } else if (PyObject_TypeCheck(input, array_type)) {
            Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
}

template <class Function> PyCFunction method(Function *function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
PyMethodDef methods[] = {
    {"is_plain", method(is_plain), METH_FASTCALL, nullptr},
    {"is_output", method(is_output), METH_FASTCALL, nullptr},
    {"are_offsets", method(are_offsets), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

} // namespace

void bind_checks(py::module_ &module) {
    module.def("name_dtypes", &name_dtypes, py::arg("names"));
    py::detail::npy_api::get();
    if (PyModule_AddFunctions(module.ptr(), methods) < 0)
        throw py::error_already_set();
}

} // namespace pyroute
