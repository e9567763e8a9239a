// Where operands of grouped GEMM lie in shared memory, so that what a warp reads at once is in all 32 banks. Plain
// functions, so that the tests call them on the host.
//
// A panel holds what one stage of the ring brings of one side: rows of `row_bytes` bytes, in chunks of 16 that are
// permuted within their row, so that the eight rows of a matrix that ldmatrix reads lie in all 32 banks.
//   along   a row is a row of the side, its bytes run along the contraction
//   across  a row is one element of the contraction, its bytes run over rows of the side (dgrad's weights, wgrad)
#pragma once

#include "cuda/grouped_gemm_tiles.h"

namespace pyroute::cuda {

template <int item_, bool across_, int extent_, int depth_> struct Panel {
    static constexpr int item = item_, extent = extent_, depth = depth_; // depth: elements of the contraction
    static constexpr bool across = across_;
    static constexpr int rows = across ? depth : extent, row_bytes = (across ? extent : depth) * item;
    static constexpr int bytes = rows * row_bytes, chunks = row_bytes / 16;
    static constexpr bool pairs = across && item == 1; // even and odd rows of the side are apart

    static PYROUTE_ANYWHERE constexpr int place(int row, int chunk) {
        int flip = 0;
        if constexpr (chunks == 4) // two rows share 128 bytes
            flip = row / 2 & 3;
        else if constexpr (pairs) // rows 0, 1, 4, 5, 8, 9, 12, 13 are a matrix
            flip = (row / 4 & 3) * 2 + (row & 1);
        else if constexpr (across)
            flip = row & 7;
        else // 8 rows of one chunk, and 4 rows of two (bfloat16 beside FP8)
            flip = (row & 3) * 2 + (row / 4 & 1);
        return row * row_bytes + (chunk ^ flip) * 16;
    }
};

// The row of an FP8 panel across that lane % 8 of matrix `matrix` of an ldmatrix reads, within 32 of the contraction.
PYROUTE_ANYWHERE constexpr int row_of_pairs(int lane, int matrix) {
    return matrix / 2 * 16 + lane % 8 / 2 * 4 + matrix % 2 * 2 + lane % 2;
}

// The general kernels' float32 of (row, k) of a side of `width` rows. Four rows of eight k, which a warp stores where
// the contraction runs along memory, lie in 32 banks, and so do 32 rows of one k; the four rows that a thread reads
// stay together.
template <int width> PYROUTE_ANYWHERE constexpr int place_in_side(int row, int k) {
    return k * width + (row ^ (k % 8 * 4 & (width - 1)));
}

} // namespace pyroute::cuda
