#include "cuda/permutation.h"

#include <algorithm>
#include <string>

#include "cuda/permutation_args.h"

namespace pyroute::cuda {

namespace {

constexpr const char *room = "permutation";
constexpr int64_t threads = 256;
constexpr int64_t most_blocks = 1 << 30; // two parts of a grid; blocks take more than one item then
constexpr int64_t rows_per_block = threads / 32 * padding_rows_at_once;

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

uint32_t blocks_for(int64_t items, int64_t per_block) {
    return static_cast<uint32_t>(std::min(divide_up(items, per_block), most_blocks));
}

uintptr_t bits_of(const void *address) { return reinterpret_cast<uintptr_t>(address); }

// As many lanes as items, a power of two up to a warp.
uint32_t lanes_log2(int64_t items) {
    uint32_t log2 = 0;
    while (log2 < 5 && (int64_t{1} << log2) < items)
        ++log2;
    return log2;
}

// Blocks for groups of lanes, one per `items_per_lane` items of a lane.
uint32_t blocks_for_strips(int64_t num_tokens, int64_t items, int64_t items_per_lane, uint32_t log2) {
    const int64_t strips = divide_up(items, (int64_t{1} << log2) * items_per_lane);
    return blocks_for(num_tokens * strips, threads >> log2);
}

std::string kernel_of(const char *name, FloatType type, bool vectors) {
    static constexpr const char *types[] = {"_float32", "_bfloat16", "_float16", "_float64"};
    return std::string(name) + types[static_cast<int>(type)] + (vectors ? "" : "_any");
}

} // namespace

void permute(const Stream &stream, const PermuteArgs &args, uint32_t padding, const int64_t *rows_end) {
    if (args.row_bytes == 0)
        return;
    const uintptr_t bits = bits_of(args.x) | bits_of(args.rows) | static_cast<uintptr_t>(args.row_bytes);
    const int64_t size = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
    const int64_t words = args.row_bytes / size;
    MoveArgs move = {args, rows_end, padding, 0, lanes_log2(words)};
    move.token_blocks = blocks_for_strips(args.maps.num_tokens, words, words_per_lane, move.lanes_log2);
    const std::string kernel = "permute_" + std::to_string(size);
    const uint32_t blocks = move.token_blocks + blocks_for(args.maps.num_rows, rows_per_block);
    launch(stream, room, kernel.c_str(), {blocks, threads}, move);
}

void permute_quantize(const Stream &stream, const PermuteQuantizeArgs &args, const int64_t *rows_end) {
    const int64_t size = item_size(args.x_type);
    const bool vectors =
        args.hidden % 4 == 0 && bits_of(args.x) % (size == 2 ? 8 : 16) == 0 && bits_of(args.codes) % 4 == 0;
    QuantizeMoveArgs move = {args, rows_end, 0};
    move.token_blocks = blocks_for_strips(args.maps.num_tokens, divide_up(args.hidden, 4), blocks_at_once, 5);
    const uint32_t blocks = move.token_blocks + blocks_for(args.maps.num_rows, rows_per_block);
    launch(stream, room, kernel_of("permute_quantize", args.x_type, vectors).c_str(), {blocks, threads}, move);
}

void unpermute(const Stream &stream, const UnpermuteArgs &args) {
    const int64_t row_bytes = args.hidden * item_size(args.type);
    const bool vectors = (bits_of(args.rows) | bits_of(args.out) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
    const int64_t items = vectors ? row_bytes / 16 : args.hidden;
    const SumArgs sum = {args, lanes_log2(items)};
    const uint32_t blocks = blocks_for_strips(args.maps.num_tokens, items, 1, sum.lanes_log2);
    launch(stream, room, kernel_of("unpermute", args.type, vectors).c_str(), {blocks, threads}, sum);
}

void unpermute_backward(const Stream &stream, const UnpermuteBackwardArgs &args, const int64_t *rows_end) {
    const int64_t size = item_size(args.type), row_bytes = args.hidden * size;
    const uintptr_t bits = bits_of(args.grad_y) | bits_of(args.rows) | bits_of(args.grad_rows);
    const bool vectors = (bits | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
    const int64_t lanes = vectors ? 2 * size : 32; // of a slot: 32 columns in pieces of 16 bytes
    SumBackwardArgs sum = {args, rows_end, 0};
    sum.token_blocks = blocks_for(args.maps.num_tokens * args.maps.top_k, threads / lanes);
    const uint32_t blocks = sum.token_blocks + blocks_for(args.maps.num_rows, rows_per_block);
    launch(stream, room, kernel_of("unpermute_backward", args.type, vectors).c_str(), {blocks, threads}, sum);
}

} // namespace pyroute::cuda
