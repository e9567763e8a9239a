// The part of the CUDA driver's interface that pyroute calls, declared here so that building needs no CUDA header and
// loading no CUDA library. Names, layouts and numbers are the driver's (CUDA 12.0 and later):
// tests/cuda/driver_layout.cpp compares them with cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pyroute::cuda::driver {

using Result = int; // CUresult
constexpr Result success = 0, invalid_value = 1, out_of_memory = 2, not_initialized = 3, no_device = 100,
                 invalid_image = 200, no_binary_for_gpu = 209, unsupported_ptx_version = 222, illegal_address = 700,
                 launch_timeout = 702, kernel_assert = 710, hardware_stack_error = 714, launch_failed = 719;

using Device = int;        // CUdevice
using Context = void *;    // CUcontext
using CuStream = void *;   // CUstream
using Library = void *;    // CUlibrary
using Kernel = void *;     // CUkernel, which launches take for a CUfunction
using Function = void *;   // CUfunction: a kernel in one context
using Address = uintptr_t; // CUdeviceptr

enum DeviceAttribute : int {
    multiprocessor_count = 16,
    compute_capability_major = 75,
    compute_capability_minor = 76,
    max_shared_memory_per_block_optin = 97,
};

constexpr int max_dynamic_shared_size_bytes = 8; // CUfunction_attribute

enum CaptureMode : int { capture_global = 0, capture_thread_local = 1, capture_relaxed = 2 };
enum CaptureStatus : int { capture_none = 0, capture_active = 1, capture_invalidated = 2 };

enum LaunchAttributeId : int { cluster_dimension = 4 };

union LaunchAttributeValue {
    char pad[64];
    struct {
        uint32_t x, y, z;
    } cluster;
    void *alignment;
};

struct LaunchAttribute {
    LaunchAttributeId id;
    char pad[4];
    LaunchAttributeValue value;
};

struct LaunchConfig {
    uint32_t grid_x, grid_y, grid_z;
    uint32_t block_x, block_y, block_z;
    uint32_t shared_bytes;
    CuStream stream;
    LaunchAttribute *attributes;
    uint32_t num_attributes;
};

struct alignas(128) TensorMap { // CUtensorMap: aligned to 64 bytes until CUDA 12, to 128 since
    uint64_t opaque[16];
};

enum TensorMapType : int { map_uint8 = 0, map_float32 = 7, map_bfloat16 = 9 };
enum TensorMapInterleave : int { interleave_none = 0 };
enum TensorMapSwizzle : int { swizzle_none = 0, swizzle_32b = 1, swizzle_64b = 2, swizzle_128b = 3 };
enum TensorMapPromotion : int { promotion_none = 0, promotion_l2_256b = 3 };
enum TensorMapFill : int { fill_zero = 0 };

// Every entry point that is called: X(name in libcuda, parameters).
#define PYROUTE_DRIVER_FUNCTIONS(X)                                                                                    \
    X(cuInit, (unsigned int flags))                                                                                    \
    X(cuDriverGetVersion, (int *version))                                                                              \
    X(cuGetErrorName, (Result error, const char **text))                                                               \
    X(cuGetErrorString, (Result error, const char **text))                                                             \
    X(cuDeviceGetCount, (int *count))                                                                                  \
    X(cuDeviceGet, (Device * device, int ordinal))                                                                     \
    X(cuDeviceGetName, (char *name, int length, Device device))                                                        \
    X(cuDeviceGetAttribute, (int *value, DeviceAttribute attribute, Device device))                                    \
    X(cuDevicePrimaryCtxRetain, (Context * context, Device device))                                                    \
    X(cuCtxGetCurrent, (Context * context))                                                                            \
    X(cuCtxGetDevice, (Device * device))                                                                               \
    X(cuCtxPushCurrent_v2, (Context context))                                                                          \
    X(cuCtxPopCurrent_v2, (Context * context))                                                                         \
    X(cuThreadExchangeStreamCaptureMode, (CaptureMode * mode))                                                         \
    X(cuStreamIsCapturing, (CuStream stream, CaptureStatus * status))                                                  \
    X(cuStreamSynchronize, (CuStream stream))                                                                          \
    X(cuLibraryLoadData, (Library * library, const void *image, void *jit_options, void **jit_values,                  \
                          unsigned int num_jit_options, void *options, void **values, unsigned int num_options))       \
    X(cuLibraryGetKernel, (Kernel * kernel, Library library, const char *name))                                        \
    X(cuKernelGetFunction, (Function * function, Kernel kernel))                                                       \
    X(cuKernelSetAttribute, (int attribute, int value, Kernel kernel, Device device))                                  \
    X(cuLaunchKernelEx, (const LaunchConfig *config, Kernel kernel, void **arguments, void **extra))                   \
    X(cuMemsetD8Async, (Address to, unsigned char value, size_t bytes, CuStream stream))                               \
    X(cuMemcpyDtoHAsync_v2, (void *to, Address from, size_t bytes, CuStream stream))                                   \
    X(cuTensorMapEncodeTiled,                                                                                          \
      (TensorMap * map, TensorMapType type, uint32_t rank, void *data, const uint64_t *extents,                        \
       const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides, TensorMapInterleave interleave,  \
       TensorMapSwizzle swizzle, TensorMapPromotion promotion, TensorMapFill fill))

// Since CUDA 12.4.
#define PYROUTE_DRIVER_OPTIONAL_FUNCTIONS(X)                                                                           \
    X(cuKernelGetParamInfo, (Kernel kernel, size_t index, size_t *offset, size_t *size))                               \
    X(cuFuncLoad, (Function function))

struct Api {
#define PYROUTE_DECLARE(name, parameters) Result(*name) parameters;
    PYROUTE_DRIVER_FUNCTIONS(PYROUTE_DECLARE)
    PYROUTE_DRIVER_OPTIONAL_FUNCTIONS(PYROUTE_DECLARE) // null where it has them not
#undef PYROUTE_DECLARE

    std::string text(Result error) const; // "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
};

// The driver, loaded and initialised by the first call that needs it; libcuda.so.1, or what PYROUTE_CUDA_DRIVER names.
// Throws Error, and tries again at the next call, where there is none, where it is older than CUDA 12.0, and in the
// child of a process that had initialised it before the fork.
const Api &api();

} // namespace pyroute::cuda::driver
