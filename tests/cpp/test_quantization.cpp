// FP8 with block scales: the same bytes on every instruction set and number of threads, whatever the block and type; a
// row of blocks alone has the bytes that it has in its matrix; scales and codes belong to their own block.
#include <algorithm>
#include <cmath>

#include "cpu/quantization.h"
#include "fuzz.h"
#include "rows.h"

using namespace pyroute;
using namespace pyroute::test;

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// float32, as the op rounds float64.
float value_of(const Bytes &x, FloatType type, int64_t i) {
    uint32_t bits = 0;
    float value;
    switch (type) {
    case FloatType::float64:
        return static_cast<float>(reinterpret_cast<const double *>(x.get())[i]);
    case FloatType::float32:
        return reinterpret_cast<const float *>(x.get())[i];
    case FloatType::bfloat16:
        bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t *>(x.get())[i]) << 16;
        std::memcpy(&value, &bits, 4);
        return value;
    case FloatType::float16:
        break;
    }
    const uint16_t half = reinterpret_cast<const uint16_t *>(x.get())[i];
    const int exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
    value = exponent == 31
                ? (mantissa ? NAN : HUGE_VALF)
                : std::ldexp(static_cast<float>(mantissa + (exponent ? 1024 : 0)), std::max(exponent, 1) - 25);
    return half & 0x8000 ? -value : value;
}

float value_of_code(uint8_t code, Fp8Format format) {
    const int bits = format == Fp8Format::e4m3 ? 3 : 2, bias = format == Fp8Format::e4m3 ? 7 : 15;
    const int magnitude = code & 0x7f, exponent = magnitude >> bits, mantissa = magnitude & ((1 << bits) - 1);
    float value =
        std::ldexp(static_cast<float>(mantissa + (exponent ? 1 << bits : 0)), std::max(exponent, 1) - bias - bits);
    if (format == Fp8Format::e4m3 ? magnitude == 0x7f : magnitude > 0x7c)
        value = NAN;
    else if (format == Fp8Format::e5m2 && magnitude == 0x7c)
        value = HUGE_VALF;
    return code & 0x80 ? -value : value;
}

struct Problem {
    explicit Problem(Random &random) : segments(random_segments(random, 40)), skip(random.integer(0, 3)) {
        blocks.format = random.any_of({Fp8Format::e4m3, Fp8Format::e5m2});
        blocks.block_rows = random.any_of({int64_t{1}, int64_t{1}, int64_t{3}, int64_t{8}, int64_t{32}, int64_t{128}});
        blocks.block_cols =
            random.any_of({int64_t{1}, int64_t{1}, int64_t{5}, int64_t{32}, int64_t{128}, int64_t{128}});
        blocks.cols = random.one_in(20) ? 0 : odd_size(random, 300);
        blocks.num_matrices = 1;
        blocks.num_segments = 1;
        if (segments.num_experts > 0 && random.one_in(2)) {
            blocks.rows = segments.num_rows;
            blocks.expert_offsets = segments.offsets.data();
            blocks.num_segments = segments.num_experts;
            for (int64_t e = 0; e < segments.num_experts; ++e)
                starts.push_back(starts.back() + ceil_div(segments.end(e) - segments.begin(e), blocks.block_rows));
            blocks.row_block_starts = starts.data();
        } else {
            blocks.num_matrices = random.integer(1, 3);
            blocks.rows = random.one_in(20) ? 0 : odd_size(random, random.one_in(10) ? 140 : 20);
        }
    }
    Problem(const Problem &) = delete;
    Problem &operator=(const Problem &) = delete;

    int64_t row_blocks() const { // of one matrix
        return blocks.expert_offsets ? starts.back() : ceil_div(blocks.rows, blocks.block_rows);
    }
    int64_t col_blocks() const { return ceil_div(blocks.cols, blocks.block_cols); }
    int64_t num_scales() const { return blocks.num_matrices * row_blocks() * col_blocks(); }
    int64_t num_elements() const { return blocks.num_matrices * blocks.rows * blocks.cols; }

    // body(first row in the stack, rows, its row of scales) for every row of blocks
    template <class Body> void for_each_strip(const Body &body) const {
        for (int64_t matrix = 0; matrix < blocks.num_matrices; ++matrix) {
            int64_t strip = matrix * row_blocks();
            for (int64_t segment = 0; segment < blocks.num_segments; ++segment) {
                int64_t row = blocks.expert_offsets ? segments.begin(segment) : 0;
                const int64_t end = blocks.expert_offsets ? segments.end(segment) : blocks.rows;
                for (; row < end; row += blocks.block_rows, ++strip)
                    body(matrix * blocks.rows + row, std::min(blocks.block_rows, end - row), strip);
            }
        }
    }

    Segments segments;
    int64_t skip;
    std::vector<int64_t> starts{0};
    Fp8Blocks blocks{};
};

// The largest finite magnitude of a block gives its scale and gets the largest code; what is not finite gets the NaN
// code, and nothing else does.
void check_blocks(const Problem &p, const QuantizeFp8Args &args, const Bytes &x, const Outputs &out) {
    const bool e4m3 = p.blocks.format == Fp8Format::e4m3;
    const float max_value = e4m3 ? 448.0f : 57344.0f;
    const uint8_t max_code = e4m3 ? 0x7e : 0x7b, nan_code = e4m3 ? 0x7f : 0x7e;
    p.for_each_strip([&](int64_t first, int64_t rows, int64_t strip) {
        for (int64_t block = 0; block < p.col_blocks(); ++block) {
            float amax = 0;
            int most = 0;
            for (int64_t row = first; row < first + rows; ++row)
                for (int64_t col = block * p.blocks.block_cols;
                     col < std::min(p.blocks.cols, (block + 1) * p.blocks.block_cols); ++col) {
                    const int64_t i = row * p.blocks.cols + col;
                    const float value = std::fabs(value_of(x, args.x_type, i));
                    const uint8_t code = out.get<uint8_t>(0)[i];
                    CHECK((code == nan_code) == !std::isfinite(value));
                    if (std::isfinite(value)) {
                        amax = std::max(amax, value);
                        most = std::max(most, code & 0x7f);
                    }
                }
            const float scale = out.get<float>(1)[strip * p.col_blocks() + block];
            const bool tiny = amax < max_value * 0x1p-126f;
            const float expected = tiny ? 1.0f : amax / max_value;
            if (args.power_of_two) {
                int exponent;
                CHECK(std::frexp(scale, &exponent) == 0.5f && scale >= expected && scale * 0.5f < expected);
            } else {
                CHECK(scale == expected);
                CHECK(tiny || most == max_code);
            }
        }
    });
}

// One row of blocks as a matrix of its own.
void check_strip_alone(const Problem &p, QuantizeFp8Args args, int64_t first, int64_t rows, int64_t strip,
                       const Outputs &whole) {
    args.blocks = {1,       rows, p.blocks.cols,  p.blocks.block_rows, p.blocks.block_cols, nullptr,
                   nullptr, 1,    p.blocks.format};
    args.x = static_cast<const char *>(args.x) + first * p.blocks.cols * item_bytes(args.x_type);
    Outputs alone(0x11, 0);
    args.codes = alone.poisoned<uint8_t>(rows * p.blocks.cols);
    args.scales = alone.poisoned<float>(p.col_blocks());
    cpu::quantize_fp8(args);
    CHECK(same_bytes(args.codes, whole.get<uint8_t>(0) + first * p.blocks.cols, rows * p.blocks.cols));
    CHECK(same_bytes(args.scales, whole.get<float>(1) + strip * p.col_blocks(), 4 * p.col_blocks()));
}

void quantize(Random &random, const Problem &p) {
    QuantizeFp8Args args{};
    args.blocks = p.blocks;
    args.x_type = random.any_of(all_float_types);
    args.power_of_two = random.one_in(3);
    const Bytes x = random_floats(random, random.any_of(all_values), args.x_type, p.num_elements(), p.skip);
    args.x = x.get();
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.codes = to.poisoned<uint8_t>(p.num_elements());
        args.scales = to.poisoned<float>(p.num_scales());
        cpu::quantize_fp8(args);
    });
    check_blocks(p, args, x, out);
    const int64_t chosen = p.num_scales() ? random.integer(0, p.blocks.num_matrices * p.row_blocks() - 1) : -1;
    p.for_each_strip([&](int64_t first, int64_t rows, int64_t strip) {
        if (strip == chosen)
            check_strip_alone(p, args, first, rows, strip, out);
    });
    if (p.blocks.expert_offsets) {
        const int64_t used = p.segments.offsets.back() * p.blocks.cols;
        CHECK(all_bytes(out.get<uint8_t>(0) + used, p.num_elements() - used, 0));
    }
}

void dequantize(Random &random, const Problem &p) {
    DequantizeFp8Args args{};
    args.blocks = p.blocks;
    args.out_type = random.any_of(all_float_types);
    Buffer<uint8_t> codes(p.num_elements(), p.skip);
    Buffer<float> scales(p.num_scales(), p.skip);
    fill_codes(random, codes.get(), codes.size);
    fill(random, random.any_of(all_values), scales.get(), scales.size);
    args.codes = codes.get();
    args.scales = scales.get();
    const Outputs out = same_everywhere(random, [&](Outputs &to) {
        args.out = to.poisoned_items(p.num_elements(), item_bytes(args.out_type));
        cpu::dequantize_fp8(args);
    });
    if (args.out_type == FloatType::float32)
        p.for_each_strip([&](int64_t first, int64_t rows, int64_t strip) {
            for (int64_t i = first * p.blocks.cols; i < (first + rows) * p.blocks.cols; ++i) {
                const float scale = scales[strip * p.col_blocks() + i % p.blocks.cols / p.blocks.block_cols];
                const float expected = value_of_code(codes[i], p.blocks.format) * scale, value = out.get<float>(0)[i];
                const uint32_t nan = 0x7fc00000;
                CHECK(std::isnan(expected) ? same_bytes(&value, &nan, 4) : same_bytes(&value, &expected, 4));
            }
        });
    if (p.blocks.expert_offsets) {
        const int64_t item = item_bytes(args.out_type), used = p.segments.offsets.back() * p.blocks.cols * item;
        CHECK(all_bytes(out.get<char>(0) + used, p.num_elements() * item - used, 0));
    }
}

} // namespace

int main() {
    fuzz("test_quantization", 2000, 0x33aef9abbdeec70b, [](Random &random) {
        const Problem problem(random);
        quantize(random, problem);
        dequantize(random, problem);
    });
}
