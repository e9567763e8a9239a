#include "cuda/moe.h"

#include <cmath>

namespace pyroute::cuda {

namespace {

constexpr uint32_t threads = 256;
constexpr int64_t rows_of_warps = threads / 32;

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

template <class... Pointers> bool at_words(int64_t elements, int64_t item_bytes, const Pointers *...pointers) {
    return elements * item_bytes % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class Row> constexpr const char *type_name = "_float32";
template <> constexpr const char *type_name<uint16_t> = "_bfloat16";

const char *form_name(const ActivationProgram &program) {
    switch (program.kind) {
    case ActivationProgram::swish_gate:
        return std::isinf(program.limit) ? "_swish" : "_clamped_swish"; // an infinite clamp clamps nothing
    case ActivationProgram::gelu_gate:
        return "_gelu";
    default:
        return "_relu2";
    }
}

template <class Args>
void launch_blocks(const Stream &stream, const std::string &kernel, int64_t blocks, const Args &args) {
    if (blocks > 0xffffffff / threads) // threads are counted in 32 bits
        throw Error("moe: more than 2^32 - 1 threads of work; send fewer tokens at once");
    if (blocks > 0)
        launch(stream, "moe", kernel.c_str(), {static_cast<uint32_t>(blocks), threads}, args);
}

} // namespace

template <class Row> void activate(const Stream &stream, const ExpertRows &experts, const ActivationArgs<Row> &args) {
    const int64_t row_threads = divide_up(args.intermediate, 8);
    const bool words =
        at_words(args.intermediate, sizeof(Row), args.gate_up, args.hidden) && args.intermediate % 8 == 0;
    const ActivateLaunch<Row> work{experts, args, static_cast<uint32_t>(row_threads), words, false, nullptr, nullptr};
    launch_blocks(stream, std::string("activate") + form_name(args.program) + type_name<Row>,
                  divide_up(experts.num_rows * row_threads, threads), work);
}

template <class Row>
void activate_quantize(const Stream &stream, const ExpertRows &experts, const ActivationArgs<Row> &args,
                       const QuantizedHidden &hidden) {
    const int64_t row_threads = divide_up(args.intermediate, 128) * 8;
    const ActivateLaunch<Row> work{
        experts, args, static_cast<uint32_t>(row_threads), true, hidden.power_of_two, hidden.codes, hidden.scales};
    launch_blocks(stream, std::string("activate_quantize") + form_name(args.program) + type_name<Row>,
                  divide_up(experts.num_rows * row_threads, threads), work);
}

template <class Row>
void activate_backward(const Stream &stream, const ExpertRows &experts, const ActivationBackwardArgs<Row> &args) {
    const ActivationArgs<Row> &forward = args.forward;
    const bool words = at_words(forward.intermediate, sizeof(Row), forward.gate_up, forward.hidden, args.grad_hidden,
                                args.grad_gate_up) &&
                       forward.intermediate % 8 == 0;
    launch_blocks(stream, std::string("activate_backward") + form_name(forward.program) + type_name<Row>,
                  divide_up(experts.num_rows, rows_of_warps), ActivateBackwardLaunch<Row>{experts, args, words});
}

template <class Row> void add_bias(const Stream &stream, const ExpertRows &experts, const AddBiasArgs<Row> &args) {
    launch_blocks(stream, std::string("add_bias") + type_name<Row>, divide_up(experts.num_rows, rows_of_warps),
                  AddBiasLaunch<Row>{experts, args});
}

template <class Row> void add_bias_dots(const Stream &stream, const ExpertRows &experts, const BiasDotArgs<Row> &args) {
    launch_blocks(stream, std::string("bias_dot") + type_name<Row>, divide_up(experts.num_rows, rows_of_warps),
                  BiasDotLaunch<Row>{experts, args});
}

template <class Row> void bias_grad(const Stream &stream, const ExpertRows &experts, const BiasGradArgs<Row> &args) {
    const int64_t column_parts = divide_up(args.columns, threads);
    launch_blocks(stream, std::string("bias_grad") + type_name<Row>, experts.num_experts * column_parts,
                  BiasGradLaunch<Row>{experts, args, static_cast<uint32_t>(column_parts)});
}

void row_values(const Stream &stream, const SlotValuesLaunch &args) {
    launch_blocks(stream, "row_values", divide_up(args.maps.num_rows, threads), args);
}
void slot_values(const Stream &stream, const SlotValuesLaunch &args) {
    launch_blocks(stream, "slot_values", divide_up(args.maps.num_tokens * args.maps.top_k, threads), args);
}

#define PYROUTE_LAUNCHERS(Row)                                                                                         \
    template void activate(const Stream &, const ExpertRows &, const ActivationArgs<Row> &);                           \
    template void activate_quantize(const Stream &, const ExpertRows &, const ActivationArgs<Row> &,                   \
                                    const QuantizedHidden &);                                                          \
    template void activate_backward(const Stream &, const ExpertRows &, const ActivationBackwardArgs<Row> &);          \
    template void add_bias(const Stream &, const ExpertRows &, const AddBiasArgs<Row> &);                              \
    template void add_bias_dots(const Stream &, const ExpertRows &, const BiasDotArgs<Row> &);                         \
    template void bias_grad(const Stream &, const ExpertRows &, const BiasGradArgs<Row> &);
PYROUTE_LAUNCHERS(float)
PYROUTE_LAUNCHERS(uint16_t)

} // namespace pyroute::cuda
