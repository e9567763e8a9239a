"""The MoE layer: permute, gate_up GEMM, activation, down GEMM, weighted unpermute; forward and backward."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from . import _backend, _check
from ._activation import (
    Activation,
    activate,
    activate_backward,
    activation_program,
    add_bias,
    add_bias_dots,
    bias_grad,
)
from ._array.moe import ExpertRows
from ._moe_arguments import Layer, WeightOn, check_layer
from .grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from .permutation import permute, permute_backward, permute_quantize, plan_routes, unpermute, unpermute_backward
from .quantization import ScaleFormat, quantize_fp8
from .route_plan import RoutePlan

Array = Any
Operand = Any  # an array or an Fp8Array


@dataclasses.dataclass(frozen=True, eq=False)
class MoeSaved:
    """What :func:`moe_backward` needs of one forward call; made by ``moe_forward(..., return_saved=True)``.

    Of its own it holds the plan and ``gate_up``, the rows between the first GEMM and the activation: per token
    ``top_k * (2 * intermediate * itemsize + 8)`` bytes, padding aside. x, the weights and the biases are the caller's
    arrays and must not change before the backward pass; everything else is computed again.
    """

    layer: Layer = dataclasses.field(repr=False)
    plan: RoutePlan = dataclasses.field(repr=False)
    gate_up: Array = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the caller's arrays."""
        plan = self.plan
        maps = (plan.tokens_per_expert, plan.expert_offsets, plan.row_to_token, plan.token_to_row)
        return int(self.gate_up.nbytes + sum(array.nbytes for array in maps))


class MoeGradients(NamedTuple):
    """Gradients of one MoE layer; x in its own dtype, the others float32, those of absent biases None."""

    x: Array
    topk_weights: Array
    w_gate_up: Array
    w_down: Array
    b_gate_up: Array | None
    b_down: Array | None


def moe_forward(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    w_gate_up: Any,
    w_down: Any,
    *,
    b_gate_up: Any = None,
    b_down: Any = None,
    activation: Activation = "swiglu",
    limit: float | None = None,
    alpha: float | None = None,
    weight_on: WeightOn = "output",
    quantize_activations: bool | ScaleFormat = False,
    alignment: int = 1,
    return_saved: bool = False,
    backend: str | None = None,
) -> Any:
    """Send every token through its chosen experts and add their results up by weight.

    For each slot ``(t, j)`` with expert ``e = topk_idx[t, j] >= 0``::

        gate, up = split(w_gate_up[e] @ x[t] + b_gate_up[e])
        y[t] += topk_weights[t, j] * (w_down[e] @ act(gate, up) + b_down[e])

    Parameters
    ----------
    x : float32 or bfloat16 [num_tokens, hidden]
        Its dtype is that of the rows between the steps too; arithmetic is float32 throughout. Pass float32 for float32
        rows, whatever the weights are.
    topk_idx : integer [num_tokens, top_k]
        -1 is not routed: no contribution, no gradient. An expert may appear twice in a token.
    topk_weights : float32 [num_tokens, top_k]
        Other floating types are rounded to float32.
    w_gate_up : float32, bfloat16 or Fp8Array [num_experts, 2 * intermediate, hidden]
        Gate rows first, then up rows; ``[num_experts, intermediate, hidden]`` for "relu2".
    w_down : float32, bfloat16 or Fp8Array [num_experts, hidden, intermediate]
    b_gate_up, b_down : float32 or bfloat16 [num_experts, 2 * intermediate], [num_experts, hidden], optional
    activation : {"swiglu", "swiglu_clamp", "swiglu_oai", "geglu", "relu2"}
        silu(gate) * up; the same with gate <= limit and ``|up| <= limit`` (DeepSeek-V4); gate * sigmoid(alpha * gate) *
        (up + 1), clamped (gpt-oss); gelu(gate) * up in the tanh form (Grok, Gemma); max(z, 0)**2 without a gate.
    limit : float, optional
        For "swiglu_clamp" (10.0) and "swiglu_oai" (7.0).
    alpha : float, optional
        For "swiglu_oai" (1.702).
    weight_on : {"output", "pre_down", "input"}
        Where a slot's weight multiplies: the expert's result; the activation and the down bias (the same value, as
        Megatron orders it); or the expert's input (Llama 4), which is another function.
    quantize_activations : bool or {"float32", "ue8m0"}
        Quantise x and the activations to e4m3 with 1x128 blocks and scales of this format (True: "float32") before each
        GEMM: DeepSeek-V3's recipe. The weights must be Fp8Arrays.
    alignment : int
        Each expert's rows are padded to a multiple of this. Changes no result.
    return_saved : bool
        Return ``(y, saved)`` for :func:`moe_backward`.
    backend : str, optional

    Returns
    -------
    [num_tokens, hidden] of x's dtype, or ``(y, MoeSaved)``
        A token's bytes depend on its own row, ids and weights alone. A token without experts gets a zero row.

    Raises
    ------
    TypeError, ValueError
        In one sentence, before any work.

    Notes
    -----
    Cost: ``6 * hidden * intermediate`` floating-point operations per slot, and one read of the weights of the experts
    in use. Largest memory: rows of ``2 * hidden + 3 * intermediate`` elements per slot, less what is freed on the way.
    """
    layer = check_layer(
        "moe_forward", x, topk_idx, topk_weights, (w_gate_up, w_down), (b_gate_up, b_down), backend,
        activation_program("moe_forward", activation, limit, alpha), weight_on, quantize_activations,
    )  # fmt: skip
    alignment = _check.integer("moe_forward", "alignment", alignment, 1, 2**31 - 1)
    _check.one_of("moe_forward", "return_saved", return_saved, (False, True))

    dtype, on = layer.x.dtype.name, layer.backend
    plan = plan_routes(layer.topk_idx, layer.w_down.shape[0], alignment=alignment, backend=on)
    experts = ExpertRows(plan.expert_offsets, plan.row_to_token)
    offsets = plan.expert_offsets
    gate_up = grouped_gemm(_rows(layer, plan), layer.w_gate_up, offsets, out_dtype=dtype, backend=on)
    before_down = _row_weights(layer.topk_weights, plan) if weight_on == "pre_down" else None
    hidden = activate(gate_up, layer.b_gate_up, experts, before_down, layer.program, on)
    if layer.scale_format is not None:
        hidden = quantize_fp8(hidden, scale_format=layer.scale_format, backend=on)
    rows = grouped_gemm(hidden, layer.w_down, offsets, out_dtype=dtype, backend=on)
    if layer.b_down is not None:
        rows = add_bias(rows, layer.b_down, experts, before_down, on)
    y = unpermute(rows, plan, layer.topk_weights if weight_on == "output" else None, backend=on)
    return (y, MoeSaved(layer, plan, gate_up)) if return_saved else y


def moe_backward(grad_y: Any, saved: MoeSaved) -> MoeGradients:
    """Gradients of :func:`moe_forward` with respect to everything that is not an id.

    Parameters
    ----------
    grad_y : [num_tokens, hidden] of x's dtype
    saved : MoeSaved
        From the forward call; not changed, so a second call gives the same bytes.

    Returns
    -------
    MoeGradients
        Slots that are not routed have gradient exactly 0, and so have the weights of experts without tokens. Where a
        clamp of the activation is active the gradient through it is 0; at ``gate == limit`` and ``|up| == limit`` it
        still passes.

    Notes
    -----
    Quantised activations are passed straight through: the gradients are those of the layer without their
    quantisation, at the forward's ``gate_up``, and the weight gradients multiply rows of x's dtype. FP8 weights take
    part as their dequantised values, and their gradients are float32 with respect to those.

    ``"output"`` and ``"pre_down"`` share one path: ``<grad_y, w_down @ h> = <w_down.T @ grad_y, h>``, so the weight's
    gradient is a dot of ``intermediate`` elements and no expert's result is kept or computed again. Rows in between
    have x's dtype. Cost: twice the forward's operations, one read of the weights and one write of their gradients.
    """
    if not isinstance(saved, MoeSaved):
        raise _check.type_error("moe_backward", "saved", "a MoeSaved", _check.describe(saved))
    layer, plan = saved.layer, saved.plan
    grad_y = _backend.as_array("moe_backward", "grad_y", grad_y)
    tokens, hidden_size = layer.x.shape
    _check.array(
        "moe_backward", "grad_y", grad_y, (layer.x.dtype.name,), (("num_tokens", tokens), ("hidden", hidden_size))
    )
    _backend.choose("moe_backward", None, grad_y, layer.x)

    dtype, on, offsets = layer.x.dtype.name, layer.backend, plan.expert_offsets
    experts = ExpertRows(offsets, plan.row_to_token)
    row_weights = None if layer.weight_on == "input" else _row_weights(layer.topk_weights, plan)
    grad_results = permute(grad_y, plan, backend=on)
    grad_hidden = grouped_gemm_dgrad(grad_results, layer.w_down, offsets, out_dtype=dtype, backend=on)
    hidden, grad_gate_up, grad_row_weights = activate_backward(
        saved.gate_up, layer.b_gate_up, experts, row_weights, layer.program, grad_hidden, on
    )
    grad_w_down = grouped_gemm_wgrad(grad_results, hidden, offsets, backend=on)
    grad_b_gate_up = grad_b_down = None
    if layer.b_down is not None:
        grad_b_down = bias_grad(grad_results, experts, row_weights, on)
        grad_row_weights = add_bias_dots(grad_results, layer.b_down, experts, grad_row_weights, on)
    if layer.b_gate_up is not None:
        grad_b_gate_up = bias_grad(grad_gate_up, experts, None, on)
    grad_rows = grouped_gemm_dgrad(grad_gate_up, layer.w_gate_up, offsets, out_dtype=dtype, backend=on)
    if layer.weight_on == "input":
        rows, grad_topk_weights = unpermute_backward(layer.x, grad_rows, plan, layer.topk_weights, backend=on)
        grad_x = unpermute(grad_rows, plan, layer.topk_weights, backend=on)
    else:
        rows, grad_topk_weights = permute(layer.x, plan, backend=on), _slot_values(grad_row_weights, plan)
        grad_x = permute_backward(grad_rows, plan, backend=on)
    grad_w_gate_up = grouped_gemm_wgrad(grad_gate_up, rows, offsets, backend=on)
    return MoeGradients(grad_x, grad_topk_weights, grad_w_gate_up, grad_w_down, grad_b_gate_up, grad_b_down)


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


def _slot_values(values: Array, plan: RoutePlan) -> Array:
    """The value of each slot's row, [T, k] float32; 0 where not routed."""
    xp = _backend.array_module(values)
    slots = xp.zeros(plan.token_to_row.shape, xp.float32)
    routed = plan.token_to_row >= 0
    slots[routed] = values[plan.token_to_row[routed]]
    return slots
