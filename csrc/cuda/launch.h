// Launching a kernel: what the rooms' launchers (csrc/cuda/<room>.cpp) use. Plain C++: nothing here or in the launchers
// needs nvcc or a CUDA header, and nothing touches the driver before the first launch.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "cuda/tensor_map.h"

namespace pyroute::cuda {

// Where a call works: the caller's device and its stream (a CUstream; null is the default stream).
struct Stream {
    int device;
    void *handle;
};

struct DeviceInfo {
    std::string name;
    int capability; // 10 * major + minor: 90 for sm_90
    int num_sms;
    int shared_bytes; // the most that a block may ask for
};

struct LaunchShape {
    uint32_t blocks;
    uint32_t threads; // a multiple of 32
    uint32_t shared_bytes = 0;
    uint32_t cluster = 1; // blocks per cluster, a divisor of blocks
    uint32_t blocks_y = 1;
};

enum class MapType { uint8, bfloat16, float32 };
enum class Swizzle { none, bytes32, bytes64, bytes128 };

struct TensorMapShape { // two axes, innermost first
    MapType type;
    const void *data;
    uint64_t cols, rows, row_bytes;
    uint32_t box_cols, box_rows;
    Swizzle swizzle;
};

// Every function below throws Error, in one sentence, and leaves everything as it was.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct OutOfMemory : Error {
    using Error::Error;
};

// Kernels of one .cu file come in one image (a cubin or a fatbin), loaded at their first use on a device. `source`
// finds the image of a room for a capability; it throws if there is none. A room is its file's path under csrc/cuda
// without the suffix: "gating", "sm90/grouped_gemm". Set by the bindings, before the first launch.
void set_image_source(std::function<std::string(const std::string &room, int capability)> source);

int num_devices();           // 0 without a driver
int driver_version();        // the newest CUDA that it supports, 1000 * major + 10 * minor; 0 without one
std::string why_no_device(); // a sentence; empty if there is one
const DeviceInfo &device_info(int device);

TensorMap tensor_map(const Stream &stream, const TensorMapShape &shape);

// PYROUTE_CHECK=1 in the environment, asked once: launches wait for their kernels, unless the stream is being captured,
// so that one that fails is named by the call that launched it, and Python looks at ids and offsets.
bool checks();
std::string last_kernel(); // with checks, the one that this thread launched last, for what says which kernel was wrong

// No blocks: no launch.
void launch(const Stream &stream, const char *room, const char *kernel, const LaunchShape &shape, const void *args,
            size_t args_bytes);

template <class Args>
void launch(const Stream &stream, const char *room, const char *kernel, const LaunchShape &shape, const Args &args) {
    launch(stream, room, kernel, shape, &args, sizeof(Args));
}

// memset on the stream, `bytes` of `value`.
void fill(const Stream &stream, void *to, uint8_t value, size_t bytes);

// To the host, once the work queued before on the stream is done. False, and nothing is read, while the stream is
// captured.
bool read(const Stream &stream, void *to, const void *from, size_t bytes);

} // namespace pyroute::cuda
