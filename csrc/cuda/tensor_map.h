// A tensor map: how the copy engine finds its way through an array. Made by the driver on the host, read by the engine
// out of a kernel's arguments; shared by launchers and device code.
#pragma once

#include <stdint.h>

namespace pyroute::cuda {

struct alignas(128) TensorMap { // 64 would do on Hopper; cuda.h says 128 since CUDA 13
    uint64_t opaque[16];
};

} // namespace pyroute::cuda
