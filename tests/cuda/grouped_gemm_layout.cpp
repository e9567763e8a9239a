// Checks csrc/cuda/grouped_gemm_tiles.h and grouped_gemm_panels.h on the host; test_grouped_gemm_layout.py builds and
// runs it. Says what is wrong.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda/grouped_gemm_arguments.h"
#include "cuda/grouped_gemm_panels.h"

using namespace pyroute::cuda;

namespace {

void check(bool ok, const std::string &what) {
    if (!ok) {
        std::printf("%s\n", what.c_str());
        std::exit(1);
    }
}

void raster() {
    for (int64_t m : {1, 2, 11, 12, 13, 100})
        for (int64_t n : {1, 2, 7, 33})
            for (int64_t group : {1, 8, 12}) {
                std::set<std::pair<int64_t, int64_t>> seen;
                for (int64_t i = 0; i < m * n; ++i) {
                    const TilePlace at = place_of(i, m, n, group);
                    check(at.m >= 0 && at.m < m && at.n >= 0 && at.n < n, "a tile outside the result");
                    check(at.m / group == i / (group * n), "groups of row tiles follow one another");
                    seen.insert({at.m, at.n});
                }
                check(static_cast<int64_t>(seen.size()) == m * n, "every tile is computed once");
            }
}

void number_of_tiles() {
    std::mt19937 random(7);
    for (int round = 0; round < 2000; ++round) {
        const int64_t experts = random() % 20, tile = random() % 2 ? 16 : 128;
        int64_t rows = 0, tiles = 0;
        for (int64_t e = 0; e <= experts; ++e) { // the last one: rows past the segments
            const int64_t segment = random() % 3 ? random() % 300 : random() % 3 * tile + 1;
            rows += segment;
            tiles += (segment + tile - 1) / tile;
        }
        check(tiles <= most_tiles(rows, experts, tile), "more tiles than the workspace has room for");
    }
    check(most_tiles(3, 2, 128) == 3 && most_tiles(0, 0, 16) == 0, "the bound is reached");
}

// Addresses that are served together: 16-byte parts of eight different groups of four banks.
void apart(const std::function<int(int)> &address, int count, const std::string &what) {
    std::set<int> groups;
    for (int i = 0; i < count; ++i)
        groups.insert(address(i) / 16 % 8);
    check(static_cast<int>(groups.size()) == count, what + ": two parts in the same banks");
}

template <class P> void panel(const std::string &name) {
    std::vector<bool> taken(P::bytes / 16);
    for (int row = 0; row < P::rows; ++row)
        for (int chunk = 0; chunk < P::chunks; ++chunk) {
            const int at = P::place(row, chunk);
            check(at % 16 == 0 && at >= 0 && at < P::bytes && !taken[at / 16], name + ": a place taken twice");
            taken[at / 16] = true;
            if (row + 16 < P::rows)
                check(P::place(row + 16, chunk) == at + 16 * P::row_bytes, name + ": repeats every 16 rows");
        }
    for (int chunk = 0; chunk < P::chunks; ++chunk)
        for (int row = 0; row + 8 <= P::rows; row += 8)
            if (!P::pairs)
                apart([&](int i) { return P::place(row + i, chunk); }, 8, name + ", a matrix");
            else if (row % 32 == 0)
                for (int matrix = 0; matrix < 4; ++matrix)
                    apart([&](int i) { return P::place(row + row_of_pairs(i, matrix), chunk); }, 8, name + ", pairs");
    if (!P::across && P::chunks >= 8) // the rows beside FP8: lanes 0..15 read 8 bytes each of four rows
        for (int chunk = 0; chunk < P::chunks; chunk += 2)
            for (int row = 0; row < P::rows; row += 4)
                apart([&](int i) { return P::place(row + i / 2, chunk + i % 2); }, 8, name + ", four rows");
}

void pairs() {
    for (int half = 0; half < 2; ++half)
        for (int q = 0; q < 4; ++q)
            for (int matrix = 0; matrix < 2; ++matrix)
                for (int i = 0; i < 2; ++i)
                    check(row_of_pairs(2 * q + i, 2 * half + matrix) == 16 * half + 4 * q + 2 * matrix + i,
                          "a lane's four codes are not neighbours along the contraction");
}

template <int width> void side() {
    std::set<int> places;
    for (int k = 0; k < 128; ++k)
        for (int row = 0; row < width; ++row) {
            places.insert(place_in_side<width>(row, k));
            if (row % 4 == 0)
                for (int i = 1; i < 4; ++i)
                    check(place_in_side<width>(row + i, k) == place_in_side<width>(row, k) + i, "four rows together");
        }
    check(static_cast<int>(places.size()) == 128 * width && *places.rbegin() == 128 * width - 1, "all places once");
    if (width < 32)
        return;
    for (int row = 0; row < width; row += 4)
        for (int step = 0; step < 128; step += 8) {
            std::set<int> banks;
            for (int lane = 0; lane < 32; ++lane)
                banks.insert(place_in_side<width>(row + lane / 8, step + lane % 8) % 32);
            check(banks.size() == 32, "stores of a warp in all banks");
        }
}

} // namespace

int main() {
    raster();
    number_of_tiles();
    panel<Panel<1, false, 128, 128>>("FP8 along");
    panel<Panel<1, false, 16, 128>>("FP8 along, 16 rows");
    panel<Panel<2, false, 128, 64>>("bfloat16 along");
    panel<Panel<2, false, 16, 128>>("bfloat16 along, twice the depth");
    panel<Panel<1, false, 128, 64>>("FP8 weights along");
    panel<Panel<1, true, 128, 128>>("FP8 across");
    panel<Panel<1, true, 128, 64>>("FP8 weights across");
    panel<Panel<2, true, 128, 64>>("bfloat16 across");
    pairs();
    side<64>();
    side<32>();
    side<8>();
    check(mma_ring(128, false).stages * mma_ring(128, false).stage_bytes(128) == 99 * 1024, "99 KiB on every card");
    check(2 * mma_ring(16, false).stages * mma_ring(16, false).stage_bytes(16) <= 160 * 1024, "two blocks on sm_80");
    check(2 * mma_ring(16, true).stages * mma_ring(16, true).stage_bytes(16) <= 160 * 1024, "two blocks on sm_80");
}
