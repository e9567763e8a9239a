"""The forward of transformers' FP8 experts, which have a registry of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checkpoints.experts import common_rows
from ...pytorch import Fp8Tensor, moe_forward
from .experts import activation_of


def fp8_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of the forward of an ``FP8Experts`` module ``self``.

    Both products take e4m3 codes with block scales, of the weights as they are in the module and of the rows in blocks
    of 1 x 128, quantised where they are made; scales of rows are powers of two where those of the weights are. Weights
    are frozen; hidden states and routing weights get gradients, straight through the quantisation.

    Parameters
    ----------
    self : the experts module
        Its ``block_size`` and ``_apply_gate`` are honoured.
    hidden_states : float32 or bfloat16 [num_tokens, hidden]
    top_k_index : integer [num_tokens, top_k]
        ``num_experts`` is the sentinel of expert parallelism: not routed, no gradient.
    top_k_weights : [num_tokens, top_k]
    """
    name = type(self).__name__
    prefix = "gate_up_proj" if self.has_gate else "up_proj"
    up, up_scales = getattr(self, prefix), getattr(self, f"{prefix}_scale_inv")
    if self.activation_scheme == "static":
        raise NotImplementedError(f"{name} on pyroute: scales of activations must be dynamic, got 'static'")
    if up.dtype != torch.float8_e4m3fn:
        raise NotImplementedError(f"{name} on pyroute: weights must be float8_e4m3fn, got {up.dtype}")
    activation = activation_of(self)
    if activation is None:
        raise NotImplementedError(f"{name} on pyroute: its activation is none of pyroute.moe_forward's")
    kind, limit, alpha = activation
    ids = top_k_index.masked_fill(top_k_index == self.num_experts, -1)
    scale_format: Any = "ue8m0" if up_scales.dtype == torch.float8_e8m0fnu else "float32"
    return moe_forward(
        hidden_states, ids, top_k_weights,
        _weight(up, up_scales, self.block_size, 1 + self.has_gate),
        _weight(self.down_proj, self.down_proj_scale_inv, self.block_size, 1),
        activation=kind, limit=limit, alpha=alpha, quantize_activations=scale_format,
    )  # fmt: skip


def _weight(codes: Tensor, scales: Tensor, block_size: Any, parts: int) -> Fp8Tensor:
    """``parts`` matrices on top of each other, each in blocks for itself, as one grid; frozen."""
    codes, scales = codes.detach(), scales.detach()
    rows, cols = codes.shape[-2:]
    block = (rows // parts, cols) if block_size is None else (int(block_size[0]), int(block_size[1]))
    if block_size is None:  # one scale for a whole matrix
        scales = scales.float().expand(codes.shape[0], parts, 1)
    fine = common_rows(rows // parts, block[0])
    if parts > 1 and fine != block[0]:
        halves = scales.float().unflatten(1, (parts, -1)).repeat_interleave(block[0] // fine, dim=2)
        scales = halves[:, :, : rows // parts // fine].flatten(1, 2)
    return Fp8Tensor(codes, scales, (fine if parts > 1 else block[0], block[1]))
