#include "cuda/sm90/grouped_gemm.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cuda/grouped_gemm_plan.h"
#include "cuda/sm90/arguments.h"

namespace pyroute::cuda::sm90 {
namespace {

constexpr const char *room = "sm90/grouped_gemm", *e5m2_room = "sm90/grouped_gemm_e5m2";
constexpr int32_t raster_group = 16; // row tiles side by side: panels of 16 x 128 rows and 8 x 128 columns in a wave
constexpr int64_t most = INT32_MAX;

std::atomic<uint32_t *> hang_report{nullptr};

// PYROUTE_GROUPED_GEMM: "portable" for the kernels of every card, or a shape of arguments.h that is to be tried out.
bool asked_for(const char *what) {
    const char *value = std::getenv("PYROUTE_GROUPED_GEMM");
    return value && std::strcmp(value, what) == 0;
}
bool wanted(const DeviceInfo &card) { return card.capability == 90 && !asked_for("portable"); }

bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool has_scales(const GemmOperand &operand, int64_t block_rows, int64_t block_cols) {
    return operand.scales && operand.block_rows == block_rows && operand.block_cols == block_cols;
}
bool is_fp8(ElementType type) { return type == ElementType::e4m3 || type == ElementType::e5m2; }
bool are_fp8(const GemmOperand &a, const GemmOperand &b) { return is_fp8(a.type) && is_fp8(b.type); }
bool is_bf16(const GemmOperand &operand) { return operand.type == ElementType::bfloat16 && !operand.scales; }
bool multiples(int64_t of, std::initializer_list<int64_t> extents) {
    return std::all_of(extents.begin(), extents.end(), [&](int64_t extent) { return extent > 0 && extent % of == 0; });
}
bool small(std::initializer_list<int64_t> extents) {
    return std::all_of(extents.begin(), extents.end(), [](int64_t extent) { return extent <= most; });
}

struct ProductKernel {
    const char *name;
    ProductShape shape;
};

#define PYROUTE_PRODUCT(shape) {#shape "_product", shape}

// The bytes do not depend on the tile: 64 rows where experts have few, which leaves room for more stages. In the masked
// layout the device alone knows how many; 128 wherever there is room for more than 64, since a tile of 128 loads and
// multiplies 64 rows where it has no more, and reads the weights once where it has.
ProductKernel kernel_of(const GroupedGemmArgs &args, bool transposed) {
    const bool few = args.num_rows <= 64 * args.num_experts; // masked: there is room for so many
    const bool f32 = args.out_type == ElementType::float32;
    if (args.b.type == ElementType::e5m2) {
        if (args.a.type == ElementType::e5m2)
            return f32 ? ProductKernel PYROUTE_PRODUCT(e5m2_e5m2_128_f32)
                       : ProductKernel PYROUTE_PRODUCT(e5m2_e5m2_128);
        return f32 ? ProductKernel PYROUTE_PRODUCT(e4m3_e5m2_128_f32) : ProductKernel PYROUTE_PRODUCT(e4m3_e5m2_128);
    }
    if (args.a.type == ElementType::e5m2)
        return f32 ? ProductKernel PYROUTE_PRODUCT(e5m2_e4m3_128_f32) : ProductKernel PYROUTE_PRODUCT(e5m2_e4m3_128);
    if (args.a.type == ElementType::e4m3) {
        if (few)
            return f32 ? ProductKernel PYROUTE_PRODUCT(fp8_64_f32) : ProductKernel PYROUTE_PRODUCT(fp8_64);
        if (f32)
            return PYROUTE_PRODUCT(fp8_128_f32);
        for (const ProductKernel &kernel :
             {ProductKernel PYROUTE_PRODUCT(fp8_128_overlap), PYROUTE_PRODUCT(fp8_128_pair), PYROUTE_PRODUCT(fp8_192),
              PYROUTE_PRODUCT(fp8_192_pair)})
            if (asked_for(kernel.name))
                return kernel;
        return PYROUTE_PRODUCT(fp8_128);
    }
    if (transposed)
        return f32 ? ProductKernel PYROUTE_PRODUCT(bf16_dgrad_128_f32) : ProductKernel PYROUTE_PRODUCT(bf16_dgrad_128);
    if (few)
        return f32 ? ProductKernel PYROUTE_PRODUCT(bf16_64_f32) : ProductKernel PYROUTE_PRODUCT(bf16_64);
    return f32 ? ProductKernel PYROUTE_PRODUCT(bf16_128_f32) : ProductKernel PYROUTE_PRODUCT(bf16_128);
}

struct WgradKernel {
    const char *name;
    WgradShape shape;
};

WgradKernel wgrad_kernel_of(const GroupedGemmWgradArgs &args) {
    if (!is_fp8(args.a.type))
        return PYROUTE_PRODUCT(bf16_wgrad);
    const bool e5m2 = args.grad_out.type == ElementType::e5m2;
    if (args.a.type == ElementType::e5m2)
        return e5m2 ? WgradKernel PYROUTE_PRODUCT(e5m2_e5m2_wgrad) : WgradKernel PYROUTE_PRODUCT(e4m3_e5m2_wgrad);
    return e5m2 ? WgradKernel PYROUTE_PRODUCT(e5m2_e4m3_wgrad) : WgradKernel PYROUTE_PRODUCT(fp8_wgrad);
}
#undef PYROUTE_PRODUCT

const char *room_of(const GemmOperand &a, const GemmOperand &b) {
    return a.type == ElementType::e5m2 || b.type == ElementType::e5m2 ? e5m2_room : room;
}

int64_t item_size(ElementType type) { return is_fp8(type) ? 1 : 2; }
MapType map_type(ElementType type) { return is_fp8(type) ? MapType::uint8 : MapType::bfloat16; }

// A map of [rows, cols], row_bytes apart, in boxes of 128 bytes times box_rows.
TensorMap operand_map(const Stream &stream, ElementType type, const void *data, int64_t rows, int64_t cols,
                      uint32_t box_rows) {
    const int64_t item = item_size(type);
    return tensor_map(stream, {map_type(type), data, static_cast<uint64_t>(cols), static_cast<uint64_t>(rows),
                               static_cast<uint64_t>(cols * item), static_cast<uint32_t>(row_bytes / item), box_rows,
                               Swizzle::bytes128});
}

int64_t padded(int64_t extent) { return blocks_of(extent, 128) * 128; }

// dgrad's weights along their contraction: the caller's, or a read and a write of b for this call.
const uint8_t *transposed_weights(const Stream &stream, Cutter &cutter, const GroupedGemmArgs &args,
                                  const uint8_t *given) {
    if (given)
        return given;
    auto *const copy = cutter.take<uint8_t>(args.num_experts * args.k * padded(args.n));
    transpose_weights(stream, args.b, args.num_experts, args.n, args.k, copy);
    return copy;
}

int64_t padded_rows(const GroupedGemmWgradArgs &args) { return most_tiles(args.num_rows, args.num_experts, 128) * 128; }

// wgrad's operand along its contraction: [cols, rows], every segment from a multiple of 128 on.
TensorMap transposed_rows(const Stream &stream, Cutter &cutter, const GemmPlan &plan, const GroupedGemmWgradArgs &args,
                          const GemmOperand &operand, int64_t cols) {
    const int64_t rows = padded_rows(args);
    auto *const copy = cutter.take<uint8_t>(cols * rows);
    launch(stream, room, "transpose_bytes",
           {static_cast<uint32_t>(blocks_of(cols, 128)), 256, 0, 1, static_cast<uint32_t>(rows / 128)},
           TransposeArgs{static_cast<const uint8_t *>(operand.data), copy, plan.num_tiles, plan.tiles, args.num_rows,
                         cols, rows});
    return operand_map(stream, operand.type, copy, cols, rows, 128);
}

TensorMap scale_map(const Stream &stream, const GemmOperand &operand, int64_t cols) {
    return tensor_map(stream, {MapType::float32, operand.scales, static_cast<uint64_t>(cols),
                               static_cast<uint64_t>(operand.scale_rows), static_cast<uint64_t>(cols * 4), 128, 1,
                               Swizzle::none});
}

} // namespace

bool serves(const DeviceInfo &card, const GroupedGemmArgs &args, bool transposed) {
    const int64_t depth = transposed ? args.n : args.k, cols = transposed ? args.k : args.n;
    const bool fp8 = are_fp8(args.a, args.b) && has_scales(args.a, 1, 128) && has_scales(args.b, 128, 128);
    if (!wanted(card) || !(fp8 || (is_bf16(args.a) && is_bf16(args.b))) || args.num_experts < 1)
        return false;
    if (!aligned(args.a.data) || !aligned(args.b.data) || !aligned(args.out) || !multiples(8, {cols}))
        return false;
    if (fp8 ? !multiples(16, {depth}) || (transposed && !multiples(16, {cols}))
            : !multiples(transposed ? 64 : 8, {depth}))
        return false;
    const int64_t tiles = most_tiles(args.num_rows, args.num_experts, 64) * blocks_of(cols, 128);
    const int64_t scales = blocks_of(depth, 128), blocks = args.num_experts * blocks_of(cols, 128) * scales;
    return small({args.num_rows, depth, args.num_experts * padded(depth), args.num_experts * padded(cols), tiles,
                  args.num_rows * scales, blocks}) &&
           (!(fp8 && transposed) || args.num_experts * blocks_of(depth, 128) < 65536);
}

bool wants_transposed(const DeviceInfo &card, const GemmOperand &b, int64_t experts, int64_t n, int64_t k) {
    return wanted(card) && is_fp8(b.type) && has_scales(b, 128, 128) && aligned(b.data) && multiples(16, {n, k}) &&
           experts > 0 && small({n, experts * padded(k)}) && experts * blocks_of(n, 128) < 65536;
}

void transpose_weights(const Stream &stream, const GemmOperand &b, int64_t experts, int64_t n, int64_t k, uint8_t *to) {
    launch(stream, room, "transpose_bytes",
           {static_cast<uint32_t>(blocks_of(k, 128)), 256, 0, 1, static_cast<uint32_t>(experts * blocks_of(n, 128))},
           TransposeArgs{static_cast<const uint8_t *>(b.data), to, nullptr, nullptr, n, k, padded(n)});
}

size_t workspace(const GroupedGemmArgs &args, bool transposed, const uint8_t *b_transposed) {
    Cutter cutter(nullptr);
    cut_plan(cutter, args.num_rows, args.num_experts, kernel_of(args, transposed).shape.rows);
    if (transposed && !b_transposed && is_fp8(args.a.type))
        cutter.take<uint8_t>(args.num_experts * args.k * padded(args.n));
    return cutter.size();
}

void grouped_gemm(const Stream &stream, const GroupedGemmArgs &args, bool transposed, const uint8_t *b_transposed,
                  void *workspace) {
    if (args.num_rows == 0)
        return;
    const ProductKernel kernel = kernel_of(args, transposed);
    const ProductShape &shape = kernel.shape;
    const int64_t depth = transposed ? args.n : args.k, cols = transposed ? args.k : args.n;
    Cutter cutter(workspace);
    const GemmPlan plan = make_plan(stream, cutter, rows_of(args), shape.rows, {nullptr, nullptr});
    ProductArgs product = {};
    product.a = operand_map(stream, args.a.type, args.a.data, args.num_rows, depth, panel_rows);
    if (transposed && shape.fp8())
        product.b = operand_map(stream, args.b.type, transposed_weights(stream, cutter, args, b_transposed),
                                args.num_experts * cols, padded(depth), shape.cols);
    else
        product.b = operand_map(stream, args.b.type, args.b.data, args.num_experts * args.n, args.k,
                                shape.transposed_b ? 64 : shape.cols);
    if (shape.result == Result::bfloat16)
        product.out = tensor_map(stream, {MapType::bfloat16, args.out, static_cast<uint64_t>(cols),
                                          static_cast<uint64_t>(args.num_rows), static_cast<uint64_t>(cols * 2), 64, 64,
                                          Swizzle::bytes128});
    product.num_tiles = plan.num_tiles;
    product.tiles = plan.tiles;
    product.a_scales = args.a.scales;
    product.b_scales = args.b.scales;
    const auto scale_cols = static_cast<uint32_t>(blocks_of(args.k, 128));
    product.b_scale_expert = static_cast<uint32_t>(blocks_of(args.n, 128)) * scale_cols;
    product.b_scale_col = transposed ? 1 : scale_cols;
    product.b_scale_depth = transposed ? scale_cols : 1;
    product.out_data = args.out;
    product.rows = static_cast<int32_t>(args.num_rows);
    product.cols = static_cast<int32_t>(cols);
    product.depth = static_cast<int32_t>(depth);
    product.b_rows = static_cast<int32_t>(shape.transposed_b ? depth : cols);
    product.raster_group = raster_group;
    product.hang_report = hang_report.load();
    const int64_t tiles =
        most_tiles(args.num_rows, args.num_experts, shape.rows) * blocks_of(cols, shape.cols * shape.cluster);
    const int64_t clusters = std::min(tiles, int64_t{device_info(stream.device).num_sms} / shape.cluster);
    launch(stream, room_of(args.a, args.b), kernel.name,
           {static_cast<uint32_t>(clusters) * shape.cluster, shape.threads(), shape.shared().total(), shape.cluster},
           product);
}

bool serves_wgrad(const DeviceInfo &card, const GroupedGemmWgradArgs &args, bool restarts) {
    const bool fp8 =
        restarts && are_fp8(args.grad_out, args.a) && has_scales(args.grad_out, 128, 1) && has_scales(args.a, 128, 1);
    if (!wanted(card) || !(fp8 || (is_bf16(args.grad_out) && is_bf16(args.a))) || args.num_experts < 1)
        return false;
    if (!aligned(args.grad_out.data) || !aligned(args.a.data) || !aligned(args.out) ||
        !multiples(fp8 ? 16 : 8, {args.n, args.k}))
        return false;
    if (fp8 && (!aligned(args.grad_out.scales) || !aligned(args.a.scales)))
        return false;
    const int64_t blocks = most_tiles(args.num_rows, args.num_experts, 128);
    return blocks < 65536 &&
           small({args.num_rows, args.n, args.k, args.num_experts * blocks_of(args.n, 128) * blocks_of(args.k, 128)});
}

size_t wgrad_workspace(const GroupedGemmWgradArgs &args) {
    const bool fp8 = is_fp8(args.a.type);
    Cutter cutter(nullptr);
    cut_plan(cutter, args.num_rows, args.num_experts, fp8 ? 128 : 0);
    if (fp8)
        for (int64_t cols : {args.n, args.k})
            cutter.take<uint8_t>(cols * padded_rows(args));
    return cutter.size();
}

void grouped_gemm_wgrad(const Stream &stream, const GroupedGemmWgradArgs &args, void *workspace) {
    if (args.num_rows == 0) {
        if (!args.accumulate)
            fill(stream, args.out, 0, static_cast<size_t>(args.num_experts * args.n * args.k) * sizeof(float));
        return;
    }
    const WgradKernel kernel = wgrad_kernel_of(args);
    const WgradShape &shape = kernel.shape;
    const bool fp8 = shape.fp8();
    Cutter cutter(workspace);
    const GemmPlan plan = make_plan(stream, cutter, rows_of(args), fp8 ? 128 : 0, {nullptr, nullptr});
    WgradArgs product = {};
    if (fp8) {
        product.grad_out = transposed_rows(stream, cutter, plan, args, args.grad_out, args.n);
        product.a = transposed_rows(stream, cutter, plan, args, args.a, args.k);
        product.grad_out_scales = scale_map(stream, args.grad_out, args.n);
        product.a_scales = scale_map(stream, args.a, args.k);
    } else {
        product.grad_out = operand_map(stream, args.grad_out.type, args.grad_out.data, args.num_rows, args.n, 64);
        product.a = operand_map(stream, args.a.type, args.a.data, args.num_rows, args.k, 64);
    }
    product.tile_starts = plan.tile_starts;
    product.offsets = plan.offsets;
    product.out = args.out;
    product.accumulate = args.accumulate;
    product.experts = static_cast<int32_t>(args.num_experts);
    product.n = static_cast<int32_t>(args.n);
    product.k = static_cast<int32_t>(args.k);
    product.raster_group = raster_group;
    product.hang_report = hang_report.load();
    const int64_t tiles = args.num_experts * blocks_of(args.n, 128) * blocks_of(args.k, 128);
    launch(stream, room_of(args.grad_out, args.a), kernel.name,
           {static_cast<uint32_t>(std::min(tiles, int64_t{device_info(stream.device).num_sms})), shape.threads(),
            shape.shared().total()},
           product);
}

void report_hangs_to(uint32_t *words) { hang_report = words; }

} // namespace pyroute::cuda::sm90
