// Work that a stream does now, or keeps for a graph while it is captured.
#pragma once

#include <functional>

#include "cuda_abi.h"

namespace emulator {

// Whether the stream is being captured; then `work` is kept and not done.
bool captured(CUstream stream, const std::function<CUresult()> &work);

// Whether any stream is.
bool capturing();

} // namespace emulator
