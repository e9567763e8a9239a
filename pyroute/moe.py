"""The MoE layer: permute, gate_up GEMM, activation, down GEMM, weighted unpermute; forward and backward."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import _backend, _check, _moe_parts
from ._activation import Activation, activation_program
from ._device import moe as _device
from ._moe_arguments import Layer, MoeGradients, WeightOn, check_layer, check_output, gradient_arrays
from .quantization import Fp8Array, ScaleFormat
from .route_plan import RoutePlan, plan_routes

Array = Any
Operand = Any  # an array or an Fp8Array

# The widest rows between two steps. A bound for memory: with 8, 16 and 64 MiB a layer of 64 experts and 512 tokens
# takes the same time, forward and backward (Zen 4, two threads).
PART_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class MoeSaved:
    """What :func:`moe_backward` needs of one forward call; made by ``moe_forward(..., return_saved=True)``.

    Of its own it holds the plan and ``gate_up``, the rows between the first GEMM and the activation: per token
    ``top_k * (2 * intermediate * itemsize + 8)`` bytes, padding aside. On a GPU rows of ``gate_up`` past
    ``plan.expert_offsets[-1]`` are not written and hold anything. x, the weights and the biases are the caller's
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
    quantize_gradients: bool = False,
    alignment: int = 1,
    return_saved: bool = False,
    out: Any = None,
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
    quantize_gradients : bool
        The same for :func:`moe_backward`, which makes it that recipe for training: gradients are quantised with 1x128
        blocks before each dgrad, and both operands of each wgrad with 128x1 blocks along an expert's own rows.
    alignment : int
        Each expert's rows are padded to a multiple of this. Changes no result.
    return_saved : bool
        Return ``(y, saved)`` for :func:`moe_backward`.
    out : array [num_tokens, hidden] of x's dtype, optional
        C-contiguous; every element is written. Must not overlap an input.
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
    given = (x, topk_idx, topk_weights, w_gate_up, w_down, b_gate_up, b_down)
    layer = check_layer(
        "moe_forward", x, topk_idx, topk_weights, (w_gate_up, w_down), (b_gate_up, b_down), backend,
        activation_program("moe_forward", activation, limit, alpha), weight_on, quantize_activations,
        quantize_gradients,
    )  # fmt: skip
    alignment = _check.integer("moe_forward", "alignment", alignment, 1, 2**31 - 1)
    _check.one_of("moe_forward", "return_saved", return_saved, (False, True))

    if out is not None:
        check_output("moe_forward", "out", out, layer, given)
    return forward_of(layer, alignment, return_saved, out)


def forward_of(layer: Layer, alignment: int, return_saved: bool, out: Any) -> Any:
    """:func:`moe_forward` of checked arguments.

    Tokens that share rows of x by ``layer.x_row`` share those of :func:`moe_backward`'s ``grad_y`` too; their gradients
    of x are their own. See :func:`shares_rows`.
    """
    try:
        plan = plan_routes(layer.topk_idx, layer.w_down.shape[0], alignment=alignment, backend=layer.backend)
    except ValueError as error:  # an id out of range, or too many rows: the arguments have the same names here
        raise ValueError(str(error).replace("plan_routes", "moe_forward", 1)) from None
    x, gate_up = layer.x, None
    if return_saved:
        gate_up = _backend.empty_beside(x, (plan.num_rows, layer.w_gate_up.shape[1]), x.dtype)
    y = _backend.empty_beside(x, (plan.num_tokens, x.shape[1]), x.dtype) if out is None else out
    match layer.backend:
        case "cpu":
            _backend.core.moe_forward(_native_layer(layer), *_native_plan(layer, plan), gate_up, y)
        case "cuda":
            _device.forward(layer, plan, gate_up, y)
        case _:
            _moe_parts.forward(layer, plan, gate_up, y, PART_BYTES)
    return y if gate_up is None else (y, MoeSaved(layer, plan, gate_up))


def shares_rows(x: Array, quantized: bool) -> bool:
    """Whether tokens can share rows of such an x here, with weights that are not on the input and alignment 1."""
    return not quantized and _backend.choose("moe_forward", None, x) == "cpu"


def moe_backward(
    grad_y: Any,
    saved: MoeSaved,
    *,
    out: MoeGradients | None = None,
    accumulate: bool = False,
    wanted: tuple[str, ...] | None = None,
) -> MoeGradients:
    """Gradients of :func:`moe_forward` with respect to everything that is not an id.

    Parameters
    ----------
    grad_y : [num_tokens, hidden] of x's dtype
    saved : MoeSaved
        From the forward call; not changed, so a second call gives the same bytes.
    out : MoeGradients, optional
        Arrays to write: C-contiguous, of each gradient's shape and dtype, sharing memory with nothing else. A fresh
        array takes the place of every None. Weight gradients are as large as float32 weights, and the first write to
        fresh memory costs more than computing them: a training loop passes those of the step before.
    accumulate : bool
        Add the gradients of the weights and biases to what ``out`` holds, ``new = old + gradient`` with one rounding
        per element; experts without rows keep their bytes. Those of x and topk_weights are this call's alone.
    wanted : names of MoeGradients, optional
        What to compute, the rest being None: ``("x", "topk_weights")`` for frozen experts takes half the operations.

    Returns
    -------
    MoeGradients
        Slots that are not routed have gradient exactly 0, and so have the weights of experts without tokens. Where a
        clamp of the activation is active the gradient through it is 0; at ``gate == limit`` and ``|up| == limit`` it
        still passes.

    Notes
    -----
    Quantised activations are passed straight through: the gradients are those of the layer without their
    quantisation, at the forward's ``gate_up``, and the weight gradients multiply rows of x's dtype, or with the
    forward's ``quantize_gradients`` what those rows are in FP8. FP8 weights take part as their dequantised values, and
    their gradients are float32 with respect to those.

    ``"output"`` and ``"pre_down"`` share one path: ``<grad_y, w_down @ h> = <w_down.T @ grad_y, h>``, so the weight's
    gradient is a dot of ``intermediate`` elements and no expert's result is kept or computed again. Rows in between
    have x's dtype. Cost: twice the forward's operations, one read of the weights and one write of their gradients.
    Memory: a row of ``hidden`` elements per slot, the rest in runs of experts as in the forward pass.
    """
    if not isinstance(saved, MoeSaved):
        raise _check.type_error("moe_backward", "saved", "a MoeSaved", _check.describe(saved))
    layer, plan, given = saved.layer, saved.plan, grad_y
    axes = (("num_tokens", layer.x.shape[0]), ("hidden", layer.x.shape[1]))
    grad_y = _backend.as_array("moe_backward", "grad_y", grad_y, (_check.DTYPE_NAMES[layer.x.dtype],), axes)
    _backend.choose("moe_backward", None, grad_y, layer.x)
    inputs = (given, grad_y, saved.gate_up, plan.expert_offsets, plan.row_to_token, plan.token_to_row)
    grads = gradient_arrays("moe_backward", layer, out, accumulate, wanted, inputs)
    match layer.backend:
        case "cpu" if not layer.quantize_gradients:
            _backend.core.moe_backward(
                _native_layer(layer), *_native_plan(layer, plan), saved.gate_up, grad_y, tuple(grads), accumulate
            )
        case "cuda":
            _device.backward(layer, plan, saved.gate_up, grad_y, grads, accumulate)
        case _:
            _moe_parts.backward(layer, plan, saved.gate_up, grad_y, grads, accumulate, PART_BYTES)
    return grads


def _native_layer(layer: Layer) -> tuple[Any, ...]:
    """What csrc/bindings/moe_layer.cpp takes apart."""
    weights = (_native(layer.w_gate_up), _native(layer.w_down))
    rest = (layer.b_gate_up, layer.b_down, layer.program, layer.weight_on, layer.scale_format, PART_BYTES)
    return (layer.x, layer.topk_weights, *weights, *rest)


def _native(w: Operand) -> Any:
    return (w.codes, w.format, w.scales, *w.block) if isinstance(w, Fp8Array) else w


def _native_plan(layer: Layer, plan: RoutePlan) -> tuple[Array, ...]:
    rows = plan.row_to_token if layer.x_row is None else layer.x_row[plan.row_to_token]
    return plan.expert_offsets, rows, plan.token_to_row
