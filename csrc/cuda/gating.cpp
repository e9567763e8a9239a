#include "cuda/gating.h"

#include <algorithm>
#include <optional>

namespace pyroute::cuda {

namespace {

constexpr const char *room = "gating";

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// --- a token in registers
// ---------------------------------------------------------------------------------------------

// The kernels, the cheapest first, and the launch bounds that they are compiled with.
struct Variant {
    const char *kernel;
    int64_t lanes, items;
    uint32_t threads, blocks_per_sm;
};
constexpr Variant variants[] = {
    {"topk_gating_8x1", 8, 1, 256, 4},     {"topk_gating_8x2", 8, 2, 256, 4},     {"topk_gating_8x4", 8, 4, 256, 3},
    {"topk_gating_8x8", 8, 8, 256, 3},     {"topk_gating_16x8", 16, 8, 256, 3},   {"topk_gating_32x8", 32, 8, 256, 4},
    {"topk_gating_32x16", 32, 16, 256, 2}, {"topk_gating_32x32", 32, 32, 128, 2},
};

struct Cut {
    const Variant *variant;
    GatingLaunch launch;
    int64_t shared_bytes_of(int64_t threads) const {
        const int64_t tokens = threads / variant->lanes;
        return (round_up(launch.args.router.num_experts, 4) + tokens * launch.token_words) * 4;
    }
};

bool is_multiple(const void *address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

// How a router's experts go over a variant's lanes, if they do.
std::optional<Cut> cut_for(const Variant &variant, const GatingArgs &args, int64_t shared_bytes) {
    const Router &router = args.router;
    const int64_t size = router.num_experts / router.num_groups;
    if (router.num_groups > variant.lanes || args.logits.type == FloatType::float64)
        return {};
    Cut cut{&variant, {}};
    GatingLaunch &launch = cut.launch;
    launch.args = args;
    launch.num_experts = static_cast<int32_t>(router.num_experts);
    launch.top_k = static_cast<int32_t>(router.top_k);
    launch.group_size = static_cast<int32_t>(size);
    int64_t lanes_per_group = 1;
    for (; 2 * lanes_per_group * router.num_groups <= variant.lanes; lanes_per_group *= 2)
        ++launch.group_shift;
    int64_t run = divide_up(size, lanes_per_group);
    if (run > variant.items || (router.num_groups > 1 && router.group_topn > 2))
        return {};
    launch.vectors = variant.items >= 4 && size % 4 == 0 &&
                     is_multiple(args.logits.data, 4 * item_size(args.logits.type)) && is_multiple(args.bias, 16);
    if (launch.vectors)
        run = round_up(run, 4);
    launch.experts_per_lane = static_cast<int32_t>(run);
    launch.full =
        run == variant.items && size == run * lanes_per_group && router.num_groups * lanes_per_group == variant.lanes;
    launch.renormalize_eps = static_cast<float>(router.renormalize_eps);
    launch.scaling_factor = static_cast<float>(router.scaling_factor);
    launch.token_words = static_cast<int32_t>(variant.lanes * variant.items + 2 * round_up(router.top_k, 4));
    if (cut.shared_bytes_of(32) > shared_bytes)
        return {};
    return cut;
}

std::optional<Cut> cut_of(const Stream &stream, const GatingArgs &args) {
    for (const Variant &variant : variants)
        if (const auto cut = cut_for(variant, args, device_info(stream.device).shared_bytes))
            return cut;
    return {};
}

// Few tokens: one block, whose counts need no zeros to be added to. More: first over the SMs, then into full blocks.
void launch_in_registers(const Stream &stream, Cut &cut) {
    const DeviceInfo &device = device_info(stream.device);
    const int64_t tokens_per_warp = 32 / cut.variant->lanes;
    const int64_t warps = divide_up(cut.launch.args.logits.num_tokens, tokens_per_warp);
    int64_t most = cut.variant->threads / 32;
    while (most > 1 && cut.shared_bytes_of(most * 32) > device.shared_bytes)
        most /= 2;
    const int64_t together = warps <= most ? warps : std::clamp<int64_t>(divide_up(warps, device.num_sms), 1, most);
    const int64_t blocks = std::min(divide_up(warps, together), int64_t{cut.variant->blocks_per_sm} * device.num_sms);
    LaunchShape shape = {static_cast<uint32_t>(blocks), static_cast<uint32_t>(together * 32)};
    shape.shared_bytes = static_cast<uint32_t>(cut.shared_bytes_of(shape.threads));
    cut.launch.alone = blocks == 1;
    if (!cut.launch.alone)
        fill(stream, cut.launch.args.tokens_per_expert, 0,
             static_cast<size_t>(cut.launch.args.router.num_experts) * sizeof(int32_t));
    launch(stream, room, cut.variant->kernel, shape, cut.launch);
}

// --- any router
// -------------------------------------------------------------------------------------------------------

constexpr uint32_t any_threads = 128;

LaunchShape any_shape(const Stream &stream, const GatingArgs &args) {
    const int64_t blocks = std::min<int64_t>(divide_up(args.logits.num_tokens, any_threads / 32),
                                             4 * int64_t{device_info(stream.device).num_sms});
    return {static_cast<uint32_t>(blocks), any_threads};
}

} // namespace

size_t topk_gating_workspace(const Stream &stream, const GatingArgs &args) {
    if (args.logits.num_tokens == 0 || cut_of(stream, args))
        return 0;
    const LaunchShape shape = any_shape(stream, args);
    const int64_t keys = gating_workspace_rows * args.router.num_experts + args.router.num_groups;
    return static_cast<size_t>(shape.blocks * (shape.threads / 32) * keys * 8);
}

void topk_gating(const Stream &stream, const GatingArgs &args, void *workspace) {
    const auto count_bytes = static_cast<size_t>(args.router.num_experts) * sizeof(int32_t);
    if (args.logits.num_tokens == 0)
        return fill(stream, args.tokens_per_expert, 0, count_bytes);
    if (auto cut = cut_of(stream, args))
        return launch_in_registers(stream, *cut);
    fill(stream, args.tokens_per_expert, 0, count_bytes);
    const char *kernel = args.logits.type == FloatType::float64 ? "topk_gating_any_float64" : "topk_gating_any_float32";
    launch(stream, room, kernel, any_shape(stream, args), AnyGatingLaunch{args, workspace});
}

} // namespace pyroute::cuda
