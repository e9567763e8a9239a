// Every item of a range is visited once, by any number of threads; exceptions arrive; nested regions do not multiply.
#include <atomic>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cpu/threads.h"

using namespace pyroute::cpu;

static void visits_everything_once() {
    for (int threads : {1, 2, 3, 7, 16}) {
        set_num_threads(threads);
        for (int64_t count : {0, 1, 2, 3, 15, 16, 17, 1000})
            for (int64_t grain : {1, 3, 64, 5000}) {
                std::vector<std::atomic<int>> seen(static_cast<size_t>(count) + 1);
                const auto visit = [&](int64_t begin, int64_t end) {
                    CHECK(0 <= begin && begin < end && end <= count);
                    for (int64_t i = begin; i < end; ++i)
                        ++seen[static_cast<size_t>(i)];
                };
                parallel_ranges(count, grain, visit);
                parallel_chunks(count, grain, visit);
                for (int64_t i = 0; i < count; ++i)
                    CHECK(seen[static_cast<size_t>(i)] == 2);
            }
    }
}

static void exceptions_reach_the_caller() {
    for (int threads : {1, 4}) {
        set_num_threads(threads);
        bool caught = false;
        try {
            parallel_chunks(100, 1, [](int64_t begin, int64_t) {
                if (begin == 57)
                    throw std::runtime_error("57");
            });
        } catch (const std::runtime_error &) {
            caught = true;
        }
        CHECK(caught);
    }
}

static void nested_regions_stay_serial() {
    set_num_threads(4);
    parallel_ranges(4, 1, [](int64_t, int64_t) {
        if (threads_available())
            CHECK(num_threads() == 1);
        std::atomic<int64_t> sum{0};
        parallel_ranges(10, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
        CHECK(sum == 10);
    });
}

int main() {
    visits_everything_once();
    exceptions_reach_the_caller();
    nested_regions_stay_serial();
}
