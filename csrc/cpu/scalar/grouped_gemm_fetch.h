// Fetching into L2 what a thread will pack next, a few lines at a time between its tiles.
#pragma once

#include "cpu/grouped_gemm.h"
#include "cpu/lanes.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

class Fetch {
  public:
    Fetch(const NextRead &next, int64_t calls)
        : next_(next), lines_per_row_((next.row_bytes + 63) / 64),
          lines_per_call_((next.num_rows * lines_per_row_ + calls - 1) / calls) {}

    __attribute__((always_inline)) void operator()() {
        for (int64_t i = 0; i < lines_per_call_ && row_ < next_.num_rows; ++i) {
            __builtin_prefetch(next_.data + row_ * next_.row_stride + line_ * 64, 0, 2);
            if (++line_ == lines_per_row_) {
                line_ = 0;
                ++row_;
            }
        }
    }

  private:
    const NextRead &next_;
    int64_t lines_per_row_, lines_per_call_, row_ = 0, line_ = 0;
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
