// The entry points of the MoE layer's own kernels: <kernel>_<form of the activation>_<type of the rows>.
#include "cuda/moe.cuh"

// `blocks`: of the backward kernel on an SM; gelu spills on sm_120 with the registers of three.
#define PYROUTE_ACTIVATION(name, form, Type, blocks)                                                                   \
    PYROUTE_KERNEL(activate_##name, 256, 4, pyroute::ActivateLaunch<pyroute::cuda::Type::Storage>) {                   \
        pyroute::cuda::activate<pyroute::cuda::Type, pyroute::cuda::Form::form>(args);                                 \
    }                                                                                                                  \
    PYROUTE_KERNEL(activate_quantize_##name, 256, 3, pyroute::ActivateLaunch<pyroute::cuda::Type::Storage>) {          \
        pyroute::cuda::activate_quantize<pyroute::cuda::Type, pyroute::cuda::Form::form>(args);                        \
    }                                                                                                                  \
    PYROUTE_KERNEL(activate_backward_##name, 256, blocks,                                                              \
                   pyroute::ActivateBackwardLaunch<pyroute::cuda::Type::Storage>) {                                    \
        pyroute::cuda::activate_backward<pyroute::cuda::Type, pyroute::cuda::Form::form>(args);                        \
    }
#define PYROUTE_BIASES(name, Type)                                                                                     \
    PYROUTE_KERNEL(add_bias_##name, 256, 4, pyroute::AddBiasLaunch<pyroute::cuda::Type::Storage>) {                    \
        pyroute::cuda::add_bias<pyroute::cuda::Type>(args);                                                            \
    }                                                                                                                  \
    PYROUTE_KERNEL(bias_dot_##name, 256, 4, pyroute::BiasDotLaunch<pyroute::cuda::Type::Storage>) {                    \
        pyroute::cuda::bias_dot<pyroute::cuda::Type>(args);                                                            \
    }                                                                                                                  \
    PYROUTE_KERNEL(bias_grad_##name, 256, 4, pyroute::BiasGradLaunch<pyroute::cuda::Type::Storage>) {                  \
        pyroute::cuda::bias_grad<pyroute::cuda::Type>(args);                                                           \
    }

PYROUTE_ACTIVATION(swish_float32, swish, Float32, 3)
PYROUTE_ACTIVATION(clamped_swish_float32, clamped_swish, Float32, 3)
PYROUTE_ACTIVATION(gelu_float32, gelu, Float32, 2)
PYROUTE_ACTIVATION(relu2_float32, relu2, Float32, 3)
PYROUTE_ACTIVATION(swish_bfloat16, swish, Bfloat16, 3)
PYROUTE_ACTIVATION(clamped_swish_bfloat16, clamped_swish, Bfloat16, 3)
PYROUTE_ACTIVATION(gelu_bfloat16, gelu, Bfloat16, 2)
PYROUTE_ACTIVATION(relu2_bfloat16, relu2, Bfloat16, 3)
PYROUTE_BIASES(float32, Float32)
PYROUTE_BIASES(bfloat16, Bfloat16)

PYROUTE_KERNEL(row_values, 256, 4, pyroute::SlotValuesLaunch) { pyroute::cuda::row_values(args); }
PYROUTE_KERNEL(slot_values, 256, 4, pyroute::SlotValuesLaunch) { pyroute::cuda::slot_values(args); }
