#include "bindings/memory.h"
#include "bindings/router.h"

#include "cpu/gating.h"

namespace pyroute {

void bind_gating(py::module_ &module);

namespace {

[[noreturn]] void refuse(const char *what) { throw std::invalid_argument(std::string("_core: ") + what); }

// `logits` [T, E] of the named type.
Logits logits_of(const py::array &logits, const std::string &type) {
    if (logits.ndim() != 2 || logits.shape(1) < 1)
        refuse("logits must have two dimensions and at least one expert");
    const int64_t tokens = logits.shape(0), experts = logits.shape(1);
    if (type == "float32")
        return {input<float>(logits, "logits", {tokens, experts}), FloatType::float32, tokens, experts};
    if (type == "float64")
        return {input<double>(logits, "logits", {tokens, experts}), FloatType::float64, tokens, experts};
    if (type != "bfloat16" && type != "float16")
        refuse("logits must be float32, float64, bfloat16 or float16");
    const FloatType float_type = type == "bfloat16" ? FloatType::bfloat16 : FloatType::float16;
    return {input<uint16_t>(logits, "logits", {tokens, experts}), float_type, tokens, experts};
}

Logits router_logits(const py::array &array, const std::string &type, const Router &router) {
    const Logits logits = logits_of(array, type);
    if (logits.num_experts != router.num_experts)
        refuse("logits must have the router's number of experts");
    return logits;
}

// Arrays in the type of the scores: double for float64 logits, float otherwise.
const void *scalar_input(const py::object &object, const char *name, const Logits &logits,
                         std::initializer_list<int64_t> shape) {
    if (logits.type == FloatType::float64)
        return optional_input<double>(object, name, shape);
    return optional_input<float>(object, name, shape);
}

void *scalar_output(py::array &array, const char *name, const Logits &logits, std::initializer_list<int64_t> shape) {
    if (logits.type == FloatType::float64)
        return output<double>(array, name, shape);
    return output<float>(array, name, shape);
}

BalanceTerms balance_of(const py::object &fractions, const py::object &scales, const py::object &sequence,
                        const Logits &logits) {
    if (fractions.is_none())
        return {nullptr, nullptr, nullptr, 0};
    const py::array array = array_of(fractions, "fractions"), weights = array_of(scales, "scales");
    const int64_t sequences = array.ndim() == 2 ? array.shape(0) : 0;
    if (sequences < 1)
        refuse("fractions must have at least one row");
    return {scalar_input(fractions, "fractions", logits, {sequences, logits.num_experts}),
            scalar_input(weights, "scales", logits, {sequences}),
            input<int32_t>(array_of(sequence, "sequence"), "sequence", {logits.num_tokens}), sequences};
}

void topk_gating(const py::tuple &fields, const py::array &logits, const std::string &type, const py::object &bias,
                 const py::object &given_idx, const py::object &token_mask, py::array topk_idx, py::array topk_weights,
                 py::array tokens_per_expert) {
    GatingArgs args;
    args.router = router_of(fields);
    args.logits = router_logits(logits, type, args.router);
    const int64_t tokens = args.logits.num_tokens, top_k = args.router.top_k;
    args.bias = scalar_input(bias, "bias", args.logits, {args.router.num_experts});
    args.given_idx = optional_input<int32_t>(given_idx, "given_idx", {tokens, top_k});
    args.token_mask = optional_input<uint8_t>(token_mask, "token_mask", {tokens});
    args.topk_idx = output<int32_t>(topk_idx, "topk_idx", {tokens, top_k});
    args.topk_weights = scalar_output(topk_weights, "topk_weights", args.logits, {tokens, top_k});
    args.tokens_per_expert = output<int32_t>(tokens_per_expert, "tokens_per_expert", {args.router.num_experts});
    const ReleaseGil release(tokens * args.router.num_experts * 2);
    cpu::topk_gating(args);
}

void topk_gating_backward(const py::tuple &fields, const py::array &grad_weights, const py::array &logits,
                          const std::string &type, const py::array &topk_idx, const py::object &token_mask,
                          const py::object &fractions, const py::object &scales, const py::object &sequence,
                          double z_scale, py::array grad_logits) {
    GatingBackwardArgs args;
    args.router = router_of(fields);
    args.logits = router_logits(logits, type, args.router);
    const int64_t tokens = args.logits.num_tokens, top_k = args.router.top_k;
    args.grad_weights = scalar_input(grad_weights, "grad_weights", args.logits, {tokens, top_k});
    args.topk_idx = input<int32_t>(topk_idx, "topk_idx", {tokens, top_k});
    args.token_mask = optional_input<uint8_t>(token_mask, "token_mask", {tokens});
    args.balance = balance_of(fractions, scales, sequence, args.logits);
    args.z_scale = z_scale;
    args.grad_logits = scalar_output(grad_logits, "grad_logits", args.logits, {tokens, args.router.num_experts});
    py::gil_scoped_release release;
    cpu::topk_gating_backward(args);
}

void expert_choice(const py::array &logits, const std::string &type, const py::array &tokens, py::array keys,
                   py::array token_idx, py::array token_weights) {
    ExpertChoiceArgs args;
    args.logits = logits_of(logits, type);
    const int64_t experts = args.logits.num_experts;
    args.num_real = tokens.size();
    args.tokens = input<int32_t>(tokens, "tokens", {args.num_real});
    for (int64_t i = 0; i < args.num_real; ++i)
        if (args.tokens[i] < 0 || args.tokens[i] >= args.logits.num_tokens)
            refuse("tokens must be rows of logits");
    args.capacity = token_idx.ndim() == 2 ? token_idx.shape(1) : 0;
    args.token_idx = output<int32_t>(token_idx, "token_idx", {experts, args.capacity});
    args.token_weights = scalar_output(token_weights, "token_weights", args.logits, {experts, args.capacity});
    args.keys = scalar_output(keys, "keys", args.logits, {experts, args.num_real});
    py::gil_scoped_release release;
    cpu::expert_choice(args);
}

void gating_loss_terms(const std::string &score, const py::array &logits, const std::string &type,
                       const py::object &fractions, const py::object &scales, const py::object &sequence,
                       py::array terms) {
    LossTermsArgs args;
    args.score = score_of(score);
    args.logits = logits_of(logits, type);
    args.balance = balance_of(fractions, scales, sequence, args.logits);
    args.terms = output<double>(terms, "terms", {args.logits.num_tokens});
    py::gil_scoped_release release;
    cpu::gating_loss_terms(args);
}

} // namespace

void bind_gating(py::module_ &module) {
    module.def("topk_gating", &topk_gating);
    module.def("topk_gating_backward", &topk_gating_backward);
    module.def("expert_choice", &expert_choice);
    module.def("gating_loss_terms", &gating_loss_terms);
}

} // namespace pyroute
