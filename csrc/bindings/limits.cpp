#include "bindings/arrays.h"

#include "cpu/limits.h"

namespace pyroute {

void bind_limits(py::module_ &module);

namespace {

// The 64-byte aligned part of a byte buffer, in whole blocks.
struct Aligned {
    uint8_t *data;
    int64_t bytes;
};

Aligned aligned_part(const py::array &array, const char *name) {
    input<uint8_t>(array, name, {array.size()});
    const auto address = reinterpret_cast<uintptr_t>(array.data());
    const int64_t skip = static_cast<int64_t>((64 - address % 64) % 64);
    const int64_t bytes = (array.nbytes() - skip) / cpu::limit_block * cpu::limit_block;
    if (bytes <= 0)
        throw std::invalid_argument(std::string("_core: ") + name + " must hold at least 320 bytes");
    return {const_cast<uint8_t *>(static_cast<const uint8_t *>(array.data())) + skip, bytes};
}

int checked_threads(int threads) {
    if (threads < 1 || threads > 1024) // more than the system grants ends the process
        throw std::invalid_argument("_core: threads must be in 1..1024");
    return threads;
}

} // namespace

void bind_limits(py::module_ &module) {
    module.def("compiler", [] {
#if defined(__clang__)
        return "Clang " __clang_version__;
#else
        return "GCC " __VERSION__;
#endif
    });
    module.def(
        "probe_fma",
        [](int64_t rounds, int threads) {
            py::gil_scoped_release release;
            return cpu::fma_flops(rounds, checked_threads(threads));
        },
        py::arg("rounds"), py::arg("threads"));
    module.def(
        "probe_read",
        [](const py::array &source, int threads) {
            const Aligned from = aligned_part(source, "source");
            py::gil_scoped_release release;
            cpu::read_buffer(from.data, from.bytes, checked_threads(threads));
            return from.bytes;
        },
        py::arg("source"), py::arg("threads"));
    module.def(
        "probe_write",
        [](py::array destination, int threads) {
            output<uint8_t>(destination, "destination", {destination.size()});
            const Aligned to = aligned_part(destination, "destination");
            py::gil_scoped_release release;
            cpu::write_buffer(to.data, to.bytes, checked_threads(threads));
            return to.bytes;
        },
        py::arg("destination"), py::arg("threads"));
    module.def(
        "probe_copy",
        [](py::array destination, const py::array &source, int threads) {
            output<uint8_t>(destination, "destination", {source.size()});
            const Aligned to = aligned_part(destination, "destination"), from = aligned_part(source, "source");
            const int64_t bytes = to.bytes < from.bytes ? to.bytes : from.bytes;
            py::gil_scoped_release release;
            cpu::copy_buffer(to.data, from.data, bytes, checked_threads(threads));
            return 2 * bytes;
        },
        py::arg("destination"), py::arg("source"), py::arg("threads"));
}

} // namespace pyroute
