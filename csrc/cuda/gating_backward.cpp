#include <algorithm>

#include "cuda/gating.h"

namespace pyroute::cuda {

namespace {

constexpr const char *room = "gating_backward";

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The kernels by how many experts a lane holds, and the launch bounds that they are compiled with.
struct Variant {
    const char *kernel;
    int64_t items;
    uint32_t threads, blocks_per_sm;
};
constexpr Variant variants[] = {
    {"topk_gating_backward_1", 1, 256, 4},   {"topk_gating_backward_2", 2, 256, 4},
    {"topk_gating_backward_4", 4, 256, 4},   {"topk_gating_backward_8", 8, 256, 3},
    {"topk_gating_backward_16", 16, 256, 2}, {"topk_gating_backward_32", 32, 128, 2},
};
constexpr Variant any_float32 = {"topk_gating_backward_any_float32", 0, 128, 4},
                  any_float64 = {"topk_gating_backward_any_float64", 0, 128, 4};

// Slots and, in registers, a row of gradients.
int64_t words_of_warp(const Variant &variant, int64_t top_k) { return 32 * variant.items + slot_arrays * top_k; }

const Variant &variant_for(const GatingBackwardArgs &args, int64_t shared_bytes) {
    if (args.logits.type == FloatType::float64)
        return any_float64;
    for (const Variant &variant : variants)
        if (args.router.num_experts <= 32 * variant.items &&
            4 * words_of_warp(variant, args.router.top_k) <= shared_bytes)
            return variant;
    return any_float32;
}

LaunchShape shape_for(const Variant &variant, const DeviceInfo &device, const GatingBackwardArgs &args) {
    const int64_t tokens = args.logits.num_tokens,
                  words = variant.items ? words_of_warp(variant, args.router.top_k) : 0;
    int64_t most = variant.threads / 32;
    while (most > 1 && 4 * most * words > device.shared_bytes)
        most /= 2;
    const int64_t warps = std::clamp<int64_t>(divide_up(tokens, device.num_sms), 1, most);
    const int64_t blocks = std::min(divide_up(tokens, warps), int64_t{variant.blocks_per_sm} * device.num_sms);
    LaunchShape shape = {static_cast<uint32_t>(blocks), static_cast<uint32_t>(warps * 32)};
    shape.shared_bytes = static_cast<uint32_t>(4 * warps * words);
    return shape;
}

} // namespace

size_t topk_gating_backward_workspace(const Stream &stream, const GatingBackwardArgs &args) {
    const DeviceInfo &device = device_info(stream.device);
    const Variant &variant = variant_for(args, device.shared_bytes);
    if (variant.items)
        return 0;
    const LaunchShape shape = shape_for(variant, device, args);
    return static_cast<size_t>(int64_t{shape.blocks} * (shape.threads / 32) * slot_arrays * args.router.top_k * 8);
}

void topk_gating_backward(const Stream &stream, const GatingBackwardArgs &args, const double *z_scale,
                          void *workspace) {
    const DeviceInfo &device = device_info(stream.device);
    const Variant &variant = variant_for(args, device.shared_bytes);
    const GatingBackwardLaunch arguments = {args, z_scale, workspace,
                                            static_cast<int32_t>(words_of_warp(variant, args.router.top_k))};
    launch(stream, room, variant.kernel, shape_for(variant, device, args), arguments);
}

void gating_loss_terms(const Stream &stream, const LossTermsArgs &args) {
    const bool wide = args.logits.type == FloatType::float64;
    const int64_t blocks = std::min<int64_t>(divide_up(args.logits.num_tokens, 8),
                                             (wide ? 2 : 4) * int64_t{device_info(stream.device).num_sms});
    launch(stream, room, wide ? "gating_loss_terms_float64" : "gating_loss_terms_float32",
           {static_cast<uint32_t>(blocks), 256}, args);
}

} // namespace pyroute::cuda
