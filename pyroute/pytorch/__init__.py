"""PyTorch on the core: ops with gradients that compile, and the modules made of them. Importing it imports torch."""

from .gating import OPS_TO_SAVE, balance_loss, topk_gating, z_loss
from .grouped_gemm import grouped_gemm
from .moe import moe_forward
from .permutation import RoutePlan, permute, permute_quantize, plan_routes, unpermute
from .quantization import Fp8Tensor, dequantize_fp8, quantize_fp8
from .router_logits import router_logits

__all__ = [
    "OPS_TO_SAVE",
    "Fp8Tensor",
    "RoutePlan",
    "balance_loss",
    "dequantize_fp8",
    "grouped_gemm",
    "moe_forward",
    "permute",
    "permute_quantize",
    "plan_routes",
    "quantize_fp8",
    "router_logits",
    "topk_gating",
    "unpermute",
    "z_loss",
]
