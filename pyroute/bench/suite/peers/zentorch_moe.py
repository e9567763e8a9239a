"""AMD's zentorch: its fused experts operator."""

from __future__ import annotations

import torch
import zentorch  # noqa: F401  (registers the operator)

from . import Work, column, package_version
from .torch_eager import array, set_threads, tensor

NAME = "zentorch"
__all__ = ["NAME", "set_threads", "version"]


def version() -> str:
    return package_version("zentorch")


def layer(p, kind: str):
    if p.wide != (kind == "float32"):
        return None
    w13, w2 = map(tensor, p.weights.pair(kind))
    x = tensor(p.x if kind == "float32" else p.x16)
    out, ids, weights = torch.zeros_like(x), torch.from_numpy(p.gating.topk_idx).int(), tensor(p.gating.topk_weights)

    def run():
        torch.ops.zentorch.zentorch_fused_moe(out, x, w13, w2, None, None, weights, ids, False, "silu")
        return out

    return Work(run, array)


@column("layer", "zentorch float32")
def layer_float32(p):
    return layer(p, "float32")
