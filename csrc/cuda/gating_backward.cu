// The entry points of gating's backward: topk_gating_backward_<experts of a lane>.
#include "cuda/gating_backward.cuh"

namespace cuda = pyroute::cuda;

PYROUTE_KERNEL(topk_gating_backward_1, 256, 4, cuda::GatingBackwardLaunch) { cuda::backward_in_registers<1>(args); }
PYROUTE_KERNEL(topk_gating_backward_2, 256, 4, cuda::GatingBackwardLaunch) { cuda::backward_in_registers<2>(args); }
PYROUTE_KERNEL(topk_gating_backward_4, 256, 4, cuda::GatingBackwardLaunch) { cuda::backward_in_registers<4>(args); }
PYROUTE_KERNEL(topk_gating_backward_8, 256, 3, cuda::GatingBackwardLaunch) { cuda::backward_in_registers<8>(args); }
PYROUTE_KERNEL(topk_gating_backward_16, 256, 2, cuda::GatingBackwardLaunch) { cuda::backward_in_registers<16>(args); }
PYROUTE_KERNEL(topk_gating_backward_32, 128, 2, cuda::GatingBackwardLaunch) { cuda::backward_in_registers<32>(args); }
PYROUTE_KERNEL(topk_gating_backward_any_float32, 128, 4, cuda::GatingBackwardLaunch) {
    cuda::backward_any<float>(args);
}
PYROUTE_KERNEL(topk_gating_backward_any_float64, 128, 4, cuda::GatingBackwardLaunch) {
    cuda::backward_any<double>(args);
}

PYROUTE_KERNEL(gating_loss_terms_float32, 256, 4, pyroute::LossTermsArgs) { cuda::loss_terms_of_tokens<float>(args); }
PYROUTE_KERNEL(gating_loss_terms_float64, 256, 2, pyroute::LossTermsArgs) { cuda::loss_terms_of_tokens<double>(args); }
