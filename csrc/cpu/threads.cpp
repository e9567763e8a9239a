#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include <pthread.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyroute::cpu {

namespace {

std::atomic<int> requested_threads{0};

// GNU OpenMP's pool does not survive a fork: a parallel region in the child would wait for threads that are not there.
std::atomic<bool> in_forked_child{false};
const int fork_guard = pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

// Arithmetic as IEEE 754 has it by default while it lives: to nearest, subnormals kept, nothing trapped. A thread's
// mode is otherwise what its caller or its creator left: libraries built with -ffast-math have subnormals flushed from
// their import on, torch.set_flush_denormal does so on purpose, and feenableexcept ends the process at the first NaN.
class DefaultArithmetic {
  public:
    DefaultArithmetic() {
        if (differs(mode_))
            set((mode_ & ~control) | by_default);
    }
    ~DefaultArithmetic() {
        if (differs(mode_))
            set(mode_);
    }
    DefaultArithmetic(const DefaultArithmetic &) = delete;
    DefaultArithmetic &operator=(const DefaultArithmetic &) = delete;

  private:
#if defined(__SSE2__)
    using Mode = unsigned;
    static constexpr Mode control = 0xffc0, by_default = 0x1f80;
    static Mode get() { return _mm_getcsr(); }
    static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
    using Mode = uint64_t;
    static constexpr Mode control = ~Mode{0}, by_default = 0;
    static Mode get() {
        Mode mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
    using Mode = unsigned;
    static constexpr Mode control = 0, by_default = 0;
    static Mode get() { return 0; }
    static void set(Mode) {}
#endif
    static bool differs(Mode mode) { return (mode & control) != by_default; }
    const Mode mode_ = get();
};

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
