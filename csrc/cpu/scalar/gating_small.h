// Softmax over at most eight experts, eight tokens at a time: a vector holds one expert's logits of all of them, so
// that nothing goes across lanes. An expert's rank is the number of those that beat it, one comparison a pair.
//
// One token at a time spends most of a vector on padding and waits for every step: 2 of 8 took 86 ns a token on Zen 4.
#pragma once

#include "cpu/scalar/gating_columns.h"
#include "cpu/scalar/gating_scores.h"

namespace pyroute::cpu::PYROUTE_ISA {

constexpr int small_experts = 8, small_tokens = 8;

PYROUTE_INLINE bool small_softmax(const GatingArgs &args) {
    const Router &r = args.router;
    return args.logits.type != FloatType::float64 && r.num_experts <= small_experts && r.num_groups == 1 &&
           r.score == Score::softmax && !args.bias && !args.given_idx && !args.token_mask;
}

// The logits of eight tokens, by expert; -inf where there is no expert.
PYROUTE_INLINE void load_columns(const Logits &logits, int64_t token, f32x8 (&columns)[8]) {
    float rows[small_tokens][row_block];
    for (int t = 0; t < small_tokens; ++t)
        columns[t] = load<f32x8>(row_of(logits, token + t, rows[t]));
    transpose(columns);
}

struct SmallRouting {
    i32x8 ids[small_experts];
    f32x8 e[small_experts]; // exp(logit - largest) of the slots
    f32x8 sum;              // over experts
};

// False if a logit is NaN or no largest one is finite.
PYROUTE_INLINE bool route_small(const f32x8 (&z)[8], int64_t top_k, SmallRouting &routing) {
    f32x8 largest = z[0];
    i32x8 ordered = z[0] == z[0];
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) {
        largest = larger(z[i], largest);
        ordered &= z[i] == z[i];
    }
    ordered &= largest - largest == f32x8{};
    if (any_lane(~ordered))
        return false;
    Pack<f32x8, 4> low = {{z[0] - largest, z[1] - largest, z[2] - largest, z[3] - largest}};
    Pack<f32x8, 4> high = {{z[4] - largest, z[5] - largest, z[6] - largest, z[7] - largest}};
    low = each([](const f32x8 &v) PYROUTE_INLINED { return exp_lanes(v); }, low);
    high = each([](const f32x8 &v) PYROUTE_INLINED { return exp_lanes(v); }, high);
    const f32x8 e[8] = {low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]};
    // the order of a row's sum: experts 4 apart, then 2, then 1
    routing.sum = ((e[0] + e[4]) + (e[2] + e[6])) + ((e[1] + e[5]) + (e[3] + e[7]));
    i32x8 rank[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        rank[i] = i32x8{} + i; // as if all before it beat it
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 8
        for (int j = i + 1; j < 8; ++j) {
            const i32x8 later = z[j] > z[i]; // then j moves up and i down
            rank[i] -= later;
            rank[j] += later;
        }
    for (int64_t slot = 0; slot < top_k; ++slot) {
        const i32x8 wanted = i32x8{} + static_cast<int32_t>(slot);
        i32x8 id = {};
        f32x8 value = e[0]; // the slot is expert 0's if it is no other's
#pragma GCC unroll 8
        for (int i = 1; i < 8; ++i) {
            const i32x8 is = rank[i] == wanted;
            id = blend(is, i32x8{} + i, id);
            value = blend(is, e[i], value);
        }
        routing.ids[slot] = id;
        routing.e[slot] = value;
    }
    return true;
}

// Eight tokens' ids and weights; false if they have to go one by one.
__attribute__((noinline)) static bool gate_small(const GatingArgs &args, int64_t token) {
    const Router &router = args.router;
    const int64_t top_k = router.top_k;
    f32x8 columns[8];
    SmallRouting routing;
    load_columns(args.logits, token, columns);
    if (!route_small(columns, top_k, routing))
        return false;
    f32x8 sum = {}, divisor = routing.sum;
    if (router.post) {
        for (int64_t j = 0; j < top_k; ++j)
            sum += routing.e[j];
        divisor = sum;
    }
    f32x8 values[small_experts];
    sum = f32x8{};
    for (int64_t j = 0; j < top_k; ++j) {
        values[j] = routing.e[j] / divisor;
        sum += values[j];
    }
    const f32x8 eps = broadcast<f32x8>(static_cast<float>(router.renormalize_eps));
    f32x8 last = broadcast<f32x8>(1.0f);
    if (router.renormalize == Renormalize::sum)
        last = sum + eps;
    else if (router.renormalize == Renormalize::clamp)
        last = larger(eps, sum);
    const float scale = static_cast<float>(router.scaling_factor);
    int32_t ids[small_experts][8];
    float weights[small_experts][8];
    for (int64_t j = 0; j < top_k; ++j) {
        store(ids[j], routing.ids[j]);
        store(weights[j], canonical(values[j] / last * scale));
    }
    int32_t *to_ids = args.topk_idx + token * top_k;
    float *to_weights = static_cast<float *>(args.topk_weights) + token * top_k;
    for (int t = 0; t < small_tokens; ++t)
        for (int64_t j = 0; j < top_k; ++j) {
            *to_ids++ = ids[j][t];
            *to_weights++ = weights[j][t];
        }
    return true;
}

} // namespace pyroute::cpu::PYROUTE_ISA
