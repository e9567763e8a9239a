"""The MoE layer: permute, gate_up GEMM, activation, down GEMM, weighted unpermute; forward and backward."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
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
from .permutation import permute, permute_backward, permute_quantize, unpermute, unpermute_backward
from .quantization import ScaleFormat, quantize_fp8
from .route_plan import RoutePlan, plan_routes, unchecked_plan

Array = Any
Operand = Any  # an array or an Fp8Array

# The widest rows between two steps. Over 32 MiB memory comes fresh from the system each time, at 0.7 ms per MiB (glibc,
# AMD Zen 3); below, the allocator hands back what it had. Half of that leaves room for uneven experts.
PART_BYTES = 16 * 2**20


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

    def __post_init__(self) -> None:
        for name, kind in (("layer", Layer), ("plan", RoutePlan)):
            if not isinstance(getattr(self, name), kind):
                raise _check.type_error("MoeSaved", name, f"a {kind.__name__}", _check.describe(getattr(self, name)))
        layer, plan = self.layer, self.plan
        sizes = (*layer.topk_idx.shape, layer.w_down.shape[0])
        if (*plan.token_to_row.shape, plan.num_experts) != sizes:
            got = f"one of {plan.num_tokens}, {plan.top_k} and {plan.num_experts}"
            expected = "the plan of {} tokens, {} slots and {} experts".format(*sizes)
            raise _check.value_error("MoeSaved", "plan", expected, got)
        axes = (("num_rows", plan.num_rows), ("gate_up", layer.w_gate_up.shape[1]))
        gate_up = _backend.as_array("MoeSaved", "gate_up", self.gate_up, (_check.DTYPE_NAMES[layer.x.dtype],), axes)
        object.__setattr__(self, "gate_up", gate_up)

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
    in use. Memory: a row of ``hidden`` elements per slot (with return_saved a ``gate_up`` row too); the rest works
    through the experts in runs of at most 16 MiB per buffer, unless one expert's rows alone are more.
    """
    layer = check_layer(
        "moe_forward", x, topk_idx, topk_weights, (w_gate_up, w_down), (b_gate_up, b_down), backend,
        activation_program("moe_forward", activation, limit, alpha), weight_on, quantize_activations,
    )  # fmt: skip
    alignment = _check.integer("moe_forward", "alignment", alignment, 1, 2**31 - 1)
    _check.one_of("moe_forward", "return_saved", return_saved, (False, True))

    on = layer.backend
    try:
        plan = plan_routes(layer.topk_idx, layer.w_down.shape[0], alignment=alignment, backend=on)
    except ValueError as error:  # an id out of range, or too many rows: the arguments have the same names here
        raise ValueError(str(error).replace("plan_routes", "moe_forward", 1)) from None
    results = _backend.empty_beside(layer.x, (plan.num_rows, layer.x.shape[1]), layer.x.dtype)
    gate_up = None
    if return_saved:
        gate_up = _backend.empty_beside(layer.x, (plan.num_rows, layer.w_gate_up.shape[1]), layer.x.dtype)
    for part in _parts(layer, plan):
        _forward_part(part, None if gate_up is None else gate_up[part.rows], results[part.rows])
    y = unpermute(results, plan, layer.topk_weights if weight_on == "output" else None, backend=on)
    return y if gate_up is None else (y, MoeSaved(layer, plan, gate_up))


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
    Memory: a row of ``hidden`` elements per slot, the rest in runs of experts as in the forward pass.
    """
    if not isinstance(saved, MoeSaved):
        raise _check.type_error("moe_backward", "saved", "a MoeSaved", _check.describe(saved))
    layer, plan = saved.layer, saved.plan
    tokens, hidden = layer.x.shape
    axes = (("num_tokens", tokens), ("hidden", hidden))
    grad_y = _backend.as_array("moe_backward", "grad_y", grad_y, (_check.DTYPE_NAMES[layer.x.dtype],), axes)
    _backend.choose("moe_backward", None, grad_y, layer.x)

    xp, on = _backend.array_module(layer.x), layer.backend
    like = [None if w is None else _backend.empty_beside(layer.x, w.shape, xp.float32) for w in layer.by_expert]
    grads = MoeGradients(None, xp.zeros(layer.topk_weights.shape, xp.float32), *like)
    grad_rows = _backend.empty_beside(layer.x, (plan.num_rows, hidden), layer.x.dtype)
    for part in _parts(layer, plan):
        _backward_part(part, grad_y, saved.gate_up[part.rows], grads, grad_rows[part.rows])
    if layer.weight_on == "input":
        return grads._replace(x=unpermute(grad_rows, plan, layer.topk_weights, backend=on))
    return grads._replace(x=permute_backward(grad_rows, plan, backend=on))


class _Part(NamedTuple):
    """A run of experts and their rows, as a layer and a plan of its own."""

    layer: Layer
    plan: RoutePlan
    experts: slice  # of the whole layer
    rows: slice  # of the whole plan


def _parts(layer: Layer, plan: RoutePlan) -> Iterator[_Part]:
    """Runs of whole experts whose rows fill at most PART_BYTES, or one expert where it alone fills more."""
    num_experts, num_rows = plan.num_experts, plan.num_rows
    most = PART_BYTES // (max(layer.x.shape[1], layer.w_gate_up.shape[1]) * layer.x.dtype.itemsize or 1)
    if num_rows <= most:
        yield _Part(layer, plan, slice(0, num_experts), slice(0, num_rows))
        return
    xp, starts = _backend.array_module(layer.x), plan.expert_offsets.tolist()
    first = 0
    while first < num_experts:
        last = max(first + 1, bisect.bisect_right(starts, starts[first] + most) - 1)
        experts, rows = slice(first, last), slice(starts[first], starts[last])
        inside = (plan.token_to_row >= rows.start) & (plan.token_to_row < rows.stop)
        yield _Part(
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


def _forward_part(part: _Part, gate_up: Array | None, results: Array) -> None:
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


def _backward_part(part: _Part, grad_y: Array, gate_up: Array, grads: MoeGradients, grad_rows: Array) -> None:
    """Fill these experts' entries of ``grads`` and their rows of the gradient of x."""
    layer, plan = part.layer, part.plan
    dtype, on, offsets = layer.x.dtype, layer.backend, plan.expert_offsets
    experts = ExpertRows(offsets, plan.row_to_token)
    row_weights = None if layer.weight_on == "input" else _row_weights(layer.topk_weights, plan)
    grad_results = permute(grad_y, plan, backend=on)
    grad_hidden = grouped_gemm_dgrad(grad_results, layer.w_down, offsets, out_dtype=dtype, backend=on)
    hidden, grad_gate_up, grad_row_weights = activate_backward(
        gate_up, layer.b_gate_up, experts, row_weights, layer.program, grad_hidden, on
    )
    grouped_gemm_wgrad(grad_results, hidden, offsets, out=grads.w_down[part.experts], backend=on)
    if grads.b_down is not None:
        grads.b_down[part.experts] = bias_grad(grad_results, experts, row_weights, on)
        grad_row_weights = add_bias_dots(grad_results, layer.b_down, experts, grad_row_weights, on)
    if grads.b_gate_up is not None:
        grads.b_gate_up[part.experts] = bias_grad(grad_gate_up, experts, None, on)
    grouped_gemm_dgrad(grad_gate_up, layer.w_gate_up, offsets, out=grad_rows, backend=on)
    routed = plan.token_to_row >= 0
    if layer.weight_on == "input":
        rows, by_slot = unpermute_backward(layer.x, grad_rows, plan, layer.topk_weights, backend=on)
        grads.topk_weights[routed] = by_slot[routed]
    else:
        rows = permute(layer.x, plan, backend=on)
        grads.topk_weights[routed] = grad_row_weights[plan.token_to_row[routed]]
    grouped_gemm_wgrad(grad_gate_up, rows, offsets, out=grads.w_gate_up[part.experts], backend=on)


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
