"""torch, eager: the routers' formulas of transformers, rows moved by indexing, FP8 by elementwise operations."""

from __future__ import annotations

import numpy as np
import torch

from . import Work, column, package_version

NAME = "torch"


def version() -> str:
    return package_version("torch")


def set_threads(n: int) -> None:
    torch.set_num_threads(n)


def tensor(x: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(t: torch.Tensor) -> np.ndarray:
    """float32 of a tensor's values."""
    return t.detach().float().numpy()


def grouped_sigmoid(logits, bias, groups: int, kept: int, top_k: int, scaling: float):
    """transformers' DeepseekV3MoE.route_tokens_to_experts."""
    scores = logits.sigmoid()
    for_choice = scores + bias
    group_scores = for_choice.view(logits.shape[0], groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
    group_idx = torch.topk(group_scores, k=kept, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores).scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(-1, groups, logits.shape[1] // groups).reshape(logits.shape)
    for_choice = for_choice.masked_fill(~score_mask.bool(), 0.0)
    topk_idx = torch.topk(for_choice, k=top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, topk_idx)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scaling, topk_idx


def softmax_topk(logits, top_k: int):
    """transformers' Qwen3MoeTopKRouter and MixtralTopKRouter, without the linear layer before it."""
    probabilities = torch.nn.functional.softmax(logits, dim=-1, dtype=torch.float)
    weights, topk_idx = torch.topk(probabilities, top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), topk_idx


def gate_work(p, wrap=lambda function: function) -> Work | None:
    if not p.formula:
        return None
    logits, c = tensor(p.logits), p.config
    if p.bias is not None:
        bias, f = tensor(p.bias), wrap(grouped_sigmoid)
        run = lambda: f(logits, bias, c.num_groups, c.topk_groups, c.top_k, c.scaling_factor)  # noqa: E731
    else:
        f = wrap(softmax_topk)
        run = lambda: f(logits, c.top_k)  # noqa: E731
    return Work(run, lambda result: (array(result[0]), result[1].numpy()))


@column("gate", "torch eager")
def gate(p):
    return gate_work(p)


def rows_of(p) -> torch.Tensor:
    return torch.from_numpy(p.plan.row_to_token.astype(np.int64))


@column("permute", "torch x[idx]", kind="exact")
def permute(p):
    x, idx = tensor(p.x), rows_of(p)
    return Work(lambda: x[idx], array)


@column("permute", "torch index_select(out=)", kind="exact")
def permute_out(p):
    x, idx, out = tensor(p.x), rows_of(p), tensor(np.empty_like(p.rows))
    return Work(lambda: torch.index_select(x, 0, idx, out=out), array)


def combine(rows, weights, slots, shape):
    """transformers' grouped_mm experts: weighted rows, back in the order of the tokens, summed over the slots."""
    weighted = rows * weights
    return weighted[slots].view(*shape).sum(dim=1)


def unpermute_work(p, wrap=lambda function: function) -> Work:
    rows, slots = tensor(p.rows), torch.from_numpy(p.plan.token_to_row.astype(np.int64).reshape(-1))
    weights = torch.empty(p.rows.shape[0])
    weights[slots] = tensor(p.gating.topk_weights).reshape(-1)
    weights = weights.to(rows.dtype)[:, None]
    f, shape = wrap(combine), (*p.plan.token_to_row.shape, p.rows.shape[1])
    return Work(lambda: f(rows, weights, slots, shape), array)


@column("unpermute", "torch mul, index, sum", kind="bfloat16")
def unpermute(p):
    return unpermute_work(p)


@column("unpermute", "torch index_add_", kind="bfloat16")
def unpermute_index_add(p):
    """transformers' eager experts: every expert's rows are weighted and added to their tokens."""
    rows, tokens = tensor(p.rows), rows_of(p)
    weights = torch.empty(p.rows.shape[0])
    weights[torch.from_numpy(p.plan.token_to_row.astype(np.int64))] = tensor(p.gating.topk_weights)
    weights = weights.to(rows.dtype)[:, None]
    return Work(lambda: torch.zeros(p.x.shape, dtype=rows.dtype).index_add_(0, tokens, rows * weights), array)


def quantize_e4m3(x):
    blocks = x.float().view(x.shape[0], -1, 128)
    scales = blocks.abs().amax(dim=-1, keepdim=True).clamp(1e-12) / 448.0
    codes = (blocks / scales).to(torch.float8_e4m3fn)
    return codes.view(x.shape), scales.squeeze(-1)


def read_codes(result):
    return result[0].view(torch.uint8).numpy(), array(result[1])


@column("quantize", "torch eager", kind="codes")
def quantize(p):
    x = tensor(p.x)
    return Work(lambda: quantize_e4m3(x), read_codes)


@column("quantize", "torch cast, no scales", kind="cast")
def cast(p):
    x = tensor(p.x)
    return Work(lambda: x.to(torch.float8_e4m3fn), lambda codes: (codes.view(torch.uint8).numpy(), None))
