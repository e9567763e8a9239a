#include "cpu/limits.h"

#include <atomic>

#include "cpu/threads.h"

namespace pyroute::cpu {

double fma_flops(int64_t rounds, int threads) {
    const LimitKernels &kernels = current_limit_kernels();
    std::atomic<int64_t> done{0};
    std::atomic<float> sink{0.0f};
    parallel_ranges(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t share = begin; share < end; ++share) {
            sink.store(kernels.fma(rounds, static_cast<float>(share)), std::memory_order_relaxed);
            done.fetch_add(rounds, std::memory_order_relaxed);
        }
    });
    return static_cast<double>(done.load()) * kernels.flops_per_round;
}

// A share is a whole number of blocks, so shares keep the buffer's alignment.
uint64_t read_buffer(const uint8_t *from, int64_t bytes, int threads) {
    const LimitKernels &kernels = current_limit_kernels();
    const int64_t blocks = bytes / limit_block;
    std::atomic<uint64_t> sum{0};
    parallel_ranges(blocks, (blocks - 1) / threads + 1, [&](int64_t begin, int64_t end) {
        sum.fetch_add(kernels.read(from + begin * limit_block, (end - begin) * limit_block), std::memory_order_relaxed);
    });
    return sum.load();
}

void write_buffer(uint8_t *to, int64_t bytes, int threads) {
    const LimitKernels &kernels = current_limit_kernels();
    const int64_t blocks = bytes / limit_block;
    parallel_ranges(blocks, (blocks - 1) / threads + 1, [&](int64_t begin, int64_t end) {
        kernels.write(to + begin * limit_block, (end - begin) * limit_block);
    });
}

void copy_buffer(uint8_t *to, const uint8_t *from, int64_t bytes, int threads) {
    const LimitKernels &kernels = current_limit_kernels();
    const int64_t blocks = bytes / limit_block;
    parallel_ranges(blocks, (blocks - 1) / threads + 1, [&](int64_t begin, int64_t end) {
        const int64_t offset = begin * limit_block;
        kernels.copy(to + offset, from + offset, (end - begin) * limit_block);
    });
}

} // namespace pyroute::cpu
