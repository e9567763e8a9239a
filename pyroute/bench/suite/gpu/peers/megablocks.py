"""MegaBlocks: rows gathered to their experts and scattered back (0.10); its products are those of grouped_gemm."""

from __future__ import annotations

import torch
from megablocks import ops

from . import Calls, column, version_of

NAME = "MegaBlocks"


def version():
    return version_of("megablocks")


def plan_of(p):
    """Slots in the order of their experts, the expert of each, and where every expert ends."""
    bin_ids, slots = p.ids.reshape(-1).sort(stable=True)
    ends = torch.bincount(p.ids.reshape(-1), minlength=p.num_experts).cumsum(0)
    return slots.int(), bin_ids.int(), ends.int(), p.ids.shape[1]


@column("permute", "MegaBlocks", kind="exact")
def permute(p):
    slots, bin_ids, ends, top_k = plan_of(p)
    return Calls([lambda: ops.gather(p.x, slots, bin_ids, ends, top_k)])


@column("unpermute", "MegaBlocks", kind="bfloat16")
def unpermute(p):
    slots, bin_ids, ends, top_k = plan_of(p)
    weights = p.weights.reshape(-1)
    return Calls([lambda: ops.scatter(p.rows, slots, bin_ids, weights, ends, top_k)])
