// libcuda as far as pyroute calls it, over host memory. A launch runs to its end before it returns; where a kernel
// fails, the sentence that says why is the text of its error.
//
// For the tests: every entry point can be told to fail, by pyroute_emulator_fail or by the environment before loading
// (PYROUTE_EMULATOR_FAIL="cuInit=100"); PYROUTE_EMULATED_DEVICES, _ARCH, _SMS and _VERSION say what is emulated.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "graphs.h"
#include "refusals.h"
#include "registry.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {
namespace {

struct State {
    std::mutex mutex;
    std::map<std::string, int> failures; // by entry point: what its next call returns
    std::map<const Kernel *, int> dynamic_shared;
    std::set<const Kernel *> loaded;
    std::map<std::string, int> calls; // by entry point
    std::string sentence;
    std::string launched; // names of kernels, one a line
    bool initialised = false;

    State() {
        const char *text = std::getenv("PYROUTE_EMULATOR_FAIL");
        for (std::string rest = text ? text : ""; !rest.empty();) {
            const std::string entry = rest.substr(0, rest.find(','));
            rest.erase(0, entry.size() + 1);
            failures[entry.substr(0, entry.find('='))] = std::atoi(entry.c_str() + entry.find('=') + 1);
        }
    }
};

State &state() {
    static State all;
    return all;
}

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

thread_local std::vector<CUcontext> contexts;

int number_from(const char *variable, int otherwise) {
    const char *text = std::getenv(variable);
    return text && *text ? std::atoi(text) : otherwise;
}

int num_devices() { return number_from("PYROUTE_EMULATED_DEVICES", 1); }
} // namespace

int emulated_arch() { return number_from("PYROUTE_EMULATED_ARCH", 90); }
int emulated_fp8_bits() { return number_from("PYROUTE_EMULATED_FP8_BITS", 0); }

namespace {

int num_sms() { return number_from("PYROUTE_EMULATED_SMS", 4); }

int most_shared() {
    switch (emulated_arch()) {
    case 80:
        return 166912;
    case 86:
    case 89:
    case 120:
        return 101376;
    default:
        return static_cast<int>(shared_limit);
    }
}

CUcontext context_of(CUdevice device) {
    static char places[64];
    return reinterpret_cast<CUcontext>(places + device);
}
CUdevice device_of(CUcontext context) {
    return static_cast<CUdevice>(reinterpret_cast<char *>(context) - reinterpret_cast<char *>(context_of(0)));
}

struct Text {
    CUresult result;
    const char *name, *words;
};
constexpr Text texts[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for the device"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "the driver does not fit the system"},
    {CUDA_ERROR_INVALID_CLUSTER_SIZE, "CUDA_ERROR_INVALID_CLUSTER_SIZE", "invalid cluster size"},
};

const Text *text_of(CUresult result) {
    const Text *found =
        std::find_if(std::begin(texts), std::end(texts), [result](const Text &text) { return text.result == result; });
    return found == std::end(texts) ? nullptr : found;
}

unsigned cluster_of(const CUlaunchConfig &config) {
    for (unsigned i = 0; i < config.num_attributes; ++i)
        if (config.attributes[i].id == 4)
            return config.attributes[i].value.cluster.x;
    return 1;
}

// Empty, or what the hardware would not run.
std::string objection(const Kernel &kernel, const CUlaunchConfig &config) {
    const unsigned cluster = cluster_of(config);
    for (unsigned i = 0; i < config.num_attributes; ++i) {
        const CUlaunchAttribute &attribute = config.attributes[i];
        if (attribute.id != 4)
            return "a launch attribute that is not emulated: " + std::to_string(attribute.id);
        if (attribute.value.cluster.y != 1 || attribute.value.cluster.z != 1)
            return "a cluster that is not one-dimensional";
        if (emulated_arch() < 90)
            return "launch attributes of compute capability 9.0 on an older device";
    }
    if (config.block_y != 1 || config.block_z != 1 || config.block_x == 0 || config.block_x % 32)
        return "a block of " + std::to_string(config.block_x) + " threads: one axis, a multiple of 32";
    if (config.block_x > kernel.threads)
        return "a block of " + std::to_string(config.block_x) + " threads, the launch bound is " +
               std::to_string(kernel.threads);
    if (config.grid_x == 0 || config.grid_y == 0 || config.grid_z == 0 || config.grid_x > 0x7fffffff ||
        config.grid_y > 65535 || config.grid_z > 65535)
        return "a grid of " + std::to_string(config.grid_x) + " x " + std::to_string(config.grid_y) + " x " +
               std::to_string(config.grid_z) + " blocks";
    if (cluster == 0 || cluster > 8 || config.grid_x % cluster)
        return "clusters of " + std::to_string(cluster) + " in a grid of " + std::to_string(config.grid_x);
    State &all = state();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto allowed = all.dynamic_shared.find(&kernel);
    const int limit = allowed == all.dynamic_shared.end() ? static_cast<int>(static_shared_limit) : allowed->second;
    if (config.shared_bytes > static_cast<unsigned>(limit))
        return std::to_string(config.shared_bytes) + " bytes of dynamic shared memory, " + std::to_string(limit) +
               " are allowed";
    return "";
}

} // namespace

// What every entry point does first.
CUresult begin(const char *entry_point) {
    State &all = state();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto failure = all.failures.find(entry_point);
    if (failure != all.failures.end()) {
        const CUresult result = static_cast<CUresult>(failure->second);
        all.failures.erase(failure);
        return result;
    }
    ++all.calls[entry_point];
    return all.initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult refuse(CUresult result, const std::string &sentence) {
    State &all = state();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.sentence = sentence;
    std::fprintf(stderr, "emulator: %s\n", sentence.c_str());
    return result;
}

Registration::Registration(const Kernel &kernel) {
    if (!kernels().emplace(kernel.name, kernel).second) {
        std::fprintf(stderr, "two kernels are named %s\n", kernel.name);
        std::abort();
    }
}

const Kernel *find_kernel(const char *name) {
    const auto kernel = kernels().find(name);
    return kernel == kernels().end() ? nullptr : &kernel->second;
}

} // namespace emulator

using namespace emulator;

#define BEGIN(entry_point)                                                                                             \
    if (const CUresult refused = begin(#entry_point); refused != CUDA_SUCCESS)                                         \
    return refused

// For the loader: kernels need no image here.
EXPORT int pyroute_emulator() { return 1; }

// The next call of an entry point returns this instead of doing anything.
EXPORT void pyroute_emulator_fail(const char *entry_point, int result) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().failures[entry_point] = result;
}

// Launches are numbered from 1 again: what a test sees does not depend on the tests before it.
EXPORT void pyroute_emulator_restart() { restart(); }

// Why the last launch that failed did.
EXPORT const char *pyroute_emulator_sentence() { return state().sentence.c_str(); }

// The kernels launched since the last call, one a line; with clear, starts anew.
EXPORT const char *pyroute_emulator_launched(int clear) {
    static std::string names;
    const std::lock_guard<std::mutex> lock(state().mutex);
    names = state().launched;
    if (clear)
        state().launched.clear();
    return names.c_str();
}

// How often an entry point was called.
EXPORT int pyroute_emulator_calls(const char *entry_point) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    return state().calls[entry_point];
}

EXPORT CUresult cuInit(unsigned) {
    state().initialised = true;
    BEGIN(cuInit);
    return num_devices() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = number_from("PYROUTE_EMULATED_VERSION", 13000);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    const Text *found = text_of(error);
    *text = found ? found->name : nullptr;
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    const Text *found = text_of(error);
    *text = found ? found->words : nullptr;
    if (error == CUDA_ERROR_LAUNCH_FAILED && !state().sentence.empty())
        *text = state().sentence.c_str();
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    BEGIN(cuDeviceGetCount);
    *count = num_devices();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    BEGIN(cuDeviceGet);
    if (ordinal < 0 || ordinal >= num_devices())
        return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice) {
    BEGIN(cuDeviceGetName);
    std::snprintf(name, static_cast<size_t>(length), "emulated sm_%d", emulated_arch());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice) {
    BEGIN(cuDeviceGetAttribute);
    const std::map<int, int> values = {
        {1, 1024},                    // threads per block
        {10, 32},                     // threads per warp
        {16, num_sms()},              // multiprocessors
        {75, emulated_arch() / 10},   // compute capability, major
        {76, emulated_arch() % 10},   // minor
        {97, most_shared()},          // shared memory per block that a kernel may ask for
        {120, emulated_arch() >= 90}, // cluster launch
    };
    const auto found = values.find(attribute);
    if (found == values.end())
        return CUDA_ERROR_INVALID_VALUE;
    *value = found->second;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    BEGIN(cuDevicePrimaryCtxRetain);
    *context = context_of(device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    BEGIN(cuCtxGetCurrent);
    *context = contexts.empty() ? nullptr : contexts.back();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    BEGIN(cuCtxSetCurrent);
    if (!contexts.empty())
        contexts.pop_back();
    contexts.push_back(context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    BEGIN(cuCtxGetDevice);
    if (contexts.empty())
        return CUDA_ERROR_INVALID_CONTEXT;
    *device = device_of(contexts.back());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    BEGIN(cuCtxPushCurrent_v2);
    contexts.push_back(context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    BEGIN(cuCtxPopCurrent_v2);
    if (contexts.empty())
        return CUDA_ERROR_INVALID_CONTEXT;
    *context = contexts.back();
    contexts.pop_back();
    return CUDA_SUCCESS;
}

static thread_local int capture_mode = 0; // 2: relaxed

// Calls that load break a capture on a GPU: one of this thread's, or a global one (PyTorch's) of any thread's.
static bool breaks_a_capture() { return capturing() && capture_mode != 2; }

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    BEGIN(cuThreadExchangeStreamCaptureMode);
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *, void *, void **, unsigned, void *, void **,
                                  unsigned) {
    static char any;
    BEGIN(cuLibraryLoadData);
    if (contexts.empty())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (breaks_a_capture())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *library = reinterpret_cast<CUlibrary>(&any);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary, const char *name) {
    BEGIN(cuLibraryGetKernel);
    const Kernel *found = find_kernel(name);
    *kernel = reinterpret_cast<CUkernel>(const_cast<Kernel *>(found));
    return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuKernelGetParamInfo(CUkernel kernel, size_t index, size_t *offset, size_t *size) {
    BEGIN(cuKernelGetParamInfo);
    if (index > 0)
        return CUDA_ERROR_INVALID_VALUE;
    *offset = 0;
    *size = reinterpret_cast<const Kernel *>(kernel)->args_bytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    BEGIN(cuKernelGetFunction);
    if (breaks_a_capture())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncLoad(CUfunction function) {
    BEGIN(cuFuncLoad);
    if (breaks_a_capture())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().loaded.insert(reinterpret_cast<const Kernel *>(function));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice) {
    BEGIN(cuKernelSetAttribute);
    if (breaks_a_capture())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (attribute != 8 || value < 0 || value > most_shared()) // 8: the most dynamic shared memory
        return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().dynamic_shared[reinterpret_cast<const Kernel *>(kernel)] = value;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    return cuKernelSetAttribute(attribute, value, reinterpret_cast<CUkernel>(function), 0);
}

namespace {

CUresult run_now(const Kernel &kernel, const CUlaunchConfig &config, unsigned cluster, const std::vector<char> &kept) {
    {
        const std::lock_guard<std::mutex> lock(state().mutex);
        state().launched += std::string(kernel.name) + "\n";
    }
    std::vector<char> copy(kept.size() + 128); // tensor maps in it are aligned
    void *args = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(copy.data()) + 127) / 128 * 128);
    std::memcpy(args, kept.data(), kept.size());
    const Shape shape = {{config.grid_x, config.grid_y, config.grid_z},
                         config.block_x,
                         config.shared_bytes,
                         cluster,
                         static_cast<uint32_t>(emulated_arch())};
    const std::string sentence = run(kernel, shape, args);
    if (!sentence.empty())
        return refuse(CUDA_ERROR_LAUNCH_FAILED, std::string(kernel.name) + ": " + sentence);
    return CUDA_SUCCESS;
}

} // namespace

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    BEGIN(cuLaunchKernelEx);
    const Kernel &kernel = *reinterpret_cast<const Kernel *>(function);
    if (contexts.empty())
        return CUDA_ERROR_INVALID_CONTEXT;
    const std::string wrong = extra ? "a launch with 'extra'" : objection(kernel, *config);
    if (!wrong.empty())
        return refuse(CUDA_ERROR_INVALID_VALUE, std::string(kernel.name) + ": " + wrong);
    if (capturing()) { // lazy loading has no place in a graph
        const std::lock_guard<std::mutex> lock(state().mutex);
        if (!state().loaded.count(&kernel))
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    // The launch keeps a copy of its arguments.
    const char *given = static_cast<const char *>(arguments[0]);
    const auto work = [&kernel, config = *config, cluster = cluster_of(*config),
                       kept = std::vector<char>(given, given + kernel.args_bytes)] {
        return run_now(kernel, config, cluster, kept);
    };
    return captured(config->stream, work) ? CUDA_SUCCESS : work();
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    BEGIN(cuMemsetD8Async);
    const auto work = [=] {
        std::memset(reinterpret_cast<void *>(to), value, bytes);
        return CUDA_SUCCESS;
    };
    return captured(stream, work) ? CUDA_SUCCESS : work();
}
