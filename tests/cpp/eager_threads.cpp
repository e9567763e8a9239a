// cpu/threads.h for the fuzz tests, linked in place of csrc/cpu/threads.cpp (which has its own test): every range is
// cut into as many shares as there are threads, however short it is, so that small cases exercise the cuts.
//
// Under the thread sanitizer each share has a std::thread, which that sanitizer understands; GNU OpenMP's barriers it
// does not see. Otherwise the shares run one after the other, the last one first: ten times faster than starting
// threads, and the same in every run.
#include "cpu/threads.h"

#include "cpu/default_arithmetic.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace pyroute::cpu {

namespace {

int requested_threads = 1;
thread_local bool inside = false;

struct Inside {
    Inside() { inside = true; }
    ~Inside() { inside = false; }
};

void work(detail::RangeFunction function, void *context, int64_t begin, int64_t end) {
    const DefaultArithmetic arithmetic;
    function(context, begin, end);
}

template <class Share> void run_share(const Share &share, int64_t i) {
    const Inside here;
    share(i);
}

template <class Share> void run(int64_t shares, const Share &share) {
#if defined(__SANITIZE_THREAD__)
    std::vector<std::thread> threads;
    std::vector<std::exception_ptr> errors(static_cast<size_t>(shares));
    for (int64_t i = 0; i < shares; ++i)
        threads.emplace_back([&, i] {
            try {
                run_share(share, i);
            } catch (...) {
                errors[static_cast<size_t>(i)] = std::current_exception();
            }
        });
    for (std::thread &thread : threads)
        thread.join();
    for (const std::exception_ptr &error : errors)
        if (error)
            std::rethrow_exception(error);
#else
    for (int64_t i = shares; i-- > 0;)
        run_share(share, i);
#endif
}

} // namespace

bool threads_available() { return true; }
int num_threads() { return inside ? 1 : requested_threads; }
void set_num_threads(int n) { requested_threads = n; }

namespace detail {

void parallel_ranges(int64_t count, int64_t, RangeFunction function, void *context) {
    const int64_t shares = std::min<int64_t>(num_threads(), count);
    if (shares > 1)
        run(shares, [&](int64_t i) { work(function, context, count * i / shares, count * (i + 1) / shares); });
    else if (count > 0)
        work(function, context, 0, count);
}

// No chunk is longer than `chunk`; on several threads most are shorter.
void parallel_chunks(int64_t count, int64_t chunk, RangeFunction function, void *context) {
    const int64_t workers = num_threads();
    chunk = std::max<int64_t>(1, workers == 1 ? chunk : std::min(chunk, count / (3 * workers)));
    const int64_t chunks = (count + chunk - 1) / chunk, shares = std::min(workers, chunks);
    const auto share = [&](int64_t i) {
        for (int64_t c = i; c < chunks; c += shares)
            work(function, context, c * chunk, std::min(count, (c + 1) * chunk));
    };
    if (shares > 1)
        run(shares, share);
    else if (shares == 1)
        share(0);
}

} // namespace detail
} // namespace pyroute::cpu
