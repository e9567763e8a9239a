#include "cuda/gating.h"

#include "bindings/cuda/pointers.h"
#include "bindings/router.h"

namespace pyroute::cuda {

void bind_gating(py::module_ &module);

namespace {

using Address = uintptr_t;

FloatType type_of(const std::string &name) {
    if (name == "float32")
        return FloatType::float32;
    if (name == "bfloat16")
        return FloatType::bfloat16;
    if (name == "float16")
        return FloatType::float16;
    if (name == "float64")
        return FloatType::float64;
    throw std::invalid_argument("type must be float32, bfloat16, float16 or float64");
}

Logits logits_of(Address data, const std::string &type, int64_t num_tokens, int64_t num_experts) {
    return {pointer<const void>(data), type_of(type), num_tokens, num_experts};
}

BalanceTerms balance_of(Address fractions, Address scales, Address sequence, int64_t num_sequences) {
    return {pointer<const void>(fractions), pointer<const void>(scales), pointer<const int32_t>(sequence),
            num_sequences};
}

// --- the choice and its backward
// --------------------------------------------------------------------------------------

size_t gating_workspace(int device, const py::tuple &fields, const std::string &type, int64_t num_tokens) {
    GatingArgs args = {};
    args.router = router_of(fields);
    args.logits = logits_of(0, type, num_tokens, args.router.num_experts);
    return topk_gating_workspace({device, nullptr}, args);
}

void gate(int device, Address stream, const py::tuple &fields, Address logits, const std::string &type,
          int64_t num_tokens, Address bias, Address given_idx, Address token_mask, Address workspace, Address topk_idx,
          Address topk_weights, Address tokens_per_expert) {
    GatingArgs args;
    args.router = router_of(fields);
    args.logits = logits_of(logits, type, num_tokens, args.router.num_experts);
    args.bias = pointer<const void>(bias);
    args.given_idx = pointer<const int32_t>(given_idx);
    args.token_mask = pointer<const uint8_t>(token_mask);
    args.topk_idx = pointer<int32_t>(topk_idx);
    args.topk_weights = pointer<void>(topk_weights);
    args.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
    topk_gating(stream_of(device, stream), args, pointer<void>(workspace));
}

size_t backward_workspace(int device, const py::tuple &fields, const std::string &type, int64_t num_tokens) {
    GatingBackwardArgs args = {};
    args.router = router_of(fields);
    args.logits = logits_of(0, type, num_tokens, args.router.num_experts);
    return topk_gating_backward_workspace({device, nullptr}, args);
}

void backward(int device, Address stream, const py::tuple &fields, Address grad_weights, Address logits,
              const std::string &type, int64_t num_tokens, Address topk_idx, Address token_mask, Address fractions,
              Address scales, Address sequence, int64_t num_sequences, double z_scale, Address device_z_scale,
              Address workspace, Address grad_logits) {
    GatingBackwardArgs args;
    args.router = router_of(fields);
    args.logits = logits_of(logits, type, num_tokens, args.router.num_experts);
    args.grad_weights = pointer<const void>(grad_weights);
    args.topk_idx = pointer<const int32_t>(topk_idx);
    args.token_mask = pointer<const uint8_t>(token_mask);
    args.balance = balance_of(fractions, scales, sequence, num_sequences);
    args.z_scale = z_scale;
    args.grad_logits = pointer<void>(grad_logits);
    topk_gating_backward(stream_of(device, stream), args, pointer<const double>(device_z_scale),
                         pointer<void>(workspace));
}

// --- losses
// -----------------------------------------------------------------------------------------------------------

void loss_terms(int device, Address stream, const std::string &score, Address logits, const std::string &type,
                int64_t num_tokens, int64_t num_experts, Address fractions, Address sequence, int64_t num_sequences,
                Address terms) {
    LossTermsArgs args;
    args.score = score_of(score);
    args.logits = logits_of(logits, type, num_tokens, num_experts);
    args.balance = balance_of(fractions, 0, sequence, num_sequences);
    args.terms = pointer<double>(terms);
    gating_loss_terms(stream_of(device, stream), args);
}

void count(int device, Address stream, int64_t num_tokens, int64_t top_k, int64_t num_experts, Address topk_idx,
           Address token_mask, Address sequence_ids, int64_t sequence_item_size, Address table, uint64_t table_size,
           Address totals, Address sequence, Address tokens, Address loads) {
    BalanceCounts args = {};
    args.num_tokens = num_tokens;
    args.top_k = top_k;
    args.num_experts = num_experts;
    args.topk_idx = pointer<const int32_t>(topk_idx);
    args.token_mask = pointer<const uint8_t>(token_mask);
    args.sequence_ids = pointer<const void>(sequence_ids);
    args.sequence_item_size = sequence_item_size;
    args.table = pointer<int32_t>(table);
    args.table_size = table_size;
    args.totals = pointer<BalanceTotals>(totals);
    args.sequence = pointer<int32_t>(sequence);
    args.tokens = pointer<int32_t>(tokens);
    args.loads = pointer<int32_t>(loads);
    count_assignments(stream_of(device, stream), args);
}

void fractions_of(int device, Address stream, const std::string &type, int64_t num_rows, int64_t num_experts,
                  int64_t top_k, Address loads, Address wide_loads, Address tokens, int64_t total_tokens,
                  Address totals, double coef, Address factor, Address fractions, Address scales, Address weights) {
    const BalanceFractions args = {num_rows,
                                   num_experts,
                                   top_k,
                                   pointer<const int32_t>(loads),
                                   pointer<const int64_t>(wide_loads),
                                   pointer<const int32_t>(tokens),
                                   total_tokens,
                                   pointer<const BalanceTotals>(totals),
                                   coef,
                                   pointer<const double>(factor),
                                   pointer<void>(fractions),
                                   pointer<void>(scales),
                                   pointer<double>(weights)};
    balance_terms(stream_of(device, stream), args, type_of(type));
}

void sum_of_tokens(int device, Address stream, int64_t num_tokens, Address terms, Address weights, Address sequence,
                   Address token_mask, Address num_real, Address chunk_sums, Address sum) {
    sum_tokens(stream_of(device, stream),
               {num_tokens, pointer<const double>(terms), pointer<const double>(weights),
                pointer<const int32_t>(sequence), pointer<const uint8_t>(token_mask), pointer<const int32_t>(num_real),
                pointer<double>(chunk_sums), pointer<double>(sum)});
}

void share_of_token(int device, Address stream, double numerator, Address factor, int64_t num_tokens, Address num_real,
                    Address share) {
    share_among_tokens(stream_of(device, stream), {numerator, pointer<const double>(factor), num_tokens,
                                                   pointer<const int32_t>(num_real), pointer<double>(share)});
}

// --- the rest
// ---------------------------------------------------------------------------------------------------------

void updated_bias(int device, Address stream, const std::string &type, int64_t num_experts, Address bias, Address loads,
                  double rate, Address updated) {
    update_bias(stream_of(device, stream),
                {num_experts, pointer<const void>(bias), pointer<const int64_t>(loads), rate, pointer<void>(updated)},
                type_of(type));
}

void integers(int device, Address stream, int64_t size, Address from, int64_t item_size, bool is_signed,
              int64_t num_experts, Address ids, Address loads) {
    copy_integers(stream_of(device, stream), {size, pointer<const void>(from), item_size, is_signed, num_experts,
                                              pointer<int32_t>(ids), pointer<int64_t>(loads)});
}

void choose_tokens(int device, Address stream, Address logits, const std::string &type, int64_t num_tokens,
                   int64_t num_experts, Address token_mask, int64_t capacity, Address keys, Address more_keys,
                   Address positions, Address more_positions, Address token_idx, Address token_weights) {
    const ExpertChoiceLaunch args = {logits_of(logits, type, num_tokens, num_experts),
                                     pointer<const uint8_t>(token_mask),
                                     capacity,
                                     {pointer<void>(keys), pointer<void>(more_keys)},
                                     {pointer<int32_t>(positions), pointer<int32_t>(more_positions)},
                                     pointer<int32_t>(token_idx),
                                     pointer<void>(token_weights)};
    expert_choice(stream_of(device, stream), args);
}

} // namespace

void bind_gating(py::module_ &module) {
    module.def("topk_gating_workspace", &gating_workspace);
    module.def("topk_gating", &gate);
    module.def("topk_gating_backward_workspace", &backward_workspace);
    module.def("topk_gating_backward", &backward);
    module.def("gating_loss_terms", &loss_terms);
    module.def("count_assignments", &count);
    module.def("balance_terms", &fractions_of);
    module.def("sum_tokens", &sum_of_tokens);
    module.def("share_among_tokens", &share_of_token);
    module.def("update_bias", &updated_bias);
    module.def("copy_integers", &integers);
    module.def("expert_choice", &choose_tokens);
}

} // namespace pyroute::cuda
