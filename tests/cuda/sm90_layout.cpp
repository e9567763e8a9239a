// Checks csrc/cuda/sm90/layout.h and the shapes on the host; test_sm90_layout.py builds and runs it. Says what is
// wrong.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/sm90/arguments.h"

using namespace pyroute::cuda::sm90;

namespace {

void check(bool ok, const std::string &what) {
    if (!ok) {
        std::printf("%s\n", what.c_str());
        std::exit(1);
    }
}

void descriptors() {
    check(matrix_descriptor(0, 16) == 0x4000004000010000u, "constant part of the descriptor");
    for (uint32_t address = 0; address < most_shared; address += 32) {
        const uint64_t d = matrix_descriptor(address, panel_bytes);
        check((d & 0x3fff) << 4 == address, "start address");
        check((d >> 16 & 0x3fff) << 4 == panel_bytes && (d >> 32 & 0x3fff) << 4 == 1024, "strides");
        check((d >> 49 & 7) == 0 && d >> 62 == 1, "base offset and swizzle");
        if (address + 32 < most_shared)
            check(descriptor_at(d, step_bytes) == matrix_descriptor(address + 32, panel_bytes), "a step of 32 bytes");
    }
    check(matrix_descriptor(0x7000400, 16) == matrix_descriptor(0x400 + (0x7000000 & 0x3ffff), 16),
          "only the window's bits");
}

void swizzle() {
    std::set<uint32_t> seen;
    for (uint32_t row = 0; row < 64; ++row)
        for (uint32_t byte = 0; byte < row_bytes; ++byte) {
            const uint32_t to = swizzled(row * row_bytes + byte);
            check(to == row * row_bytes + ((byte / 16) ^ (row % 8)) * 16 + byte % 16, "chunk ^ row");
            check(swizzled(to) == row * row_bytes + byte, "its own inverse");
            check(swizzled(group_bytes + to) == group_bytes + row * row_bytes + byte, "periodic in 1024");
            seen.insert(to);
        }
    check(seen.size() == panel_bytes, "a permutation");
}

void sums(uint32_t cols) {
    std::set<std::pair<uint32_t, uint32_t>> seen;
    for (uint32_t warp = 0; warp < 4; ++warp)
        for (uint32_t lane = 0; lane < 32; ++lane)
            for (uint32_t i = 0; i < cols / 2; ++i) {
                const uint32_t row = sum_row(warp, lane, i), col = sum_col(lane, i);
                check(row / 16 == warp && row < 64 && col < cols, "a sum outside its warp's rows");
                seen.insert({row, col});
            }
    check(seen.size() == 64 * cols, "every element of the product has one owner");
}

// stmatrix by its definition, with the addresses and registers that store_bf16 uses, against what the copy engine
// reads.
void staging(uint32_t cols) {
    std::vector<uint32_t> memory(64 * cols, ~0u); // 16-bit places; what is in them: row * 1024 + col
    for (uint32_t warp = 0; warp < 4; ++warp)
        for (uint32_t j = 0; j < cols / 8; j += 2)
            for (uint32_t m = 0; m < 4; ++m) {
                std::set<uint32_t> banks;
                for (uint32_t r = 0; r < 8; ++r) {
                    const uint32_t address = staged_row(warp, 8 * m + r, j);
                    check(address % 16 == 0 && address < 128 * cols, "address of a row");
                    banks.insert(address % 128);
                    for (uint32_t q = 0; q < 4; ++q)
                        for (uint32_t half = 0; half < 2; ++half) {
                            const uint32_t lane = 4 * r + q, i = 2 * (2 * j + m) + half; // pairs[2 * j + m]
                            uint32_t &place = memory[(address + 4 * q + 2 * half) / 2];
                            check(place == ~0u, "a place is written twice");
                            place = sum_row(warp, lane, i) * 1024 + sum_col(lane, i);
                        }
                }
                check(banks.size() == 8, "rows of a matrix in the same banks");
            }
    for (uint32_t row = 0; row < 64; ++row)
        for (uint32_t col = 0; col < cols; ++col) {
            const uint32_t at = col / 64 * panel_bytes + swizzled(row * row_bytes + col % 64 * 2);
            check(memory[at / 2] == row * 1024 + col, "an element is not where the copy engine reads it");
        }
}

void order_of_tiles() {
    for (int32_t num_m : {1, 2, 7, 16, 17, 131})
        for (int32_t num_n : {1, 3, 16, 29})
            for (int32_t group : {1, 4, 12, 16, 200}) {
                std::set<std::pair<int32_t, int32_t>> seen;
                for (int32_t i = 0; i < num_m * num_n; ++i) {
                    const TilePlace place = place_of(i, num_m, num_n, group);
                    check(place.m >= 0 && place.m < num_m && place.n >= 0 && place.n < num_n, "a tile outside");
                    const auto same = pyroute::cuda::place_of(i, num_m, num_n, group);
                    check(place.m == same.m && place.n == same.n, "the portable kernels' order");
                    seen.insert({place.m, place.n});
                }
                check(seen.size() == static_cast<size_t>(num_m * num_n), "every tile once");
            }
}

void shapes() {
    for (const ProductShape &shape : {fp8_128, fp8_192, fp8_128_f32, fp8_64, fp8_64_f32, bf16_128, bf16_128_f32,
                                      bf16_64, bf16_64_f32, bf16_dgrad_128, bf16_dgrad_128_f32}) {
        const SharedPlan plan = shape.shared();
        check(plan.sound(), "shared memory of a product");
        check(plan.a(1) - plan.a(0) == shape.rows * 128 && plan.b(0) == plan.a(shape.stages), "stages lie in a row");
        check(plan.full(0) % 8 == 0 && plan.total() == plan.full(0) + 16 * shape.stages + 8, "barriers are last");
        check(shape.stage_depth() * (shape.element == Element::e4m3 ? 1 : 2) == 128, "depth of a stage");
    }
    check(fp8_128.shared().total() == 196696 && fp8_64.shared().total() == 213128, "totals");
    for (const WgradShape &shape : {fp8_wgrad, bf16_wgrad})
        check(shape.shared().sound() && shape.shared().scales(0) % 128 == 0, "shared memory of a gradient");
    check(fp8_128.threads() == 384 && fp8_64.threads() == 160, "threads");
    check(128 * loader_registers + 256 * math_registers == 384 * (65536 / 384 / 8 * 8), "registers handed over");
}

} // namespace

int main() {
    descriptors();
    swizzle();
    for (uint32_t cols : {128u, 192u}) {
        sums(cols);
        staging(cols);
    }
    order_of_tiles();
    shapes();
    return 0;
}
