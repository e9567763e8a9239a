"""The MoE layer on a GPU: the rooms' ops one after another on the caller's stream.

Nothing waits for the host and every size is known beforehand, so that a step can be captured into a graph; memory comes
from the caller's allocator and goes back as soon as what reads it is queued. csrc/cpu/moe_layer.cpp has the same steps
through runs of experts, which would need the offsets' values here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend
from .._array.moe import ExpertRows
from .._moe_arguments import Layer, MoeGradients
from ..grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from ..permutation import permute, permute_quantize, unpermute
from ..quantization import quantize_fp8, unchecked_fp8
from ..route_plan import RoutePlan
from . import activation, arrays, permutation
from .route_plan import maps

Array = Any
Operand = Any  # an array or an Fp8Array

ON = "cuda"


def forward(layer: Layer, plan: RoutePlan, gate_up: Array | None, y: Array) -> None:
    """Fill ``y``, and ``gate_up`` if it is given."""
    experts, dtype = ExpertRows(plan.expert_offsets, plan.row_to_token), layer.x.dtype
    weights = activation.row_weights(layer.topk_weights, plan) if layer.weight_on == "pre_down" else None
    rows = _rows(layer, plan)
    gate_up = grouped_gemm(rows, layer.w_gate_up, plan.expert_offsets, out_dtype=dtype, out=gate_up, backend=ON)
    del rows
    hidden = _hidden(layer, gate_up, experts, weights)
    del gate_up
    results = grouped_gemm(hidden, layer.w_down, plan.expert_offsets, out_dtype=dtype, backend=ON)
    del hidden
    if layer.b_down is not None:
        activation.add_bias(results, layer.b_down, experts, weights)
    unpermute(results, plan, layer.topk_weights if layer.weight_on == "output" else None, out=y, backend=ON)


def _rows(layer: Layer, plan: RoutePlan) -> Operand:
    """x in expert order, as the first GEMM reads it."""
    if layer.weight_on == "input":
        rows = _weighted_rows(layer, plan, permute(layer.x, plan, backend=ON), None)
        return rows if layer.scale_format is None else quantize_fp8(rows, scale_format=layer.scale_format, backend=ON)
    if layer.scale_format is not None:
        return permute_quantize(layer.x, plan, scale_format=layer.scale_format, backend=ON)
    return permute(layer.x, plan, backend=ON)


def _weighted_rows(layer: Layer, plan: RoutePlan, rows: Array, dots: Array | None) -> Array:
    """Each row's weight times its token of x; ``dots`` [T, k] of each slot's token with its row of ``rows``.

    Both are what the backward pass of unpermute computes.
    """
    weighted = arrays.empty(rows, rows.shape, rows.dtype)
    dots = arrays.empty(rows, layer.topk_weights.shape, np.float32) if dots is None else dots
    _backend.cuda.unpermute_backward(
        *arrays.place(rows), maps(plan), rows.shape[1], permutation._type(rows),
        *map(arrays.pointer, (layer.x, rows, layer.topk_weights, weighted, dots)),
    )  # fmt: skip
    return weighted


def _hidden(layer: Layer, gate_up: Array, experts: ExpertRows, weights: Array | None) -> Operand:
    """The activation's rows, as the second GEMM reads them."""
    given = (gate_up, layer.b_gate_up, experts, weights, layer.program)
    if layer.scale_format is None:
        return activation.activate(*given)
    if activation.can_quantize(gate_up, layer.program):
        codes, scales = activation.activate_quantize(*given, layer.scale_format == "ue8m0")
        return unchecked_fp8(codes, scales, (1, 128), "e4m3", None)
    return quantize_fp8(activation.activate(*given), scale_format=layer.scale_format, backend=ON)


def backward(
    layer: Layer, plan: RoutePlan, gate_up: Array, grad_y: Array, grads: MoeGradients, accumulate: bool
) -> None:
    """Fill or add to the gradients that are not None."""
    experts, offsets, dtype = ExpertRows(plan.expert_offsets, plan.row_to_token), plan.expert_offsets, layer.x.dtype
    by_row = layer.weight_on != "input"  # whether the weight multiplies what a row becomes, not x
    weights = activation.row_weights(layer.topk_weights, plan) if by_row else None
    grad_results = permute(grad_y, plan, backend=ON)
    arriving = grad_results
    if layer.gradient_format is not None:  # the bytes of quantising grad_results, for every token once
        arriving = permute_quantize(grad_y, plan, scale_format=layer.gradient_format, backend=ON)
    grad_hidden = grouped_gemm_dgrad(arriving, layer.w_down, offsets, out_dtype=dtype, backend=ON)
    hidden, grad_gate_up, grad_row_weights = activation.activate_backward(
        gate_up, layer.b_gate_up, experts, weights, layer.program, grad_hidden
    )
    del arriving, grad_hidden
    if layer.b_down is not None and by_row and grads.topk_weights is not None:
        activation.add_bias_dots(grad_results, layer.b_down, experts, grad_row_weights)
    _weight_gradient(layer, offsets, grad_results, hidden, grads.w_down, accumulate)
    del hidden
    if grads.b_down is not None:
        activation.bias_grad(grad_results, experts, weights, grads.b_down, accumulate)
    del grad_results
    if grads.b_gate_up is not None:
        activation.bias_grad(grad_gate_up, experts, None, grads.b_gate_up, accumulate)
    if by_row and grads.topk_weights is not None:
        activation.slot_values(grad_row_weights, plan, grads.topk_weights)
    _inward(layer, plan, grad_gate_up, grads, accumulate)


def _inward(layer: Layer, plan: RoutePlan, grad_gate_up: Array, grads: MoeGradients, accumulate: bool) -> None:
    """The gradients of the first GEMM's operands and, with weights on the input, of those."""
    by_row, rows = layer.weight_on != "input", None
    if grads.x is not None or (not by_row and (grads.topk_weights is not None or grads.w_gate_up is not None)):
        arriving = grad_gate_up
        if layer.gradient_format is not None:
            arriving = quantize_fp8(grad_gate_up, scale_format=layer.gradient_format, backend=ON)
        grad_rows = grouped_gemm_dgrad(
            arriving, layer.w_gate_up, plan.expert_offsets, out_dtype=layer.x.dtype, backend=ON
        )
        if grads.x is not None:
            unpermute(grad_rows, plan, None if by_row else layer.topk_weights, out=grads.x, backend=ON)
        if not by_row:
            rows = _weighted_rows(layer, plan, grad_rows, grads.topk_weights)
        del arriving, grad_rows
    if grads.w_gate_up is not None:
        rows = permute(layer.x, plan, backend=ON) if rows is None else rows
        _weight_gradient(layer, plan.expert_offsets, grad_gate_up, rows, grads.w_gate_up, accumulate)


def _weight_gradient(
    layer: Layer, offsets: Array, grad_out: Array, rows: Array, into: Array | None, accumulate: bool
) -> None:
    if into is None:
        return
    if layer.gradient_format is not None:  # along tokens, from the wide rows: codes of codes would be off twice
        along: dict[str, Any] = {"block": (128, 1), "scale_format": layer.gradient_format, "expert_offsets": offsets}
        grad_out, rows = (quantize_fp8(x, **along, backend=ON) for x in (grad_out, rows))
    to: dict[str, Any] = {"accumulate_into" if accumulate else "out": into}
    grouped_gemm_wgrad(grad_out, rows, offsets, **to, backend=ON)
