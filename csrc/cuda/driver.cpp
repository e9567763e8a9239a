#include "cuda/driver.h"

#include <atomic>
#include <cstdlib>
#include <mutex>

#include <dlfcn.h>
#include <pthread.h>

#include "cuda/launch.h"

namespace pyroute::cuda::driver {

namespace {

constexpr int oldest_version = 12000; // cuLibraryLoadData and tensor maps

std::mutex loading;
Api entry_points;
std::atomic<const Api *> ready{nullptr};
std::atomic<bool> forked{false}; // this is a child of a process that had initialised the driver

[[noreturn]] void refuse_child() {
    throw Error("CUDA was initialised before this process was forked, and a driver does not live on in a child: start "
                "workers with 'spawn'");
}

// A fork waits until no thread is loading, so that the child's lock is free.
int watch_forks() {
    return pthread_atfork([] { loading.lock(); }, [] { loading.unlock(); },
                          [] {
                              forked.store(ready.load(std::memory_order_relaxed) != nullptr, std::memory_order_relaxed);
                              loading.unlock();
                          });
}

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
}

void *open_library() {
    const char *named = std::getenv("PYROUTE_CUDA_DRIVER");
    const char *path = named && *named ? named : "libcuda.so.1";
    if (void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL))
        return library;
    const char *reason = dlerror();
    throw Error(std::string("no NVIDIA driver: ") + (reason ? reason : path));
}

template <class Function> void find(void *library, const char *name, Function &function, bool required) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function && required)
        throw Error(std::string("the NVIDIA driver is older than CUDA ") + version_text(oldest_version) +
                    ", the oldest that pyroute works with: it has no " + name);
}

void load(Api &api) {
    void *library = open_library(); // kept for the life of the process
    find(library, "cuDriverGetVersion", api.cuDriverGetVersion, true);
    int version = 0;
    if (api.cuDriverGetVersion(&version) == success && version < oldest_version)
        throw Error("the NVIDIA driver supports CUDA " + version_text(version) + ", pyroute needs " +
                    version_text(oldest_version) + " or newer");
#define PYROUTE_FIND(name, parameters) find(library, #name, api.name, true);
    PYROUTE_DRIVER_FUNCTIONS(PYROUTE_FIND)
#undef PYROUTE_FIND
#define PYROUTE_FIND(name, parameters) find(library, #name, api.name, false);
    PYROUTE_DRIVER_OPTIONAL_FUNCTIONS(PYROUTE_FIND)
#undef PYROUTE_FIND
    const Result result = api.cuInit(0);
    if (result == no_device)
        throw Error("the NVIDIA driver finds no GPU");
    if (result == not_initialized) // the answer when another library had started it before a fork
        refuse_child();
    if (result != success)
        throw Error("the NVIDIA driver does not start: " + api.text(result));
}

} // namespace

std::string Api::text(Result error) const {
    const char *name = nullptr, *words = nullptr;
    if (cuGetErrorName(error, &name) != success || !name)
        return "CUDA error " + std::to_string(error);
    if (cuGetErrorString(error, &words) != success || !words)
        return name;
    return std::string(name) + " (" + words + ")";
}

const Api &api() {
    if (forked.load(std::memory_order_relaxed))
        refuse_child();
    if (const Api *loaded = ready.load(std::memory_order_acquire))
        return *loaded;
    [[maybe_unused]] static const int watching = watch_forks();
    const std::lock_guard lock(loading);
    if (const Api *loaded = ready.load(std::memory_order_relaxed))
        return *loaded;
    load(entry_points);
    ready.store(&entry_points, std::memory_order_release);
    return entry_points;
}

} // namespace pyroute::cuda::driver
