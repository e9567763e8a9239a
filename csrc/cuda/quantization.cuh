// FP8 with block scales: a block's scale needs all of it, so every kernel but the last holds whole blocks in registers
// and reads its input once.
//
//   quantize_row128     1 x 128 blocks: 8 lanes of 16 elements, three xor-shuffles
//   quantize_tile128    128 x 128: 256 threads of 4 x 16 elements, one exchange through shared memory
//   quantize_column128  128 x 1: 64 columns at a time, 256 threads of 8 columns x 4 rows, likewise
//   quantize_any        any blocks, shapes and addresses: 1, 32 or 256 threads a block, which read it twice
//   dequantize          16 elements a thread
//
// The first three want rows of a multiple of 16 elements at addresses that are multiples of 16: 16-byte loads and
// stores. Bytes per element: its own once and one of code, 4 / 128 of scale in 1 x 128 blocks.
// Source: DeepSeek-V3 technical report, section 3.3.2; csrc/cpu/scalar/quantization.cpp has the same bytes.
#pragma once

#include "cuda/float_rows.cuh"
#include "cuda/quantization_blocks.cuh"

namespace pyroute::cuda {

template <class Type> PYROUTE_DEVICE const typename Type::Storage *elements(const void *data) {
    return static_cast<const typename Type::Storage *>(data);
}

template <class Type, class Format> PYROUTE_DEVICE void quantize_row128(const QuantizeLaunch &args) {
    const Fp8Blocks &b = args.op.blocks;
    const uint32_t index = blockIdx.x * (blockDim.x / 8) + threadIdx.x / 8;
    if (index >= args.num_blocks) // all lanes of the block
        return;
    const int64_t row = index / args.col_blocks;
    const int64_t column = static_cast<int64_t>(index % args.col_blocks) * 128 + threadIdx.x % 8 * 16;
    const int64_t at = row * b.cols + column;
    const bool inside = row < b.num_matrices * b.rows && column < b.cols; // there may be scales for more rows
    const bool used = !b.expert_offsets || row < used_rows(b);
    if (args.segments_only && !used)
        return;
    float x[16] = {};
    if (inside && used)
        load_elements<Type>(elements<Type>(args.op.x) + at, x);
    const BlockScale block = block_scale<Format, 8>(x, args.op.power_of_two);
    Words codes;
    encode<Format>(x, block, codes.w);
    if (inside)
        store_words(args.op.codes + at, codes);
    if (threadIdx.x % 8 == 0)
        args.op.scales[index] = block.scale;
}

template <class Type, class Format> PYROUTE_DEVICE void quantize_tile128(const QuantizeLaunch &args) {
    const Fp8Blocks &b = args.op.blocks;
    const Strip strip = find_strip(b, args.scale_rows, blockIdx.x / args.col_blocks);
    if (args.segments_only && strip.rows == 0) // all threads
        return;
    const uint32_t column_block = blockIdx.x % args.col_blocks;
    const int64_t column = static_cast<int64_t>(column_block) * 128 + threadIdx.x % 8 * 16;
    const int64_t first = strip.first_row * b.cols + column;
    const int64_t end_row = column < b.cols ? strip.rows : 0;
    Held<Type, 16> x[4];
    uint32_t amax = 0;
    PYROUTE_UNROLL
    for (int part = 0; part < 4; ++part) {
        const int64_t row = part * 32 + threadIdx.x / 8;
        if (row < end_row)
            x[part].load(elements<Type>(args.op.x) + first + row * b.cols);
    }
    PYROUTE_UNROLL
    for (int part = 0; part < 4; ++part)
        amax = max_of(amax, largest_magnitude<16>(x[part]));
    amax = largest_of_block(amax);
    const bool finite = amax < infinity_bits;
    if (!finite) { // for every thread: look again at the finite ones
        amax = 0;
        PYROUTE_UNROLL
        for (int part = 0; part < 4; ++part)
            amax = max_of(amax, largest_finite_magnitude<16>(x[part]));
        amax = largest_of_block(amax);
    }
    const BlockScale block = scale_of<Format>(amax, finite, args.op.power_of_two);
    PYROUTE_UNROLL
    for (int part = 0; part < 4; ++part) {
        const int64_t row = part * 32 + threadIdx.x / 8;
        Words codes;
        encode<Format>(x[part], block, codes.w);
        if (row < end_row)
            store_words(args.op.codes + first + row * b.cols, codes);
    }
    if (threadIdx.x == 0)
        args.op.scales[strip.scale_row * args.col_blocks + column_block] = block.scale;
    if (!args.segments_only)
        zero_unused_rows(b, args.op.codes, b.cols);
}

template <class Type, class Format> PYROUTE_DEVICE void quantize_column128(const QuantizeLaunch &args) {
    struct Columns {
        alignas(16) uint32_t largest[8][64]; // by warp
        alignas(16) float inverse[64];
    };
    PYROUTE_SHARED(Columns, columns);
    const Fp8Blocks &b = args.op.blocks;
    const uint32_t column_parts = divide_up(args.col_blocks, 64u);
    const Strip strip = find_strip(b, args.scale_rows, blockIdx.x / column_parts);
    if (args.segments_only && strip.rows == 0) // all threads
        return;
    const int64_t part_column = static_cast<int64_t>(blockIdx.x % column_parts) * 64;
    const uint32_t within = threadIdx.x % 8 * 8;
    const int64_t first = strip.first_row * b.cols + part_column + within;
    const int64_t end_row = part_column + within < b.cols ? strip.rows : 0;
    Held<Type, 8> x[4];
    PYROUTE_UNROLL
    for (int part = 0; part < 4; ++part) {
        const int64_t row = part * 32 + threadIdx.x / 8;
        if (row < end_row)
            x[part].load(elements<Type>(args.op.x) + first + row * b.cols);
    }
    uint32_t of_all = 0;
    PYROUTE_UNROLL
    for (int part = 0; part < 4; ++part)
        of_all = max_of(of_all, largest_magnitude<8>(x[part]));
    const bool finite = of_all < infinity_bits; // what this thread has
    PYROUTE_UNROLL
    for (int c = 0; c < 8; ++c) {
        uint32_t most = 0;
        PYROUTE_UNROLL
        for (int part = 0; part < 4; ++part)
            most = max_of(most, finite ? magnitude_bits(x[part][c]) : finite_magnitude(x[part][c]));
        most = max_of(most, shuffle_xor(most, 8));
        most = max_of(most, shuffle_xor(most, 16));
        if (lane_id() < 8)
            columns.largest[warp_id()][within + c] = most;
    }
    sync_block();
    if (threadIdx.x < 64) {
        uint32_t amax = 0;
        for (int warp = 0; warp < 8; ++warp)
            amax = max_of(amax, columns.largest[warp][threadIdx.x]);
        const BlockScale block = scale_of<Format>(amax, true, args.op.power_of_two);
        columns.inverse[threadIdx.x] = block.inverse;
        if (part_column + threadIdx.x < b.cols)
            args.op.scales[strip.scale_row * b.cols + part_column + threadIdx.x] = block.scale;
    }
    sync_block();
    float inverse[8];
    load_elements<Float32>(columns.inverse + within, inverse);
    PYROUTE_UNROLL
    for (int part = 0; part < 4; ++part) {
        const int64_t row = part * 32 + threadIdx.x / 8;
        uint64_t codes = 0;
        PYROUTE_UNROLL
        for (int c = 0; c < 8; c += 4)
            codes |= static_cast<uint64_t>(encode_products<Format>(
                         x[part][c] * inverse[c], x[part][c + 1] * inverse[c + 1], x[part][c + 2] * inverse[c + 2],
                         x[part][c + 3] * inverse[c + 3], finite))
                     << (8 * c);
        if (row < end_row)
            *reinterpret_cast<uint64_t *>(args.op.codes + first + row * b.cols) = codes;
    }
    if (!args.segments_only)
        zero_unused_rows(b, args.op.codes, b.cols);
}

template <class Type, class Format> PYROUTE_DEVICE void quantize_any(const QuantizeLaunch &args) {
    const Fp8Blocks &b = args.op.blocks;
    const uint32_t blocks_at_once = blockDim.x / args.group;
    const uint32_t column_parts = divide_up(args.col_blocks, blocks_at_once);
    const Strip strip = find_strip(b, args.scale_rows, blockIdx.x / column_parts);
    if (args.segments_only && strip.rows == 0) // all threads
        return;
    const uint32_t column_block = blockIdx.x % column_parts * blocks_at_once + threadIdx.x / args.group;
    const uint32_t thread = threadIdx.x % args.group, rows_at_once = args.group / args.threads_across;
    const int64_t first_row = thread / args.threads_across, first_column = thread % args.threads_across;
    const int64_t column = column_block * b.block_cols, first = strip.first_row * b.cols + column;
    const int64_t width = min_of(b.block_cols, b.cols - column); // negative past the last block
    const auto *x = elements<Type>(args.op.x) + first;
    uint32_t amax = 0;
    for (int64_t row = first_row; row < strip.rows; row += rows_at_once)
        for (int64_t c = first_column; c < width; c += args.threads_across)
            amax = max_of(amax, finite_magnitude(static_cast<float>(Type::widen(x[row * b.cols + c]))));
    if (args.group == 32)
        amax = reduce_max(amax);
    else if (args.group > 32)
        amax = largest_of_block(amax);
    const BlockScale block = scale_of<Format>(amax, false, args.op.power_of_two);
    uint8_t *codes = args.op.codes + first;
    for (int64_t row = first_row; row < strip.rows; row += rows_at_once)
        for (int64_t c = first_column; c < width; c += args.threads_across) {
            const float value = static_cast<float>(Type::widen(x[row * b.cols + c])) * block.inverse;
            codes[row * b.cols + c] = static_cast<uint8_t>(encode_any<Format>(value));
        }
    if (thread == 0 && column_block < args.col_blocks)
        args.op.scales[strip.scale_row * args.col_blocks + column_block] = block.scale;
    if (!args.segments_only)
        zero_unused_rows(b, args.op.codes, b.cols);
}

template <class Type, class Format> PYROUTE_DEVICE void dequantize(const DequantizeLaunch &args) {
    const Fp8Blocks &b = args.op.blocks;
    const int64_t index = blockIdx.x / args.column_parts;
    Strip strip;               // of rows of this thread block
    int64_t row_in_matrix = 0; // of its first one, less the rows of the blocks before strip.scale_row
    if (b.expert_offsets && b.block_rows > 1) {
        strip = find_in_segments(b, index);
    } else {
        const int64_t parts = divide_up(b.rows, args.part_rows), matrix = index / parts;
        row_in_matrix = (index - matrix * parts) * args.part_rows;
        const int64_t rows = max_of<int64_t>(0, min_of(args.part_rows, used_rows(b) - row_in_matrix));
        strip = {matrix * b.rows + row_in_matrix, rows, matrix * args.scale_rows};
    }
    const int64_t column = (blockIdx.x % args.column_parts * static_cast<int64_t>(args.threads_across) +
                            threadIdx.x % args.threads_across) *
                           16;
    const int64_t count = min_of<int64_t>(16, b.cols - column), column_block = column / b.block_cols;
    const bool one_scale = b.block_cols % 16 == 0;
    auto *const out = static_cast<typename Type::Storage *>(args.op.out);
    for (int64_t row = threadIdx.x / args.threads_across; row < strip.rows; row += blockDim.x / args.threads_across) {
        if (count <= 0)
            break;
        const int64_t at = (strip.first_row + row) * b.cols + column;
        const int64_t block_row = b.block_rows == 1 ? row_in_matrix + row : (row_in_matrix + row) / b.block_rows;
        const float *scales = args.op.scales + (strip.scale_row + block_row) * args.col_blocks;
        Words codes = {};
        if (args.whole_words)
            codes = load_words(args.op.codes + at);
        else
            for (int i = 0; i < 16; ++i)
                codes.w[i / 4] |= i < count ? static_cast<uint32_t>(args.op.codes[at + i]) << (8 * (i % 4)) : 0;
        typename Type::Wide x[16];
        PYROUTE_UNROLL
        for (int i = 0; i < 16; ++i) {
            const float scale = one_scale ? scales[column_block] : i < count ? scales[(column + i) / b.block_cols] : 0;
            x[i] = Format::decode(codes.w[i / 4] >> (8 * (i % 4)) & 0xff) * scale;
        }
        if (args.whole_words)
            store_elements<Type>(out + at, x);
        else
            store_elements<Type>(out + at, count, x);
    }
    zero_unused_rows(b, out, b.cols * static_cast<int64_t>(sizeof(*out)));
}

} // namespace pyroute::cuda
