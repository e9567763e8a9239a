#include <algorithm>

#include "cuda/gating.h"

namespace pyroute::cuda {

namespace {

constexpr const char *room = "gating_losses";

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A thread to an item, as far as the device has room at once.
LaunchShape over_items(const Stream &stream, int64_t items) {
    const int64_t blocks = std::min<int64_t>(divide_up(items, 256), 4 * int64_t{device_info(stream.device).num_sms});
    return {static_cast<uint32_t>(blocks), 256};
}

const char *by_type(FloatType type, const char *narrow, const char *wide) {
    return type == FloatType::float64 ? wide : narrow;
}

} // namespace

void count_assignments(const Stream &stream, BalanceCounts args) {
    const int64_t rows = args.sequence_ids ? std::max<int64_t>(args.num_tokens, 1) : 1;
    const auto clear = [&](void *counts, int64_t count, uint8_t byte) {
        if (counts && count)
            fill(stream, counts, byte, static_cast<size_t>(count) * sizeof(int32_t));
    };
    clear(args.tokens, rows, 0);
    clear(args.loads, rows * args.num_experts, 0);
    clear(args.totals, 1, 0);
    clear(args.table, static_cast<int64_t>(args.table_size), 0xff);
    args.table_shift = 64;
    for (uint64_t size = args.table_size; size > 1; size /= 2)
        --args.table_shift;
    LaunchShape shape = over_items(stream, args.num_tokens);
    args.counts_in_block = !args.sequence_ids && args.loads && args.num_experts <= 8192;
    if (args.counts_in_block)
        shape.shared_bytes = static_cast<uint32_t>(args.num_experts * 4);
    launch(stream, room, "count_assignments", shape, args);
}

void balance_terms(const Stream &stream, const BalanceFractions &args, FloatType type) {
    launch(stream, room, by_type(type, "balance_terms_float32", "balance_terms_float64"),
           over_items(stream, args.num_rows * args.num_experts), args);
}

void sum_tokens(const Stream &stream, const TokenSum &args) { launch(stream, room, "sum_tokens", {1, 256}, args); }

void share_among_tokens(const Stream &stream, const TokenShare &args) {
    launch(stream, room, "share_among_tokens", {1, 32}, args);
}

void update_bias(const Stream &stream, const BiasUpdate &args, FloatType type) {
    launch(stream, room, by_type(type, "update_bias_float32", "update_bias_float64"), {1, 256}, args);
}

void copy_integers(const Stream &stream, const IntegerCopy &args) {
    launch(stream, room, "copy_integers", over_items(stream, args.count), args);
}

void expert_choice(const Stream &stream, const ExpertChoiceLaunch &args) {
    const FloatType type = args.logits.type;
    const int64_t sms = device_info(stream.device).num_sms;
    const int64_t blocks =
        std::min<int64_t>(divide_up(args.logits.num_tokens, 8), (type == FloatType::float64 ? 2 : 4) * sms);
    launch(stream, room, by_type(type, "expert_choice_keys_float32", "expert_choice_keys_float64"),
           {static_cast<uint32_t>(blocks), 256}, args);
    launch(stream, room, by_type(type, "expert_choice_sort_float32", "expert_choice_sort_float64"),
           {static_cast<uint32_t>(std::min(args.logits.num_experts, 4 * sms)), 256}, args);
}

} // namespace pyroute::cuda
