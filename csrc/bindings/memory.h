// What a call holds while it works: outputs that come from recycled memory, and the GIL, if the work is short.
#pragma once

#include <optional>
#include <vector>

#include "bindings/arrays.h"

namespace pyroute {

// An array that is not filled, as numpy.empty makes it; from 64 KiB on in recycled memory.
py::array empty_array(const py::dtype &type, const std::vector<py::ssize_t> &shape);

// Other Python threads run during work of 20 us and more. Less is done before they would be awake, and whoever gave the
// GIL away may wait 5 ms, the interpreter's switch interval, to have it back.
class ReleaseGil {
  public:
    explicit ReleaseGil(int64_t nanoseconds) {
        if (nanoseconds >= 20'000)
            release_.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> release_;
};

} // namespace pyroute
