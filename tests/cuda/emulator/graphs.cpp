// Streams, graphs and memory, as far as the tests themselves call the driver. A captured stream does nothing: what it
// was given is done when the graph is launched, so host code that waits for a result in between does not get one.
#include "graphs.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "refusals.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {
namespace {

using Graph = std::vector<std::function<CUresult()>>;

std::mutex mutex;
std::map<CUstream, std::unique_ptr<Graph>> captures;

} // namespace

bool captured(CUstream stream, const std::function<CUresult()> &work) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto capture = captures.find(stream);
    if (capture == captures.end())
        return false;
    capture->second->push_back(work);
    return true;
}

bool capturing() {
    const std::lock_guard<std::mutex> lock(mutex);
    return !captures.empty();
}

} // namespace emulator

using namespace emulator;

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned) {
    *stream = reinterpret_cast<CUstream>(new char);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    delete reinterpret_cast<char *>(stream);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, int *status) {
    if (const CUresult refused = begin("cuStreamIsCapturing"); refused != CUDA_SUCCESS)
        return refused;
    const std::lock_guard<std::mutex> lock(mutex);
    *status = captures.count(stream) ? 1 : 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    if (const CUresult refused = begin("cuStreamSynchronize"); refused != CUDA_SUCCESS)
        return refused;
    const std::lock_guard<std::mutex> lock(mutex);
    return captures.count(stream) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, int) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!stream || captures.count(stream)) // the default stream cannot be captured
        return CUDA_ERROR_INVALID_VALUE;
    captures[stream] = std::make_unique<Graph>();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream stream, void **graph) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto capture = captures.find(stream);
    if (capture == captures.end())
        return CUDA_ERROR_INVALID_VALUE;
    *graph = capture->second.release();
    captures.erase(capture);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph *>(graph));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphLaunch(void *executable, CUstream) {
    for (const auto &work : *static_cast<Graph *>(executable))
        if (const CUresult result = work(); result != CUDA_SUCCESS)
            return result;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphExecDestroy(void *executable) {
    delete static_cast<Graph *>(executable);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphDestroy(void *graph) {
    delete static_cast<Graph *>(graph);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSynchronize() { return begin("cuCtxSynchronize"); }

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    void *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    *address = reinterpret_cast<CUdeviceptr>(memory);
    return memory ? begin("cuMemAlloc_v2") : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
    *memory = std::calloc(bytes, 1);
    return *memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    std::free(reinterpret_cast<void *>(address));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    std::memset(reinterpret_cast<void *>(to), value, bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    std::memcpy(reinterpret_cast<void *>(to), from, bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    if (const CUresult refused = begin("cuMemcpyDtoHAsync_v2"); refused != CUDA_SUCCESS)
        return refused;
    const std::lock_guard<std::mutex> lock(mutex);
    if (captures.count(stream))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; // of memory that is not pinned
    std::memcpy(to, reinterpret_cast<const void *>(from), bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    std::memcpy(to, reinterpret_cast<const void *>(from), bytes);
    return CUDA_SUCCESS;
}
