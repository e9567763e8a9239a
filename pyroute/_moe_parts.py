"""The MoE layer on the array floors: the other rooms' ops through runs of experts; csrc/cpu/moe_layer.cpp in Python."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import _backend
from ._activation import activate, activate_backward, add_bias, add_bias_dots, bias_grad
from ._array.moe import ExpertRows, canonical_nan
from ._moe_arguments import Layer, MoeGradients
from .grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from .permutation import permute, permute_backward, permute_quantize, unpermute, unpermute_backward
from .quantization import quantize_fp8
from .route_plan import RoutePlan, unchecked_plan

Array = Any
Operand = Any  # an array or an Fp8Array


def forward(layer: Layer, plan: RoutePlan, gate_up: Array | None, y: Array, part_bytes: int) -> None:
    """Fill ``y``, and ``gate_up`` if it is given."""
    results = _backend.empty_beside(layer.x, (plan.num_rows, layer.x.shape[1]), layer.x.dtype)
    for part in parts(layer, plan, part_bytes):
        _forward_part(part, None if gate_up is None else gate_up[part.rows], results[part.rows])
    weights = layer.topk_weights if layer.weight_on == "output" else None
    unpermute(results, plan, weights, out=y, backend=layer.backend)


def backward(
    layer: Layer, plan: RoutePlan, gate_up: Array, grad_y: Array, grads: MoeGradients, accumulate: bool, part_bytes: int
) -> None:
    """Fill or add to the gradients that are not None."""
    on = layer.backend
    grad_rows = _backend.empty_beside(layer.x, (plan.num_rows, layer.x.shape[1]), layer.x.dtype)
    if grads.topk_weights is not None:
        grads.topk_weights[...] = 0
    for part in parts(layer, plan, part_bytes):
        _backward_part(part, grad_y, gate_up[part.rows], grads, accumulate, grad_rows[part.rows])
    if grads.x is None:
        return
    if layer.weight_on == "input":
        unpermute(grad_rows, plan, layer.topk_weights, out=grads.x, backend=on)
    else:
        grads.x[...] = permute_backward(grad_rows, plan, backend=on)


class Part(NamedTuple):
    """A run of experts and their rows, as a layer and a plan of its own."""

    layer: Layer
    plan: RoutePlan
    experts: slice  # of the whole layer
    rows: slice  # of the whole plan


def parts(layer: Layer, plan: RoutePlan, part_bytes: int) -> Iterator[Part]:
    """Runs of whole experts whose widest rows fill at most ``part_bytes``, or one expert where it alone fills more."""
    num_experts, num_rows = plan.num_experts, plan.num_rows
    most = part_bytes // (max(layer.x.shape[1], layer.w_gate_up.shape[1]) * layer.x.dtype.itemsize or 1)
    if num_rows <= most:
        yield Part(layer, plan, slice(0, num_experts), slice(0, num_rows))
        return
    xp, starts = _backend.array_module(layer.x), plan.expert_offsets.tolist()
    first = 0
    while first < num_experts:
        last = max(first + 1, bisect.bisect_right(starts, starts[first] + most) - 1)
        experts, rows = slice(first, last), slice(starts[first], starts[last])
        inside = (plan.token_to_row >= rows.start) & (plan.token_to_row < rows.stop)
        yield Part(
            layer.of_experts(experts),
            unchecked_plan(
                plan.tokens_per_expert[experts],
                plan.expert_offsets[first : last + 1] - rows.start,
                plan.row_to_token[rows],
                xp.where(inside, plan.token_to_row - rows.start, -1).astype(xp.int32),
                plan.alignment,
            ),
            experts,
            rows,
        )
        first = last


def _forward_part(part: Part, gate_up: Array | None, results: Array) -> None:
    """Fill the experts' ``results``, and ``gate_up`` if it is to be kept."""
    layer, plan = part.layer, part.plan
    dtype, on, offsets = layer.x.dtype, layer.backend, plan.expert_offsets
    experts = ExpertRows(offsets, plan.row_to_token)
    rows = _rows(layer, plan)
    gate_up = grouped_gemm(rows, layer.w_gate_up, offsets, out_dtype=dtype, out=gate_up, backend=on)
    before_down = _row_weights(layer.topk_weights, plan) if layer.weight_on == "pre_down" else None
    hidden = activate(gate_up, layer.b_gate_up, experts, before_down, layer.program, on)
    if layer.scale_format is not None:
        hidden = quantize_fp8(hidden, scale_format=layer.scale_format, backend=on)
    grouped_gemm(hidden, layer.w_down, offsets, out=results, backend=on)
    if layer.b_down is not None:
        add_bias(results, layer.b_down, experts, before_down, on)


def _backward_part(
    part: Part, grad_y: Array, gate_up: Array, grads: MoeGradients, accumulate: bool, grad_rows: Array
) -> None:
    """Fill these experts' entries of ``grads`` and their rows of the gradient of x."""
    layer, plan = part.layer, part.plan
    dtype, on, offsets = layer.x.dtype, layer.backend, plan.expert_offsets
    experts = ExpertRows(offsets, plan.row_to_token)
    row_weights = None if layer.weight_on == "input" else _row_weights(layer.topk_weights, plan)
    grad_results = permute(grad_y, plan, backend=on)
    arriving = grad_results
    if layer.gradient_format is not None:  # the bytes of quantising grad_results, for every token once
        arriving = permute_quantize(grad_y, plan, scale_format=layer.gradient_format, backend=on)
    grad_hidden = grouped_gemm_dgrad(arriving, layer.w_down, offsets, out_dtype=dtype, backend=on)
    hidden, grad_gate_up, grad_row_weights = activate_backward(
        gate_up, layer.b_gate_up, experts, row_weights, layer.program, grad_hidden, on
    )
    if layer.b_down is not None:
        grad_row_weights = add_bias_dots(grad_results, layer.b_down, experts, grad_row_weights, on)
    _weight_gradient(part, grads.w_down, accumulate, grad_results, hidden)
    _bias_gradient(part, grads.b_down, accumulate, grad_results, row_weights)
    _bias_gradient(part, grads.b_gate_up, accumulate, grad_gate_up, None)
    arriving = grad_gate_up
    if layer.gradient_format is not None:
        arriving = quantize_fp8(grad_gate_up, scale_format=layer.gradient_format, backend=on)
    grouped_gemm_dgrad(arriving, layer.w_gate_up, offsets, out=grad_rows, backend=on)
    routed = plan.token_to_row >= 0
    if layer.weight_on == "input":
        rows, by_slot = unpermute_backward(layer.x, grad_rows, plan, layer.topk_weights, backend=on)
        by_slot = by_slot[routed]
    else:
        rows = permute(layer.x, plan, backend=on)
        by_slot = grad_row_weights[plan.token_to_row[routed]]
    if grads.topk_weights is not None:
        grads.topk_weights[routed] = by_slot
    _weight_gradient(part, grads.w_gate_up, accumulate, grad_gate_up, rows)


def _weight_gradient(part: Part, into: Array | None, accumulate: bool, grad_out: Array, rows: Array) -> None:
    if into is None:
        return
    layer, offsets = part.layer, part.plan.expert_offsets
    if layer.gradient_format is not None:  # along tokens, from the wide rows: codes of codes would be off twice
        along = {"block": (128, 1), "scale_format": layer.gradient_format, "expert_offsets": offsets}
        grad_out, rows = (quantize_fp8(x, **along, backend=layer.backend) for x in (grad_out, rows))
    to = {"accumulate_into" if accumulate else "out": into[part.experts]}
    grouped_gemm_wgrad(grad_out, rows, offsets, **to, backend=layer.backend)


def _bias_gradient(
    part: Part, into: Array | None, accumulate: bool, grad_out: Array, row_weights: Array | None
) -> None:
    """Experts without rows keep their bytes when gradients are added up."""
    if into is None:
        return
    offsets, xp = part.plan.expert_offsets, _backend.array_module(grad_out)
    grad = bias_grad(grad_out, ExpertRows(offsets, part.plan.row_to_token), row_weights, part.layer.backend)
    into = into[part.experts]
    if accumulate:
        total = into + grad
        grad = xp.where((offsets[1:] > offsets[:-1])[:, None], canonical_nan(xp, total), into)
    into[...] = grad


def _rows(layer: Layer, plan: RoutePlan) -> Operand:
    """x in expert order, as the first GEMM reads it."""
    on, scale_format = layer.backend, layer.scale_format
    if layer.weight_on == "input":  # weight * x in expert order is what the backward pass of unpermute computes
        rows = permute(layer.x, plan, backend=on)
        rows, _ = unpermute_backward(layer.x, rows, plan, layer.topk_weights, backend=on)
        return rows if scale_format is None else quantize_fp8(rows, scale_format=scale_format, backend=on)
    if scale_format is not None:
        return permute_quantize(layer.x, plan, scale_format=scale_format, backend=on)
    return permute(layer.x, plan, backend=on)


def _row_weights(topk_weights: Array, plan: RoutePlan) -> Array:
    """The weight of each row's slot, [R] float32; 0 on padding rows."""
    xp = _backend.array_module(topk_weights)
    weights = xp.zeros(plan.num_rows, xp.float32)
    routed = plan.token_to_row >= 0
    weights[plan.token_to_row[routed]] = topk_weights[routed]
    return weights
