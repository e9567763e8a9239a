// Fetching into L2 what a thread will pack next, a few lines at a time between its tiles.
#pragma once

#include "cpu/grouped_gemm.h"
#include "cpu/lanes.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

class Fetch {
  public:
    Fetch(const NextRead &next, int64_t calls)
        : next_(next), lines_per_row_((next.row_bytes + (begins_lines(next) ? 63 : 126)) / 64),
          lines_per_call_((next.num_rows * lines_per_row_ + calls - 1) / calls) {}

    __attribute__((always_inline)) void operator()() {
        for (int64_t i = 0; i < lines_per_call_ && row_ < next_.num_rows; ++i) {
            const int64_t byte = line_ * 64, last = next_.row_bytes - 1;
            __builtin_prefetch(next_.data + row_ * next_.row_stride + (byte < last ? byte : last), 0, 2);
            if (++line_ == lines_per_row_) {
                line_ = 0;
                ++row_;
            }
        }
    }

  private:
    // A row that begins inside a line ends in one more: a panel of 48 float32 columns at 16 bytes past a line is four
    // lines a row, not three, and dgrad over 2816 with 48 rows took 1.28 times as long without the fourth.
    static bool begins_lines(const NextRead &next) {
        return (reinterpret_cast<uintptr_t>(next.data) | static_cast<uintptr_t>(next.row_stride)) % 64 == 0;
    }

    const NextRead &next_;
    int64_t lines_per_row_, lines_per_call_, row_ = 0, line_ = 0;
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA
