// csrc/cuda/driver.h against NVIDIA's own cuda.h, where there is one: compiled, never run.
#include <cstddef>
#include <type_traits>

#include <cuda.h>

#include "cuda/driver.h"
#include "cuda/tensor_map.h"

namespace driver = pyroute::cuda::driver;

#define SAME(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs), #theirs)

SAME(driver::success, CUDA_SUCCESS);
SAME(driver::invalid_value, CUDA_ERROR_INVALID_VALUE);
SAME(driver::out_of_memory, CUDA_ERROR_OUT_OF_MEMORY);
SAME(driver::not_initialized, CUDA_ERROR_NOT_INITIALIZED);
SAME(driver::no_device, CUDA_ERROR_NO_DEVICE);
SAME(driver::invalid_image, CUDA_ERROR_INVALID_IMAGE);
SAME(driver::no_binary_for_gpu, CUDA_ERROR_NO_BINARY_FOR_GPU);
SAME(driver::unsupported_ptx_version, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME(driver::illegal_address, CUDA_ERROR_ILLEGAL_ADDRESS);
SAME(driver::launch_timeout, CUDA_ERROR_LAUNCH_TIMEOUT);
SAME(driver::kernel_assert, CUDA_ERROR_ASSERT);
SAME(driver::hardware_stack_error, CUDA_ERROR_HARDWARE_STACK_ERROR);
SAME(driver::launch_failed, CUDA_ERROR_LAUNCH_FAILED);

SAME(driver::multiprocessor_count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(driver::compute_capability_major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(driver::compute_capability_minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(driver::max_shared_memory_per_block_optin, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME(driver::max_dynamic_shared_size_bytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(driver::capture_global, CU_STREAM_CAPTURE_MODE_GLOBAL);
SAME(driver::capture_thread_local, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME(driver::capture_relaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME(driver::capture_none, CU_STREAM_CAPTURE_STATUS_NONE);
SAME(driver::capture_active, CU_STREAM_CAPTURE_STATUS_ACTIVE);
SAME(driver::capture_invalidated, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
SAME(driver::cluster_dimension, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
SAME(driver::map_uint8, CU_TENSOR_MAP_DATA_TYPE_UINT8);
SAME(driver::map_float32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
SAME(driver::map_bfloat16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
SAME(driver::interleave_none, CU_TENSOR_MAP_INTERLEAVE_NONE);
SAME(driver::swizzle_none, CU_TENSOR_MAP_SWIZZLE_NONE);
SAME(driver::swizzle_32b, CU_TENSOR_MAP_SWIZZLE_32B);
SAME(driver::swizzle_64b, CU_TENSOR_MAP_SWIZZLE_64B);
SAME(driver::swizzle_128b, CU_TENSOR_MAP_SWIZZLE_128B);
SAME(driver::promotion_none, CU_TENSOR_MAP_L2_PROMOTION_NONE);
SAME(driver::promotion_l2_256b, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
SAME(driver::fill_zero, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);

SAME(sizeof(driver::LaunchAttribute), sizeof(CUlaunchAttribute));
SAME(alignof(driver::LaunchAttribute), alignof(CUlaunchAttribute));
SAME(offsetof(driver::LaunchAttribute, id), offsetof(CUlaunchAttribute, id));
SAME(offsetof(driver::LaunchAttribute, value), offsetof(CUlaunchAttribute, value));
SAME(sizeof(driver::LaunchAttributeValue), sizeof(CUlaunchAttributeValue));
SAME(offsetof(driver::LaunchAttributeValue, cluster), offsetof(CUlaunchAttributeValue, clusterDim));
SAME(sizeof(driver::LaunchAttributeValue::cluster), sizeof(CUlaunchAttributeValue::clusterDim));

SAME(sizeof(driver::LaunchConfig), sizeof(CUlaunchConfig));
SAME(alignof(driver::LaunchConfig), alignof(CUlaunchConfig));
SAME(offsetof(driver::LaunchConfig, grid_x), offsetof(CUlaunchConfig, gridDimX));
SAME(offsetof(driver::LaunchConfig, grid_z), offsetof(CUlaunchConfig, gridDimZ));
SAME(offsetof(driver::LaunchConfig, block_x), offsetof(CUlaunchConfig, blockDimX));
SAME(offsetof(driver::LaunchConfig, block_z), offsetof(CUlaunchConfig, blockDimZ));
SAME(offsetof(driver::LaunchConfig, shared_bytes), offsetof(CUlaunchConfig, sharedMemBytes));
SAME(offsetof(driver::LaunchConfig, stream), offsetof(CUlaunchConfig, hStream));
SAME(offsetof(driver::LaunchConfig, attributes), offsetof(CUlaunchConfig, attrs));
SAME(offsetof(driver::LaunchConfig, num_attributes), offsetof(CUlaunchConfig, numAttrs));

SAME(sizeof(driver::TensorMap), sizeof(CUtensorMap));
static_assert(alignof(driver::TensorMap) >= alignof(CUtensorMap));
SAME(sizeof(pyroute::cuda::TensorMap), sizeof(CUtensorMap)); // as kernels take it
static_assert(alignof(pyroute::cuda::TensorMap) >= alignof(CUtensorMap));

// Parameter by parameter: pointers for pointers, otherwise values of one size and kind.
template <class Ours, class Theirs> constexpr bool passed_alike() {
    if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>)
        return std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>;
    else
        return sizeof(Ours) == sizeof(Theirs) && !std::is_floating_point_v<Theirs> && !std::is_class_v<Theirs>;
}

template <class... Ours, class... Theirs>
constexpr bool called_alike(driver::Result (*)(Ours...), CUresult (*)(Theirs...)) {
    if constexpr (sizeof...(Ours) != sizeof...(Theirs))
        return false;
    else
        return (passed_alike<Ours, Theirs>() && ...);
}

// cuda.h renames the entry points that have versions (#define cuCtxPushCurrent cuCtxPushCurrent_v2), so the names
// agree.
#define COMPARE(name, parameters)                                                                                      \
    static_assert(called_alike(decltype(driver::Api::name){}, decltype(&::name){}), #name);
PYROUTE_DRIVER_FUNCTIONS(COMPARE)
#if CUDA_VERSION >= 12040
PYROUTE_DRIVER_OPTIONAL_FUNCTIONS(COMPARE)
#endif
