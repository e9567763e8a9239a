// A tensor map: how the copy engine finds its way through an array. Made by the driver on the host, read by the engine
// out of a kernel's arguments; shared by launchers and device code.
#pragma once

#include <stdint.h>

namespace pyroute::cuda {

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

} // namespace pyroute::cuda
