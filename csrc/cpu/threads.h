// Work over threads. Every kernel gives the same bytes for any number of threads: ranges are disjoint in their outputs
// and no result depends on where a range begins. Bodies run in the default floating-point mode, whatever the caller's.
#pragma once

#include <cstdint>

namespace pyroute::cpu {

int num_threads(); // what the next parallel call will use
void set_num_threads(
    int n);               // n >= 1; until called, OpenMP's own setting holds (OMP_NUM_THREADS, torch.set_num_threads)
bool threads_available(); // built with OpenMP

namespace detail {
using RangeFunction = void (*)(void *context, int64_t begin, int64_t end);
void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void *context);
void parallel_chunks(int64_t count, int64_t chunk, RangeFunction function, void *context);
} // namespace detail

// body(begin, end) over equal contiguous shares of [0, count), one per thread, none shorter than `grain` items: for
// even work. A region costs about 2 us, so choose the grain to hold 20 us of work. An exception in a body reaches the
// caller.
template <class Body> void parallel_ranges(int64_t count, int64_t grain, const Body &body) {
    detail::parallel_ranges(
        count, grain,
        [](void *context, int64_t begin, int64_t end) { (*static_cast<const Body *>(context))(begin, end); },
        const_cast<Body *>(&body));
}

// body(begin, end) over consecutive chunks, handed out in order to whichever thread is free: for uneven work.
template <class Body> void parallel_chunks(int64_t count, int64_t chunk, const Body &body) {
    detail::parallel_chunks(
        count, chunk,
        [](void *context, int64_t begin, int64_t end) { (*static_cast<const Body *>(context))(begin, end); },
        const_cast<Body *>(&body));
}

} // namespace pyroute::cpu
