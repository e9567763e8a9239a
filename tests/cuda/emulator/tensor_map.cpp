// cuTensorMapEncodeTiled: what the driver's manual demands of a map, then the map in the emulator's own form.
#include "tensor_map.h"

#include <cstdio>
#include <cstring>
#include <string>

#include "cuda_abi.h"
#include "refusals.h"

namespace emulator {
namespace {

uint32_t item_bytes(int type) {
    static constexpr uint32_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return type >= 0 && type < 13 ? bytes[type] : 0;
}

struct Request {
    int type;
    uint32_t rank;
    const void *data;
    const uint64_t *extents, *strides;
    const uint32_t *box, *steps;
    int interleave, swizzle, promotion, fill;
};

std::string objection(const void *map, const Request &ask) {
    const uint32_t item = item_bytes(ask.type);
    if (reinterpret_cast<uintptr_t>(map) % 128)
        return "the map's address is no multiple of 128";
    if (ask.rank != 2 || ask.interleave != 0)
        return "only two axes without interleaving are emulated";
    if (!item)
        return "there is no item type " + std::to_string(ask.type);
    if (reinterpret_cast<uintptr_t>(ask.data) % 16 || !ask.data)
        return "the address of the data is no multiple of 16";
    if (ask.swizzle < 0 || ask.swizzle > 3 || ask.promotion < 0 || ask.promotion > 3 || ask.fill != 0)
        return "an option that is not emulated";
    for (int axis = 0; axis < 2; ++axis) {
        if (ask.extents[axis] == 0 || ask.extents[axis] > uint64_t{1} << 32)
            return "an extent of " + std::to_string(ask.extents[axis]);
        if (ask.box[axis] == 0 || ask.box[axis] > 256)
            return "a box of " + std::to_string(ask.box[axis]) + " items";
        if (ask.steps[axis] != 1)
            return "element strides other than 1 are not emulated";
    }
    if (ask.strides[0] % 16 || ask.strides[0] >= uint64_t{1} << 40 || ask.strides[0] < ask.extents[0] * item)
        return "a row stride of " + std::to_string(ask.strides[0]) + " bytes for rows of " +
               std::to_string(ask.extents[0] * item);
    const uint32_t inner = ask.box[0] * item;
    if (inner % 16)
        return "the rows of a box have " + std::to_string(inner) + " bytes, no multiple of 16";
    if (ask.swizzle && inner > 16u << ask.swizzle)
        return "the rows of a box have " + std::to_string(inner) + " bytes, more than the swizzle's " +
               std::to_string(16 << ask.swizzle);
    return "";
}

} // namespace
} // namespace emulator

extern "C" __attribute__((visibility("default"))) CUresult cuTensorMapEncodeTiled(
    void *map, int type, uint32_t rank, void *data, const uint64_t *extents, const uint64_t *strides,
    const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    using namespace emulator;
    if (const CUresult refused = begin("cuTensorMapEncodeTiled"); refused != CUDA_SUCCESS)
        return refused;
    if (emulated_arch() < 90)
        return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor maps need compute capability 9.0");
    const std::string wrong =
        objection(map, {type, rank, data, extents, strides, box, steps, interleave, swizzle, promotion, fill});
    if (!wrong.empty())
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: " + wrong);
    TensorMap made{};
    made.mark = TensorMap::written;
    made.data = static_cast<char *>(data);
    made.cols = extents[0];
    made.rows = extents[1];
    made.row_bytes = strides[0];
    made.box_cols = box[0];
    made.box_rows = box[1];
    made.item_bytes = item_bytes(type);
    made.swizzle_bytes = swizzle ? 16u << swizzle : 0;
    std::memcpy(map, &made, sizeof(made));
    return CUDA_SUCCESS;
}
