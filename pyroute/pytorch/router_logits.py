"""The router's own product, in float32 whatever the model's type."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _check
from ..grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from ._library import define, goes_direct
from ._tensors import array, check_tensors, on_host, tensor


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32: the router's product, whatever the model's type.

    Products of bfloat16 operands are exact and summed in float32, so that nothing is rounded to bfloat16 on the way to
    a choice, and no float32 copy of x is made. The bytes of a token do not depend on the batch or on threads.

    Parameters
    ----------
    x : float32 or bfloat16 [num_tokens, hidden]
    weight : float32 or bfloat16 [num_experts, hidden]

    Returns
    -------
    float32 [num_tokens, num_experts]
    """
    if goes_direct(x, weight):
        return _logits_kernel(x, weight)
    check_tensors("router_logits", "x", x=x, weight=weight)
    return _router_logits(x, weight)


def _one_segment(x: Tensor) -> Any:
    """The offsets of one expert with all rows; on a GPU filled there, as a copy of them would end a graph's capture."""
    num_rows = x.shape[0]
    if on_host(x):
        return np.array([0, num_rows], np.int64)
    offsets = torch.arange(2, device=x.device) * num_rows
    return array("router_logits", "expert_offsets", offsets)


def _logits_kernel(x: Tensor, weight: Tensor) -> Tensor:
    a, b = array("router_logits", "x", x), array("router_logits", "weight", weight)
    _check_product(a, b)
    return tensor(grouped_gemm(a, _stack(b), _one_segment(x), out_dtype="float32"))


def _stack(b: Any) -> Any:
    return b.reshape(1, *b.shape)


def _check_product(a: Any, b: Any) -> None:
    """In this function's names: the GEMM underneath has others."""
    _check.dtype("router_logits", "x", a, ("float32", "bfloat16"))
    _check.shape("router_logits", "x", a, (("num_tokens", None), ("hidden", None)))
    _check.dtype("router_logits", "weight", b, ("float32", "bfloat16"))
    _check.shape("router_logits", "weight", b, (("num_experts", None), ("hidden", a.shape[1])))


def _logits_fake(x: Tensor, weight: Tensor) -> Tensor:
    check_tensors("router_logits", "x", x=x, weight=weight)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _logits_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _logits_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = _router_logits_backward(grad, x, weight)
    return grad_x, grad_weight.to(weight.dtype)


def _logits_backward_kernel(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    function = "router_logits_backward"
    g, a, b = array(function, "grad", grad), array(function, "x", x), array(function, "weight", weight)
    offsets = _one_segment(x)
    grad_x = grouped_gemm_dgrad(g, _stack(b), offsets, out_dtype=a.dtype)
    return tensor(grad_x), tensor(grouped_gemm_wgrad(g, a, offsets)[0])


def _logits_backward_fake(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


_router_logits_backward = define(
    "router_logits_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _logits_backward_kernel,
    _logits_backward_fake,
)
_router_logits = define(
    "router_logits(Tensor x, Tensor weight) -> Tensor",
    _logits_kernel,
    _logits_fake,
    backward=_logits_grad,
    save=_logits_save,
)
