// The entry points of Hopper's grouped GEMM on FP8 codes of which those of one side or both are e5m2, as gradients may
// be: <rows>_<weights>. A file of its own, so that who has none never compiles them.
#include "cuda/sm90/entry.cuh"

using namespace pyroute::cuda::sm90;

PYROUTE_PRODUCT(e5m2_e4m3_128)
PYROUTE_PRODUCT(e5m2_e4m3_128_f32)
PYROUTE_PRODUCT(e4m3_e5m2_128)
PYROUTE_PRODUCT(e4m3_e5m2_128_f32)
PYROUTE_PRODUCT(e5m2_e5m2_128)
PYROUTE_PRODUCT(e5m2_e5m2_128_f32)

PYROUTE_WGRAD(e5m2_e4m3_wgrad)
PYROUTE_WGRAD(e4m3_e5m2_wgrad)
PYROUTE_WGRAD(e5m2_e5m2_wgrad)
