"""Expert routing for Mixture-of-Experts models: top-k gating, token permutation, FP8 grouped GEMM."""

from ._backend import BackendInfo, backends, get_num_threads, set_num_threads
from ._moe_arguments import MoeGradients
from .checkpoints import Experts, expert_layers, load_experts, save_experts
from .gating import Gating, topk_gating, topk_gating_backward
from .gating_expert_choice import ExpertChoice, expert_choice_gating
from .gating_losses import balance_loss, update_bias, z_loss
from .gating_quantile import bias_from_histogram, bias_histogram, quantile_bias
from .grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from .memory import CacheInfo, cache_info, empty_cache, set_cache_limit
from .moe import MoeSaved, moe_backward, moe_forward
from .permutation import (
    permute,
    permute_backward,
    permute_quantize,
    unpermute,
    unpermute_backward,
)
from .quantization import Fp8Array, dequantize_fp8, quantize_fp8
from .route_plan import RoutePlan, plan_routes
from .router_config import RouterConfig
from .router_presets import presets

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "CacheInfo",
    "ExpertChoice",
    "Experts",
    "Fp8Array",
    "Gating",
    "MoeGradients",
    "MoeSaved",
    "RoutePlan",
    "RouterConfig",
    "__version__",
    "backends",
    "balance_loss",
    "bias_from_histogram",
    "bias_histogram",
    "cache_info",
    "dequantize_fp8",
    "empty_cache",
    "expert_choice_gating",
    "expert_layers",
    "get_num_threads",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "load_experts",
    "moe_backward",
    "moe_forward",
    "permute",
    "permute_backward",
    "permute_quantize",
    "plan_routes",
    "presets",
    "quantile_bias",
    "quantize_fp8",
    "save_experts",
    "set_cache_limit",
    "set_num_threads",
    "topk_gating",
    "topk_gating_backward",
    "unpermute",
    "unpermute_backward",
    "update_bias",
    "z_loss",
]
