"""Arithmetic of the stand-ins, and their faults."""

from __future__ import annotations

from typing import Any

import torch


class Faults:
    """``damage`` is applied to every result before the caller gets it; ``error`` is raised instead."""

    damage: Any = None
    error: Exception | None = None


def done(result: torch.Tensor) -> torch.Tensor:
    if Faults.error is not None:
        raise Faults.error
    return Faults.damage(result) if Faults.damage else result


def rows_dequantised(pair):
    codes, scales = pair
    return codes.float() * scales.repeat_interleave(128, dim=-1)[..., : codes.shape[-1]]


def weights_dequantised(pair):
    codes, scales = pair
    return codes.float() * scales.repeat_interleave(128, dim=-2).repeat_interleave(128, dim=-1)


def grouped(a, w, sizes):
    """[rows, K] and [E, N, K]"""
    parts = a.float().split([int(n) for n in sizes])
    return torch.cat([part @ w[e].float().T for e, part in enumerate(parts)])


def experts(x, w1, w2, weights, ids):
    y = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(len(w1)):
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[tokens].float() @ w1[e].float().T).chunk(2, dim=-1)
        y[tokens] += weights[tokens, slots, None] * ((torch.nn.functional.silu(gate) * up) @ w2[e].float().T)
    return y.to(x.dtype)


def grouped_sigmoid(z, bias, groups, kept, top_k, scaling):
    scores = z.sigmoid()
    keys = scores + bias
    best = keys.view(len(z), groups, -1).topk(2, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
    mask = torch.zeros(len(z), groups).scatter_(1, best, 1.0).repeat_interleave(z.shape[1] // groups, dim=1)
    ids = keys.masked_fill(mask == 0, -torch.inf).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return done(weights / weights.sum(dim=-1, keepdim=True) * scaling), ids
