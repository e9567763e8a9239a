// Every allocation of the native floor fails once: the caller gets std::bad_alloc, nothing leaks (the address sanitizer
// looks), and the next call is right.
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/gating.h"
#include "cpu/grouped_gemm.h"
#include "cpu/route_plan.h"
#include "cpu/threads.h"
#include "values.h"

namespace {

std::atomic<int64_t> allocations_left{-1}; // before one fails; negative: none does

void *allocate(size_t bytes, size_t alignment) {
    if (allocations_left >= 0 && allocations_left-- == 0)
        return nullptr;
    return std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
}
void *allocate_or_throw(size_t bytes, size_t alignment) {
    if (void *block = allocate(bytes, alignment))
        return block;
    throw std::bad_alloc();
}

} // namespace

void *operator new(size_t bytes) { return allocate_or_throw(bytes, 16); }
void *operator new[](size_t bytes) { return allocate_or_throw(bytes, 16); }
void *operator new(size_t bytes, std::align_val_t a) { return allocate_or_throw(bytes, static_cast<size_t>(a)); }
void *operator new[](size_t bytes, std::align_val_t a) { return allocate_or_throw(bytes, static_cast<size_t>(a)); }
void operator delete(void *block) noexcept { std::free(block); }
void operator delete[](void *block) noexcept { std::free(block); }
void operator delete(void *block, size_t) noexcept { std::free(block); }
void operator delete[](void *block, size_t) noexcept { std::free(block); }
void operator delete(void *block, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void *block, std::align_val_t) noexcept { std::free(block); }
void operator delete(void *block, size_t, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void *block, size_t, std::align_val_t) noexcept { std::free(block); }

using namespace pyroute;
using namespace pyroute::test;

namespace {

// Fails the first allocation of op(), then the second, ... until op() has no more. Its results are all in `out`.
template <class Op> void every_allocation(Buffer<unsigned char> &out, Op &&op) {
    const auto run = [&](int fill) {
        std::memset(out.get(), fill, out.bytes());
        op();
    };
    for (int threads : {1, 3}) {
        cpu::set_num_threads(threads);
        run(0x7f);
        Buffer<unsigned char> expected(out.size);
        std::memcpy(expected.get(), out.get(), out.bytes());
        int64_t failures = 0;
        for (bool failed = true; failed; failures += failed) {
            failed = false;
            allocations_left = failures;
            try {
                run(0x11);
            } catch (const std::bad_alloc &) {
                failed = true;
            }
            allocations_left = -1;
            CHECK(failed || out == expected);
            run(0x22);
            CHECK(out == expected);
        }
        CHECK(failures > 0);
    }
}

constexpr int64_t tokens = 700, experts = 64, top_k = 2, hidden = 24;

Logits random_logits(Bytes &data) {
    Random random(1);
    data = random_floats(random, Values::ordinary, FloatType::float32, tokens * experts);
    return {data.get(), FloatType::float32, tokens, experts};
}

Router softmax_router() { return {experts, top_k, 1, 1, 1, Score::softmax, false, Renormalize::sum, 1e-20, 1.0}; }

void gating() {
    Bytes data(0), ids(tokens * top_k * 4), weights(tokens * top_k * 4), counts(experts * 4),
        grad(tokens * experts * 4);
    GatingArgs args{};
    args.router = softmax_router();
    args.logits = random_logits(data);
    args.topk_idx = reinterpret_cast<int32_t *>(ids.get());
    args.topk_weights = weights.get();
    args.tokens_per_expert = reinterpret_cast<int32_t *>(counts.get());
    every_allocation(ids, [&] { cpu::topk_gating(args); });
    GatingBackwardArgs backward{};
    backward.router = args.router;
    backward.logits = args.logits;
    backward.grad_weights = weights.get();
    backward.topk_idx = args.topk_idx;
    backward.z_scale = 0.5;
    backward.grad_logits = grad.get();
    every_allocation(grad, [&] { cpu::topk_gating_backward(backward); });
}

void expert_choice() {
    constexpr int64_t capacity = 100;
    Bytes data(0), ids(experts * capacity * 4), weights(experts * capacity * 4), keys(experts * tokens * 4);
    Buffer<int32_t> all(tokens);
    for (int32_t i = 0; i < tokens; ++i)
        all[i] = i;
    const ExpertChoiceArgs args{
        random_logits(data), all.get(), tokens, capacity, keys.get(), reinterpret_cast<int32_t *>(ids.get()),
        weights.get()};
    every_allocation(ids, [&] { cpu::expert_choice(args); });
}

void plan_routes() {
    constexpr int64_t slots = 40000; // several runs
    Random random(2);
    Buffer<int64_t> ids(slots), offsets(experts + 1);
    Buffer<int32_t> counts(experts), row_to_token(slots);
    Bytes token_to_row(slots * 4);
    for (int64_t i = 0; i < slots; ++i)
        ids[i] = random.integer(-1, experts - 1);
    every_allocation(token_to_row, [&] {
        cpu::RoutePlanner<int64_t> planner(ids.get(), slots / top_k, top_k, experts, 1);
        planner.count(counts.get(), offsets.get());
        planner.place(row_to_token.get(), reinterpret_cast<int32_t *>(token_to_row.get()));
    });
}

void grouped_gemm() {
    Random random(3);
    const int64_t offsets[] = {0, 40, 40, tokens};
    const Bytes a = random_floats(random, Values::ordinary, FloatType::float32, tokens * hidden);
    const Bytes b = random_floats(random, Values::ordinary, FloatType::float32, 3 * hidden * hidden);
    const auto operand = [](const Bytes &data) {
        return GemmOperand{data.get(), ElementType::float32, nullptr, 0, 1, 1, nullptr};
    };
    Bytes out(tokens * hidden * 4), grad(3 * hidden * hidden * 4);
    const GroupedGemmArgs args{operand(a), operand(b), offsets, out.get(), ElementType::float32,
                               tokens,     3,          hidden,  hidden};
    every_allocation(out, [&] { cpu::grouped_gemm(args); });
    every_allocation(out, [&] { cpu::grouped_gemm_dgrad(args); });
    const GroupedGemmWgradArgs wgrad{
        operand(a), operand(a), offsets, reinterpret_cast<float *>(grad.get()), false, tokens, 3, hidden, hidden};
    every_allocation(grad, [&] { cpu::grouped_gemm_wgrad(wgrad); });
}

} // namespace

int main() {
    gating();
    expert_choice();
    plan_routes();
    grouped_gemm();
}
