// The entry points of gating's losses, of the bias rule and of expert choice.
#include "cuda/expert_choice.cuh"
#include "cuda/gating_losses.cuh"

namespace cuda = pyroute::cuda;

PYROUTE_KERNEL(count_assignments, 256, 4, cuda::BalanceCounts) { cuda::count_assignments(args); }
PYROUTE_KERNEL(balance_terms_float32, 256, 4, cuda::BalanceFractions) { cuda::balance_terms<float>(args); }
PYROUTE_KERNEL(balance_terms_float64, 256, 4, cuda::BalanceFractions) { cuda::balance_terms<double>(args); }
PYROUTE_KERNEL(sum_tokens, 256, 1, cuda::TokenSum) { cuda::sum_tokens(args); }
PYROUTE_KERNEL(share_among_tokens, 32, 1, cuda::TokenShare) {
    if (threadIdx.x == 0)
        cuda::share_among_tokens(args);
}
PYROUTE_KERNEL(update_bias_float32, 256, 1, cuda::BiasUpdate) { cuda::update_bias<float>(args); }
PYROUTE_KERNEL(update_bias_float64, 256, 1, cuda::BiasUpdate) { cuda::update_bias<double>(args); }
PYROUTE_KERNEL(copy_integers, 256, 4, cuda::IntegerCopy) { cuda::copy_integers(args); }

PYROUTE_KERNEL(expert_choice_keys_float32, 256, 4, cuda::ExpertChoiceLaunch) { cuda::expert_choice_keys<float>(args); }
PYROUTE_KERNEL(expert_choice_keys_float64, 256, 2, cuda::ExpertChoiceLaunch) { cuda::expert_choice_keys<double>(args); }
PYROUTE_KERNEL(expert_choice_sort_float32, 256, 4, cuda::ExpertChoiceLaunch) { cuda::expert_choice_sort<float>(args); }
PYROUTE_KERNEL(expert_choice_sort_float64, 256, 4, cuda::ExpertChoiceLaunch) { cuda::expert_choice_sort<double>(args); }
