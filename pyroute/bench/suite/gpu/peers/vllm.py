"""vLLM: grouped_topk, permutation, and the Triton experts in bfloat16 and FP8 (signatures of 0.32)."""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import moe_permute, moe_unpermute

from . import Calls, column, version_of

NAME = "vLLM"
SIGMOID = 1  # of its scoring functions


def version():
    return version_of("vllm")


@column("gate", "vLLM")
def gate(p):
    c = p.config
    if c.score != "sigmoid" or c.renormalize != "sum":
        return None

    def of(z):
        return lambda: ops.grouped_topk(
            z, c.num_groups, c.topk_groups, c.top_k, True, c.scaling_factor, p.bias, SIGMOID
        )

    return Calls([of(z) for z in p.logits])


@column("permute", "vLLM, plan included", kind="exact")
def permute(p):
    return Calls([lambda: moe_permute(p.x, None, p.ids, p.num_experts)], read=lambda got: got[0])


@column("unpermute", "vLLM", kind="bfloat16")
def unpermute(p):
    rows, _, starts, inverse, _ = moe_permute(p.x, None, p.ids, p.num_experts)
    out = torch.empty_like(p.x)

    def run():
        moe_unpermute(out, rows, p.weights, inverse, starts)
        return out

    return Calls([run])


@column("layer", "vLLM bfloat16", kind="bfloat16")
def layer(p):
    x, weights, w_gate_up, w_down = p.detached
    return Calls([lambda: fused_experts(x, w_gate_up, w_down, topk_weights=weights, topk_ids=p.ids)])


@column("layer", "vLLM FP8", kind="fp8 layer")
def layer_fp8(p):
    """1x128 and 128x128 scales; the rows are quantised in every call, as ours are."""
    (w_gate_up, scales_gate_up), (w_down, scales_down) = p.codes
    quantised = fp8_w8a8_moe_quant_config(w1_scale=scales_gate_up, w2_scale=scales_down, block_shape=[128, 128])
    x, weights, *_ = p.detached
    return Calls(
        [lambda: fused_experts(
            x, w_gate_up, w_down, topk_weights=weights, topk_ids=p.ids, quant_config=quantised
        )]
    )  # fmt: skip
