"""torch: eager routing, indexing, grouped_mm in bfloat16 and scaled_grouped_mm in FP8 (private names up to 2.8)."""

from __future__ import annotations

import torch

from ...peers.torch_eager import combine, grouped_sigmoid, softmax_topk
from . import Calls, column

NAME = "torch"


def version():
    return torch.__version__


def grouped_mm(a, b, ends):
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public(a, b, offs=ends) if public else torch._grouped_mm(a, b, offs=ends)


@column("gate", "torch eager")
def gate(p):
    c = p.config
    plain = c.score == "softmax" and c.renormalize == "sum" and c.num_groups == 1 and c.scaling_factor == 1
    if not plain and (p.bias is None or (c.num_groups > 1 and c.group_score != "top2_sum")):
        return None

    def of(z):
        if plain:
            return lambda: softmax_topk(z, c.top_k)
        return lambda: grouped_sigmoid(z, p.bias, c.num_groups, c.topk_groups, c.top_k, c.scaling_factor)

    return Calls([of(z) for z in p.logits])


@column("permute", "torch index_select", kind="exact")
def permute(p):
    return Calls([lambda: torch.index_select(p.x, 0, p.token_of)])


@column("unpermute", "torch mul, index, sum", kind="bfloat16")
def unpermute(p):
    by_row = torch.empty(p.rows.shape[0], 1, dtype=p.rows.dtype, device=p.rows.device)
    by_row[p.row_of.reshape(-1), 0] = p.weights.reshape(-1).to(p.rows.dtype)
    slots, shape = p.row_of.reshape(-1), (*p.row_of.shape, p.rows.shape[1])
    return Calls([lambda: combine(p.rows, by_row, slots, shape)])


@column("gemm", "torch grouped_mm bfloat16", kind="bfloat16")
def gemm(p):
    transposed = p.w.transpose(1, 2)
    return Calls([lambda: grouped_mm(p.a, transposed, p.ends)])


@column("gemm", "torch scaled_grouped_mm FP8", kind="fp8")
def gemm_fp8(p):
    """One scale per row of a and per output column: the recipe that PyTorch has on Hopper."""
    if not p.a.is_cuda:
        return None
    scale_a, scale_b = p.a.abs().amax(dim=1).float() / 448, p.w.abs().amax(dim=2).float() / 448
    a = (p.a / scale_a[:, None]).to(torch.float8_e4m3fn)
    b = (p.w / scale_b[..., None]).to(torch.float8_e4m3fn).transpose(1, 2)
    return Calls([lambda: torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs=p.ends, out_dtype=torch.bfloat16)])


@column("dgrad", "torch grouped_mm bfloat16", kind="bfloat16")
def dgrad(p):
    return Calls([lambda: grouped_mm(p.grad, p.w, p.ends)])


@column("wgrad", "torch grouped_mm bfloat16", kind="bfloat16")
def wgrad(p):
    return Calls([lambda: grouped_mm(p.grad.t(), p.a, p.ends)])


def layer_of(x, ids, weights, w_gate_up, w_down):
    """A layer as it is written in PyTorch: sort, gather, grouped_mm, SwiGLU, grouped_mm, weigh and add."""
    experts, top_k = w_down.shape[0], ids.shape[1]
    order = ids.reshape(-1).argsort(stable=True)
    ends = torch.bincount(ids.reshape(-1), minlength=experts).cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    gate, up = grouped_mm(rows, w_gate_up.transpose(1, 2), ends).chunk(2, dim=-1)
    out = grouped_mm(torch.nn.functional.silu(gate) * up, w_down.transpose(1, 2), ends)
    out = out * weights.reshape(-1)[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // top_k, out)


@column("layer", "torch grouped_mm bfloat16", kind="bfloat16")
def layer(p):
    return p.forward(layer_of)


@column("training", "torch grouped_mm bfloat16", kind="bfloat16")
def training(p):
    return p.step(layer_of)
