"""PyTorch on the core: ops with gradients that compile, and the modules made of them. Importing it imports torch."""

from ._fp8_weights import forget_fp8_weights, keep_transposed_weights
from .checkpoints import Fp8Experts, load_experts
from .expert_parallel import ExpertParallel, expert_parallel_parameters, reduce_expert_gradients
from .experts import GroupedExperts, MoELayer, SharedExpert, set_precision
from .gating import OPS_TO_SAVE, balance_loss, topk_gating, z_loss
from .grouped_gemm import grouped_gemm
from .moe import moe_forward
from .permutation import RoutePlan, permute, permute_quantize, plan_routes, unpermute
from .quantization import Fp8Tensor, dequantize_fp8, quantize_fp8
from .router import Routing, TopKRouter, set_aux_loss_scale, update_biases_after
from .router_logits import router_logits

__all__ = [
    "OPS_TO_SAVE",
    "ExpertParallel",
    "Fp8Experts",
    "Fp8Tensor",
    "GroupedExperts",
    "MoELayer",
    "RoutePlan",
    "Routing",
    "SharedExpert",
    "TopKRouter",
    "balance_loss",
    "dequantize_fp8",
    "expert_parallel_parameters",
    "forget_fp8_weights",
    "grouped_gemm",
    "keep_transposed_weights",
    "load_experts",
    "moe_forward",
    "permute",
    "permute_quantize",
    "plan_routes",
    "quantize_fp8",
    "reduce_expert_gradients",
    "router_logits",
    "set_aux_loss_scale",
    "set_precision",
    "topk_gating",
    "unpermute",
    "update_biases_after",
    "z_loss",
]
