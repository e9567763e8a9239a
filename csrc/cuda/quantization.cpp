#include "cuda/quantization.h"

#include <algorithm>

namespace pyroute::cuda {

namespace {

constexpr uint32_t threads = 256;
constexpr int64_t most_blocks = 0x7fffffff; // of a grid

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

uint32_t power_of_two_from(int64_t n, uint32_t most) {
    uint32_t power = 1;
    while (power < most && power < n)
        power *= 2;
    return power;
}

template <class... Pointers> bool at_words(int64_t cols, const Pointers *...pointers) {
    return cols % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

std::string of_types(const std::string &kernel, FloatType type, Fp8Format format) {
    static const char *const types[] = {"float32", "bfloat16", "float16", "float64"};
    return kernel + "_" + types[static_cast<int>(type)] + (format == Fp8Format::e4m3 ? "_e4m3" : "_e5m2");
}

template <class Args>
void launch_blocks(const Stream &stream, const std::string &kernel, int64_t blocks, uint32_t threads_each,
                   const Args &args) {
    if (blocks > most_blocks)
        throw Error("quantize_fp8: more than 2^31 - 1 thread blocks of work; quantize fewer rows at once");
    if (blocks > 0)
        launch(stream, "quantization", kernel.c_str(), {static_cast<uint32_t>(blocks), threads_each}, args);
}

} // namespace

void quantize_fp8(const Stream &stream, const QuantizeFp8Args &args, int64_t scale_rows, bool segments_only) {
    const Fp8Blocks &b = args.blocks;
    const int64_t col_blocks = divide_up(b.cols, b.block_cols), strips = b.num_matrices * scale_rows;
    const int64_t all_blocks = strips * col_blocks;
    QuantizeLaunch work{args, scale_rows, static_cast<uint32_t>(col_blocks), 0, 1, 1, segments_only};
    const auto go = [&](const char *kernel, int64_t blocks, uint32_t threads_each) {
        launch_blocks(stream, of_types(kernel, args.x_type, b.format), blocks, threads_each, work);
    };
    const bool words = at_words(b.cols, args.x, args.codes);
    const bool across128 = b.block_cols == 128 || (col_blocks == 1 && b.cols <= 128);
    if (words && across128 && b.block_rows == 1 && all_blocks <= most_blocks) {
        work.num_blocks = static_cast<uint32_t>(all_blocks);
        return go("quantize_row128", divide_up(all_blocks, threads / 8), threads);
    }
    if (words && across128 && b.block_rows > 32 && b.block_rows <= 128)
        return go("quantize_tile128", strips * col_blocks, threads);
    if (words && b.block_cols == 1 && b.block_rows > 32 && b.block_rows <= 128)
        return go("quantize_column128", strips * divide_up(b.cols, 64), threads);
    // As many threads a block as its row has use for: neighbours read neighbours.
    work.group = b.block_cols < 16 ? 1 : b.block_rows > 4096 / b.block_cols ? threads : 32;
    work.threads_across = power_of_two_from(b.block_cols, work.group);
    const int64_t wanted = std::min<int64_t>(threads, divide_up(work.group * col_blocks, 32) * 32);
    go("quantize_any", strips * divide_up(col_blocks, std::max<int64_t>(wanted / work.group, 1)),
       static_cast<uint32_t>(wanted));
}

void dequantize_fp8(const Stream &stream, const DequantizeFp8Args &args, int64_t scale_rows) {
    const Fp8Blocks &b = args.blocks;
    const int64_t sixteens = divide_up(b.cols, 16);
    if (sixteens == 0 || b.rows == 0)
        return;
    const bool restarts = b.expert_offsets && b.block_rows > 1; // then a thread block takes a row of blocks
    DequantizeLaunch work{args, scale_rows, static_cast<uint32_t>(divide_up(b.cols, b.block_cols)), 0, 0, 0, false};
    work.threads_across = power_of_two_from(sixteens, restarts ? 8 : threads);
    work.column_parts = static_cast<uint32_t>(divide_up(sixteens, work.threads_across));
    work.part_rows = restarts ? b.block_rows : threads / work.threads_across * 4;
    work.whole_words = at_words(b.cols, args.codes, args.out);
    const int64_t parts = restarts ? scale_rows : b.num_matrices * divide_up(b.rows, work.part_rows);
    launch_blocks(stream, of_types("dequantize", args.out_type, b.format), parts * work.column_parts, threads, work);
}

void transpose(const Stream &stream, const TransposeLaunch &args, int64_t item_bytes) {
    const int64_t tile = item_bytes == 1 ? 128 : 32;
    const int64_t tiles = divide_up(args.to_pitch, tile) * divide_up(args.cols, tile);
    launch_blocks(stream, item_bytes == 1 ? "transpose_codes" : "transpose_scales", args.num_matrices * tiles, threads,
                  args);
}

} // namespace pyroute::cuda
