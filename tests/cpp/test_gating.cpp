// Gating: the same bytes on every instruction set and number of threads for every router; ids are distinct, inside the
// kept groups and in the order of a stable sort; counts add up; what is not routed is zero; a token alone has the bytes
// that it has in the batch.
#include <algorithm>
#include <climits>
#include <cmath>
#include <numeric>

#include "cpu/gating.h"
#include "fuzz.h"

using namespace pyroute;
using namespace pyroute::test;

namespace {

Router random_router(Random &random) {
    const int64_t sizes[] = {1, 2, 4, 7, 8, 9, 31, 32, 33, 60, 64, 96, 127, 128, 129, 160, 256, 257, 384};
    Router r{};
    r.num_experts = random.one_in(3) ? random.integer(1, 70) : random.any_of(sizes);
    r.num_groups = 1;
    if (random.one_in(2)) {
        do
            r.num_groups = random.integer(1, std::min<int64_t>(r.num_experts, 64));
        while (r.num_experts % r.num_groups != 0);
    }
    const int64_t size = r.num_experts / r.num_groups;
    r.topk_groups = random.integer(1, r.num_groups);
    r.group_topn = random.integer(1, std::min<int64_t>(size, 4));
    const int64_t most = r.topk_groups * size;
    r.top_k = random.one_in(8) ? most : random.integer(1, std::min<int64_t>(most, random.one_in(4) ? 33 : 9));
    r.score = random.any_of({Score::softmax, Score::sigmoid, Score::sqrtsoftplus});
    r.post = random.one_in(4);
    r.renormalize = random.any_of({Renormalize::none, Renormalize::sum, Renormalize::clamp});
    r.renormalize_eps = random.any_of({1e-20, 1e-12, 1e-2});
    r.scaling_factor = random.any_of({1.0, 2.5});
    return r;
}

// A router, and logits, bias, mask, given ids and gradients of the types that belong together.
struct Problem {
    explicit Problem(Random &random)
        : router(random_router(random)), tokens(random.one_in(12) ? 0 : random.integer(1, 12)),
          type(random.any_of(all_float_types)),
          scalar(type == FloatType::float64 ? FloatType::float64 : FloatType::float32),
          values(random.any_of(all_values)), skip(random.integer(0, 3)),
          logits(random_floats(random, values, type, tokens * router.num_experts, skip)),
          bias(random_floats(random, random.any_of(all_values), scalar, router.num_experts, skip)),
          grad_weights(random_floats(random, random.any_of(all_values), scalar, tokens * router.top_k, skip)),
          mask(tokens, skip), ids(tokens * router.top_k, skip) {
        const int64_t masked = random.any_of({2, 6, 1 << 20}), missing = random.any_of({2, 6, 1 << 20});
        for (int64_t i = 0; i < mask.size; ++i)
            mask[i] = random.one_in(masked) ? 0 : static_cast<uint8_t>(random.integer(1, 255));
        const int32_t nowhere[] = {-1, -2, static_cast<int32_t>(router.num_experts), INT_MAX, INT_MIN};
        for (int64_t i = 0; i < ids.size; ++i)
            ids[i] = random.one_in(missing) ? random.any_of(nowhere)
                                            : static_cast<int32_t>(random.integer(0, router.num_experts - 1));
        biased = random.one_in(2);
        is_masked = random.one_in(3);
        given = random.one_in(5);
    }

    int64_t scalar_bytes() const { return item_bytes(scalar); }
    bool routed(int64_t token) const { return !is_masked || mask[token]; }
    Logits all_logits() const { return {logits.get(), type, tokens, router.num_experts}; }
    Logits one_token(int64_t token) const {
        return {logits.get() + token * router.num_experts * item_bytes(type), type, 1, router.num_experts};
    }

    Router router;
    int64_t tokens;
    FloatType type, scalar;
    Values values;
    int64_t skip;
    Bytes logits, bias, grad_weights;
    Buffer<uint8_t> mask;
    Buffer<int32_t> ids;
    bool biased, is_masked, given;
};

bool is_canonical(const void *from, int64_t i, FloatType type) {
    if (type == FloatType::float64) {
        const double x = static_cast<const double *>(from)[i], nan = NAN;
        return !std::isnan(x) || same_bytes(&x, &nan, 8);
    }
    const float x = static_cast<const float *>(from)[i], nan = NAN;
    return !std::isnan(x) || same_bytes(&x, &nan, 4);
}

// --- forward ------------------------------------------------------------------------------------------------------

// float64 holds every other type.
double logit(const Problem &p, int64_t i) {
    const unsigned char *at = p.logits.get() + i * item_bytes(p.type);
    uint16_t half;
    uint32_t bits;
    float x;
    switch (p.type) {
    case FloatType::float64:
        return *reinterpret_cast<const double *>(at);
    case FloatType::float32:
        return static_cast<double>(*reinterpret_cast<const float *>(at));
    case FloatType::bfloat16:
        std::memcpy(&half, at, 2);
        bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&x, &bits, 4);
        return static_cast<double>(x);
    case FloatType::float16:
        break;
    }
    std::memcpy(&half, at, 2);
    const int exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
    double value = std::ldexp(mantissa + (exponent ? 1024 : 0), std::max(exponent, 1) - 25);
    if (exponent == 31)
        value = mantissa ? NAN : HUGE_VAL;
    return half & 0x8000 ? -value : value;
}

// Without bias and groups the logits are the keys: a stable sort, NaN last.
void check_order(const Problem &p, int64_t token, const int32_t *ids) {
    std::vector<int32_t> order(static_cast<size_t>(p.router.num_experts));
    std::iota(order.begin(), order.end(), 0);
    const auto key = [&](int32_t e) { return logit(p, token * p.router.num_experts + e); };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return std::isnan(key(a)) || std::isnan(key(b)) ? !std::isnan(key(a)) && std::isnan(key(b)) : key(a) > key(b);
    });
    CHECK(std::equal(ids, ids + p.router.top_k, order.begin()));
}

void check_choice(const Problem &p, int64_t token, const int32_t *ids) {
    const Router &r = p.router;
    std::vector<char> used(static_cast<size_t>(r.num_experts)), groups(static_cast<size_t>(r.num_groups));
    for (int64_t j = 0; j < r.top_k; ++j) {
        CHECK(ids[j] >= 0 && ids[j] < r.num_experts && !used[static_cast<size_t>(ids[j])]);
        used[static_cast<size_t>(ids[j])] = 1;
        groups[static_cast<size_t>(ids[j] / (r.num_experts / r.num_groups))] = 1;
    }
    CHECK(std::count(groups.begin(), groups.end(), 1) <= r.topk_groups);
    if (!p.biased && r.num_groups == 1)
        check_order(p, token, ids);
}

void check_forward(const Problem &p, const Outputs &out) {
    const Router &r = p.router;
    const auto *ids = out.get<int32_t>(0), *counts = out.get<int32_t>(2);
    std::vector<int32_t> expected(static_cast<size_t>(r.num_experts));
    for (int64_t token = 0; token < p.tokens; ++token) {
        const int32_t *mine = ids + token * r.top_k;
        for (int64_t j = 0; j < r.top_k; ++j) {
            const int64_t slot = token * r.top_k + j;
            const int32_t given = p.ids[slot] >= 0 && p.ids[slot] < r.num_experts ? p.ids[slot] : -1;
            CHECK(p.routed(token) ? !p.given || mine[j] == given : mine[j] == -1);
            if (mine[j] < 0)
                CHECK(all_bytes(out.get<char>(1) + slot * p.scalar_bytes(), p.scalar_bytes(), 0));
            else
                ++expected[static_cast<size_t>(mine[j])];
            CHECK(is_canonical(out.get<char>(1), slot, p.scalar));
        }
        if (p.routed(token) && !p.given)
            check_choice(p, token, mine);
    }
    CHECK(std::equal(expected.begin(), expected.end(), counts));
}

void forward(Random &random, const Problem &p) {
    const Router &r = p.router;
    GatingArgs args{};
    args.router = r;
    args.logits = p.all_logits();
    args.bias = p.biased ? p.bias.get() : nullptr;
    args.given_idx = p.given ? p.ids.get() : nullptr;
    args.token_mask = p.is_masked ? p.mask.get() : nullptr;
    const auto run = [&](Outputs &to) {
        args.topk_idx = to.poisoned<int32_t>(args.logits.num_tokens * r.top_k);
        args.topk_weights = to.poisoned_items(args.logits.num_tokens * r.top_k, p.scalar_bytes());
        args.tokens_per_expert = to.poisoned<int32_t>(r.num_experts);
        cpu::topk_gating(args);
    };
    const Outputs out = same_everywhere(random, run);
    check_forward(p, out);
    if (p.tokens == 0)
        return;
    const int64_t token = random.integer(0, p.tokens - 1), first = token * r.top_k;
    Outputs alone(0x22, 0);
    args.logits = p.one_token(token);
    args.given_idx = p.given ? p.ids.get() + first : nullptr;
    args.token_mask = p.is_masked ? p.mask.get() + token : nullptr;
    run(alone);
    CHECK(same_bytes(alone.get<char>(0), out.get<int32_t>(0) + first, 4 * r.top_k));
    CHECK(same_bytes(alone.get<char>(1), out.get<char>(1) + first * p.scalar_bytes(), r.top_k * p.scalar_bytes()));
}

// --- expert choice ------------------------------------------------------------------------------------------------

// Best first, NaN last, equal weights by token; `tokens` holds those that can be chosen.
void check_expert(const ExpertChoiceArgs &args, const int32_t *chosen, const void *weights, FloatType scalar) {
    const auto weight = [&](int64_t i) {
        return scalar == FloatType::float64 ? static_cast<const double *>(weights)[i]
                                            : static_cast<double>(static_cast<const float *>(weights)[i]);
    };
    for (int64_t i = 0; i < args.capacity; ++i) {
        CHECK(std::binary_search(args.tokens, args.tokens + args.num_real, chosen[i]));
        CHECK(is_canonical(weights, i, scalar));
        if (i == 0)
            continue;
        const double before = weight(i - 1), here = weight(i);
        const bool tie = before == here || (std::isnan(before) && std::isnan(here));
        CHECK(tie ? chosen[i - 1] < chosen[i] : std::isnan(here) || before > here);
    }
}

void expert_choice(Random &random, const Problem &p) {
    std::vector<int32_t> real;
    for (int64_t token = 0; token < p.tokens; ++token)
        if (p.routed(token))
            real.push_back(static_cast<int32_t>(token));
    Buffer<int32_t> tokens(static_cast<int64_t>(real.size()), p.skip);
    std::copy(real.begin(), real.end(), tokens.get());
    ExpertChoiceArgs args{};
    args.logits = p.all_logits();
    args.tokens = tokens.get();
    args.num_real = tokens.size;
    args.capacity = random.one_in(4) ? tokens.size : random.integer(0, tokens.size);
    const int64_t slots = p.router.num_experts * args.capacity;
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        Bytes keys(p.router.num_experts * tokens.size * p.scalar_bytes());
        args.keys = keys.get();
        args.token_idx = to.poisoned<int32_t>(slots);
        args.token_weights = to.poisoned_items(slots, p.scalar_bytes());
        cpu::expert_choice(args);
    });
    for (int64_t first = 0; first < slots; first += args.capacity)
        check_expert(args, out.get<int32_t>(0) + first, out.get<char>(1) + first * p.scalar_bytes(), p.scalar);
}

// --- backward and losses ------------------------------------------------------------------------------------------

struct Balance {
    Balance(Random &random, const Problem &p)
        : sequences(random.integer(1, 3)), fractions(random_floats(random, random.any_of(all_values), p.scalar,
                                                                   sequences * p.router.num_experts, p.skip)),
          scales(random_floats(random, Values::ordinary, p.scalar, sequences, p.skip)), sequence(p.tokens, p.skip) {
        for (int64_t i = 0; i < sequence.size; ++i)
            sequence[i] = static_cast<int32_t>(random.integer(0, sequences - 1));
    }
    BalanceTerms terms(int64_t first_token) const {
        return {fractions.get(), scales.get(), sequence.get() + first_token, sequences};
    }

    int64_t sequences;
    Bytes fractions, scales;
    Buffer<int32_t> sequence;
};

void backward(Random &random, const Problem &p, const Balance &balance) {
    const Router &r = p.router;
    const bool balanced = random.one_in(2);
    const int64_t row_bytes = r.num_experts * p.scalar_bytes();
    GatingBackwardArgs args{};
    args.router = r;
    args.logits = p.all_logits();
    args.grad_weights = p.grad_weights.get();
    args.topk_idx = p.ids.get();
    args.token_mask = p.is_masked ? p.mask.get() : nullptr;
    args.balance = balanced ? balance.terms(0) : BalanceTerms{};
    args.z_scale = random.any_of({0.0, 0.25});
    const auto run = [&](Outputs &to) {
        args.grad_logits = to.poisoned_items(args.logits.num_tokens * r.num_experts, p.scalar_bytes());
        cpu::topk_gating_backward(args);
    };
    const Outputs out = same_everywhere(random, run);
    for (int64_t i = 0; i < p.tokens * r.num_experts; ++i)
        CHECK(is_canonical(out.get<char>(0), i, p.scalar));
    for (int64_t token = 0; token < p.tokens; ++token) {
        const auto *mine = p.ids.get() + token * r.top_k;
        const bool any = std::any_of(mine, mine + r.top_k, [&](int32_t id) { return id >= 0 && id < r.num_experts; });
        if (!p.routed(token) || (!any && !balanced && args.z_scale == 0))
            CHECK(all_bytes(out.get<char>(0) + token * row_bytes, row_bytes, 0));
    }
    if (p.tokens == 0)
        return;
    const int64_t token = random.integer(0, p.tokens - 1);
    Outputs alone(0x22, 0);
    args.logits = p.one_token(token);
    args.grad_weights = p.grad_weights.get() + token * r.top_k * p.scalar_bytes();
    args.topk_idx = p.ids.get() + token * r.top_k;
    args.token_mask = p.is_masked ? p.mask.get() + token : nullptr;
    args.balance = balanced ? balance.terms(token) : BalanceTerms{};
    run(alone);
    CHECK(same_bytes(alone.get<char>(0), out.get<char>(0) + token * row_bytes, row_bytes));
}

void losses(Random &random, const Problem &p, const Balance &balance) {
    const bool balanced = random.one_in(2);
    LossTermsArgs args{p.router.score, p.all_logits(), balanced ? balance.terms(0) : BalanceTerms{}, nullptr};
    const auto run = [&](Outputs &to) {
        args.terms = to.poisoned<double>(args.logits.num_tokens);
        cpu::gating_loss_terms(args);
    };
    const Outputs out = same_everywhere(random, run);
    for (int64_t token = 0; token < p.tokens; ++token)
        CHECK(is_canonical(out.get<double>(0), token, FloatType::float64));
    if (p.tokens == 0)
        return;
    const int64_t token = random.integer(0, p.tokens - 1);
    Outputs alone(0x22, 0);
    args.logits = p.one_token(token);
    args.balance = balanced ? balance.terms(token) : BalanceTerms{};
    run(alone);
    CHECK(same_bytes(alone.get<double>(0), out.get<double>(0) + token, 8));
}

} // namespace

int main() {
    fuzz("test_gating", 2500, 0xaefdb522c39bac7b, [](Random &random) {
        const Problem problem(random);
        forward(random, problem);
        expert_choice(random, problem);
        const Balance balance(random, problem);
        backward(random, problem, balance);
        losses(random, problem, balance);
    });
}
