"""The MoE layer for tensors: one op forward, one backward."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import _check
from .. import moe as core
from .._activation import Activation, activation_program
from .._moe_arguments import Layer, MoeGradients, WeightOn, check_layer
from ..quantization import ScaleFormat
from ..route_plan import plan_routes
from ._fp8_weights import fp8_weight, frozen_weight
from ._library import define, goes_direct
from ._tensors import array, check_tensors, float32_array, ids_array, on_host, optional_array, tensor
from .grouped_gemm import Operand, autocast_float
from .quantization import Fp8Tensor, fp8_array

Precision = Literal["fp8", "fp8_ue8m0"]

SCALE_FORMATS: dict[str, ScaleFormat] = {"fp8": "float32", "fp8_ue8m0": "ue8m0"}
_NAMES = (
    "x", "topk_idx", "topk_weights", "w_gate_up", "w_gate_up_scales", "w_down", "w_down_scales", "b_gate_up", "b_down",
)  # fmt: skip


def moe_forward(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, w_gate_up: Operand, w_down: Operand, *,
    b_gate_up: Tensor | None = None, b_down: Tensor | None = None, activation: Activation = "swiglu",
    limit: float | None = None, alpha: float | None = None, weight_on: WeightOn = "output",
    quantize_activations: bool | ScaleFormat = False, precision: Precision | None = None,
) -> Tensor:  # fmt: skip
    """:func:`pyroute.moe_forward` on tensors, with every gradient.

    Parameters
    ----------
    x : float32 or bfloat16 [num_tokens, hidden]
    topk_idx : integer [num_tokens, top_k], -1 is not routed
    topk_weights : any floating type [num_tokens, top_k], used as float32
    w_gate_up, w_down : float32, bfloat16 or Fp8Tensor
    precision : {None, "fp8", "fp8_ue8m0"}
        None: that of the arguments. "fp8": DeepSeek-V3's training recipe on wide weights. All operands of every GEMM,
        forward and backward, are e4m3 with block scales: weights 128x128, activations and gradients 1x128, both
        operands of a weight gradient 128x1 along an expert's own rows. Sums are float32; gradients pass straight
        through the quantisation to the wide weights. "fp8_ue8m0": the same with powers of two as scales
        (DeepSeek-V3.1).
    others
        As in the core.

    Returns
    -------
    [num_tokens, hidden] of x's dtype

    Notes
    -----
    Where a gradient is to be recorded, the rows between the first GEMM and the activation are kept for it:
    ``num_tokens * top_k * 2 * intermediate`` elements of x's type; the rest is computed again. The gradients of the
    weights are summed in float32 and rounded once to their type. Under autocast float32 x, weights and biases are cast;
    ``topk_weights`` are not, nor are weights that ``precision`` quantises. Those keep their codes, a byte per element,
    until they change; see :func:`forget_fp8_weights`.
    """
    w_gate_up, scales, block = w_gate_up if isinstance(w_gate_up, Fp8Tensor) else (w_gate_up, None, (1, 128))
    w_down, down_scales, down_block = w_down if isinstance(w_down, Fp8Tensor) else (w_down, None, (1, 128))
    tensors = (x, topk_idx, topk_weights, w_gate_up, scales, w_down, down_scales, b_gate_up, b_down)
    if isinstance(quantize_activations, bool):
        quantize_activations = "float32" if quantize_activations else ""  # type: ignore[assignment]
    if check_precision("moe_forward", precision) and quantize_activations:
        raise _check.value_error("moe_forward", "quantize_activations", f"False with precision '{precision}'", "True")
    options = (block, down_block, activation, limit, alpha, weight_on, quantize_activations, precision or "")
    if goes_direct(*tensors):
        return moe_kernel(*tensors, *options)
    check_tensors("moe_forward", "x", **dict(zip(_NAMES, tensors, strict=True)))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _moe_forward_saved(*tensors, *options)[0]
    return _moe_forward(*tensors, *options)


def check_precision(function: str, precision: Any) -> Precision | None:
    chosen: Precision | None = _check.one_of(function, "precision", precision, (None, *SCALE_FORMATS))
    return chosen


def _autocast(dtype: torch.dtype, x: Tensor, *args: Any) -> tuple[Any, ...]:
    ids, weights, w_gate_up, scales, w_down, down_scales, *rest = args
    b_gate_up, b_down, *options = rest
    x, b_gate_up, b_down = (autocast_float(dtype, t) for t in (x, b_gate_up, b_down))
    if not options[-1]:
        w_gate_up, w_down = (autocast_float(dtype, w) for w in (w_gate_up, w_down))
    return (x, ids, weights, w_gate_up, scales, w_down, down_scales, b_gate_up, b_down, *options)


def _weight(
    function: str, argument: str, w: Tensor, scales: Tensor | None, block: Any, precision: str, for_dgrad: bool
) -> Any:
    if scales is not None:
        q = fp8_array(function, argument, w, scales, block)
        return frozen_weight(w, q) if precision and for_dgrad else q  # else gradients are wide, which read it as it is
    if precision:
        return fp8_weight(function, argument, w, SCALE_FORMATS[precision], for_dgrad)
    return array(function, argument, w)


def _arguments(
    function: str, tensors: tuple[Any, ...], options: tuple[Any, ...], wanted: list[str] | None = None
) -> tuple[tuple[Any, ...], Any, Any, Any]:
    """The core's positional arguments, its biases, and the format of quantised activations or False.

    ``wanted``: the gradients that these are for; that of x takes a dgrad by w_gate_up, each takes one by w_down.
    """
    block, down_block, *_, quantize, precision = options
    x, topk_idx, topk_weights, w_gate_up, scales, w_down, down_scales, b_gate_up, b_down = tensors
    positional = (
        array(function, "x", x),
        ids_array(function, "topk_idx", topk_idx),
        float32_array(function, "topk_weights", topk_weights),
        _weight(function, "w_gate_up", w_gate_up, scales, block, precision, "x" in (wanted or ())),
        _weight(function, "w_down", w_down, down_scales, down_block, precision, wanted is not None),
    )
    biases = optional_array(function, "b_gate_up", b_gate_up), optional_array(function, "b_down", b_down)
    return positional, *biases, SCALE_FORMATS.get(precision) or quantize or False


def _forward(args: tuple[Any, ...], return_saved: bool, x_row: Tensor | None) -> Any:
    _, _, activation, limit, alpha, weight_on, _, precision = args[9:]
    positional, b_gate_up, b_down, quantize = _arguments("moe_forward", args[:9], args[9:])
    if x_row is not None:
        layer = _layer_of("moe_forward", positional, (b_gate_up, b_down), args[9:], quantize, x_row)
        return core.forward_of(layer, 1, return_saved, None)
    return core.moe_forward(
        *positional, b_gate_up=b_gate_up, b_down=b_down, activation=activation, limit=limit, alpha=alpha,
        weight_on=weight_on, quantize_activations=quantize, quantize_gradients=bool(precision),
        return_saved=return_saved,
    )  # fmt: skip


def _layer_of(
    function: str, positional: Any, biases: Any, options: tuple[Any, ...], quantize: Any, x_row: Tensor | None
) -> Layer:
    _, _, activation, limit, alpha, weight_on, _, precision = options
    x, topk_idx, topk_weights, *weights = positional
    return check_layer(
        function, x, topk_idx, topk_weights, (weights[0], weights[1]), biases, None,
        activation_program(function, activation, limit, alpha), weight_on, quantize, bool(precision),
        optional_array(function, "x_row", x_row),
    )  # fmt: skip


def shares_rows(x: Tensor, precision: str | None) -> bool:
    """Whether the kernels below take an ``x_row`` for such rows: the row of x that each token has."""
    return on_host(x) and core.shares_rows(array("moe_forward", "x", x), bool(precision))


def moe_kernel(*args: Any, x_row: Tensor | None = None) -> Tensor:
    return tensor(_forward(args, False, x_row))


def _moe_fake(x: Tensor, *args: Any) -> Tensor:
    check_tensors("moe_forward", "x", **dict(zip(_NAMES, (x, *args[:8]), strict=True)))
    return x.new_empty(x.shape)


def saved_kernel(*args: Any, x_row: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y, saved = _forward(args, True, x_row)
    gate_up, slots = saved.gate_up, args[1].numel()
    if gate_up.shape[0] < slots:  # slots that are not routed have no row: the static shape has one for each
        missing = np.zeros((slots - gate_up.shape[0], gate_up.shape[1]), gate_up.dtype)
        gate_up = np.concatenate([gate_up, missing])
    return tensor(y), tensor(gate_up)


def _saved_fake(x: Tensor, topk_idx: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = topk_idx.shape
    return _moe_fake(x, topk_idx, *args), x.new_empty((num_tokens * top_k, args[1].shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[9:]
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.set_materialize_grads(False)  # nobody differentiates gate_up: no zeros of its size


def _grad(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, gate_up = ctx.saved_tensors
    wanted = [name for name in MoeGradients._fields if ctx.needs_input_grad[_NAMES.index(name)]]
    grads = _moe_backward(grad_y, gate_up, *tensors, *ctx.options, ",".join(wanted))
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for name, grad in zip(MoeGradients._fields, grads, strict=True):
        if name in wanted:
            place = _NAMES.index(name)
            result[place] = grad.to(tensors[place].dtype)
    return tuple(result)


def backward_kernel(grad_y: Tensor, gate_up: Tensor, *args: Any, x_row: Tensor | None = None) -> tuple[Tensor, ...]:
    function = "moe_backward"
    wanted = args[-1].split(",")
    positional, b_gate_up, b_down, quantize = _arguments(function, args[:9], args[9:-1], wanted)
    layer = _layer_of(function, positional, (b_gate_up, b_down), args[9:-1], quantize, x_row)
    plan = plan_routes(layer.topk_idx, layer.w_down.shape[0])
    rows = array(function, "gate_up", gate_up)[: plan.num_rows]
    saved = core.MoeSaved(layer, plan, rows)
    grads = core.moe_backward(array(function, "grad_y", grad_y), saved, wanted=tuple(filter(None, wanted)))
    empty = torch.empty(0, dtype=torch.float32, device=grad_y.device)
    return tuple(
        (empty.to(grad_y.dtype) if name == "x" else empty.clone()) if grad is None else tensor(grad)
        for name, grad in grads._asdict().items()
    )


def _backward_fake(grad_y: Tensor, gate_up: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, wanted = dict(zip(_NAMES, args[:9], strict=True)), args[-1].split(",")
    dtypes = {"x": grad_y.dtype}
    return tuple(
        grad_y.new_empty(tensors[name].shape if name in wanted else 0, dtype=dtypes.get(name, torch.float32))
        for name in MoeGradients._fields
    )


_ARGUMENTS = (
    "Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor w_gate_up, Tensor? w_gate_up_scales, Tensor w_down, "
    "Tensor? w_down_scales, Tensor? b_gate_up, Tensor? b_down, int[2] gate_up_block, int[2] down_block, "
    "str activation, float? limit, float? alpha, str weight_on, str quantize_activations, str precision"
)
_moe_backward = define(
    f"moe_backward(Tensor grad_y, Tensor gate_up, {_ARGUMENTS}, str wanted) -> (Tensor x, Tensor topk_weights, "
    "Tensor w_gate_up, Tensor w_down, Tensor b_gate_up, Tensor b_down)",
    backward_kernel,
    _backward_fake,
)
_moe_forward = define(f"moe_forward({_ARGUMENTS}) -> Tensor", moe_kernel, _moe_fake, autocast=_autocast)
_moe_forward_saved = define(
    f"moe_forward_saved({_ARGUMENTS}) -> (Tensor y, Tensor gate_up)",
    saved_kernel,
    _saved_fake,
    backward=_grad,
    save=_save,
    autocast=_autocast,
)
