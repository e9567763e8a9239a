"""The arguments of the MoE layer: what is legal, said in one sentence each when it is not."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from . import _backend, _check
from ._array.moe import ActivationProgram
from .quantization import Fp8Array, ScaleFormat

Array = Any
Operand = Any  # an array or an Fp8Array
WeightOn = Literal["output", "pre_down", "input"]

ROW_TYPES = ("float32", "bfloat16")
WEIGHT_TYPES = ("float32", "bfloat16", "float16", "float64")


class MoeGradients(NamedTuple):
    """Gradients of one MoE layer; x in its own dtype, the others float32. None: of an absent bias, or not wanted."""

    x: Array | None
    topk_weights: Array | None
    w_gate_up: Array | None
    w_down: Array | None
    b_gate_up: Array | None
    b_down: Array | None


class Layer(NamedTuple):
    """The arguments of a call after validation."""

    x: Array
    topk_idx: Array
    topk_weights: Array
    w_gate_up: Operand
    w_down: Operand
    b_gate_up: Array | None
    b_down: Array | None
    program: ActivationProgram
    weight_on: WeightOn
    scale_format: ScaleFormat | None  # of quantised activations
    quantize_gradients: bool
    backend: str
    x_row: Array | None = None  # int32 [num_tokens], the row of x that each token has; None: its own

    @property
    def gradient_format(self) -> ScaleFormat | None:
        """Of quantised gradients, and of both operands of wgrad."""
        return self.scale_format if self.quantize_gradients else None

    @property
    def by_expert(self) -> tuple[Operand, Operand, Array | None, Array | None]:
        """Weights and biases, all [num_experts, ...]."""
        return self.w_gate_up, self.w_down, self.b_gate_up, self.b_down

    def of_experts(self, experts: slice) -> Layer:
        """The same layer with some of its experts."""
        w_gate_up, w_down, b_gate_up, b_down = (None if w is None else w[experts] for w in self.by_expert)
        return self._replace(w_gate_up=w_gate_up, w_down=w_down, b_gate_up=b_gate_up, b_down=b_down)


def check_layer(
    function: str,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    weights: tuple[Any, Any],
    biases: tuple[Any, Any],
    backend: str | None,
    program: ActivationProgram,
    weight_on: Any,
    quantize_activations: Any,
    quantize_gradients: Any,
    x_row: Array | None = None,
) -> Layer:
    """Everything that can be wrong with a call, except the values of the ids and of ``x_row``."""
    x = _backend.as_array(function, "x", x, ROW_TYPES, (("num_tokens", None), ("hidden", None)))
    num_tokens, hidden = x.shape
    if x_row is not None:
        num_tokens = len(x_row)
    slots: tuple[_check.Axis, ...] = (("num_tokens", num_tokens), ("top_k", None))
    topk_idx = _backend.as_array(function, "topk_idx", topk_idx, _check.INTEGERS, slots)
    slots = (("num_tokens", num_tokens), ("top_k", topk_idx.shape[1]))
    kinds = ("float32",) if _check.is_device_array(topk_weights) else WEIGHT_TYPES  # which does no arithmetic
    topk_weights = _backend.as_array(function, "topk_weights", topk_weights, kinds, slots)
    w_down = _weight(
        function, "w_down", weights[1], (("num_experts", None), ("hidden", hidden), ("intermediate", None))
    )
    num_experts, _, intermediate = w_down.shape
    if num_experts < 1:
        raise _check.value_error(function, "w_down", "of at least one expert", list(w_down.shape))
    width = ("2 * intermediate", 2 * intermediate) if program.gated else ("intermediate", intermediate)
    w_gate_up = _weight(function, "w_gate_up", weights[0], (("num_experts", num_experts), width, ("hidden", hidden)))
    b_gate_up = _bias(function, "b_gate_up", biases[0], (("num_experts", num_experts), width))
    b_down = _bias(function, "b_down", biases[1], (("num_experts", num_experts), ("hidden", hidden)))
    _check.one_of(function, "weight_on", weight_on, ("output", "pre_down", "input"))
    scale_format = _scale_format(function, quantize_activations)
    if scale_format is not None and not (isinstance(w_gate_up, Fp8Array) and isinstance(w_down, Fp8Array)):
        expected = "False unless both weights are Fp8Arrays"
        raise _check.value_error(function, "quantize_activations", expected, repr(quantize_activations))
    if _check.one_of(function, "quantize_gradients", quantize_gradients, (False, True)) and scale_format is None:
        raise _check.value_error(function, "quantize_gradients", "False without quantize_activations", "True")
    arrays = [x, topk_idx, topk_weights, *_operand_memory(w_gate_up, w_down, b_gate_up, b_down)]
    chosen = _backend.choose(function, backend, *arrays)
    if topk_weights.dtype != _check.DTYPES["float32"]:
        with np.errstate(over="ignore"):  # float64 weights past float32 are infinite, as in every other rounding
            topk_weights = topk_weights.astype("float32")
    return Layer(
        x, topk_idx, topk_weights, w_gate_up, w_down, b_gate_up, b_down,
        program, weight_on, scale_format, quantize_gradients, chosen, x_row,
    )  # fmt: skip


def _weight(function: str, argument: str, w: Any, axes: tuple[_check.Axis, ...]) -> Operand:
    if isinstance(w, Fp8Array):
        _check.shape(function, argument, w, axes)
        return w
    return _backend.as_array(function, argument, w, ROW_TYPES, axes)


def _bias(function: str, argument: str, bias: Any, axes: tuple[_check.Axis, ...]) -> Array | None:
    return None if bias is None else _backend.as_array(function, argument, bias, ROW_TYPES, axes)


def _scale_format(function: str, quantize_activations: Any) -> ScaleFormat | None:
    chosen: bool | ScaleFormat = _check.one_of(
        function, "quantize_activations", quantize_activations, (False, True, "float32", "ue8m0")
    )
    if isinstance(chosen, bool):
        return "float32" if chosen else None
    return chosen


def check_output(function: str, argument: str, out: Any, layer: Layer, inputs: tuple[Any, ...]) -> None:
    """A caller's array for y, or for its mirror, the gradient of x."""
    axes = (("num_tokens", layer.x.shape[0]), ("hidden", layer.x.shape[1]))
    _check.output(function, argument, out, layer.x.dtype, axes, *inputs, *_memory(layer))
    _backend.check_together(function, layer.x, out)


def gradient_arrays(
    function: str, layer: Layer, out: Any, accumulate: Any, wanted: Any, inputs: tuple[Any, ...]
) -> MoeGradients:
    """An array for each gradient that is wanted: the caller's, or a fresh one."""
    if out is not None and not isinstance(out, MoeGradients):
        raise _check.type_error(function, "out", "MoeGradients", _check.describe(out))
    _check.one_of(function, "accumulate", accumulate, (False, True))
    names = MoeGradients._fields
    if wanted is None:
        wanted = names
    elif not isinstance(wanted, (tuple, list, set, frozenset)):
        raise _check.type_error(function, "wanted", "a tuple of names", _check.describe(wanted))
    for name in wanted:
        _check.one_of(function, "wanted", name, names)
    float32 = _check.DTYPES["float32"]
    arrays: list[Array | None] = []
    for name, given in zip(names, out or (None,) * len(names), strict=True):
        like = getattr(layer, name)
        if like is None or name not in wanted:
            if given is not None:
                raise _check.value_error(function, f"out.{name}", "None: it is not computed", _check.describe(given))
            arrays.append(None)
            continue
        dtype = layer.x.dtype if name == "x" else float32
        if given is not None:
            axes = tuple((f"axis {i}", extent) for i, extent in enumerate(like.shape))
            _check.output(function, f"out.{name}", given, dtype, axes, *_memory(layer), *inputs, *arrays)
            _backend.check_together(function, layer.x, given)
        elif accumulate and name not in ("x", "topk_weights"):
            raise _check.value_error(function, f"out.{name}", "an array to accumulate into", "None")
        shape = (layer.topk_idx.shape[0], like.shape[1]) if name == "x" else like.shape
        arrays.append(_backend.empty_beside(layer.x, shape, dtype) if given is None else given)
    return MoeGradients(*arrays)


def _memory(layer: Layer) -> list[Array]:
    """Every array that a layer reads."""
    return [layer.x, layer.topk_idx, layer.topk_weights, *_operand_memory(*layer.by_expert)]


def _operand_memory(*operands: Operand) -> list[Array]:
    arrays = []
    for w in operands:
        arrays += [w.codes, w.scales] if isinstance(w, Fp8Array) else [w]
    return arrays
