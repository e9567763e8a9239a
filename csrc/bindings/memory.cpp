// NumPy arrays in memory that is handed out again (cpu/memory.h). NumPy takes its memory from a handler (NEP 49) that
// each array remembers: an array made here owns its data, may be resized, and gives its block back when it goes.
#include "bindings/memory.h"

#include <cstring>

#include "cpu/memory.h"

namespace pyroute {

void bind_memory(py::module_ &module);

namespace {

void *take(void *, size_t bytes) { return cpu::take_block(bytes); }
void *take_zeroed(void *, size_t count, size_t size) {
    if (size > 0 && count > SIZE_MAX / size)
        return nullptr;
    void *block = cpu::take_block(count * size);
    return block ? std::memset(block, 0, count * size) : nullptr;
}
void *resize(void *, void *block, size_t bytes) {
    void *const larger = cpu::take_block(bytes);
    if (larger && block) {
        const size_t held = cpu::block_bytes(block);
        std::memcpy(larger, block, held < bytes ? held : bytes);
        cpu::give_block(block);
    }
    return larger;
}
void give(void *, void *block, size_t) { cpu::give_block(block); }

// PyDataMem_Handler of numpy/ndarraytypes.h, version 1.
struct Handler {
    char name[127];
    uint8_t version;
    struct {
        void *context;
        void *(*malloc)(void *, size_t);
        void *(*calloc)(void *, size_t, size_t);
        void *(*realloc)(void *, void *, size_t);
        void (*free)(void *, void *, size_t);
    } allocator;
} handler = {"pyroute", 1, {nullptr, take, take_zeroed, resize, give}};

// What is used of NumPy's C interface; the numbers are those of its stable ABI.
struct NumPy {
    NumPy() {
        const py::object api = py::detail::import_numpy_core_submodule("_multiarray_umath").attr("_ARRAY_API");
        void **table = static_cast<void **>(PyCapsule_GetPointer(api.ptr(), nullptr));
        if (!table)
            throw py::error_already_set();
        array_type = static_cast<PyTypeObject *>(table[2]);
        new_from_descr = reinterpret_cast<decltype(new_from_descr)>(table[94]);
        to_descr = reinterpret_cast<decltype(to_descr)>(table[174]);
        set_handler = reinterpret_cast<decltype(set_handler)>(table[304]);
        pooled = PyCapsule_New(&handler, "mem_handler", nullptr);
        if (!pooled)
            throw py::error_already_set();
    }
    PyTypeObject *array_type;
    PyObject *(*new_from_descr)(PyTypeObject *, PyObject *, int, const Py_ssize_t *, const Py_ssize_t *, void *, int,
                                PyObject *);
    int (*to_descr)(PyObject *, PyObject **);
    PyObject *(*set_handler)(PyObject *);
    PyObject *pooled;
};
NumPy *numpy; // set when the module is loaded, never freed: arrays outlive modules

constexpr Py_ssize_t most_axes = 32;

// Bytes of the array, or 0 where only NumPy knows what to say.
size_t bytes_of(const Py_ssize_t *shape, Py_ssize_t axes, size_t item_size) {
    size_t bytes = item_size;
    for (Py_ssize_t i = 0; i < axes; ++i)
        if (shape[i] < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(shape[i]), &bytes))
            return 0;
    return bytes;
}

// The array, or null with an exception set; takes the reference to `descr`.
PyObject *array_of_descr(PyObject *descr, Py_ssize_t axes, const Py_ssize_t *shape) {
    const auto item_size = static_cast<size_t>(py::reinterpret_borrow<py::dtype>(descr).itemsize());
    const bool pooled = bytes_of(shape, axes, item_size) >= cpu::smallest_kept_block &&
                        (py::reinterpret_borrow<py::dtype>(descr).flags() & 1) == 0; // no Python objects
    PyObject *const before = pooled ? numpy->set_handler(numpy->pooled) : nullptr;
    if (pooled && !before) {
        Py_DECREF(descr);
        return nullptr;
    }
    PyObject *const array =
        numpy->new_from_descr(numpy->array_type, descr, static_cast<int>(axes), shape, nullptr, nullptr, 0, nullptr);
    if (before) { // this thread's handler, which a failure above leaves an exception beside
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        Py_XDECREF(numpy->set_handler(before));
        Py_DECREF(before);
        PyErr_Restore(type, value, traceback);
    }
    return array;
}

// empty(shape, dtype): numpy.empty, for a tuple or list of integers and anything that is a dtype.
PyObject *empty(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count != 2 || !(PyTuple_CheckExact(args[0]) || PyList_CheckExact(args[0]))) {
        PyErr_SetString(PyExc_TypeError, "_core: empty takes a tuple or list of extents and a dtype");
        return nullptr;
    }
    const Py_ssize_t axes = PySequence_Fast_GET_SIZE(args[0]);
    Py_ssize_t shape[most_axes];
    if (axes > most_axes) {
        PyErr_SetString(PyExc_ValueError, "_core: empty takes at most 32 axes");
        return nullptr;
    }
    for (Py_ssize_t i = 0; i < axes; ++i) {
        shape[i] = PyNumber_AsSsize_t(PySequence_Fast_GET_ITEM(args[0], i), PyExc_OverflowError);
        if (shape[i] == -1 && PyErr_Occurred())
            return nullptr;
    }
    PyObject *descr = nullptr; // new_from_descr takes the reference
    if (!numpy->to_descr(args[1], &descr))
        return nullptr;
    return array_of_descr(descr, axes, shape);
}
PyMethodDef methods[] = {
    {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

} // namespace

py::array empty_array(const py::dtype &type, const std::vector<py::ssize_t> &shape) {
    PyObject *const array = array_of_descr(type.inc_ref().ptr(), static_cast<Py_ssize_t>(shape.size()), shape.data());
    if (!array)
        throw py::error_already_set();
    return py::reinterpret_steal<py::array>(array);
}

void bind_memory(py::module_ &module) {
    if (!numpy)
        numpy = new NumPy;
    if (PyModule_AddFunctions(module.ptr(), methods) < 0)
        throw py::error_already_set();
    module.def("memory_info", [] {
        const cpu::MemoryInfo info = cpu::memory_info();
        return py::make_tuple(info.in_use, info.kept, info.limit, info.fresh, info.recycled);
    });
    module.def(
        "set_memory_limit",
        [](int64_t bytes) {
            if (bytes < 0)
                throw std::invalid_argument("_core: a limit must be at least 0");
            py::gil_scoped_release release;
            cpu::set_memory_limit(bytes);
        },
        py::arg("bytes"));
    module.def("release_memory", [] {
        py::gil_scoped_release release;
        return cpu::release_memory();
    });
    module.def("set_memory_fill", &cpu::set_memory_fill, py::arg("byte"));
}

} // namespace pyroute
