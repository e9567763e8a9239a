#include "cuda/permutation.h"

namespace pyroute::cuda {

void permute(const Stream &stream, const PermuteArgs &args) {
    launch(stream, "permutation", "permute_bytes", {static_cast<uint32_t>(args.maps.num_rows), 256}, args);
}

} // namespace pyroute::cuda
