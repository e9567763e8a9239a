// pyroute._cuda: the CUDA floor. One bind_<room>() per room, in the room's own file. Loading it touches no driver.
#include "bindings/cuda/pointers.h"

namespace pyroute::cuda {
void bind_gating(py::module_ &module);
void bind_permutation(py::module_ &module);
void bind_quantization(py::module_ &module);
void bind_grouped_gemm(py::module_ &module);
void bind_moe(py::module_ &module);
} // namespace pyroute::cuda

namespace {

namespace py = pybind11;

// The Python function lives as long as the process: a launch may want it while the interpreter goes down.
void set_image_source(py::function source) {
    auto *kept = new py::function(std::move(source));
    pyroute::cuda::set_image_source([kept](const std::string &room, int capability) {
        const py::gil_scoped_acquire acquire;
        return py::cast<std::string>((*kept)(room, capability)); // bytes
    });
}

} // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    namespace cuda = pyroute::cuda;

    module.doc() = "pyroute's CUDA kernels, launched through the driver";
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown)
                std::rethrow_exception(thrown);
        } catch (const cuda::OutOfMemory &error) {
            PyErr_SetString(PyExc_MemoryError, error.what());
        }
    });

    module.def("num_devices", &cuda::num_devices);
    module.def("driver_version", &cuda::driver_version);
    module.def("why_no_device", &cuda::why_no_device);
    module.def(
        "device_info",
        [](int device) {
            const cuda::DeviceInfo &info = cuda::device_info(device);
            return py::make_tuple(info.name, info.capability, info.num_sms, info.shared_bytes);
        },
        py::arg("device"));
    module.def(
        "launch", // any kernel, for tests and tools: args is its argument struct
        [](int device, uintptr_t stream, const std::string &room, const std::string &kernel, uint32_t blocks,
           uint32_t threads, const py::bytes &args, uint32_t shared_bytes, uint32_t cluster) {
            const std::string_view bytes = args;
            cuda::launch(cuda::stream_of(device, stream), room.c_str(), kernel.c_str(),
                         {blocks, threads, shared_bytes, cluster}, bytes.data(), bytes.size());
        },
        py::arg("device"), py::arg("stream"), py::arg("room"), py::arg("kernel"), py::arg("blocks"), py::arg("threads"),
        py::arg("args"), py::arg("shared_bytes") = 0, py::arg("cluster") = 1);
    module.attr("checks") = cuda::checks();
    module.def("last_kernel", &cuda::last_kernel); // with checks: the one that this thread launched last
    module.def(
        "read", // None while the stream is captured
        [](int device, uintptr_t stream, uintptr_t address, size_t num_bytes) -> py::object {
            std::string content(num_bytes, '\0');
            const auto *from = reinterpret_cast<const void *>(address);
            if (!cuda::read(cuda::stream_of(device, stream), content.data(), from, num_bytes))
                return py::none();
            return py::bytes(content);
        },
        py::arg("device"), py::arg("stream"), py::arg("address"), py::arg("num_bytes"));
    module.def("set_image_source", &set_image_source, py::arg("source"));

    cuda::bind_gating(module);
    cuda::bind_permutation(module);
    cuda::bind_quantization(module);
    cuda::bind_grouped_gemm(module);
    cuda::bind_moe(module);
}
