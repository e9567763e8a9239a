// The tensor cores' operands: panels in shared memory, the fragments that a warp takes from them, their products.
//
// Of a panel across (grouped_gemm_panels.h) ldmatrix transposes items of two bytes, which is all that bfloat16 needs.
// Of FP8 it gives pairs of neighbouring rows of the side for two elements of the contraction. The lanes ask for
// contraction 4q, 4q + 1 and 4q + 2, 4q + 3 (any eight addresses may be a matrix), and two byte selections make the
// fragments of the even and of the odd rows: what the product calls rows r and r + 8 are then rows 2r and 2r + 1, and
// its columns likewise (row_of, col_of).
//
// FP8 where the card has no FP8 product: codes become float16 by an instruction, or by a shift (e4m3 with 2^-8, which
// the promotion takes out again), or as they are (e5m2). Codes beside bfloat16 become bfloat16. All exact, NaN too.
#pragma once

#include "cuda/grouped_gemm_arguments.h"
#include "cuda/grouped_gemm_panels.h"
#include "cuda/mma.cuh"

namespace pyroute::cuda {

enum class Kind { bf16, fp8, mixed }; // both bfloat16; both FP8; bfloat16 times e4m3

template <Kind kind_, bool a_across, bool b_across, int rows_, bool a_e5m2_ = false, bool b_e5m2_ = false>
struct Config {
    static constexpr Kind kind = kind_;
    static constexpr bool a_e5m2 = a_e5m2_, b_e5m2 = b_e5m2_; // else e4m3, of FP8
    static constexpr int rows = rows_, cols = 128, warps = 8;
    static constexpr MmaRing ring = mma_ring(rows, kind == Kind::mixed);
    // Codes beside bfloat16 are widened by every warp that takes them: by two, not four.
    static constexpr int warps_down = rows == 16 ? 1 : kind == Kind::mixed ? 2 : 4, warps_across = warps / warps_down;
    static constexpr int warp_rows = rows / warps_down, warp_cols = cols / warps_across;
    static constexpr int row_parts = warp_rows / 16, col_parts = warp_cols / 8;
    static constexpr int stages = ring.stages, depth = ring.a_bytes / (kind == Kind::fp8 ? 1 : 2); // of a stage
    static constexpr int step = kind == Kind::bf16 ? 16 : 32; // of a set of fragments
    using A = Panel<kind == Kind::fp8 ? 1 : 2, a_across, rows, depth>;
    using B = Panel<kind == Kind::bf16 ? 2 : 1, b_across, cols, depth>;
    static constexpr int scales_at = A::bytes + B::bytes; // of the rows, then of the columns
    static constexpr int stage_bytes = ring.stage_bytes(rows);
    static_assert(scales_at + (rows + cols) * 4 <= stage_bytes, "a stage holds both panels and their scales");
    static constexpr bool row_scales = kind == Kind::fp8, col_scales = kind != Kind::bf16; // bfloat16 has none

    // Rows and columns of the warp that a lane's sums belong to: sum[i][j][2 * half + k] is (row_of(i, half),
    // col_of(j, k)).
    static PYROUTE_DEVICE int row_of(int part, int half) {
        const int r = static_cast<int>(lane_id()) / 4;
        return 16 * part + (A::pairs ? 2 * r + half : r + 8 * half);
    }
    static PYROUTE_DEVICE int col_of(int part, int k) {
        const int q = static_cast<int>(lane_id()) % 4;
        return B::pairs ? part / 2 * 16 + 4 * q + 2 * k + part % 2 : 8 * part + 2 * q + k;
    }
};

// Four codes as two pairs of float16 or bfloat16, the lower code in the lower half of the first.
struct Wide {
    uint32_t low, high;
};
PYROUTE_DEVICE Wide top_bytes(uint32_t codes) { // each code as the upper byte of a half
    return {select_bytes(codes, 0, 0x1404u), select_bytes(codes, 0, 0x3424u)};
}
PYROUTE_DEVICE Wide nan_halves(uint32_t codes) { // all bits of the halves of e4m3's NaN codes; no branch: it costs more
    const uint32_t nan = (codes & 0x7f7f7f7fu) + 0x01010101u;
    return {select_top_bits(nan, 0x1100u), select_top_bits(nan, 0x3322u)};
}
template <bool e5m2> PYROUTE_DEVICE Wide to_f16(uint32_t codes) {
    if (!e5m2 && converts_fp8())
        return {f16_pair_of_e4m3(codes & 0xffff), f16_pair_of_e4m3(codes >> 16)};
    Wide wide = top_bytes(codes);
    if constexpr (!e5m2) { // whose codes are the upper byte of a float16
        const auto rebased = [](uint32_t top, uint32_t nan) {
            return (top & 0x80008000u) | (top >> 1 & 0x3f803f80u) | (nan & 0x7e007e00u);
        };
        const Wide nan = nan_halves(codes);
        wide = {rebased(wide.low, nan.low), rebased(wide.high, nan.high)};
    }
    return wide;
}
PYROUTE_DEVICE Wide e4m3_to_bf16(uint32_t codes) {
    const auto rebased = [](uint32_t top, uint32_t nan) { // the exponents' biases differ by 120
        const uint32_t small = (top & 0x80008000u) | (top >> 4 & 0x07f007f0u);
        return multiply_bf16_pairs(small, 0x7b807b80u) | (nan & 0x7fc07fc0u);
    };
    const Wide wide = top_bytes(codes), nan = nan_halves(codes);
    return {rebased(wide.low, nan.low), rebased(wide.high, nan.high)};
}

// A warp's operands for one step of the contraction.
template <class C> struct Fragments {
    static constexpr int sets = C::kind == Kind::mixed ? 2 : 1; // of 16 elements each, or one of the whole step
    uint32_t a[C::row_parts][sets][4];
    uint32_t b[C::col_parts][2];
};

// What the transposed load gives of even and of odd rows of the side.
PYROUTE_DEVICE uint32_t even_rows(uint32_t first, uint32_t second) { return select_bytes(first, second, 0x6420u); }
PYROUTE_DEVICE uint32_t odd_rows(uint32_t first, uint32_t second) { return select_bytes(first, second, 0x7531u); }

template <class C> PYROUTE_DEVICE void load_a(const char *panel, int warp_row, int step, Fragments<C> &f) {
    using A = typename C::A;
    const int lane = static_cast<int>(lane_id()), matrix = lane / 8;
    PYROUTE_UNROLL
    for (int i = 0; i < C::row_parts; ++i) {
        const int row = warp_row + 16 * i;
        if constexpr (C::kind == Kind::mixed) { // contraction 4q..4q+3 of each 16, as the codes beside it come
            PYROUTE_UNROLL
            for (int j = 0; j < 4; ++j) {
                const int set = j / 2, half = j % 2, chunk = step * 4 + set * 2 + lane % 4 / 2;
                const char *from = (panel + A::place(row + lane / 4 + 8 * half, chunk) + lane % 2 * 8);
                const WordPair pair = load_word_pair(from);
                f.a[i][set][half] = pair.w[0];
                f.a[i][set][half + 2] = pair.w[1];
            }
        } else if constexpr (A::pairs) {
            uint32_t d[4];
            load_matrices_transposed(d, panel + A::place(step * 32 + row_of_pairs(lane, matrix), row / 16));
            f.a[i][0][0] = even_rows(d[0], d[1]);
            f.a[i][0][1] = odd_rows(d[0], d[1]);
            f.a[i][0][2] = even_rows(d[2], d[3]);
            f.a[i][0][3] = odd_rows(d[2], d[3]);
        } else if constexpr (A::across) {
            const int depth = step * 16 + lane % 8 + matrix / 2 * 8;
            load_matrices_transposed(f.a[i][0], panel + A::place(depth, row / 8 + matrix % 2));
        } else {
            load_matrices(f.a[i][0], panel + A::place(row + lane % 8 + matrix % 2 * 8, step * 2 + matrix / 2));
        }
    }
}

template <class C> PYROUTE_DEVICE void load_b(const char *panel, int warp_col, int step, Fragments<C> &f) {
    using B = typename C::B;
    const int lane = static_cast<int>(lane_id()), matrix = lane / 8;
    PYROUTE_UNROLL
    for (int j = 0; j < C::col_parts; j += 2) { // 16 columns
        const int col = warp_col + 8 * j;
        uint32_t d[4];
        if constexpr (B::pairs) {
            load_matrices_transposed(d, panel + B::place(step * 32 + row_of_pairs(lane, matrix), col / 16));
            f.b[j][0] = even_rows(d[0], d[1]);
            f.b[j][1] = even_rows(d[2], d[3]);
            f.b[j + 1][0] = odd_rows(d[0], d[1]);
            f.b[j + 1][1] = odd_rows(d[2], d[3]);
            continue;
        }
        if constexpr (B::across)
            load_matrices_transposed(d, panel + B::place(step * 16 + lane % 8 + matrix % 2 * 8, col / 8 + matrix / 2));
        else
            load_matrices(d, panel + B::place(col + lane % 8 + matrix / 2 * 8, step * 2 + matrix % 2));
        f.b[j][0] = d[0];
        f.b[j][1] = d[1];
        f.b[j + 1][0] = d[2];
        f.b[j + 1][1] = d[3];
    }
}

template <class C> using Sums = float[C::row_parts][C::col_parts][4];

// sum += a b for one step.
template <class C> PYROUTE_DEVICE void multiply(const Fragments<C> &f, Sums<C> &sum) {
    PYROUTE_UNROLL
    for (int j = 0; j < C::col_parts; ++j) {
        if constexpr (C::kind == Kind::mixed) {
            const Wide first = e4m3_to_bf16(f.b[j][0]), second = e4m3_to_bf16(f.b[j][1]);
            const uint32_t b[2][2] = {{first.low, first.high}, {second.low, second.high}};
            PYROUTE_UNROLL
            for (int i = 0; i < C::row_parts; ++i) {
                mma_bf16(sum[i][j], f.a[i][0], b[0]);
                mma_bf16(sum[i][j], f.a[i][1], b[1]);
            }
        } else {
            PYROUTE_UNROLL
            for (int i = 0; i < C::row_parts; ++i) {
                if constexpr (C::kind == Kind::fp8)
                    mma_fp8<C::a_e5m2, C::b_e5m2>(sum[i][j], f.a[i][0], f.b[j]);
                else
                    mma_bf16(sum[i][j], f.a[i][0], f.b[j]);
            }
        }
    }
}

// The same for FP8 by way of float16, in sums that are unscaled<C>() times too small.
template <class C> PYROUTE_DEVICE float unscaled() {
    return converts_fp8() ? 1.0f : (C::a_e5m2 ? 1.0f : 0x1p8f) * (C::b_e5m2 ? 1.0f : 0x1p8f); // of each e4m3 operand
}
template <class C> PYROUTE_DEVICE void multiply_as_f16(const Fragments<C> &f, Sums<C> &sum) {
    uint32_t a[C::row_parts][2][4];
    PYROUTE_UNROLL
    for (int i = 0; i < C::row_parts; ++i)
        PYROUTE_UNROLL
    for (int j = 0; j < 4; ++j) { // contraction 4q, 4q + 1 are what the product calls 2q, 2q + 1, the others 8 more
        const Wide wide = to_f16<C::a_e5m2>(f.a[i][0][j]);
        a[i][j / 2][j % 2] = wide.low;
        a[i][j / 2][j % 2 + 2] = wide.high;
    }
    PYROUTE_UNROLL
    for (int j = 0; j < C::col_parts; ++j) {
        const Wide first = to_f16<C::b_e5m2>(f.b[j][0]), second = to_f16<C::b_e5m2>(f.b[j][1]);
        const uint32_t b[2][2] = {{first.low, first.high}, {second.low, second.high}};
        PYROUTE_UNROLL
        for (int i = 0; i < C::row_parts; ++i) {
            mma_f16(sum[i][j], a[i][0], b[0]);
            mma_f16(sum[i][j], a[i][1], b[1]);
        }
    }
}

} // namespace pyroute::cuda
