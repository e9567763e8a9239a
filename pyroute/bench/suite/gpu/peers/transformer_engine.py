"""TransformerEngine: fused router, permutation and GroupedLinear (signatures of 2.20)."""

from __future__ import annotations

import functools

import torch
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8BlockScaling
from transformer_engine.pytorch.router import fused_topk_with_score_function

from . import Calls, column, version_of

NAME = "TransformerEngine"


def version():
    return version_of("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13")


@column("gate", "TransformerEngine")
def gate(p):
    """Its weights are dense, [T, E]; it scores a group by its best top_k // groups experts."""
    c = p.config
    if c.score != "sigmoid" or c.renormalize != "sum" or c.top_k != 2 * c.topk_groups:
        return None

    def of(z):
        return lambda: fused_topk_with_score_function(
            z, c.top_k, False, c.num_groups, c.topk_groups, c.scaling_factor, "sigmoid", p.bias
        )

    return Calls([of(z) for z in p.logits], read=lambda got: got[0].topk(c.top_k))


@column("permute", "TransformerEngine, plan included", kind="exact")
def permute(p):
    chosen = p.routing_map.int()
    return Calls([lambda: te.moe_permute(p.x, chosen, p.rows.shape[0], map_type="mask")], read=lambda got: got[0])


@column("unpermute", "TransformerEngine", kind="bfloat16")
def unpermute(p):
    rows, row_id_map = te.moe_permute(p.x, p.routing_map.int(), p.rows.shape[0], map_type="mask")
    dense = torch.zeros(p.routing_map.shape, device=p.x.device).scatter_(1, p.ids.long(), p.weights)
    return Calls(
        [lambda: te.moe_unpermute(rows, row_id_map, merging_probs=dense, restore_shape=p.x.shape, map_type="mask")]
    )


def grouped_linear(p):
    experts, n, k = p.w.shape
    linear = te.GroupedLinear(experts, k, n, bias=False, params_dtype=p.w.dtype, device=p.w.device)
    with torch.no_grad():
        for e in range(experts):
            getattr(linear, f"weight{e}").copy_(p.w[e])
    return linear, [p.rows] * experts


@column("gemm", "TransformerEngine bfloat16", kind="bfloat16")
def gemm(p):
    linear, splits = grouped_linear(p)
    return Calls([torch.no_grad()(lambda: linear(p.a, splits))])


@column("gemm", "TransformerEngine FP8, cast included", kind="fp8")
def gemm_fp8(p):
    """1x128 and 128x128 scales; the weights' codes are made once, those of the rows in every call."""
    linear, splits = grouped_linear(p)

    @torch.no_grad()
    def run(first: bool = False):
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
            return linear(p.a, splits, is_first_microbatch=first)

    return Calls([run], first=functools.partial(run, True))
