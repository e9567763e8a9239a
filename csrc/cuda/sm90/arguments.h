// What launchers hand to Hopper's kernels, and the shapes that both know.
#pragma once

#include <stdint.h>

#include "cuda/grouped_gemm_tiles.h"
#include "cuda/sm90/layout.h"
#include "cuda/tensor_map.h"

namespace pyroute::cuda::sm90 {

// out[rows of e] = a[rows of e] b[e]^T; forward and dgrad.
struct ProductArgs {
    TensorMap a;              // [rows, depth]
    TensorMap b;              // [experts * cols, depth], or [experts * depth, cols]
    TensorMap out;            // bfloat16 [rows, cols]
    const int64_t *num_tiles; // of the plan, like tiles
    const GemmTile *tiles;
    const float *a_scales; // [rows, blocks of depth]
    const float *b_scales; // one for 128 x 128 elements, at expert * .. + block of columns * .. + block of depth * ..
    uint32_t b_scale_expert, b_scale_col, b_scale_depth;
    void *out_data;
    int32_t rows, cols, depth;
    int32_t b_rows; // of the map of b for one expert
    int32_t raster_group;
    uint32_t *hang_report; // PYROUTE_HANG_TRAP builds: 8 words for each block, or null
};

// out[e] = grad_out[rows of e]^T a[rows of e].
struct WgradArgs {
    TensorMap grad_out, a;               // FP8: [cols, padded rows], transposed; bfloat16: [rows, cols]
    TensorMap grad_out_scales, a_scales; // FP8: [blocks of 128 rows, cols]
    const int64_t *tile_starts;          // of the plan, tiles of 128 rows: FP8
    const int64_t *offsets;              // of the plan
    float *out;                          // [experts, n, k]
    bool accumulate;
    int32_t experts, n, k;
    int32_t raster_group;
    uint32_t *hang_report;
};

// Bytes of [rows of a segment, cols] to [cols, padded rows], every segment padded with zeros to a multiple of 128 rows.
struct TransposeArgs {
    const uint8_t *from;      // [rows, cols]
    uint8_t *to;              // [cols, to_pitch]
    const int64_t *num_tiles; // of the plan, like tiles: 128 rows each; or null
    const GemmTile *tiles;
    int64_t rows, cols, to_pitch;
};

enum class Element { e4m3, e5m2, bfloat16 }; // of a (grad_out); FP8 beside FP8, of either kind
enum class Result { bfloat16, float32 };

// A kernel of ProductArgs. `math` warpgroups multiply 64 rows each, one more (a single warp if math is 1) loads.
struct ProductShape {
    Element element;
    uint32_t rows, cols, stages, cluster;
    bool transposed_b; // depth runs down the rows of b: bfloat16 only
    Result result;
    bool overlaps = false; // FP8: a stage is multiplied while the one before it is added, in two sets of sums
    bool b_e5m2 = false;   // FP8: b is e5m2, else e4m3

    PYROUTE_BOTH bool fp8() const { return element != Element::bfloat16; }
    PYROUTE_BOTH uint32_t math() const { return rows / panel_rows; }
    PYROUTE_BOTH uint32_t threads() const { return math() * warpgroup + (math() > 1 ? warpgroup : 32); }
    PYROUTE_BOTH int32_t stage_depth() const { return fp8() ? 128 : 64; } // elements in 128 bytes
    PYROUTE_BOTH uint32_t staging() const { return result == Result::bfloat16 ? rows * cols * 2 : 0; }
    PYROUTE_BOTH SharedPlan shared() const { return {staging(), stages, rows * row_bytes, cols * row_bytes, 0}; }
};

// A kernel of WgradArgs: 128 x 128, two math warpgroups.
struct WgradShape {
    Element element;
    uint32_t stages;
    bool b_e5m2 = false; // as in ProductShape, of a

    PYROUTE_BOTH bool fp8() const { return element != Element::bfloat16; }
    PYROUTE_BOTH uint32_t threads() const { return 3 * warpgroup; }
    PYROUTE_BOTH SharedPlan shared() const { return {0, stages, 128 * row_bytes, 128 * row_bytes, fp8() ? 1024u : 0u}; }
};

constexpr ProductShape fp8_128 = {Element::e4m3, 128, 128, 5, 1, false, Result::bfloat16};
constexpr ProductShape fp8_128_pair = {Element::e4m3, 128, 128, 5, 2, false, Result::bfloat16};
constexpr ProductShape fp8_128_overlap = {Element::e4m3, 128, 128, 5, 1, false, Result::bfloat16, true};
constexpr ProductShape fp8_192 = {Element::e4m3, 128, 192, 4, 1, false, Result::bfloat16};
constexpr ProductShape fp8_192_pair = {Element::e4m3, 128, 192, 4, 2, false, Result::bfloat16};
constexpr ProductShape fp8_128_f32 = {Element::e4m3, 128, 128, 6, 1, false, Result::float32};
constexpr ProductShape fp8_64 = {Element::e4m3, 64, 128, 8, 1, false, Result::bfloat16};
constexpr ProductShape fp8_64_f32 = {Element::e4m3, 64, 128, 8, 1, false, Result::float32};
constexpr ProductShape e5m2_e4m3_128 = {Element::e5m2, 128, 128, 5, 1, false, Result::bfloat16};
constexpr ProductShape e5m2_e4m3_128_f32 = {Element::e5m2, 128, 128, 6, 1, false, Result::float32};
constexpr ProductShape e4m3_e5m2_128 = {Element::e4m3, 128, 128, 5, 1, false, Result::bfloat16, false, true};
constexpr ProductShape e4m3_e5m2_128_f32 = {Element::e4m3, 128, 128, 6, 1, false, Result::float32, false, true};
constexpr ProductShape e5m2_e5m2_128 = {Element::e5m2, 128, 128, 5, 1, false, Result::bfloat16, false, true};
constexpr ProductShape e5m2_e5m2_128_f32 = {Element::e5m2, 128, 128, 6, 1, false, Result::float32, false, true};
constexpr ProductShape bf16_128 = {Element::bfloat16, 128, 128, 5, 1, false, Result::bfloat16};
constexpr ProductShape bf16_128_f32 = {Element::bfloat16, 128, 128, 6, 1, false, Result::float32};
constexpr ProductShape bf16_64 = {Element::bfloat16, 64, 128, 8, 1, false, Result::bfloat16};
constexpr ProductShape bf16_64_f32 = {Element::bfloat16, 64, 128, 8, 1, false, Result::float32};
constexpr ProductShape bf16_dgrad_128 = {Element::bfloat16, 128, 128, 5, 1, true, Result::bfloat16};
constexpr ProductShape bf16_dgrad_128_f32 = {Element::bfloat16, 128, 128, 6, 1, true, Result::float32};
constexpr WgradShape fp8_wgrad = {Element::e4m3, 6};
constexpr WgradShape e5m2_e4m3_wgrad = {Element::e5m2, 6};
constexpr WgradShape e4m3_e5m2_wgrad = {Element::e4m3, 6, true};
constexpr WgradShape e5m2_e5m2_wgrad = {Element::e5m2, 6, true};
constexpr WgradShape bf16_wgrad = {Element::bfloat16, 6};

static_assert(fp8_128.shared().sound() && fp8_192.shared().sound() && fp8_128_f32.shared().sound() &&
              fp8_64.shared().sound());
static_assert(fp8_64_f32.shared().sound() && bf16_dgrad_128.shared().sound() && bf16_dgrad_128_f32.shared().sound());
static_assert(fp8_wgrad.shared().sound() && bf16_wgrad.shared().sound());

} // namespace pyroute::cuda::sm90
