// Cutting the products of few rows into tasks: runs of columns, each one stretch of memory of about the same size,
// claimed by whichever thread is free. A thread claims its next task before it computes the one at hand and has the
// kernel fetch it meanwhile.
#include "cpu/grouped_gemm_decode.h"

#include <algorithm>
#include <atomic>

#include "cpu/threads.h"

namespace pyroute::cpu {
namespace {

constexpr int64_t task_bytes = 128 << 10;  // of weights: 10 us of reading; twice that for a single row
constexpr int64_t share_bytes = 256 << 10; // below that a thread is not worth waking

} // namespace

bool DecodeBatch::add(const PanelSource &x, const PanelSource &y, int64_t num_rows, int64_t num_cols, void *out,
                      ElementType out_type) {
    if (num_rows > decode_rows || num_cols == 0 || y.columns || x.columns || (y.scales && !y.keeps_scales))
        return false;
    if (count_ == capacity)
        run();
    Entry &entry = entries_[count_];
    entry.product = {x, y, num_rows, out, num_cols, out_type};
    const int64_t row_bytes = std::max<int64_t>(1, y.length * item_size(y.type));
    entry.num_cols = num_cols;
    entry.task_cols = std::clamp<int64_t>((num_rows == 1 ? 2 : 1) * task_bytes / row_bytes / 8 * 8, 8,
                                          decode_totals / num_rows / 8 * 8);
    entry.end_task = (count_ ? entries_[count_ - 1].end_task : 0) + divide_up(num_cols, entry.task_cols);
    bytes_ += num_cols * row_bytes;
    ++count_;
    return true;
}

int64_t DecodeBatch::entry_of(int64_t task) const {
    return std::upper_bound(entries_, entries_ + count_, task,
                            [](int64_t t, const Entry &entry) { return t < entry.end_task; }) -
           entries_;
}

const char *DecodeBatch::weights_of(int64_t task) const {
    const int64_t i = entry_of(task);
    const Entry &entry = entries_[i];
    const PanelSource &y = entry.product.y;
    const int64_t col = (task - (i ? entries_[i - 1].end_task : 0)) * entry.task_cols;
    return static_cast<const char *>(y.data) + col * y.stride * item_size(y.type);
}

void DecodeBatch::run() {
    if (count_ == 0)
        return;
    const auto multiply = current_grouped_gemm_decode_kernels().multiply;
    const int64_t num_tasks = entries_[count_ - 1].end_task;
    const int64_t workers = std::min({int64_t{num_threads()}, num_tasks, 1 + bytes_ / share_bytes});
    std::atomic<int64_t> next_task{0};
    parallel_ranges(workers, 1, [&](int64_t, int64_t) {
        int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
        while (task < num_tasks) {
            const int64_t next = next_task.fetch_add(1, std::memory_order_relaxed);
            const int64_t i = entry_of(task);
            const Entry &entry = entries_[i];
            const int64_t col = (task - (i ? entries_[i - 1].end_task : 0)) * entry.task_cols;
            multiply(entry.product, col, std::min(entry.task_cols, entry.num_cols - col),
                     next < num_tasks ? weights_of(next) : nullptr);
            task = next;
        }
    });
    count_ = bytes_ = 0;
}

} // namespace pyroute::cpu
