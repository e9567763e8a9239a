// The entry points: every PYROUTE_KERNEL of the sources that were compiled in.
#pragma once

#include "machine.h"

namespace emulator {

struct Registration {
    explicit Registration(const Kernel &kernel);
};

const Kernel *find_kernel(const char *name); // null: there is none

} // namespace emulator
