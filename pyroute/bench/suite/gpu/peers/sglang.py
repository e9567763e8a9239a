"""SGLang: the fused gate and the FP8 grouped product of sgl-kernel (0.3.21), the Triton experts of sglang (0.5)."""

from __future__ import annotations

import sgl_kernel
import torch

from . import Calls, column, version_of

NAME = "SGLang"
WORKSPACE = 1 << 30  # bytes, as its own tests give the product


def version():
    return version_of("sglang-kernel", "sgl-kernel")


@column("gate", "SGLang")
def gate(p):
    c = p.config
    if c.score != "sigmoid" or c.renormalize != "sum":
        return None

    def of(z):
        return lambda: sgl_kernel.moe_fused_gate(
            z, p.bias, c.num_groups, c.topk_groups, c.top_k, num_fused_shared_experts=0,
            routed_scaling_factor=c.scaling_factor, apply_routed_scaling_factor_on_output=True,
        )  # fmt: skip

    return Calls([of(z) for z in p.logits])


@column("gemm", "SGLang FP8", kind="fp8")
def gemm(p):
    """CUTLASS with 1x128 and 128x128 scales; layouts and addresses are written by the call itself."""
    (experts, n, k), device = p.w.shape, p.a.device
    (a, scales_a), (w, scales_w) = p.a_codes, p.w_codes
    out = torch.empty(p.a.shape[0], n, dtype=torch.bfloat16, device=device)
    a_at, w_at, out_at, scales_a_at, scales_w_at = torch.empty(5, experts, dtype=torch.int64, device=device)
    layout_a, layout_w = torch.zeros(2, experts, 5, dtype=torch.int32, device=device)
    inner, outer = (torch.full((experts,), step, dtype=torch.int64, device=device) for step in (k, n))
    sizes = torch.tensor([[p.rows, n, k]] * experts, dtype=torch.int32, device=device)
    starts = torch.arange(experts, dtype=torch.int32, device=device) * p.rows
    workspace = torch.empty(WORKSPACE if a.is_cuda else 1, dtype=torch.uint8, device=device)

    def run():
        sgl_kernel.fp8_blockwise_scaled_grouped_mm(
            out, a_at, w_at, out_at, scales_a_at, scales_w_at, a, w.transpose(1, 2), scales_a,
            scales_w.transpose(1, 2), inner, inner, outer, layout_a, layout_w, sizes, starts, workspace,
        )  # fmt: skip
        return out

    return Calls([run])


@column("layer", "SGLang bfloat16", kind="bfloat16")
def layer(p):
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    x, weights, w_gate_up, w_down = p.detached
    chosen = StandardTopKOutput(weights, p.ids, None)
    settings = MoeRunnerConfig(inplace=False)
    return Calls([lambda: fused_experts(x, w_gate_up, w_down, chosen, settings)])
