"""DeepEP's dispatch and combine as the transport of an expert-parallel layer (github.com/deepseek-ai/DeepEP).

Its normal kernels send a token once to every rank that has some of its experts and add up what comes back, one row of
each rank. So the sum over slots is made in two steps, each rounded to bfloat16: bounded, not the bytes of one process.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check
from ._expert_parallel_plan import ExpertSlots
from .quantization import Fp8Tensor, dequantize_fp8, quantize_fp8

_buffers: dict[Any, Any] = {}  # a group's buffer, which grows with the widest rows


def check(function: str, group: dist.ProcessGroup | None, slots: ExpertSlots, payload: Any, hidden: int) -> None:
    """What DeepEP cannot do, and whether it is there."""
    if group is None or len(set(np.diff(slots.first).tolist())) > 1:
        expected = "'torch' without a group, and where ranks differ in their number of experts"
        raise _check.value_error(function, "transport", expected, "'deep_ep'")
    if payload not in (None, "fp8") or (payload and hidden % 128):
        expected = "None with transport 'deep_ep', or 'fp8' for a hidden size that 128 divides"
        raise _check.value_error(function, "payload", expected, f"'{payload}'")
    try:
        importlib.import_module("deep_ep")
    except ImportError as error:
        raise ValueError(
            f"{function}: transport 'deep_ep' needs the package deep_ep, which does not import: {error}"
        ) from None


@dataclasses.dataclass(eq=False)
class Sent:
    """A dispatch: its buffer, and the handle that the way back needs."""

    buffer: Any
    handle: Any = None


def through_deep_ep(
    group: dist.ProcessGroup, experts: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, slots: Tensor,
    topk_weights: Tensor, num_slots: int, payload: Any, records: bool,
) -> Tensor:  # fmt: skip
    """The layer of ``experts(rows, local slots, weights)`` on every rank.

    Parameters
    ----------
    x : bfloat16 [T, hidden]
    slots : int64 [T, top_k], -1 is not routed
    topk_weights : float32 [T, top_k]
    records : bool
        Whether there will be a backward pass, on every rank alike.
    """
    sent = Sent(_buffer_of(group, x.shape[1] * 2))
    # ranks whose x and weights need no gradient take part in the backward pass of the others
    anchor = torch.empty(0, device=x.device, requires_grad=records)
    rows, local, weights = _Dispatch.apply(sent, x, topk_weights, anchor, slots, num_slots, payload)
    y: Tensor = _Combine.apply(sent, experts(rows, local, weights))
    return y


def _buffer_of(group: dist.ProcessGroup, row_bytes: int) -> Any:
    buffers = importlib.import_module("deep_ep").Buffer
    size, nvl, rdma = group.size(), 0, 0
    for config in (buffers.get_dispatch_config(size), buffers.get_combine_config(size)):
        nvl = max(nvl, config.get_nvl_buffer_size_hint(row_bytes, size))
        rdma = max(rdma, config.get_rdma_buffer_size_hint(row_bytes, size))
    known = _buffers.get(group)
    if known is None or known.num_nvl_bytes < nvl or known.num_rdma_bytes < rdma:
        _buffers[group] = known = buffers(group, nvl, rdma)
    return known


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sent: Sent,
        x: Tensor,
        topk_weights: Tensor,
        anchor: Tensor,
        slots: Tensor,
        num_slots: int,
        payload: Any,
    ) -> tuple[Tensor, ...]:
        by_rank, by_node, by_slot, in_rank, _ = sent.buffer.get_dispatch_layout(slots, num_slots)
        rows: Any = x.contiguous()
        if payload is not None:
            rows = tuple(quantize_fp8(rows)[:2])
        rows, local, weights, _, sent.handle, _ = sent.buffer.dispatch(
            rows, topk_idx=slots, topk_weights=topk_weights, num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_node, is_token_in_rank=in_rank, num_tokens_per_expert=by_slot,
        )  # fmt: skip
        if payload is not None:
            rows = dequantize_fp8(Fp8Tensor(*rows), x.dtype)
        ctx.sent = sent
        ctx.mark_non_differentiable(local)
        return rows, local, weights

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, _: Any, grad_weights: Tensor) -> tuple[Any, ...]:
        sent: Sent = ctx.sent
        grad_x, of_weights, _ = sent.buffer.combine(
            grad_rows.contiguous(), sent.handle, topk_weights=grad_weights.contiguous()
        )
        return None, grad_x, of_weights, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Sent, rows: Tensor) -> Tensor:
        ctx.sent = sent
        y: Tensor = sent.buffer.combine(rows.contiguous(), sent.handle)[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        sent: Sent = ctx.sent
        return None, sent.buffer.dispatch(grad_y.contiguous(), handle=sent.handle)[0]
