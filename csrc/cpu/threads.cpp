#include "cpu/threads.h"

#include "cpu/default_arithmetic.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include <pthread.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyroute::cpu {

namespace {

std::atomic<int> requested_threads{0};

// GNU OpenMP's pool does not survive a fork: a parallel region in the child would wait for threads that are not there.
std::atomic<bool> in_forked_child{false};
const int fork_guard = pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

void run(detail::RangeFunction function, void *context, int64_t begin, int64_t end) {
    const DefaultArithmetic arithmetic;
    function(context, begin, end);
}

// The first exception of any thread; the rest of the work is skipped.
class FirstError {
  public:
    template <class F> void guard(F &&f) noexcept {
        if (failed_.load(std::memory_order_relaxed))
            return;
        try {
            f();
        } catch (...) {
            if (!failed_.exchange(true))
                error_ = std::current_exception();
        }
    }
    void rethrow() const {
        if (error_)
            std::rethrow_exception(error_);
    }

  private:
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

} // namespace

bool threads_available() {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
}

int num_threads() {
    (void)fork_guard;
#if defined(_OPENMP)
    // Inside somebody else's parallel region more threads would only oversubscribe the cores.
    if (in_forked_child.load(std::memory_order_relaxed) || omp_in_parallel())
        return 1;
    const int requested = requested_threads.load(std::memory_order_relaxed);
    return requested > 0 ? requested : omp_get_max_threads();
#else
    return 1;
#endif
}

void set_num_threads(int n) { requested_threads.store(n, std::memory_order_relaxed); }

namespace detail {

void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void *context) {
    if (count <= 0)
        return;
    const int64_t shares = std::min<int64_t>(num_threads(), std::max<int64_t>(1, count / std::max<int64_t>(1, grain)));
    if (shares == 1)
        return run(function, context, 0, count);
#if defined(_OPENMP)
    FirstError error;
#pragma omp parallel for num_threads(static_cast<int>(shares)) schedule(static, 1)
    for (int64_t share = 0; share < shares; ++share) {
        const int64_t begin = count / shares * share + std::min(share, count % shares);
        const int64_t end = begin + count / shares + (share < count % shares ? 1 : 0);
        error.guard([&] { run(function, context, begin, end); });
    }
    error.rethrow();
#endif
}

void parallel_chunks(int64_t count, int64_t chunk, RangeFunction function, void *context) {
    if (count <= 0)
        return;
    chunk = std::max<int64_t>(1, chunk);
    const int64_t chunks = (count - 1) / chunk + 1;
    const int64_t workers = std::min<int64_t>(num_threads(), chunks);
    if (workers == 1) {
        for (int64_t i = 0; i < chunks; ++i)
            run(function, context, i * chunk, std::min(count, (i + 1) * chunk));
        return;
    }
#if defined(_OPENMP)
    FirstError error;
#pragma omp parallel for num_threads(static_cast<int>(workers)) schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; ++i)
        error.guard([&] { run(function, context, i * chunk, std::min(count, (i + 1) * chunk)); });
    error.rethrow();
#endif
}

} // namespace detail
} // namespace pyroute::cpu
