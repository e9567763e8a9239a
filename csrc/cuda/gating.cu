// The entry points of the gating kernels: topk_gating_<lanes of a token>x<experts of a lane>.
#include "cuda/gating.cuh"
#include "cuda/gating_any.cuh"

namespace cuda = pyroute::cuda;

PYROUTE_KERNEL(topk_gating_8x1, 256, 4, cuda::GatingLaunch) { cuda::gate_tokens<8, 1>(args); }
PYROUTE_KERNEL(topk_gating_8x2, 256, 4, cuda::GatingLaunch) { cuda::gate_tokens<8, 2>(args); }
PYROUTE_KERNEL(topk_gating_8x4, 256, 3, cuda::GatingLaunch) { cuda::gate_tokens<8, 4>(args); }
PYROUTE_KERNEL(topk_gating_8x8, 256, 3, cuda::GatingLaunch) { cuda::gate_tokens<8, 8>(args); }
PYROUTE_KERNEL(topk_gating_16x8, 256, 3, cuda::GatingLaunch) { cuda::gate_tokens<16, 8>(args); }
PYROUTE_KERNEL(topk_gating_32x8, 256, 4, cuda::GatingLaunch) { cuda::gate_tokens<32, 8>(args); }
PYROUTE_KERNEL(topk_gating_32x16, 256, 2, cuda::GatingLaunch) { cuda::gate_tokens<32, 16>(args); }
PYROUTE_KERNEL(topk_gating_32x32, 128, 2, cuda::GatingLaunch) { cuda::gate_tokens<32, 32>(args); }

PYROUTE_KERNEL(topk_gating_any_float32, 128, 4, cuda::AnyGatingLaunch) { cuda::gate_any_tokens<float>(args); }
PYROUTE_KERNEL(topk_gating_any_float64, 128, 4, cuda::AnyGatingLaunch) { cuda::gate_any_tokens<double>(args); }
