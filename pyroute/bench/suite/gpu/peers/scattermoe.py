"""ScatterMoE: its gated MLP, forward and backward, in bfloat16 (from source; 0.3)."""

from __future__ import annotations

import torch
from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

from . import column, version_of

NAME = "ScatterMoE"


def version():
    return version_of("scattermoe")


def layer_of(x, ids, weights, w_gate_up, w_down):
    """What its GLUMLP does, around weights of ours: sort, product with gather, SwiGLU, product that sums."""
    by_expert, slots, ends = flatten_sort_count(ids, num_experts=w_down.shape[0])
    hidden = parallel_linear(x, w_gate_up.permute(0, 2, 1), ids.shape[1], by_expert, slots, ends, grouped_out=True)
    gate, up = hidden.chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    return parallel_linear(
        hidden, w_down.permute(0, 2, 1), 1, by_expert, slots, ends, gates=weights.to(x.dtype), grouped_in=True
    )


@column("layer", "ScatterMoE bfloat16", kind="bfloat16")
def layer(p):
    return p.forward(layer_of)


@column("training", "ScatterMoE bfloat16", kind="bfloat16")
def training(p):
    return p.step(layer_of)
