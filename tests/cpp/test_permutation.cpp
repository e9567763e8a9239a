// Route plans and moves: the same bytes on every instruction set and number of threads; the two maps are each other's
// inverse, counts and offsets add up, padding rows are zero and never read; a token alone has the bytes that it has
// among others.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "cpu/permutation.h"
#include "cpu/quantization.h"
#include "cpu/route_plan.h"
#include "fuzz.h"

using namespace pyroute;
using namespace pyroute::test;

namespace {

template <class Body> bool throws_out_of_range(Body &&body) {
    try {
        body();
    } catch (const std::out_of_range &) {
        return true;
    }
    return false;
}

// --- plans --------------------------------------------------------------------------------------------------------

struct Sizes {
    int64_t num_tokens, top_k, num_experts, alignment;
};

// Enough slots for several runs of the counting sort now and then, whose length is fixed; few ones otherwise.
Sizes random_sizes(Random &random) {
    const int64_t alignments[] = {1, 1, 2, 7, 16, 128};
    Sizes s;
    s.num_tokens = random.one_in(100) ? random.integer(5000, 30000) : random.one_in(10) ? 0 : random.integer(1, 40);
    s.top_k = random.one_in(4) ? 1 : random.integer(2, 9);
    s.num_experts = random.one_in(4) ? odd_size(random, 300) : random.integer(1, 12);
    s.alignment = random.any_of(alignments);
    return s;
}

template <class Id> Buffer<Id> random_ids(Random &random, const Sizes &sizes) {
    Buffer<Id> ids(sizes.num_tokens * sizes.top_k, random.integer(0, 3));
    const int64_t favourites = random.one_in(3) ? 1 + sizes.num_experts / 4 : sizes.num_experts;
    const int64_t dropped = random.any_of({1, 3, 1 << 20}); // one in so many is not routed: all, many, none
    for (int64_t i = 0; i < ids.size; ++i)
        ids[i] = static_cast<Id>(random.one_in(dropped) ? -1 : random.integer(0, favourites - 1));
    return ids;
}

struct Plan {
    Buffer<int32_t> row_to_token, token_to_row;
    RouteMaps maps;
};

template <class T> Buffer<T> copy(const Outputs &out, size_t i, int64_t skip) {
    Buffer<T> to(out.block(i).size / static_cast<int64_t>(sizeof(T)), skip);
    std::memcpy(to.get(), out.get<T>(i), to.bytes());
    return to;
}

template <class Id> void check_plan(const Sizes &sizes, const Buffer<Id> &ids, const Outputs &out) {
    const auto *counts = out.get<int32_t>(0), *row_to_token = out.get<int32_t>(2), *token_to_row = out.get<int32_t>(3);
    const auto *offsets = out.get<int64_t>(1);
    const int64_t num_rows = out.block(2).size / 4;
    CHECK(offsets[0] == 0 && offsets[sizes.num_experts] == num_rows);
    for (int64_t e = 0; e < sizes.num_experts; ++e) {
        const int64_t padded = offsets[e + 1] - offsets[e];
        CHECK(counts[e] >= 0 && padded >= counts[e] && padded - counts[e] < sizes.alignment &&
              padded % sizes.alignment == 0);
    }
    std::vector<int64_t> next(offsets, offsets + sizes.num_experts); // rows are handed out in the order of the slots
    std::vector<char> used(static_cast<size_t>(num_rows));
    for (int64_t slot = 0; slot < ids.size; ++slot) {
        if (ids[slot] < 0) {
            CHECK(token_to_row[slot] == -1);
            continue;
        }
        const int64_t row = next[static_cast<size_t>(ids[slot])]++;
        CHECK(token_to_row[slot] == row && row_to_token[row] == slot / sizes.top_k);
        used[static_cast<size_t>(row)] = 1;
    }
    for (int64_t e = 0; e < sizes.num_experts; ++e)
        CHECK(next[static_cast<size_t>(e)] == offsets[e] + counts[e]);
    for (int64_t row = 0; row < num_rows; ++row)
        CHECK(used[static_cast<size_t>(row)] || row_to_token[row] == -1);
}

template <class Id> Plan plan(Random &random, const Sizes &sizes) {
    Buffer<Id> ids = random_ids<Id>(random, sizes);
    const auto planner = [&] {
        return cpu::RoutePlanner<Id>(ids.get(), sizes.num_tokens, sizes.top_k, sizes.num_experts, sizes.alignment);
    };
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        cpu::RoutePlanner<Id> sort = planner();
        auto *counts = to.poisoned<int32_t>(sizes.num_experts);
        const int64_t num_rows = sort.count(counts, to.poisoned<int64_t>(sizes.num_experts + 1));
        auto *row_to_token = to.poisoned<int32_t>(num_rows);
        sort.place(row_to_token, to.poisoned<int32_t>(ids.size));
    });
    check_plan(sizes, ids, out);
    if (ids.size) { // one wrong id
        const Id wrong[] = {static_cast<Id>(sizes.num_experts), -2, std::numeric_limits<Id>::min(),
                            std::numeric_limits<Id>::max()};
        ids[random.integer(0, ids.size - 1)] = random.any_of(wrong);
        std::vector<int32_t> counts(static_cast<size_t>(sizes.num_experts));
        std::vector<int64_t> offsets(static_cast<size_t>(sizes.num_experts) + 1);
        cpu::set_num_threads(static_cast<int>(random.integer(1, 3)));
        CHECK(throws_out_of_range([&] { planner().count(counts.data(), offsets.data()); }));
    }
    const int64_t skip = random.integer(0, 3);
    Plan result{copy<int32_t>(out, 2, skip), copy<int32_t>(out, 3, skip), {}};
    result.maps = {sizes.num_tokens, sizes.top_k, result.row_to_token.size, result.row_to_token.get(),
                   result.token_to_row.get()};
    return result;
}

// --- moves --------------------------------------------------------------------------------------------------------

// The maps of one token of a plan: its rows stay where they are.
RouteMaps token_alone(const RouteMaps &maps, int64_t token) {
    return {1, maps.top_k, maps.num_rows, maps.row_to_token, maps.token_to_row + token * maps.top_k};
}

void permute(Random &random, const RouteMaps &maps) {
    PermuteArgs args{maps, random.one_in(10) ? 0 : odd_size(random, 300), nullptr, nullptr};
    const int64_t skip = random.integer(0, 3);
    Buffer<uint8_t> x(maps.num_tokens * args.row_bytes, skip);
    fill_codes(random, x.get(), x.size);
    args.x = x.get();
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.rows = to.poisoned<uint8_t>(maps.num_rows * args.row_bytes);
        cpu::permute(args);
    });
    for_each_isa([&](cpu::Isa) { // the stores that the driver takes for rows past the caches, with and without joints
        for (const int32_t *inverse : {maps.row_to_token, static_cast<const int32_t *>(nullptr)}) {
            Outputs streamed(0, skip);
            auto *rows = streamed.poisoned<uint8_t>(maps.num_rows * args.row_bytes);
            cpu::current_permutation_kernels().spread(
                {maps.top_k, maps.token_to_row, args.row_bytes, args.x, rows, true, inverse, maps.num_rows}, 0,
                maps.num_tokens);
            streamed.check_equal(out, "streaming stores against plain ones");
        }
    });
    for (int64_t row = 0; row < maps.num_rows; ++row) {
        const uint8_t *bytes = out.get<uint8_t>(0) + row * args.row_bytes;
        const int64_t token = maps.row_to_token[row];
        CHECK(token < 0 ? all_bytes(bytes, args.row_bytes, 0)
                        : same_bytes(bytes, &x[token * args.row_bytes], args.row_bytes));
    }
}

// permute_quantize is quantize_fp8 of the tokens, then permute of codes and of scales; scales of padding rows are 1.
void permute_quantize(Random &random, const RouteMaps &maps) {
    PermuteQuantizeArgs args{};
    args.maps = maps;
    args.hidden = odd_size(random, 300);
    args.block_cols = random.any_of({int64_t{128}, int64_t{128}, int64_t{1}, int64_t{7}, int64_t{64}});
    args.x_type = random.any_of(all_float_types);
    args.power_of_two = random.one_in(3);
    const int64_t skip = random.integer(0, 3);
    const Bytes x = random_floats(random, random.any_of(all_values), args.x_type, maps.num_tokens * args.hidden, skip);
    args.x = x.get();
    const int64_t blocks = (args.hidden + args.block_cols - 1) / args.block_cols;
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.codes = to.poisoned<uint8_t>(maps.num_rows * args.hidden);
        args.scales = to.poisoned<float>(maps.num_rows * blocks);
        cpu::permute_quantize(args);
    });
    Buffer<uint8_t> codes(maps.num_tokens * args.hidden);
    Buffer<float> scales(maps.num_tokens * blocks);
    cpu::quantize_fp8({{1, maps.num_tokens, args.hidden, 1, args.block_cols, nullptr, nullptr, 1, Fp8Format::e4m3},
                       args.x_type,
                       args.x,
                       args.power_of_two,
                       codes.get(),
                       scales.get()});
    for (int64_t row = 0; row < maps.num_rows; ++row) {
        const uint8_t *row_codes = out.get<uint8_t>(0) + row * args.hidden;
        const float *row_scales = out.get<float>(1) + row * blocks;
        const int64_t token = maps.row_to_token[row];
        if (token < 0) {
            CHECK(all_bytes(row_codes, args.hidden, 0));
            CHECK(std::all_of(row_scales, row_scales + blocks, [](float scale) { return scale == 1.0f; }));
        } else {
            CHECK(same_bytes(row_codes, &codes[token * args.hidden], args.hidden));
            CHECK(same_bytes(row_scales, &scales[token * blocks], 4 * blocks));
        }
    }
}

// What unpermute and its backward read.
struct Sums {
    Sums(Random &random, const RouteMaps &maps)
        : type(random.any_of(all_float_types)),
          weight_type(type == FloatType::float64 ? FloatType::float64 : FloatType::float32),
          hidden(random.one_in(10) ? 0 : odd_size(random, 140)), values(random.any_of(all_values)),
          skip(random.integer(0, 3)), rows(random_floats(random, values, type, maps.num_rows * hidden, skip)),
          grad_y(random_floats(random, values, type, maps.num_tokens * hidden, skip)),
          weights(random_floats(random, values, weight_type, maps.num_tokens * maps.top_k, skip)) {}

    int64_t row_bytes() const { return hidden * item_bytes(type); }
    int64_t token_weight_bytes(const RouteMaps &maps) const { return maps.top_k * item_bytes(weight_type); }

    FloatType type, weight_type;
    int64_t hidden;
    Values values;
    int64_t skip;
    Bytes rows, grad_y, weights;
};

void unpermute(Random &random, const RouteMaps &maps, const Sums &s) {
    const bool weighted = random.one_in(2);
    UnpermuteArgs args{maps, s.hidden, s.type, s.rows.get(), weighted ? s.weights.get() : nullptr, nullptr, false};
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.out = to.poisoned_items(maps.num_tokens * s.hidden, item_bytes(s.type));
        cpu::unpermute(args);
    });
    for_each_isa([&](cpu::Isa) { // the stores that the driver takes for an output past the caches
        Outputs streamed(0, s.skip);
        args.out = streamed.poisoned_items(maps.num_tokens * s.hidden, item_bytes(s.type));
        args.streaming = true;
        cpu::current_permutation_kernels().unpermute[static_cast<int>(s.type)](args, 0, maps.num_tokens);
        streamed.check_equal(out, "streaming stores against plain ones");
    });
    Bytes other_padding(s.rows.size); // what lies in a row that no slot names does not matter
    std::memcpy(other_padding.get(), s.rows.get(), s.rows.bytes());
    for (int64_t row = 0; row < maps.num_rows; ++row)
        if (maps.row_to_token[row] < 0)
            std::memset(other_padding.get() + row * s.row_bytes(), 0xff, static_cast<size_t>(s.row_bytes()));
    Outputs again(0x11, 0);
    args.rows = other_padding.get();
    args.out = again.poisoned_items(maps.num_tokens * s.hidden, item_bytes(s.type));
    cpu::unpermute(args);
    again.check_equal(out, "other bytes in the padding rows");
    for (int64_t token = 0; token < maps.num_tokens; ++token) {
        const int32_t *to_row = maps.token_to_row + token * maps.top_k;
        const auto routed = maps.top_k - std::count(to_row, to_row + maps.top_k, -1);
        const char *result = out.get<char>(0) + token * s.row_bytes();
        if (routed == 0)
            CHECK(all_bytes(result, s.row_bytes(), 0));
        if (routed == 1 && !weighted)
            CHECK(same_bytes(result, s.rows.get() + *std::max_element(to_row, to_row + maps.top_k) * s.row_bytes(),
                             s.row_bytes()));
    }
    if (maps.num_tokens) {
        const int64_t token = random.integer(0, maps.num_tokens - 1);
        Outputs alone(0x22, 0);
        args.maps = token_alone(maps, token);
        args.topk_weights = weighted ? s.weights.get() + token * s.token_weight_bytes(maps) : nullptr;
        args.out = alone.poisoned_items(s.hidden, item_bytes(s.type));
        cpu::unpermute(args);
        CHECK(same_bytes(args.out, out.get<char>(0) + token * s.row_bytes(), s.row_bytes()));
    }
}

void check_backward(const RouteMaps &maps, const Sums &s, const Outputs &out) {
    for (int64_t row = 0; row < maps.num_rows; ++row)
        if (maps.row_to_token[row] < 0)
            CHECK(all_bytes(out.get<char>(0) + row * s.row_bytes(), s.row_bytes(), 0));
    for (int64_t slot = 0; slot < maps.num_tokens * maps.top_k; ++slot) {
        const int64_t row = maps.token_to_row[slot], item = item_bytes(s.weight_type);
        if (row < 0) {
            CHECK(all_bytes(out.get<char>(1) + slot * item, item, 0));
            continue;
        }
        if (s.type != FloatType::float32)
            continue;
        const float weight = reinterpret_cast<const float *>(s.weights.get())[slot];
        const float *grad = reinterpret_cast<const float *>(s.grad_y.get()) + slot / maps.top_k * s.hidden;
        for (int64_t i = 0; i < s.hidden; ++i) {
            const float product = weight * grad[i], expected = std::isnan(product) ? NAN : product;
            CHECK(same_bytes(out.get<float>(0) + row * s.hidden + i, &expected, 4));
        }
    }
}

void unpermute_backward(Random &random, const RouteMaps &maps, const Sums &s) {
    UnpermuteBackwardArgs args{};
    args.maps = maps;
    args.hidden = s.hidden;
    args.type = s.type;
    args.grad_y = s.grad_y.get();
    args.rows = s.rows.get();
    args.topk_weights = s.weights.get();
    const auto run = [&](Outputs &to, int64_t num_tokens) {
        args.grad_rows = to.poisoned_items(maps.num_rows * s.hidden, item_bytes(s.type));
        args.grad_topk_weights = to.poisoned_items(num_tokens * maps.top_k, item_bytes(s.weight_type));
        cpu::unpermute_backward(args);
    };
    const Outputs out = same_everywhere(random, [&](Outputs &to) { run(to, maps.num_tokens); });
    check_backward(maps, s, out);
    for_each_isa([&](cpu::Isa) { // the stores that the driver takes for rows past the caches
        Outputs streamed(0, s.skip);
        args.grad_rows = streamed.poisoned_items(maps.num_rows * s.hidden, item_bytes(s.type));
        args.grad_topk_weights = streamed.poisoned_items(maps.num_tokens * maps.top_k, item_bytes(s.weight_type));
        args.streaming = true;
        cpu::current_permutation_kernels().unpermute_backward[static_cast<int>(s.type)](args, 0, maps.num_tokens);
        streamed.check_equal(out, "streaming stores against plain ones");
    });
    if (maps.num_tokens) {
        const int64_t token = random.integer(0, maps.num_tokens - 1);
        Outputs alone(0x22, 0);
        // a map of its own: the other tokens' rows are padding
        Buffer<int32_t> row_to_token(maps.num_rows);
        for (int64_t row = 0; row < maps.num_rows; ++row)
            row_to_token[row] = maps.row_to_token[row] == token ? 0 : -1;
        args.maps = token_alone(maps, token);
        args.maps.row_to_token = row_to_token.get();
        args.grad_y = s.grad_y.get() + token * s.row_bytes();
        args.topk_weights = s.weights.get() + token * s.token_weight_bytes(maps);
        run(alone, 1);
        CHECK(same_bytes(alone.get<char>(1), out.get<char>(1) + token * s.token_weight_bytes(maps),
                         s.token_weight_bytes(maps)));
        for (int64_t slot = token * maps.top_k; slot < (token + 1) * maps.top_k; ++slot)
            if (const int64_t row = maps.token_to_row[slot]; row >= 0)
                CHECK(same_bytes(alone.get<char>(0) + row * s.row_bytes(), out.get<char>(0) + row * s.row_bytes(),
                                 s.row_bytes()));
    }
}

// A map made by hand that names what does not exist is refused before anything is touched.
void wrong_maps(Random &random, Plan &plan) {
    const auto attempt = [&](Buffer<int32_t> &map, int64_t limit) {
        if (!map.size)
            return;
        int32_t &entry = map[random.integer(0, map.size - 1)];
        const int32_t wrong[] = {static_cast<int32_t>(limit), -2, INT32_MIN, INT32_MAX}, before = entry;
        entry = random.any_of(wrong);
        PermuteArgs args{plan.maps, 0, nullptr, nullptr};
        CHECK(throws_out_of_range([&] { cpu::permute(args); }));
        entry = before;
    };
    attempt(plan.row_to_token, plan.maps.num_tokens);
    attempt(plan.token_to_row, plan.maps.num_rows);
}

} // namespace

int main() {
    fuzz("test_permutation", 1500, 0x552b2a22decec2ea, [](Random &random) {
        const Sizes sizes = random_sizes(random);
        Plan routes = random.one_in(2) ? plan<int32_t>(random, sizes) : plan<int64_t>(random, sizes);
        if (sizes.num_tokens > 40)
            return;
        permute(random, routes.maps);
        permute_quantize(random, routes.maps);
        const Sums sums(random, routes.maps);
        unpermute(random, routes.maps, sums);
        unpermute_backward(random, routes.maps, sums);
        wrong_maps(random, routes);
    });
}
