#include "cuda/grouped_gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/grouped_gemm_plan.h"
#include "cuda/sm90/grouped_gemm.h"

namespace pyroute::cuda {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void limit(bool ok, const char *what) {
    if (!ok)
        throw Error(std::string("grouped_gemm: ") + what);
}

uint32_t num_blocks(int64_t count) {
    limit(count < int64_t{1} << 31, "the result has more tiles than a launch has blocks");
    return static_cast<uint32_t>(count);
}

void check_sizes(int64_t num_rows, int64_t n, int64_t k) {
    constexpr int64_t most = (int64_t{1} << 31) - 1;
    limit(num_rows <= most && n <= most && k <= most, "rows, N and K must be below 2**31 on a GPU");
}

// A kernel and what its blocks compute.
struct Choice {
    const char *room, *kernel;
    int64_t tile_rows, tile_cols;
    uint32_t threads, shared_bytes;

    bool exists() const { return kernel != nullptr; }
};

constexpr Choice general(const char *kernel, int64_t tile_rows, int64_t tile_cols) {
    return {"grouped_gemm", kernel, tile_rows,
            tile_cols,      128,    static_cast<uint32_t>((tile_rows + tile_cols) * 128 * 4)};
}
constexpr Choice mma(const char *room, const char *kernel, int tile_rows, bool mixed = false) {
    const MmaRing ring = mma_ring(tile_rows, mixed);
    return {room, kernel, tile_rows, 128, 256, static_cast<uint32_t>(ring.stages * ring.stage_bytes(tile_rows))};
}

// PYROUTE_GROUPED_GEMM=general: the kernels with the CPU floor's bytes for everything, to compare with.
bool general_is_wanted() {
    const char *value = std::getenv("PYROUTE_GROUPED_GEMM");
    return value && std::strcmp(value, "general") == 0;
}

int64_t item_size(ElementType type) { return type == ElementType::float32 ? 4 : type == ElementType::bfloat16 ? 2 : 1; }

// Whether a matrix of rows of `cols` elements can be copied in chunks of 16 bytes, and its scales fit blocks of 128
// that run along its rows, or down them.
bool suits_mma(const GemmOperand &operand, int64_t cols, bool down) {
    const int64_t block = down ? operand.block_rows : operand.block_cols;
    return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && cols * item_size(operand.type) % 16 == 0 &&
           (!operand.scales || block % 128 == 0);
}

bool are(const GemmOperand &a, ElementType type_a, const GemmOperand &b, ElementType type_b) {
    return a.type == type_a && b.type == type_b;
}

constexpr ElementType bf16 = ElementType::bfloat16, e4m3 = ElementType::e4m3, e5m2 = ElementType::e5m2;

// The tensor-core kernels for a pair of types.
struct PairKernels {
    ElementType a, b;
    const char *room, *forward, *forward_low, *dgrad, *dgrad_low, *wgrad; // null: there is none
};
#define PYROUTE_PAIR(a, b, room, name, wgrad)                                                                          \
    {a,                                                                                                                \
     b,                                                                                                                \
     "grouped_gemm_" room,                                                                                             \
     "grouped_gemm_" name,                                                                                             \
     "grouped_gemm_" name "_low",                                                                                      \
     "grouped_gemm_" name "_dgrad",                                                                                    \
     "grouped_gemm_" name "_dgrad_low",                                                                                \
     wgrad}
constexpr PairKernels pair_kernels[] = {
    PYROUTE_PAIR(bf16, bf16, "bf16", "bf16", "grouped_gemm_bf16_wgrad"),
    PYROUTE_PAIR(e4m3, e4m3, "fp8", "fp8", "grouped_gemm_fp8_wgrad"),
    PYROUTE_PAIR(bf16, e4m3, "mixed", "mixed", nullptr),
    PYROUTE_PAIR(e5m2, e4m3, "e5m2", "e5m2_e4m3", "grouped_gemm_e5m2_e4m3_wgrad"),
    PYROUTE_PAIR(e4m3, e5m2, "e5m2", "e4m3_e5m2", "grouped_gemm_e4m3_e5m2_wgrad"),
    PYROUTE_PAIR(e5m2, e5m2, "e5m2", "e5m2_e5m2", "grouped_gemm_e5m2_e5m2_wgrad"),
};
#undef PYROUTE_PAIR

Choice mma_for_rows(const GroupedGemmArgs &args, bool transposed, bool low) {
    if (!suits_mma(args.a, transposed ? args.n : args.k, false) || !suits_mma(args.b, args.k, transposed))
        return {};
    for (const PairKernels &kernels : pair_kernels)
        if (are(args.a, kernels.a, args.b, kernels.b)) {
            const bool mixed = kernels.a == bf16 && kernels.b != bf16;
            return low ? mma(kernels.room, transposed ? kernels.dgrad_low : kernels.forward_low, 16, mixed)
                       : mma(kernels.room, transposed ? kernels.dgrad : kernels.forward, 128, mixed);
        }
    return {};
}

// Within the tensor cores' kernels, and within the general ones, the tile changes no byte. The masked layout has the
// one of few rows, however many there is room for: these tiles cost what they have room for, not what they hold.
Choice for_rows(const GroupedGemmArgs &args, bool transposed) {
    const auto at_most = [&](int64_t rows) {
        return args.tokens_per_expert || args.num_rows <= rows * args.num_experts;
    };
    const Choice choice = mma_for_rows(args, transposed, at_most(32));
    if (choice.exists() && !general_is_wanted())
        return choice;
    return at_most(8) ? general("grouped_gemm_few_rows", 8, 64) : general("grouped_gemm_general", 64, 32);
}

Choice for_wgrad(const GroupedGemmWgradArgs &args, Restarts restarts) {
    const GemmOperand &g = args.grad_out, &a = args.a;
    // blocks that run through the whole matrix fit a segment or not by where it starts
    const bool fits = (!g.scales || restarts.grad_out) && (!a.scales || restarts.a);
    if (fits && suits_mma(g, args.n, true) && suits_mma(a, args.k, true) && !general_is_wanted()) {
        for (const PairKernels &kernels : pair_kernels)
            if (are(g, kernels.a, a, kernels.b) && kernels.wgrad)
                return mma(kernels.room, kernels.wgrad, 128);
    }
    return general("grouped_gemm_wgrad_general", 64, 32);
}

constexpr int64_t tile_group = 12; // row tiles side by side; see place_of

template <class Args> void launch_tiles(const Stream &stream, const Choice &choice, int64_t tiles, const Args &args) {
    launch(stream, choice.room, choice.kernel, {num_blocks(tiles), choice.threads, choice.shared_bytes}, args);
}

void multiply(const Stream &stream, GroupedGemmArgs args, Restarts restarts, bool transposed,
              const uint8_t *b_transposed, void *workspace) {
    const int64_t num_cols = transposed ? args.k : args.n;
    check_sizes(args.num_rows, args.n, args.k);
    if (args.num_rows == 0 || num_cols == 0)
        return;
    if (!general_is_wanted() && sm90::serves(device_info(stream.device), args, transposed))
        return sm90::grouped_gemm(stream, args, transposed, b_transposed, workspace);
    const Choice choice = for_rows(args, transposed);
    Cutter cutter(workspace);
    const bool own_blocks = restarts.a || (args.tokens_per_expert && args.a.block_rows > 1); // of each expert's rows
    const GemmPlan plan =
        make_plan(stream, cutter, rows_of(args), choice.tile_rows, {own_blocks ? &args.a : nullptr, nullptr});
    args.a.expert_block_starts = plan.block_starts[0];
    const int64_t tiles = most_tiles(args.num_rows, args.num_experts, choice.tile_rows);
    launch_tiles(stream, choice, tiles * divide_up(num_cols, choice.tile_cols),
                 RowsProductArgs{args, plan, transposed, tile_group});
}

} // namespace

bool grouped_gemm_wants_transposed(int device, const GemmOperand &b, int64_t num_experts, int64_t n, int64_t k) {
    return !general_is_wanted() && sm90::wants_transposed(device_info(device), b, num_experts, n, k);
}

void grouped_gemm_transpose(const Stream &stream, const GemmOperand &b, int64_t num_experts, int64_t n, int64_t k,
                            uint8_t *to) {
    sm90::transpose_weights(stream, b, num_experts, n, k, to);
}

// Enough for either path: where `out` will lie is not known yet, and Hopper's may ask for its alignment.
size_t grouped_gemm_workspace(const Stream &stream, const GroupedGemmArgs &args, bool transposed,
                              const uint8_t *b_transposed) {
    Cutter cutter(nullptr);
    cut_plan(cutter, args.num_rows, args.num_experts, for_rows(args, transposed).tile_rows);
    if (sm90::serves(device_info(stream.device), args, transposed))
        return std::max(cutter.size(), sm90::workspace(args, transposed, b_transposed));
    return cutter.size();
}

size_t grouped_gemm_wgrad_workspace(const Stream &stream, const GroupedGemmWgradArgs &args, Restarts restarts) {
    Cutter cutter(nullptr);
    cut_plan(cutter, args.num_rows, args.num_experts, 0);
    if (sm90::serves_wgrad(device_info(stream.device), args, restarts.a && restarts.grad_out))
        return std::max(cutter.size(), sm90::wgrad_workspace(args));
    return cutter.size();
}

void grouped_gemm(const Stream &stream, const GroupedGemmArgs &args, Restarts restarts, void *workspace) {
    multiply(stream, args, restarts, false, nullptr, workspace);
}

void grouped_gemm_dgrad(const Stream &stream, const GroupedGemmArgs &args, Restarts restarts,
                        const uint8_t *b_transposed, void *workspace) {
    multiply(stream, args, restarts, true, b_transposed, workspace);
}

void grouped_gemm_wgrad(const Stream &stream, const GroupedGemmWgradArgs &given, Restarts restarts, void *workspace) {
    check_sizes(given.num_rows, given.n, given.k);
    if (given.num_experts == 0 || given.n == 0 || given.k == 0)
        return;
    if (!general_is_wanted() && sm90::serves_wgrad(device_info(stream.device), given, restarts.grad_out && restarts.a))
        return sm90::grouped_gemm_wgrad(stream, given, workspace);
    GroupedGemmWgradArgs args = given;
    const Choice choice = for_wgrad(args, restarts);
    Cutter cutter(workspace);
    const GemmPlan plan = make_plan(stream, cutter, rows_of(args), 0,
                                    {restarts.grad_out ? &args.grad_out : nullptr, restarts.a ? &args.a : nullptr});
    args.grad_out.expert_block_starts = plan.block_starts[0];
    args.a.expert_block_starts = plan.block_starts[1];
    const int64_t tiles = divide_up(args.n, choice.tile_rows) * divide_up(args.k, choice.tile_cols);
    launch_tiles(stream, choice, args.num_experts * tiles, WgradProductArgs{args, plan, tile_group});
}

} // namespace pyroute::cuda
