#include "cpu/quantization.h"

#include <algorithm>
#include <cstring>

#include "cpu/memory.h"
#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {

constexpr int64_t elements_per_share = 32768; // about 20 us of work for one thread

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// body(matrix, first row, rows, row of scales) for every row of blocks of every matrix, over threads, of which each
// ends with finish().
template <class Body, class Finish> void for_each_strip(const Fp8Blocks &b, const Body &body, const Finish &finish) {
    if (b.cols == 0) // 2**58 rows of nothing are an array too
        return;
    const int64_t per_matrix = b.expert_offsets ? b.row_block_starts[b.num_segments] : ceil_div(b.rows, b.block_rows);
    const int64_t strip_elements = std::max<int64_t>(1, std::min(b.block_rows, b.rows) * b.cols);
    parallel_ranges(b.num_matrices * per_matrix, elements_per_share / strip_elements, [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t matrix = strip / per_matrix, scale_row = strip % per_matrix;
            int64_t segment_begin = 0, segment_end = b.rows, block = scale_row;
            if (b.expert_offsets) {
                const int64_t *after =
                    std::upper_bound(b.row_block_starts, b.row_block_starts + b.num_segments + 1, scale_row);
                const int64_t segment = after - b.row_block_starts - 1;
                segment_begin = b.expert_offsets[segment];
                segment_end = b.expert_offsets[segment + 1];
                block -= b.row_block_starts[segment];
            }
            const int64_t first = segment_begin + block * b.block_rows;
            body(matrix, first, std::min(b.block_rows, segment_end - first), strip);
        }
        finish();
    });
}

// Elements from the last offset on, which belong to no expert.
struct Tail {
    explicit Tail(const Fp8Blocks &b)
        : begin(b.expert_offsets ? b.expert_offsets[b.num_segments] * b.cols : 0),
          count(b.expert_offsets ? b.rows * b.cols - begin : 0) {}
    int64_t begin, count;
};

} // namespace

void quantize_fp8(const QuantizeFp8Args &args) {
    const Fp8Blocks &b = args.blocks;
    const QuantizationKernels &kernels = current_quantization_kernels();
    const auto kernel = kernels.quantize[static_cast<int>(args.x_type)][static_cast<int>(b.format)];
    const int64_t col_blocks = ceil_div(b.cols, b.block_cols);
    const bool streaming = b.num_matrices * b.rows * b.cols > most_cached_result;
    const auto *x = static_cast<const uint8_t *>(args.x);
    const auto strip = [&](int64_t matrix, int64_t first, int64_t rows, int64_t scale_row) {
        const int64_t at = (matrix * b.rows + first) * b.cols;
        kernel({x + at * item_size(args.x_type), rows, b.cols, b.block_cols, args.power_of_two, streaming,
                args.codes + at, args.scales + scale_row * col_blocks});
    };
    for_each_strip(b, strip, [&] {
        if (streaming)
            kernels.finish_streaming();
    });
    if (const Tail tail(b); tail.count > 0)
        std::memset(args.codes + tail.begin, 0, static_cast<size_t>(tail.count));
}

void dequantize_fp8(const DequantizeFp8Args &args) {
    const Fp8Blocks &b = args.blocks;
    const auto kernel =
        current_quantization_kernels().dequantize[static_cast<int>(args.out_type)][static_cast<int>(b.format)];
    const int64_t col_blocks = ceil_div(b.cols, b.block_cols), size = item_size(args.out_type);
    auto *out = static_cast<uint8_t *>(args.out);
    const auto strip = [&](int64_t matrix, int64_t first, int64_t rows, int64_t scale_row) {
        const int64_t at = (matrix * b.rows + first) * b.cols;
        kernel({args.codes + at, args.scales + scale_row * col_blocks, rows, b.cols, b.block_cols, out + at * size});
    };
    for_each_strip(b, strip, [] {});
    if (const Tail tail(b); tail.count > 0)
        std::memset(out + tail.begin * size, 0, static_cast<size_t>(tail.count * size));
}

} // namespace pyroute::cpu
