// Cutting grouped GEMM into tasks. Every product is rows X (of a segment, or of grad_out transposed) against columns Y
// (an expert's weights, or `a` transposed), and every output byte is the same however they are cut.
//
// A round packs a bounded number of X rows once, into memory that all threads read (1.3 % of the arithmetic at N =
// 1408). Its tasks are runs of about 500 rows by panels of columns that fit a quarter of L2; each thread packs the
// columns of its task into its own panel and re-uses them for the task's rows. A thread claims its next task before it
// computes the one at hand, whose tiles leave time to fetch the next one's columns from memory. So one crowded expert
// is many tasks.
#include "cpu/grouped_gemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/grouped_gemm_decode.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace pyroute::cpu {
namespace {

constexpr int64_t task_rows = 516;                // 43 groups
constexpr int64_t pack_unit = 48;                 // rows that a thread packs at a time: whole cache lines of columns
constexpr int64_t column_panel_floats = 68 << 10; // 272 KiB of L2: as much again is on its way
// At least, where a strip is 64 bytes of each matrix row: single lines from as many pages as the contraction is long
// are read at half the speed (Zen 4, two threads, 48 rows: dgrad over 2816 at 100 GFLOP/s against 140, over 7168 at 76
// against 90, although the panel is then more than L2).
constexpr int64_t least_strips_of_columns = 3;
constexpr int64_t round_floats = 4 << 20;
constexpr int64_t share_elements = 200 << 10; // packed in 20 us; below that a thread is not worth waking
constexpr int64_t share_multiply_adds = 1 << 20;

struct Product {
    PanelSource x, y;
    int64_t num_rows, num_cols;
    char *out; // row-major, num_cols elements a row

    int64_t group_floats() const { return packed_shape(x.length, group_rows).floats; }
    int64_t strip_floats() const { return packed_shape(x.length, strip_cols).floats; }
    bool scaled() const { return x.keeps_scales || y.keeps_scales; }
    PanelScales scales() const {
        const int64_t extent = y.columns ? y.block_cols : y.block_rows; // of y's scale blocks along its panel rows
        return !scaled()                                     ? PanelScales::none
               : !y.keeps_scales || extent % strip_cols == 0 ? PanelScales::per_row
                                                             : PanelScales::per_element;
    }
};

// Rows [first_row, first_row + num_rows) of a product; the unit that a round packs.
struct RowRun {
    const Product *product;
    int64_t first_row, num_rows;
    int64_t first_float;  // of its packed rows in the round's memory
    int64_t panel_strips; // of one task's columns

    int64_t num_floats() const { return divide_up(num_rows, group_rows) * product->group_floats(); }
    int64_t panel_cols() const { return panel_strips * strip_cols; }
    int64_t panel_floats() const { return panel_strips * product->strip_floats(); }
    int64_t num_tasks() const { return divide_up(product->num_cols, panel_cols()); }
    int64_t num_pack_units() const { return divide_up(num_rows, pack_unit); }
};

// Even runs: a short last one would pack its columns for a few rows.
std::vector<RowRun> cut(const std::vector<Product> &products) {
    std::vector<RowRun> runs;
    for (const Product &p : products) {
        if (p.num_rows == 0 || p.num_cols == 0)
            continue;
        const int64_t most = std::clamp<int64_t>(column_panel_floats / (p.strip_floats() + 1),
                                                 p.y.columns ? least_strips_of_columns : 1, 32);
        const int64_t strips = std::min(divide_up(p.num_cols, strip_cols), most);
        const int64_t num_runs = divide_up(p.num_rows, task_rows);
        const int64_t rows = divide_up(divide_up(p.num_rows, num_runs), group_rows) * group_rows;
        for (int64_t row = 0; row < p.num_rows; row += rows)
            runs.push_back({&p, row, std::min(rows, p.num_rows - row), 0, strips});
    }
    return runs;
}

// Ends of the runs in a common numbering of their parts.
template <class Count> std::vector<int64_t> ends(const RowRun *runs, size_t num_runs, Count count) {
    std::vector<int64_t> result(num_runs);
    int64_t end = 0;
    for (size_t i = 0; i < num_runs; ++i)
        result[i] = end += count(runs[i]);
    return result;
}

// The run that a part belongs to, and the part's number in it.
struct Part {
    size_t run;
    int64_t number;
};
Part part_at(const std::vector<int64_t> &part_ends, int64_t index) {
    const auto run =
        static_cast<size_t>(std::upper_bound(part_ends.begin(), part_ends.end(), index) - part_ends.begin());
    return {run, index - (run ? part_ends[run - 1] : 0)};
}

struct Output {
    ElementType type;
    bool accumulate, streams;
};

class Round {
  public:
    Round(RowRun *runs, size_t num_runs, const GroupedGemmKernels &kernels, Output output)
        : runs_(runs), kernels_(kernels), output_(output),
          pack_ends_(ends(runs, num_runs, [](const RowRun &r) { return r.num_pack_units(); })),
          task_ends_(ends(runs, num_runs, [](const RowRun &r) { return r.num_tasks(); })) {
        for (size_t i = 0; i < num_runs; ++i) {
            const Product &p = *runs[i].product;
            elements_ += runs[i].num_rows * p.x.length;
            multiply_adds_ += runs[i].num_rows * p.num_cols * p.x.length;
            panel_floats_ = std::max(panel_floats_, runs[i].panel_floats());
        }
    }

    int64_t num_tasks() const { return task_ends_.back(); }
    int64_t panel_floats() const { return panel_floats_; } // columns of one task, packed
    int64_t useful_workers() const { return std::min(num_tasks(), 1 + multiply_adds_ / share_multiply_adds); }

    void pack_rows(float *rows) const {
        const int64_t units = pack_ends_.back();
        parallel_ranges(units, 1 + units * share_elements / (elements_ + 1), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const Part part = part_at(pack_ends_, i);
                const RowRun &run = runs_[part.run];
                const int64_t row = part.number * pack_unit;
                const Product &p = *run.product;
                kernels_.pack_x(p.x, run.first_row + row, std::min(pack_unit, run.num_rows - row), p.scaled(),
                                rows + run.first_float + row / group_rows * p.group_floats());
            }
        });
    }

    // `next`: the task that this thread will do after this one; its columns are fetched meanwhile.
    void multiply(int64_t task, int64_t next, const float *rows, float *columns) const {
        const Part part = part_at(task_ends_, task);
        const RowRun &run = runs_[part.run];
        const Product &p = *run.product;
        const int64_t col = part.number * run.panel_cols(), num_cols = std::min(run.panel_cols(), p.num_cols - col);
        kernels_.pack_y(p.y, col, num_cols, p.scaled(), columns);
        PanelProduct product{};
        product.x = rows + run.first_float;
        product.y = columns;
        product.num_rows = run.num_rows;
        product.num_cols = num_cols;
        product.length = p.x.length;
        product.scales = p.scales();
        product.out = p.out + (run.first_row * p.num_cols + col) * item_size(output_.type);
        product.out_type = output_.type;
        product.out_stride = p.num_cols;
        product.accumulate = output_.accumulate;
        product.streams = output_.streams;
        if (next < num_tasks())
            product.next = columns_of(next);
        kernels_.multiply(product);
    }

  private:
    NextRead columns_of(int64_t task) const {
        const Part part = part_at(task_ends_, task);
        const RowRun &run = runs_[part.run];
        const PanelSource &y = run.product->y;
        const int64_t item = item_size(y.type), col = part.number * run.panel_cols();
        const int64_t num_cols = std::min(run.panel_cols(), run.product->num_cols - col);
        const auto *data = static_cast<const char *>(y.data);
        if (y.columns)
            return {data + col * item, y.length, num_cols * item, y.stride * item};
        return {data + col * y.stride * item, num_cols, y.length * item, y.stride * item};
    }

    const RowRun *runs_;
    const GroupedGemmKernels &kernels_;
    Output output_;
    std::vector<int64_t> pack_ends_, task_ends_;
    int64_t panel_floats_ = 0, elements_ = 0, multiply_adds_ = 0;
};

void run_products(const std::vector<Product> &products, Output output) {
    std::vector<RowRun> runs = cut(products);
    const GroupedGemmKernels &kernels = current_grouped_gemm_kernels();
    std::vector<Round> rounds;
    int64_t row_floats = 0, panel_floats = 0;
    for (size_t first = 0, next = 0; first < runs.size(); first = next) {
        int64_t floats = 0;
        for (; next < runs.size() && (next == first || floats + runs[next].num_floats() <= round_floats); ++next) {
            runs[next].first_float = floats;
            floats += runs[next].num_floats();
        }
        rounds.emplace_back(&runs[first], next - first, kernels, output);
        row_floats = std::max(row_floats, floats);
        panel_floats = std::max(panel_floats, rounds.back().panel_floats());
    }
    if (rounds.empty())
        return;
    const int64_t workers = num_threads();
    const Workspace<float> rows(row_floats), columns(panel_floats * workers);
    for (const Round &round : rounds) {
        round.pack_rows(rows.get());
        std::atomic<int64_t> next_task{0};
        parallel_ranges(std::min(workers, round.useful_workers()), 1, [&](int64_t worker, int64_t) {
            int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
            while (task < round.num_tasks()) {
                const int64_t next = next_task.fetch_add(1, std::memory_order_relaxed);
                round.multiply(task, next, rows.get(), columns.get() + worker * panel_floats);
                task = next;
            }
        });
    }
}

// Matrix `index` of a stack [E, rows, cols].
PanelSource matrix(const GemmOperand &operand, int64_t index, int64_t rows, int64_t cols, bool columns) {
    PanelSource s{};
    s.data = static_cast<const char *>(operand.data) + index * rows * cols * item_size(operand.type);
    s.type = operand.type;
    s.columns = columns;
    s.stride = cols;
    s.length = columns ? rows : cols;
    s.block_rows = operand.block_rows;
    s.block_cols = operand.block_cols;
    if (operand.scales) {
        s.scale_stride = divide_up(cols, operand.block_cols);
        s.scales = operand.scales + index * operand.scale_rows * s.scale_stride;
        s.keeps_scales = (columns ? operand.block_rows : operand.block_cols) % panel_depth == 0;
    }
    return s;
}

// Rows [begin, end) of a matrix: those of expert e.
PanelSource segment(const GemmOperand &operand, int64_t e, int64_t begin, int64_t end, int64_t cols, bool columns) {
    PanelSource s = matrix(operand, 0, end - begin, cols, columns);
    s.data = static_cast<const char *>(s.data) + begin * cols * item_size(operand.type);
    if (!operand.scales)
        return s;
    if (operand.expert_block_starts)
        s.scales += operand.expert_block_starts[e] * s.scale_stride;
    else {
        s.scales += begin / operand.block_rows * s.scale_stride;
        s.first_block_row = begin % operand.block_rows;
        if (columns) // whether blocks fit would depend on where the segment starts, and so on the other experts
            s.keeps_scales = false;
    }
    return s;
}

struct ExpertRows {
    int64_t begin, count;
};
ExpertRows rows_of(const GroupedGemmArgs &args, int64_t e) {
    if (args.tokens_per_expert)
        return {e * args.rows_per_expert, args.tokens_per_expert[e]};
    return {args.expert_offsets[e], args.expert_offsets[e + 1] - args.expert_offsets[e]};
}

void multiply_by_segment(const GroupedGemmArgs &args, bool transposed) {
    const int64_t length = transposed ? args.n : args.k, num_cols = transposed ? args.k : args.n;
    const int64_t row_bytes = num_cols * item_size(args.out_type);
    char *out = static_cast<char *>(args.out);
    std::vector<Product> products;
    DecodeBatch decode;
    for (int64_t e = 0; e < args.num_experts; ++e) {
        const auto [begin, count] = rows_of(args, e);
        if (count == 0)
            continue;
        const PanelSource rows = args.tokens_per_expert ? matrix(args.a, e, args.rows_per_expert, length, false)
                                                        : segment(args.a, e, begin, begin + count, length, false);
        const Product p = {rows, matrix(args.b, e, args.n, args.k, transposed), count, num_cols,
                           out + begin * row_bytes};
        if (!decode.add(p.x, p.y, p.num_rows, num_cols, p.out, args.out_type))
            products.push_back(p);
    }
    decode.run();
    if (!args.tokens_per_expert) {
        const int64_t used = args.expert_offsets[args.num_experts];
        std::memset(out + used * row_bytes, 0, static_cast<size_t>((args.num_rows - used) * row_bytes));
    }
    run_products(products, {args.out_type, false, false});
}

} // namespace

void grouped_gemm(const GroupedGemmArgs &args) { multiply_by_segment(args, false); }
void grouped_gemm_dgrad(const GroupedGemmArgs &args) { multiply_by_segment(args, true); }

void grouped_gemm_wgrad(const GroupedGemmWgradArgs &args) {
    std::vector<Product> products;
    for (int64_t e = 0; e < args.num_experts; ++e) {
        const int64_t begin = args.expert_offsets[e], end = args.expert_offsets[e + 1];
        float *out = args.out + e * args.n * args.k;
        if (begin < end)
            products.push_back({segment(args.grad_out, e, begin, end, args.n, true),
                                segment(args.a, e, begin, end, args.k, true), args.n, args.k,
                                reinterpret_cast<char *>(out)});
        else if (!args.accumulate)
            std::memset(out, 0, sizeof(float) * static_cast<size_t>(args.n * args.k));
    }
    // What no cache would hold until its reader comes; rows of whole lines.
    const bool streams = args.num_experts * args.n * args.k * 4 > 8 << 20 && args.k % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(args.out) % 64 == 0 && !args.accumulate;
    run_products(products, {ElementType::float32, args.accumulate, streams});
}

} // namespace pyroute::cpu
