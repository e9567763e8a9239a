"""The MoE layer on a GPU: the rooms' ops one after another on the caller's stream.

Nothing waits for the host and every size is known beforehand, so that a step can be captured into a graph; memory comes
from the caller's allocator and goes back as soon as what reads it is queued. csrc/cpu/moe_layer.cpp has the same steps
through runs of experts, which would need the offsets' values here.

Rows past the last segment, as many more as other ids could have needed (seven of eight on a rank of expert parallelism
that was sent slots for others too), are never read, written or computed: every kernel stops at the last offset, which
it reads on the device. Only ``y`` and the gradients are the caller's, and they have no such rows; ``gate_up`` has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend
from .._array.moe import ExpertRows
from .._moe_arguments import Layer, MoeGradients
from ..grouped_gemm import grouped_gemm_wgrad
from ..permutation import unpermute
from ..quantization import Fp8Array, ScaleFormat, quantize_segments, unchecked_fp8
from ..route_plan import RoutePlan
from . import activation, arrays, grouped_gemm, permutation
from .route_plan import maps

Array = Any
Operand = Any  # an array or an Fp8Array

ON = "cuda"
BLOCK = (1, 128)  # of rows along a contraction


def forward(layer: Layer, plan: RoutePlan, gate_up: Array | None, y: Array) -> None:
    """Fill ``y``, and ``gate_up`` if it is given."""
    experts, dtype = ExpertRows(plan.expert_offsets, plan.row_to_token), layer.x.dtype
    weights = activation.row_weights(layer.topk_weights, plan) if layer.weight_on == "pre_down" else None
    rows = _rows(layer, plan)
    gate_up = _product(rows, layer.w_gate_up, plan, dtype, out=gate_up)
    del rows
    hidden = _hidden(layer, gate_up, experts, weights)
    del gate_up
    results = _product(hidden, layer.w_down, plan, dtype)
    del hidden
    if layer.b_down is not None:
        activation.add_bias(results, layer.b_down, experts, weights)
    unpermute(results, plan, layer.topk_weights if layer.weight_on == "output" else None, out=y, backend=ON)


def _rows(layer: Layer, plan: RoutePlan) -> Operand:
    """x in expert order, as the first GEMM reads it."""
    if layer.weight_on == "input":
        rows = _weighted_rows(layer, plan, _permuted(layer.x, plan), None)
        if layer.scale_format is None:
            return rows
        return quantize_segments(rows, BLOCK, layer.scale_format, plan.expert_offsets)
    return _permuted(layer.x, plan) if layer.scale_format is None else _codes(layer.x, plan, layer.scale_format)


def _permuted(x: Array, plan: RoutePlan) -> Array:
    return permutation.permute(x, plan, None, segments_only=True)


def _codes(x: Array, plan: RoutePlan, scale_format: ScaleFormat) -> Fp8Array:
    """The bytes of quantising the permuted rows, for every token once."""
    codes, scales = permutation.permute_quantize(x, plan, scale_format == "ue8m0", segments_only=True)
    return unchecked_fp8(codes, scales, BLOCK, "e4m3", None)


def _product(
    rows: Operand, weights: Operand, plan: RoutePlan, dtype: Any, *, transposed: bool = False, out: Array | None = None
) -> Array:
    """The rows of each expert times its weights, with ``transposed`` (dgrad) times their transposes."""
    if out is None:
        beside = rows.codes if isinstance(rows, Fp8Array) else rows
        out = arrays.empty(beside, (plan.num_rows, weights.shape[2 if transposed else 1]), dtype)
    grouped_gemm.grouped_gemm(rows, weights, plan.expert_offsets, out, transposed, segments_only=True)
    return out


def _weighted_rows(layer: Layer, plan: RoutePlan, rows: Array, dots: Array | None) -> Array:
    """Each row's weight times its token of x; ``dots`` [T, k] of each slot's token with its row of ``rows``.

    Both are what the backward pass of unpermute computes.
    """
    weighted = arrays.empty(rows, rows.shape, rows.dtype)
    dots = arrays.empty(rows, layer.topk_weights.shape, np.float32) if dots is None else dots
    _backend.cuda.unpermute_backward(
        *arrays.place(rows), maps(plan), rows.shape[1], permutation._type(rows),
        *map(arrays.pointer, (layer.x, rows, layer.topk_weights, weighted, dots)), permutation.rows_end(plan),
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
    return quantize_segments(activation.activate(*given), BLOCK, layer.scale_format, experts.expert_offsets)


def backward(
    layer: Layer, plan: RoutePlan, gate_up: Array, grad_y: Array, grads: MoeGradients, accumulate: bool
) -> None:
    """Fill or add to the gradients that are not None."""
    experts, offsets, dtype = ExpertRows(plan.expert_offsets, plan.row_to_token), plan.expert_offsets, layer.x.dtype
    by_row = layer.weight_on != "input"  # whether the weight multiplies what a row becomes, not x
    weights = activation.row_weights(layer.topk_weights, plan) if by_row else None
    arriving = grad_results = _permuted(grad_y, plan)
    if layer.gradient_format is not None:
        arriving = _codes(grad_y, plan, layer.gradient_format)
    grad_hidden = _product(arriving, layer.w_down, plan, dtype, transposed=True)
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
            arriving = quantize_segments(grad_gate_up, BLOCK, layer.gradient_format, plan.expert_offsets)
        grad_rows = _product(arriving, layer.w_gate_up, plan, layer.x.dtype, transposed=True)
        if grads.x is not None:
            unpermute(grad_rows, plan, None if by_row else layer.topk_weights, out=grads.x, backend=ON)
        if not by_row:
            rows = _weighted_rows(layer, plan, grad_rows, grads.topk_weights)
        del arriving, grad_rows
    if grads.w_gate_up is not None:
        rows = _permuted(layer.x, plan) if rows is None else rows
        _weight_gradient(layer, plan.expert_offsets, grad_gate_up, rows, grads.w_gate_up, accumulate)


def _weight_gradient(
    layer: Layer, offsets: Array, grad_out: Array, rows: Array, into: Array | None, accumulate: bool
) -> None:
    if into is None:
        return
    if layer.gradient_format is not None:  # along tokens, from the wide rows: codes of codes would be off twice
        grad_out, rows = (quantize_segments(x, (128, 1), layer.gradient_format, offsets) for x in (grad_out, rows))
    to: dict[str, Any] = {"accumulate_into" if accumulate else "out": into}
    grouped_gemm_wgrad(grad_out, rows, offsets, **to, backend=ON)
