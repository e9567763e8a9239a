// permute and quantise to e4m3 in one pass: the bytes of quantising each token in 1x128 blocks and moving the codes.
//
// A warp takes up to eight blocks of a token, four elements of each per lane: all loads are in flight before the first
// use, with eight row numbers. Lane b makes the scale of block b, two divisions for all eight, and the others fetch its
// inverse. Each of the k rows then gets 1 KiB of codes and 32 bytes of scales. Other blocks of the grid fill padding
// rows. 256 threads, 3 blocks per SM: 48 KiB of bfloat16 in flight. Bytes: T rows read, R rows of codes written, and 4
// per 128 of them. Source of the blocks: DeepSeek-V3 technical report, section 3.3.2.
#pragma once

#include "cuda/float_rows.cuh"
#include "cuda/fp8.cuh"
#include "cuda/permutation.cuh"

namespace pyroute::cuda {

// Four elements of a row, those past `count` zero, in as few registers as they take. Vectors: all four or none exist,
// at an address that is a multiple of their size, or of 16.
template <class Type, bool vectors, size_t size = sizeof(typename Type::Storage)> struct FourElements {
    float x[4];
    PYROUTE_DEVICE void load(const typename Type::Storage *from, int32_t count) {
        if constexpr (!vectors)
            load_elements<Type>(from, count, x);
        else if (count > 0)
            load_elements<Type>(from, x);
        else
            x[0] = x[1] = x[2] = x[3] = 0.0f;
    }
    PYROUTE_DEVICE void widen(float (&to)[4]) const {
        PYROUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            to[i] = x[i];
    }
};
template <class Type> struct FourElements<Type, true, 2> {
    uint64_t bits;
    PYROUTE_DEVICE void load(const uint16_t *from, int32_t count) {
        bits = count > 0 ? *reinterpret_cast<const uint64_t *>(from) : 0;
    }
    PYROUTE_DEVICE void widen(float (&to)[4]) const {
        PYROUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            to[i] = Type::widen(static_cast<uint16_t>(bits >> (16 * i)));
    }
};

// The largest finite magnitude of a block that a warp holds, four elements per lane, and whether all of it is finite.
struct BlockMaximum {
    uint32_t amax;
    bool finite;
};
PYROUTE_DEVICE BlockMaximum maximum_of_block(const float (&x)[4]) {
    const uint32_t most = reduce_max(largest_magnitude<4>(x));
    if (most < infinity_bits) // the same for all lanes
        return {most, true};
    return {reduce_max(largest_finite_magnitude<4>(x)), false};
}

template <bool vectors> PYROUTE_DEVICE void store_four(uint8_t *to, int32_t count, uint32_t codes) {
    if (vectors && count > 0)
        *reinterpret_cast<uint32_t *>(to) = codes;
    if (!vectors)
        PYROUTE_UNROLL
    for (int i = 0; i < 4; ++i)
        if (i < count)
            to[i] = static_cast<uint8_t>(codes >> (8 * i));
}

// The codes of blocks that start at x, `count` elements from this lane's first one on, and in lane b the scale of
// block b.
template <class Type, bool vectors>
PYROUTE_DEVICE float quantize_blocks(const typename Type::Storage *x, int32_t count, bool power_of_two,
                                     uint32_t (&codes)[blocks_at_once]) {
    FourElements<Type, vectors> four[blocks_at_once];
    PYROUTE_UNROLL
    for (int b = 0; b < blocks_at_once; ++b)
        four[b].load(x + b * quantize_block, count - b * quantize_block);
    float wide[4];
    uint32_t finite = 0, of_lane = 0;
    PYROUTE_UNROLL
    for (int b = 0; b < blocks_at_once; ++b) {
        four[b].widen(wide);
        const BlockMaximum most = maximum_of_block(wide);
        finite |= static_cast<uint32_t>(most.finite) << b;
        of_lane = lane_id() == static_cast<uint32_t>(b) ? most.amax : of_lane;
    }
    const BlockScale scale = scale_of<E4m3>(of_lane, true, power_of_two);
    PYROUTE_UNROLL
    for (int b = 0; b < blocks_at_once; ++b) {
        four[b].widen(wide);
        const BlockScale block = {shuffle(scale.inverse, static_cast<uint32_t>(b)), 0.0f, (finite >> b & 1) != 0};
        codes[b] = encode4<E4m3>(wide[0], wide[1], wide[2], wide[3], block);
    }
    return scale.scale;
}

// Columns from one on, as far as a strip reaches.
PYROUTE_DEVICE int32_t columns_left(const PermuteQuantizeArgs &move, int64_t column) {
    return static_cast<int32_t>(min_of(move.hidden - column, int64_t{blocks_at_once * quantize_block}));
}

template <bool vectors> PYROUTE_DEVICE void fill_quantized_padding(const QuantizeMoveArgs &args) {
    const PermuteQuantizeArgs &move = args.move;
    const int64_t row_scales = divide_up(move.hidden, int64_t{quantize_block});
    const uint32_t block = blockIdx.x - args.token_blocks, blocks = gridDim.x - args.token_blocks;
    for_each_padding_row(move.maps, args.rows_end, block, blocks, [&](int64_t row) {
        for (int64_t column = lane_id() * 4; column < move.hidden; column += 128)
            store_four<vectors>(move.codes + row * move.hidden + column, columns_left(move, column), 0);
        for (int64_t i = lane_id(); i < row_scales; i += 32)
            move.scales[row * row_scales + i] = 1.0f;
    });
}

template <class Type, bool vectors> PYROUTE_DEVICE void permute_quantize(const QuantizeMoveArgs &args) {
    if (blockIdx.x >= args.token_blocks)
        return fill_quantized_padding<vectors>(args);
    const PermuteQuantizeArgs &move = args.move;
    const int64_t row_scales = divide_up(move.hidden, int64_t{quantize_block});
    const Strips strips(move.maps.num_tokens, divide_up(move.hidden, int64_t{4}), blocks_at_once, 5, args.token_blocks);
    for (int64_t strip = strips.first; strip < strips.total; strip += strips.step) {
        const int64_t token = quotient(strip, strips.per_token);
        const int64_t first_block = (strip - token * strips.per_token) * blocks_at_once;
        const int64_t column = first_block * quantize_block + lane_id() * 4;
        const int32_t count = columns_left(move, column);
        const bool has_scale = lane_id() < blocks_at_once && first_block + lane_id() < row_scales;
        const auto *x = static_cast<const typename Type::Storage *>(move.x) + token * move.hidden + column;
        uint32_t codes[blocks_at_once];
        float scale = 0.0f;
        for (int64_t base = 0; base < move.maps.top_k; base += rows_at_once) {
            int32_t rows[rows_at_once];
            load_rows(move.maps, token, base, rows);
            if (base == 0)
                scale = quantize_blocks<Type, vectors>(x, count, move.power_of_two, codes);
            PYROUTE_UNROLL
            for (int slot = 0; slot < rows_at_once; ++slot) {
                if (rows[slot] < 0)
                    continue;
                uint8_t *const to = move.codes + rows[slot] * move.hidden + column;
                PYROUTE_UNROLL
                for (int b = 0; b < blocks_at_once; ++b)
                    store_four<vectors>(to + b * quantize_block, count - b * quantize_block, codes[b]);
                if (has_scale)
                    move.scales[rows[slot] * row_scales + first_block + lane_id()] = scale;
            }
        }
    }
}

} // namespace pyroute::cuda
