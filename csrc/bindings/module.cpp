// pyroute._core: the CPU floor. One bind_<room>() per room, in the room's own file.
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace pyroute {
void bind_gating(py::module_ &module);
void bind_permutation(py::module_ &module);
void bind_quantization(py::module_ &module);
void bind_grouped_gemm(py::module_ &module);
void bind_moe(py::module_ &module);
void bind_moe_layer(py::module_ &module);
void bind_limits(py::module_ &module);
void bind_memory(py::module_ &module);
void bind_checks(py::module_ &module);
} // namespace pyroute

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
    using pyroute::cpu::Isa;
    constexpr Isa all[] = {Isa::scalar, Isa::avx2, Isa::avx512};

    module.doc() = "pyroute's CPU kernels";
    module.def("isa", [] { return pyroute::cpu::isa_name(pyroute::cpu::current_isa()); });
    module.def("isas", [all] {
        py::list names;
        for (Isa isa : all)
            if (pyroute::cpu::isa_available(isa))
                names.append(pyroute::cpu::isa_name(isa));
        return names;
    });
    module.def(
        "set_isa",
        [all](const std::string &name) {
            for (Isa isa : all)
                if (name == pyroute::cpu::isa_name(isa) && pyroute::cpu::isa_available(isa))
                    return pyroute::cpu::set_isa(isa);
            throw std::invalid_argument("set_isa: this CPU has no instruction set named " + name);
        },
        py::arg("name"));
    module.def("num_threads", &pyroute::cpu::num_threads);
    module.def("set_num_threads", &pyroute::cpu::set_num_threads, py::arg("n"));
    module.def("threads_available", &pyroute::cpu::threads_available);

    pyroute::bind_gating(module);
    pyroute::bind_permutation(module);
    pyroute::bind_quantization(module);
    pyroute::bind_grouped_gemm(module);
    pyroute::bind_moe(module);
    pyroute::bind_moe_layer(module);
    pyroute::bind_limits(module);
    pyroute::bind_memory(module);
    pyroute::bind_checks(module);
}
