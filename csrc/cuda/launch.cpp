#include "cuda/launch.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/driver.h"

namespace pyroute::cuda {

namespace {

using driver::Api;

constexpr int least_capability = 80;
constexpr uint32_t shared_without_asking = 48 * 1024;

std::string capability_text(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

[[noreturn]] void fail(const Api &api, driver::Result result, const std::string &what) {
    if (result == driver::out_of_memory)
        throw OutOfMemory(what + ": the GPU is out of memory");
    if (result == driver::illegal_address || result == driver::launch_timeout || result == driver::kernel_assert ||
        (result >= driver::hardware_stack_error && result <= driver::launch_failed)) // the context is lost
        throw Error(what + ": a kernel failed, this one or an earlier one: " + api.text(result) +
                    "; the process can use this GPU no more, and PYROUTE_CHECK=1 names the kernel");
    throw Error(what + ": " + api.text(result));
}

void check(const Api &api, driver::Result result, const std::string &what) {
    if (result != driver::success)
        fail(api, result, what);
}

// One GPU. Everything is asked once, when the driver is first used, except the context, which belongs to this process's
// runtime too and is made by whoever needs it first.
struct Card {
    driver::Device device = 0;
    DeviceInfo info;
    std::atomic<driver::Context> primary{nullptr};
};

std::vector<std::unique_ptr<Card>> find_cards(const Api &api) {
    int count = 0;
    check(api, api.cuDeviceGetCount(&count), "the NVIDIA driver does not count its GPUs");
    std::vector<std::unique_ptr<Card>> found;
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        const std::string what = "GPU " + std::to_string(ordinal) + " does not answer";
        auto card = std::make_unique<Card>();
        check(api, api.cuDeviceGet(&card->device, ordinal), what);
        const auto ask = [&](driver::DeviceAttribute attribute) {
            int value = 0;
            check(api, api.cuDeviceGetAttribute(&value, attribute, card->device), what);
            return value;
        };
        char name[256] = "";
        check(api, api.cuDeviceGetName(name, sizeof(name), card->device), what);
        card->info.name = name;
        card->info.capability = 10 * ask(driver::compute_capability_major) + ask(driver::compute_capability_minor);
        card->info.num_sms = ask(driver::multiprocessor_count);
        card->info.shared_bytes = ask(driver::max_shared_memory_per_block_optin);
        found.push_back(std::move(card));
    }
    return found;
}

const std::vector<std::unique_ptr<Card>> &cards(const Api &api) {
    static const std::vector<std::unique_ptr<Card>> all = find_cards(api); // thrown out of, it is tried again
    return all;
}

Card &card_of(const Api &api, int device) {
    const auto &all = cards(api);
    if (device < 0 || static_cast<size_t>(device) >= all.size())
        throw Error("there is no GPU " + std::to_string(device) + ", only " + std::to_string(all.size()));
    return *all[static_cast<size_t>(device)];
}

// While it lives a context of the card is current: the caller's, if it is one of this card, else the primary one.
class OnCard {
  public:
    OnCard(const Api &api, Card &card) : api_(api) {
        driver::Context current = nullptr;
        driver::Device device = 0;
        if (api.cuCtxGetCurrent(&current) == driver::success && current &&
            api.cuCtxGetDevice(&device) == driver::success && device == card.device)
            return;
        const std::string what = "GPU " + card.info.name + " gives no context";
        driver::Context primary = card.primary.load(std::memory_order_acquire);
        if (!primary) { // two threads may both retain it, which is harmless: it is never released
            check(api, api.cuDevicePrimaryCtxRetain(&primary, card.device), what);
            card.primary.store(primary, std::memory_order_release);
        }
        const driver::Result result = api.cuCtxPushCurrent_v2(primary);
        if (result != driver::success)
            card.primary.store(nullptr,
                               std::memory_order_release); // somebody reset the device; the next call asks again
        check(api, result, what);
        pushed_ = true;
    }
    ~OnCard() {
        driver::Context popped = nullptr;
        if (pushed_)
            api_.cuCtxPopCurrent_v2(&popped);
    }
    OnCard(const OnCard &) = delete;
    OnCard &operator=(const OnCard &) = delete;

  private:
    const Api &api_;
    bool pushed_ = false;
};

// While it lives this thread may load code, and ask for more shared memory, although a stream is being captured into a
// graph, by this thread or, where the capture is global, by another.
class OutsideCapture {
  public:
    explicit OutsideCapture(const Api &api) : api_(api) { api_.cuThreadExchangeStreamCaptureMode(&mode_); }
    ~OutsideCapture() { api_.cuThreadExchangeStreamCaptureMode(&mode_); }
    OutsideCapture(const OutsideCapture &) = delete;
    OutsideCapture &operator=(const OutsideCapture &) = delete;

  private:
    const Api &api_;
    driver::CaptureMode mode_ = driver::capture_relaxed;
};

// A kernel that was found, for one card. Entries are added and never removed, so that finding one takes no lock.
struct Found {
    int device;
    std::string room, name;
    driver::Kernel kernel;
    std::atomic<uint32_t> shared_allowed{shared_without_asking};
    Found *next;
};

constexpr size_t num_buckets = 512;
std::array<std::atomic<Found *>, num_buckets> buckets{};
std::mutex changing; // guards buckets, libraries and source; never held while Python code runs
std::map<std::pair<std::string, int>, driver::Library> libraries; // by room and capability
std::function<std::string(const std::string &, int)> image_source;

size_t bucket_of(int device, const char *room, const char *name) {
    uint64_t hash = 14695981039346656037u + static_cast<uint64_t>(device); // FNV-1a
    for (const char *text : {room, name})
        for (; *text; ++text)
            hash = (hash ^ static_cast<unsigned char>(*text)) * 1099511628211u;
    return static_cast<size_t>(hash ^ hash >> 32) % num_buckets;
}

Found *known(size_t bucket, int device, const char *room, const char *name) {
    Found *entry = buckets[bucket].load(std::memory_order_acquire);
    while (entry && !(entry->device == device && entry->name == name && entry->room == room))
        entry = entry->next;
    return entry;
}

driver::Library known_library(const std::pair<std::string, int> &key) {
    const auto library = libraries.find(key);
    return library == libraries.end() ? nullptr : library->second;
}

// Of a call that looks into an image: the first one does, or, where loading is lazy, the first that wants its code.
void check_image(const Api &api, driver::Result result, const Card &card, const char *room, const std::string &what) {
    if (result == driver::no_binary_for_gpu)
        throw Error(std::string("the kernels of ") + room + " were not built for " + card.info.name +
                    " (compute capability " + capability_text(card.info.capability) + ")");
    if (result == driver::invalid_image || result == driver::unsupported_ptx_version)
        throw Error(std::string("the NVIDIA driver does not take the kernels of ") + room +
                    ", it is older than the compiler that built them: " + api.text(result));
    check(api, result, what);
}

// The image is looked for without the lock: that may compile it, and calls Python, which may be waiting for us. Two
// threads may then both bring one; the first is taken.
driver::Library library_of(const Api &api, const Card &card, const char *room) {
    const int capability = card.info.capability;
    const std::pair<std::string, int> key{room, capability};
    std::function<std::string(const std::string &, int)> source;
    {
        const std::lock_guard lock(changing);
        if (driver::Library library = known_library(key))
            return library;
        source = image_source;
    }
    if (capability < least_capability)
        throw Error(card.info.name + " has compute capability " + capability_text(capability) +
                    ", pyroute's kernels need " + capability_text(least_capability) + " or newer");
    if (!source)
        throw Error("nobody said where the CUDA kernels are");
    const std::string image = source(room, capability);
    const std::lock_guard lock(changing);
    driver::Library library = known_library(key);
    if (library)
        return library;
    check_image(api, api.cuLibraryLoadData(&library, image.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0), card,
                room, std::string("the kernels of ") + room + " do not load");
    libraries.emplace(key, library);
    return library;
}

// A kernel of another build of the package would read its arguments wrongly.
void check_arguments(const Api &api, driver::Kernel kernel, const std::string &what, size_t args_bytes) {
    size_t offset = 0, size = 0;
    if (args_bytes && api.cuKernelGetParamInfo &&
        api.cuKernelGetParamInfo(kernel, 0, &offset, &size) == driver::success && size != args_bytes)
        throw Error(what + " takes " + std::to_string(size) + " bytes of arguments, not " + std::to_string(args_bytes) +
                    ": it belongs to another build of pyroute");
}

Found &find_kernel(const Api &api, const Card &card, int device, const char *room, const char *name,
                   size_t args_bytes) {
    const size_t bucket = bucket_of(device, room, name);
    if (Found *entry = known(bucket, device, room, name))
        return *entry;
    const OutsideCapture loading(api);
    const driver::Library library = library_of(api, card, room);
    driver::Kernel kernel = nullptr;
    const std::string what = std::string("kernel ") + name + " of " + room;
    check_image(api, api.cuLibraryGetKernel(&kernel, library, name), card, room, what);
    driver::Function loaded = nullptr; // into this context now, else by the first launch, which may be captured
    check_image(api, api.cuKernelGetFunction(&loaded, kernel), card, room, what);
    if (api.cuFuncLoad) // what lazy loading has left of it
        check_image(api, api.cuFuncLoad(loaded), card, room, what);
    check_arguments(api, kernel, what, args_bytes);
    const std::lock_guard lock(changing);
    if (Found *entry = known(bucket, device, room, name))
        return *entry;
    auto *entry = new Found{device, room, name, kernel, {shared_without_asking}, buckets[bucket].load()};
    buckets[bucket].store(entry, std::memory_order_release);
    return *entry;
}

// Dynamic shared memory beyond 48 KiB is asked for once per kernel and size.
void allow_shared(const Api &api, const Card &card, Found &found, uint32_t bytes) {
    if (bytes <= found.shared_allowed.load(std::memory_order_acquire))
        return;
    const std::lock_guard lock(changing);
    if (bytes <= found.shared_allowed.load(std::memory_order_relaxed))
        return;
    const OutsideCapture asking(api);
    const driver::Result result = api.cuKernelSetAttribute(driver::max_dynamic_shared_size_bytes,
                                                           static_cast<int>(bytes), found.kernel, card.device);
    if (result == driver::invalid_value)
        throw Error("kernel " + found.name + " of " + found.room + " needs " + std::to_string(bytes) +
                    " bytes of shared memory, " + card.info.name + " gives a block " +
                    std::to_string(card.info.shared_bytes));
    check(api, result, "kernel " + found.name + " of " + found.room);
    found.shared_allowed.store(bytes, std::memory_order_release);
}

// The driver's form of a launch; it points into itself.
struct Config {
    driver::LaunchAttribute cluster = {};
    driver::LaunchConfig config = {};

    Config(const Stream &stream, const LaunchShape &shape) {
        config.grid_x = shape.blocks;
        config.grid_y = shape.blocks_y;
        config.block_x = shape.threads;
        config.grid_z = config.block_y = config.block_z = 1;
        config.shared_bytes = shape.shared_bytes;
        config.stream = stream.handle;
        if (shape.cluster > 1) {
            cluster.id = driver::cluster_dimension;
            cluster.value.cluster = {shape.cluster, 1, 1};
            config.attributes = &cluster;
            config.num_attributes = 1;
        }
    }
    Config(const Config &) = delete;
    Config &operator=(const Config &) = delete;
};

thread_local std::string last_launched;

bool may_wait_for(const Api &api, const Stream &stream) {
    driver::CaptureStatus status = driver::capture_none; // an error: another stream is being captured, and the default
    return api.cuStreamIsCapturing(stream.handle, &status) == driver::success && // stream may not be waited for
           status == driver::capture_none;
}

void wait_if_asked(const Api &api, const Stream &stream, const std::string &what) {
    if (checks() && may_wait_for(api, stream))
        check(api, api.cuStreamSynchronize(stream.handle), what);
}

} // namespace

bool checks() {
    static const bool asked = [] {
        const char *value = std::getenv("PYROUTE_CHECK");
        return value && *value && std::strcmp(value, "0") != 0;
    }();
    return asked;
}

std::string last_kernel() { return last_launched; }

void set_image_source(std::function<std::string(const std::string &room, int capability)> source) {
    const std::lock_guard lock(changing);
    image_source = std::move(source);
}

int num_devices() {
    try {
        return static_cast<int>(cards(driver::api()).size());
    } catch (const Error &) {
        return 0;
    }
}

std::string why_no_device() {
    try {
        return cards(driver::api()).empty() ? "the NVIDIA driver finds no GPU" : "";
    } catch (const Error &error) {
        return error.what();
    }
}

int driver_version() {
    try {
        const Api &api = driver::api();
        int version = 0;
        return api.cuDriverGetVersion(&version) == driver::success ? version : 0;
    } catch (const Error &) {
        return 0;
    }
}

const DeviceInfo &device_info(int device) { return card_of(driver::api(), device).info; }

void launch(const Stream &stream, const char *room, const char *kernel, const LaunchShape &shape, const void *args,
            size_t args_bytes) {
    const Api &api = driver::api();
    if (shape.blocks == 0 || shape.blocks_y == 0)
        return;
    Card &card = card_of(api, stream.device);
    const OnCard current(api, card);
    Found &found = find_kernel(api, card, stream.device, room, kernel, args_bytes);
    allow_shared(api, card, found, shape.shared_bytes);
    const Config config(stream, shape);
    void *arguments[] = {const_cast<void *>(args)};
    const driver::Result result = api.cuLaunchKernelEx(&config.config, found.kernel, arguments, nullptr);
    if (result != driver::success)
        fail(api, result, "kernel " + found.name + " of " + found.room);
    if (checks()) {
        last_launched = found.name + " of " + found.room;
        wait_if_asked(api, stream, "kernel " + last_launched);
    }
}

void fill(const Stream &stream, void *to, uint8_t value, size_t bytes) {
    const Api &api = driver::api();
    if (bytes == 0)
        return;
    const OnCard current(api, card_of(api, stream.device));
    check(api, api.cuMemsetD8Async(reinterpret_cast<driver::Address>(to), value, bytes, stream.handle), "fill");
    wait_if_asked(api, stream, "fill");
}

bool read(const Stream &stream, void *to, const void *from, size_t bytes) {
    const Api &api = driver::api();
    const OnCard current(api, card_of(api, stream.device));
    if (!may_wait_for(api, stream))
        return false;
    const OutsideCapture copying(api); // of another stream
    const auto address = reinterpret_cast<driver::Address>(from);
    if (bytes > 0)
        check(api, api.cuMemcpyDtoHAsync_v2(to, address, bytes, stream.handle), "a copy to the host");
    check(api, api.cuStreamSynchronize(stream.handle), "a copy to the host");
    return true;
}

TensorMap tensor_map(const Stream &stream, const TensorMapShape &shape) {
    static_assert(sizeof(TensorMap) == sizeof(driver::TensorMap));
    constexpr driver::TensorMapType types[] = {driver::map_uint8, driver::map_bfloat16, driver::map_float32};
    constexpr driver::TensorMapSwizzle swizzles[] = {driver::swizzle_none, driver::swizzle_32b, driver::swizzle_64b,
                                                     driver::swizzle_128b};
    const Api &api = driver::api();
    const OnCard current(api, card_of(api, stream.device));
    const uint64_t extents[] = {shape.cols, shape.rows};
    const uint64_t strides[] = {shape.row_bytes};
    const uint32_t box[] = {shape.box_cols, shape.box_rows}, steps[] = {1, 1};
    driver::TensorMap encoded;
    const driver::Result result = api.cuTensorMapEncodeTiled(
        &encoded, types[static_cast<int>(shape.type)], 2, const_cast<void *>(shape.data), extents, strides, box, steps,
        driver::interleave_none, swizzles[static_cast<int>(shape.swizzle)], driver::promotion_l2_256b,
        driver::fill_zero);
    check(api, result,
          "a tensor map of " + std::to_string(shape.rows) + " x " + std::to_string(shape.cols) + " with boxes of " +
              std::to_string(shape.box_rows) + " x " + std::to_string(shape.box_cols));
    TensorMap map;
    std::memcpy(&map, &encoded, sizeof(map));
    return map;
}

} // namespace pyroute::cuda
