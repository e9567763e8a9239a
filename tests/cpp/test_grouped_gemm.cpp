// Grouped GEMM: the same bytes on every instruction set and number of threads for every pair of operand types; the
// three products are each other's on transposed operands, bit for bit; small integers come out exact; a row alone has
// the bytes that it has in its segment.
#include <algorithm>
#include <cmath>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/grouped_gemm.h"
#include "cpu/threads.h"
#include "fuzz.h"
#include "rows.h"

using namespace pyroute;
using namespace pyroute::test;

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t item_bytes(ElementType type) {
    return type == ElementType::float32 ? 4 : type == ElementType::bfloat16 ? 2 : 1;
}
bool is_fp8(ElementType type) { return item_bytes(type) == 1; }

// Codes of -4..4.
constexpr uint8_t e4m3_integers[] = {0xc8, 0xc4, 0xc0, 0xb8, 0x00, 0x38, 0x40, 0x44, 0x48};
constexpr uint8_t e5m2_integers[] = {0xc4, 0xc2, 0xc0, 0xbc, 0x00, 0x3c, 0x40, 0x42, 0x44};

// A stack of matrices [count, rows, cols], with what GemmOperand points to.
struct Operand {
    Operand(ElementType type, int64_t matrices, int64_t num_rows, int64_t num_cols, int64_t skip)
        : count(matrices), rows(num_rows), cols(num_cols),
          data(matrices * num_rows * num_cols * item_bytes(type), skip * item_bytes(type)) {
        args.data = data.get();
        args.type = type;
        args.block_rows = args.block_cols = 1;
    }
    Operand(Operand &&) = default;

    void add_scales(int64_t block_rows, int64_t block_cols, const std::vector<int64_t> *block_starts, int64_t skip) {
        args.block_rows = block_rows;
        args.block_cols = block_cols;
        args.scale_rows = block_starts ? block_starts->back() : ceil_div(rows, block_rows);
        args.expert_block_starts = block_starts ? block_starts->data() : nullptr;
        scales.emplace_back(count * args.scale_rows * ceil_div(cols, block_cols), skip);
        args.scales = scales[0].get();
    }

    void fill_random(Random &random, Values values) {
        if (args.type == ElementType::float32)
            fill(random, values, reinterpret_cast<float *>(data.get()), data.size / 4);
        else if (args.type == ElementType::bfloat16)
            fill_bf16(random, values, reinterpret_cast<uint16_t *>(data.get()), data.size / 2);
        else if (values == Values::integers)
            for (int64_t i = 0; i < data.size; ++i)
                data[i] = random.any_of(args.type == ElementType::e4m3 ? e4m3_integers : e5m2_integers);
        else
            fill_codes(random, data.get(), data.size);
        if (args.scales && values == Values::integers)
            for (int64_t i = 0; i < scales[0].size; ++i)
                scales[0][i] = random.any_of({0.5f, 1.0f, 2.0f});
        else if (args.scales)
            fill(random, values == Values::wide ? Values::wide : random.any_of({Values::ordinary, Values::extreme}),
                 scales[0].get(), scales[0].size);
    }

    // Of operands filled with integers: exact. `start` is where the segment begins, if blocks restart there.
    float at(int64_t matrix, int64_t row, int64_t col, int64_t expert, int64_t start) const {
        const int64_t i = (matrix * rows + row) * cols + col;
        float value;
        uint32_t bits = 0;
        switch (args.type) {
        case ElementType::float32:
            value = reinterpret_cast<const float *>(data.get())[i];
            break;
        case ElementType::bfloat16:
            bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t *>(data.get())[i]) << 16;
            std::memcpy(&value, &bits, 4);
            break;
        default: {
            const auto *codes = args.type == ElementType::e4m3 ? e4m3_integers : e5m2_integers;
            value = static_cast<float>(std::find(codes, codes + 9, data[i]) - codes - 4);
        }
        }
        if (!args.scales)
            return value;
        const int64_t scale_row = args.expert_block_starts
                                      ? args.expert_block_starts[expert] + (row - start) / args.block_rows
                                      : matrix * args.scale_rows + row / args.block_rows;
        return value * scales[0][scale_row * ceil_div(cols, args.block_cols) + col / args.block_cols];
    }

    int64_t count, rows, cols;
    Bytes data;
    std::vector<Buffer<float>> scales; // one or none
    GemmOperand args{};
};

template <class T> void transpose(const T *from, T *to, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
            to[j * rows + i] = from[i * cols + j];
}

// Rows [begin, end) of one matrix of a stack become columns: matrix `to_matrix` of `t`. Blocks of scales start at
// `begin`.
void transpose(const Operand &x, int64_t matrix, int64_t begin, int64_t end, int64_t first_scale_row, Operand &t,
               int64_t to_matrix) {
    const int64_t rows = end - begin, item = item_bytes(x.args.type);
    const unsigned char *from = x.data.get() + (matrix * x.rows + begin) * x.cols * item;
    unsigned char *to = t.data.get() + to_matrix * t.rows * t.cols * item;
    if (item == 4)
        transpose(reinterpret_cast<const float *>(from), reinterpret_cast<float *>(to), rows, x.cols);
    else if (item == 2)
        transpose(reinterpret_cast<const uint16_t *>(from), reinterpret_cast<uint16_t *>(to), rows, x.cols);
    else
        transpose(from, to, rows, x.cols);
    if (x.args.scales) {
        const int64_t scale_cols = ceil_div(x.cols, x.args.block_cols), scale_rows = ceil_div(rows, x.args.block_rows);
        transpose(x.args.scales + first_scale_row * scale_cols, t.scales[0].get() + to_matrix * scale_rows * scale_cols,
                  scale_rows, scale_cols);
    }
}

Operand transposed_stack(const Operand &x) {
    Operand t(x.args.type, x.count, x.cols, x.rows, 0);
    if (x.args.scales)
        t.add_scales(x.args.block_cols, x.args.block_rows, nullptr, 0);
    for (int64_t matrix = 0; matrix < x.count; ++matrix)
        transpose(x, matrix, 0, x.rows, matrix * x.args.scale_rows, t, matrix);
    return t;
}

Operand transposed_segment(const Operand &x, int64_t begin, int64_t end, int64_t expert) {
    Operand t(x.args.type, 1, x.cols, end - begin, 0);
    if (x.args.scales)
        t.add_scales(x.args.block_cols, x.args.block_rows, nullptr, 0);
    transpose(x, 0, begin, end, x.args.scales ? x.args.expert_block_starts[expert] : 0, t, 0);
    return t;
}

uint16_t rounded_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

bool is_value(const void *out, ElementType type, int64_t i, float expected) {
    if (type == ElementType::float32)
        return static_cast<const float *>(out)[i] == expected;
    return static_cast<const uint16_t *>(out)[i] == rounded_to_bf16(expected + 0.0f); // no sum of integers is -0
}

struct Problem {
    explicit Problem(Random &random)
        : segments(random_segments(random, 30)), skip(random.integer(0, 3)), values(random.any_of(all_values)) {
        n = random.one_in(30) ? 0 : odd_size(random, 300);
        k = random.one_in(30) ? 0 : odd_size(random, n > 40 ? 40 : 300);
    }
    Problem(Random &random, Segments of, int64_t columns, int64_t depth)
        : segments(std::move(of)), skip(0), n(columns), k(depth), values(random.any_of(all_values)) {}

    // Rows [R, cols], with blocks that restart at each segment if `restarting`.
    Operand rows(Random &random, int64_t cols, bool restarting) {
        Operand x(random.any_of(types), 1, segments.num_rows, cols, skip);
        if (is_fp8(x.args.type) && !random.one_in(4)) {
            const int64_t block_rows =
                random.any_of({int64_t{1}, int64_t{1}, int64_t{128}, int64_t{128}, int64_t{3}, int64_t{8}});
            const int64_t block_cols = random.any_of({int64_t{128}, int64_t{128}, int64_t{1}, int64_t{7}, int64_t{16}});
            if (restarting) {
                block_starts.emplace_back(1, 0);
                for (int64_t e = 0; e < segments.num_experts; ++e)
                    block_starts.back().push_back(block_starts.back().back() +
                                                  ceil_div(segments.end(e) - segments.begin(e), block_rows));
            }
            x.add_scales(block_rows, block_cols, restarting ? &block_starts.back() : nullptr, skip);
        }
        x.fill_random(random, values);
        return x;
    }
    Operand weights(Random &random) { // [E, N, K]
        Operand x(random.any_of(types), segments.num_experts, n, k, skip);
        if (is_fp8(x.args.type) && !random.one_in(4)) {
            const int64_t block_rows = random.any_of({int64_t{128}, int64_t{128}, int64_t{1}, int64_t{5}});
            const int64_t block_cols = random.any_of({int64_t{128}, int64_t{128}, int64_t{1}, int64_t{32}, int64_t{9}});
            x.add_scales(block_rows, block_cols, nullptr, skip);
        }
        x.fill_random(random, values);
        return x;
    }

    static constexpr ElementType types[] = {ElementType::float32, ElementType::bfloat16, ElementType::e4m3,
                                            ElementType::e5m2};
    Segments segments;
    int64_t skip, n, k;
    Values values;
    std::vector<std::vector<int64_t>> block_starts; // of the operands that rows() made
};

// --- forward and dgrad --------------------------------------------------------------------------------------------

// One row as the only row of a problem with one expert.
void check_row_alone(const Problem &p, GroupedGemmArgs args, bool dgrad, const Operand &b, int64_t row,
                     const Outputs &whole) {
    const int64_t expert = p.segments.expert_of(row), length = dgrad ? p.n : p.k, num_cols = dgrad ? p.k : p.n;
    const int64_t one[2] = {0, 1};
    const auto offset = [](const void *data, int64_t bytes) { return static_cast<const char *>(data) + bytes; };
    args.a.data = offset(args.a.data, row * length * item_bytes(args.a.type));
    if (args.a.scales) {
        const int64_t start = args.a.expert_block_starts ? p.segments.begin(expert) : 0;
        const int64_t first = args.a.expert_block_starts ? args.a.expert_block_starts[expert] : 0;
        args.a.scales += (first + (row - start) / args.a.block_rows) * ceil_div(length, args.a.block_cols);
    }
    args.a.scale_rows = 1;
    args.a.expert_block_starts = nullptr;
    args.b.data = offset(args.b.data, expert * p.n * p.k * item_bytes(args.b.type));
    if (args.b.scales)
        args.b.scales += expert * b.args.scale_rows * ceil_div(p.k, args.b.block_cols);
    args.expert_offsets = one;
    args.num_rows = args.num_experts = 1;
    Outputs alone(0x11, 0);
    const int64_t row_bytes = num_cols * item_bytes(args.out_type);
    args.out = alone.poisoned_items(num_cols, item_bytes(args.out_type));
    dgrad ? cpu::grouped_gemm_dgrad(args) : cpu::grouped_gemm(args);
    CHECK(same_bytes(args.out, whole.get<char>(0) + row * row_bytes, row_bytes));
}

void forward_or_dgrad(Random &random, Problem &p, bool dgrad) {
    const Operand a = p.rows(random, dgrad ? p.n : p.k, random.one_in(3)), b = p.weights(random);
    const int64_t num_cols = dgrad ? p.k : p.n, length = dgrad ? p.n : p.k;
    GroupedGemmArgs args{};
    args.a = a.args;
    args.b = b.args;
    args.expert_offsets = p.segments.offsets.data();
    args.out_type = random.any_of({ElementType::float32, ElementType::bfloat16});
    args.num_rows = p.segments.num_rows;
    args.num_experts = p.segments.num_experts;
    args.n = p.n;
    args.k = p.k;
    const int64_t row_bytes = num_cols * item_bytes(args.out_type);
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.out = to.poisoned_items(p.segments.num_rows * num_cols, item_bytes(args.out_type));
        dgrad ? cpu::grouped_gemm_dgrad(args) : cpu::grouped_gemm(args);
    });
    const int64_t used = p.segments.offsets.back();
    CHECK(all_bytes(out.get<char>(0) + used * row_bytes, (p.segments.num_rows - used) * row_bytes, 0));
    if (used)
        check_row_alone(p, args, dgrad, b, random.integer(0, used - 1), out);
    if (dgrad) { // forward with every matrix of weights transposed
        const Operand bt = transposed_stack(b);
        args.b = bt.args;
        std::swap(args.n, args.k);
        Outputs forward(0x11, 0);
        args.out = forward.poisoned_items(p.segments.num_rows * num_cols, item_bytes(args.out_type));
        cpu::grouped_gemm(args);
        forward.check_equal(out, "forward on transposed weights against dgrad");
    }
    if (p.values != Values::integers)
        return;
    for (int64_t row = 0; row < used; ++row) {
        const int64_t e = p.segments.expert_of(row);
        for (int64_t col = 0; col < num_cols; ++col) {
            float expected = 0;
            for (int64_t i = 0; i < length; ++i)
                expected +=
                    a.at(0, row, i, e, p.segments.begin(e)) * (dgrad ? b.at(e, i, col, e, 0) : b.at(e, col, i, e, 0));
            CHECK(is_value(out.get<char>(0), args.out_type, row * num_cols + col, expected));
        }
    }
}

// --- wgrad --------------------------------------------------------------------------------------------------------

void check_wgrad_values(const Problem &p, const Operand &grad_out, const Operand &a, const Outputs &out) {
    const auto *value = out.get<float>(0);
    for (int64_t e = 0; e < p.segments.num_experts; ++e)
        for (int64_t i = 0; i < p.n; ++i)
            for (int64_t j = 0; j < p.k; ++j, ++value) {
                const int64_t begin = p.segments.begin(e);
                float expected = 0;
                for (int64_t row = begin; row < p.segments.end(e); ++row)
                    expected += grad_out.at(0, row, i, e, begin) * a.at(0, row, j, e, begin);
                CHECK(*value == expected);
            }
}

// One expert is forward on its two operands transposed.
void check_wgrad_against_forward(const Problem &p, const Operand &grad_out, const Operand &a, const Outputs &out) {
    for (int64_t e = 0; e < p.segments.num_experts; ++e) {
        const int64_t begin = p.segments.begin(e), end = p.segments.end(e);
        if (begin == end) {
            CHECK(all_bytes(out.get<float>(0) + e * p.n * p.k, 4 * p.n * p.k, 0));
            continue;
        }
        const Operand x = transposed_segment(grad_out, begin, end, e), y = transposed_segment(a, begin, end, e);
        const int64_t offsets[2] = {0, p.n};
        Outputs forward(0x11, 0);
        cpu::grouped_gemm({x.args, y.args, offsets, forward.poisoned<float>(p.n * p.k), ElementType::float32, p.n, 1,
                           p.k, end - begin});
        CHECK(same_bytes(forward.get<float>(0), out.get<float>(0) + e * p.n * p.k, 4 * p.n * p.k));
    }
}

void wgrad(Random &random, Problem &p) {
    const bool restarting = random.one_in(2);
    const Operand grad_out = p.rows(random, p.n, restarting), a = p.rows(random, p.k, restarting);
    const int64_t size = p.segments.num_experts * p.n * p.k;
    Buffer<float> before(size, p.skip);
    fill(random, p.values, before.get(), size);
    GroupedGemmWgradArgs args{
        grad_out.args, a.args, p.segments.offsets.data(), nullptr, false, p.segments.num_rows, p.segments.num_experts,
        p.n,           p.k};
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.out = to.poisoned<float>(size);
        cpu::grouped_gemm_wgrad(args);
    });
    args.accumulate = true;
    const Outputs sum = same_everywhere(random, [&](Outputs &to) {
        args.out = to.copy_of(before);
        cpu::grouped_gemm_wgrad(args);
    });
    for (int64_t e = 0, i = 0; e < p.segments.num_experts; ++e)
        for (const int64_t end = (e + 1) * p.n * p.k; i < end; ++i) {
            float expected = before[i];
            if (p.segments.begin(e) != p.segments.end(e)) {
                expected += out.get<float>(0)[i];
                if (std::isnan(expected))
                    expected = NAN;
            }
            CHECK(same_bytes(sum.get<float>(0) + i, &expected, 4));
        }
    if (restarting || (!grad_out.args.scales && !a.args.scales))
        check_wgrad_against_forward(p, grad_out, a, out);
    if (p.values == Values::integers)
        check_wgrad_values(p, grad_out, a, out);
}

// Three segments of many rows: several tasks and, with `depth`, more than one round of packed rows.
Segments crowded(int64_t rows) {
    Segments s;
    s.offsets = {0, rows / 3, rows / 3, rows};
    s.row_to_token.assign(static_cast<size_t>(rows), 0);
    s.num_experts = 3;
    s.num_rows = rows;
    return s;
}

// A caller whose processor takes subnormals for zero (-ffast-math, torch.set_flush_denormal) loses none of the codes:
// their values are normal float32 numbers, whatever form a kernel gives them on the way.
void subnormals_flushed(Random &random) {
#if defined(__SSE2__)
    constexpr unsigned flush_and_zero = 0x8040;
    constexpr int64_t n = 40, k = 1200;
    const int threads = cpu::num_threads();
    cpu::set_num_threads(1); // the register is a thread's own
    for (const ElementType type : {ElementType::e4m3, ElementType::e5m2})
        for (const int64_t rows : {1, 2, 5, 8, 20}) {
            Operand a(ElementType::float32, 1, rows, k, 0), b(type, 1, n, k, 0);
            for (int64_t i = 0; i < rows * k; ++i)
                reinterpret_cast<float *>(a.data.get())[i] = random.real();
            for (int64_t i = 0; i < n * k; ++i) // half of them with exponent 0
                b.data[i] = static_cast<uint8_t>(random.integer(0, 1) * 0x30 + random.integer(0, 3) + 0x80 * (i & 1));
            const int64_t offsets[2] = {0, rows};
            for_each_isa([&](cpu::Isa) {
                Outputs kept(0x11, 0), flushed(0x22, 0);
                cpu::grouped_gemm(
                    {a.args, b.args, offsets, kept.poisoned<float>(rows * n), ElementType::float32, rows, 1, n, k});
                const unsigned before = _mm_getcsr();
                for (const unsigned bits : {0x8000u, 0x40u, flush_and_zero}) {
                    float *to = flushed.poisoned<float>(rows * n);
                    _mm_setcsr(before | bits);
                    cpu::grouped_gemm({a.args, b.args, offsets, to, ElementType::float32, rows, 1, n, k});
                    _mm_setcsr(before);
                    CHECK(same_bytes(kept.get<float>(0), to, 4 * rows * n));
                }
            });
        }
    cpu::set_num_threads(threads);
#else
    (void)random;
#endif
}

} // namespace

int main() {
    fuzz("test_grouped_gemm", 400, 0x3f644236c38473cf, [](Random &random) {
        Problem problem(random);
        forward_or_dgrad(random, problem, false);
        forward_or_dgrad(random, problem, true);
        wgrad(random, problem);
    });
    Random random(1);
    Problem tasks(random, crowded(1200), 210, 3), rounds(random, crowded(1500), 3, 3000);
    forward_or_dgrad(random, tasks, false);
    wgrad(random, tasks);
    forward_or_dgrad(random, rounds, false);
    subnormals_flushed(random);
}
