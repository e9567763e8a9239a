#include "cpu/permutation.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cpu/memory.h"
#include "cpu/quantization.h"
#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {

constexpr int64_t bytes_per_share = 128 << 10; // about 20 us of moving for one thread

// Items (tokens, rows) that make a share worth a thread, each moving `bytes`.
int64_t grain(int64_t bytes) { return bytes_per_share / std::max<int64_t>(1, bytes); }

// True if any entry is -1. Entries are checked so that a plan made by hand cannot read or write outside the arrays.
bool checked_map(const int32_t *map, int64_t count, int64_t limit) {
    int32_t least = 0, most = -1;
    for (int64_t i = 0; i < count; ++i) {
        least = std::min(least, map[i]);
        most = std::max(most, map[i]);
    }
    if (least < -1 || most >= limit)
        throw std::out_of_range("_core: a route map has an entry that is not a row or token of its arrays");
    return least < 0;
}

void check_slots(const RouteMaps &maps) { checked_map(maps.token_to_row, maps.num_tokens * maps.top_k, maps.num_rows); }

// body(row) for every padding row.
template <class Body> void for_each_padding_row(const RouteMaps &maps, int64_t row_bytes, const Body &body) {
    if (!checked_map(maps.row_to_token, maps.num_rows, maps.num_tokens))
        return;
    parallel_ranges(maps.num_rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            if (maps.row_to_token[row] < 0)
                body(row);
    });
}

void zero_padding(const RouteMaps &maps, void *rows, int64_t row_bytes) {
    for_each_padding_row(maps, row_bytes, [&](int64_t row) {
        std::memset(static_cast<uint8_t *>(rows) + row * row_bytes, 0, static_cast<size_t>(row_bytes));
    });
}

bool is_routed(const RouteMaps &maps, int64_t token) {
    const int32_t *rows = maps.token_to_row + token * maps.top_k;
    return std::any_of(rows, rows + maps.top_k, [](int32_t row) { return row >= 0; });
}

bool pass_the_caches(int64_t bytes) { return bytes > most_cached_result; }

} // namespace

void permute(const PermuteArgs &args) {
    check_slots(args.maps);
    zero_padding(args.maps, args.rows, args.row_bytes);
    const RouteMaps &maps = args.maps;
    const SpreadArgs rows = {maps.top_k,        maps.token_to_row,
                             args.row_bytes,    args.x,
                             args.rows,         pass_the_caches(maps.num_rows * args.row_bytes),
                             maps.row_to_token, maps.num_rows};
    parallel_ranges(maps.num_tokens, grain(args.row_bytes * (maps.top_k + 1)),
                    [&](int64_t begin, int64_t end) { current_permutation_kernels().spread(rows, begin, end); });
}

// A few tokens are quantised into a buffer that stays in cache and copied from there to their rows.
void permute_quantize(const PermuteQuantizeArgs &args) {
    constexpr int64_t run = 8; // tokens: 56 KiB of codes at hidden = 7168
    check_slots(args.maps);
    const int64_t hidden = args.hidden, top_k = args.maps.top_k, size = item_size(args.x_type);
    if (hidden == 0) // neither codes nor scales
        return;
    const int64_t row_scales = hidden / args.block_cols + (hidden % args.block_cols != 0);
    const int64_t scale_bytes = row_scales * static_cast<int64_t>(sizeof(float));
    for_each_padding_row(args.maps, hidden, [&](int64_t row) {
        std::memset(args.codes + row * hidden, 0, static_cast<size_t>(hidden));
        std::fill_n(args.scales + row * row_scales, row_scales, 1.0f);
    });
    const auto quantize =
        current_quantization_kernels().quantize[static_cast<int>(args.x_type)][static_cast<int>(Fp8Format::e4m3)];
    const auto spread = current_permutation_kernels().spread;
    const bool streaming = pass_the_caches(args.maps.num_rows * hidden);
    const auto *x = static_cast<const uint8_t *>(args.x);
    parallel_ranges(args.maps.num_tokens, grain(hidden * (size + top_k)), [&](int64_t begin, int64_t end) {
        const auto tokens = static_cast<size_t>(std::min(run, end - begin));
        const std::unique_ptr<uint8_t[]> codes(new uint8_t[tokens * static_cast<size_t>(hidden)]);
        const std::unique_ptr<float[]> scales(new float[tokens * static_cast<size_t>(row_scales)]);
        for (int64_t first = begin; first < end; first += run) {
            const int64_t count = std::min(run, end - first);
            for (int64_t i = 0; i < count; ++i)
                if (is_routed(args.maps, first + i))
                    quantize({x + (first + i) * hidden * size, 1, hidden, args.block_cols, args.power_of_two, false,
                              codes.get() + i * hidden, scales.get() + i * row_scales});
            const int32_t *to_row = args.maps.token_to_row + first * top_k;
            spread({top_k, to_row, hidden, codes.get(), args.codes, streaming}, 0, count);
            spread({top_k, to_row, scale_bytes, reinterpret_cast<const uint8_t *>(scales.get()),
                    reinterpret_cast<uint8_t *>(args.scales), false},
                   0, count);
        }
    });
}

void unpermute(const UnpermuteArgs &given) {
    UnpermuteArgs args = given;
    check_slots(args.maps);
    const auto kernel = current_permutation_kernels().unpermute[static_cast<int>(args.type)];
    const int64_t row_bytes = args.hidden * item_size(args.type);
    args.streaming = pass_the_caches(args.maps.num_tokens * row_bytes);
    parallel_ranges(args.maps.num_tokens, grain(row_bytes * (args.maps.top_k + 1)),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void unpermute_backward(const UnpermuteBackwardArgs &given) {
    UnpermuteBackwardArgs args = given;
    check_slots(args.maps);
    const int64_t row_bytes = args.hidden * item_size(args.type);
    args.streaming = pass_the_caches(args.maps.num_rows * row_bytes);
    zero_padding(args.maps, args.grad_rows, row_bytes);
    const auto kernel = current_permutation_kernels().unpermute_backward[static_cast<int>(args.type)];
    parallel_ranges(args.maps.num_tokens, grain(row_bytes * (2 * args.maps.top_k + 1)),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

} // namespace pyroute::cpu
