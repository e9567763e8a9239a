"""SonicMoE: the layer for given routing, forward and backward, in bfloat16 (pip install sonic-moe; 0.1)."""

from __future__ import annotations

import torch
from sonicmoe.enums import ActivationType
from sonicmoe.functional import moe_general_routing_inputs

from . import column, stream_of, version_of

NAME = "SonicMoE"


def version():
    return version_of("sonic-moe", "sonicmoe")


def interleaved(w_gate_up):
    """gate 0, up 0, gate 1, ...: the order of rows that it takes."""
    experts, rows, hidden = w_gate_up.shape
    return w_gate_up.view(experts, 2, rows // 2, hidden).transpose(1, 2).reshape(experts, rows, hidden)


def back(grad):
    experts, rows, hidden = grad.shape
    return grad.view(experts, rows // 2, 2, hidden).transpose(1, 2).reshape(experts, rows, hidden)


def layer_of(x, ids, weights, w_gate_up, w_down):
    """Slots in the order of their tokens, as it asks; weights [2I, H, E] and [H, I, E] as views of ours."""
    top_k = ids.shape[1]
    tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).repeat_interleave(top_k)
    y, _ = moe_general_routing_inputs(
        x, weights.reshape(-1), tokens, ids.reshape(-1), w_gate_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0),
        None, w_down.shape[0], stream_of(x), ActivationType.SWIGLU, not torch.is_grad_enabled(),
    )  # fmt: skip
    return y


@column("layer", "SonicMoE bfloat16", kind="bfloat16")
def layer(p):
    return p.forward(layer_of, gate_up=interleaved)


@column("training", "SonicMoE bfloat16", kind="bfloat16")
def training(p):
    return p.step(layer_of, gate_up=interleaved, gate_up_back=back)
