// What the emulator keeps in the 128 opaque bytes of a tensor map.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct TensorMap {
    static constexpr uint64_t written = 0x70616d20726f736eu;

    uint64_t mark; // `written`
    char *data;
    uint64_t cols, rows, row_bytes;
    uint32_t box_cols, box_rows;
    uint32_t item_bytes;
    uint32_t swizzle_bytes; // 0: none
    uint8_t unused[72];

    // Where byte `offset` of a box lies in shared memory: the hardware exchanges 16-byte chunks by address bits.
    uint32_t place(uint32_t address) const {
        return swizzle_bytes ? address ^ ((address >> 7 & (swizzle_bytes / 16 - 1)) << 4) : address;
    }
};
static_assert(sizeof(TensorMap) == 128);

} // namespace emulator
