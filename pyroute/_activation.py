"""The MoE layer's own ops: the activation between the two GEMMs and the experts' biases, on whichever floor.

Callers are the layer in moe.py, which has validated; here are the allocation and the choice of floor.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from . import _backend, _check
from ._array import moe as _array
from ._array.moe import GELU_GATE, RELU2, SWISH_GATE, ActivationProgram, ExpertRows
from ._device import activation as _device

Array = Any
Activation = Literal["swiglu", "swiglu_clamp", "swiglu_oai", "geglu", "relu2"]

PROGRAMS = {
    "swiglu": ActivationProgram(SWISH_GATE),
    "swiglu_clamp": ActivationProgram(SWISH_GATE, limit=10.0),  # DeepSeek-V4
    "swiglu_oai": ActivationProgram(SWISH_GATE, alpha=1.702, limit=7.0, up_offset=1.0),  # gpt-oss
    "geglu": ActivationProgram(GELU_GATE),  # Grok, Gemma: the tanh form
    "relu2": ActivationProgram(RELU2),  # Nemotron-H
}
_WITH_LIMIT = ("swiglu_clamp", "swiglu_oai")


def activation_program(function: str, activation: Any, limit: Any, alpha: Any) -> ActivationProgram:
    """The named activation with the caller's ``limit`` and ``alpha``, which only some activations have."""
    program = PROGRAMS[_check.one_of(function, "activation", activation, tuple(PROGRAMS))]
    if limit is not None:
        if activation not in _WITH_LIMIT:
            raise _check.value_error(function, "limit", f"None with activation '{activation}'", limit)
        program = program._replace(limit=_check.real(function, "limit", limit, minimum=0.0))
    if alpha is not None:
        if activation != "swiglu_oai":
            raise _check.value_error(function, "alpha", f"None with activation '{activation}'", alpha)
        program = program._replace(alpha=_check.real(function, "alpha", alpha))
    return program


def activate(
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
    backend: str,
) -> Array:
    """``act(gate_up + bias) * row_weights``: [R, 2I] (relu2: [R, I]) to [R, I] of the same dtype."""
    match backend:
        case "cpu":
            hidden = _backend.empty((gate_up.shape[0], gate_up.shape[1] // (1 + program.gated)), gate_up.dtype)
            _backend.core.moe_activate(gate_up, bias, *experts, row_weights, program, hidden)
            return hidden
        case "cuda":
            return _device.activate(gate_up, bias, experts, row_weights, program)
        case _:
            with np.errstate(all="ignore"):
                xp = _backend.array_module(gate_up)
                return _array.activate(xp, gate_up, bias, experts, row_weights, program)


def activate_backward(
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
    grad_hidden: Array,
    backend: str,
) -> tuple[Array, Array, Array]:
    """``(hidden, grad_gate_up, grad_row_weights)``; hidden has the forward's bytes.

    grad_row_weights [R] float32 is ``<grad_hidden, act(gate_up + bias)>``, with or without row weights: eight lanes,
    lane l adding elements l, l + 8, ..., then the tree 4, 2, 1.
    """
    match backend:
        case "cpu":
            hidden = _backend.empty(grad_hidden.shape, grad_hidden.dtype)
            grad_gate_up = _backend.empty(gate_up.shape, gate_up.dtype)
            dots = _backend.empty(gate_up.shape[:1], np.float32)
            _backend.core.moe_activate_backward(
                gate_up, bias, *experts, row_weights, program, grad_hidden, hidden, grad_gate_up, dots
            )
            return hidden, grad_gate_up, dots
        case "cuda":
            return _device.activate_backward(gate_up, bias, experts, row_weights, program, grad_hidden)
        case _:
            with np.errstate(all="ignore"):
                xp = _backend.array_module(gate_up)
                return _array.activate_backward(xp, gate_up, bias, experts, row_weights, program, grad_hidden)


def add_bias(rows: Array, bias: Array, experts: ExpertRows, row_weights: Array | None, backend: str) -> None:
    """``rows += row_weights * bias`` of each row's expert, [R, N], in place; padding rows are zero and stay so."""
    match backend:
        case "cpu":
            _backend.core.moe_add_bias(rows, bias, *experts, row_weights)
        case "cuda":
            _device.add_bias(rows, bias, experts, row_weights)
        case _:
            with np.errstate(all="ignore"):
                rows[...] = _array.add_bias(_backend.array_module(rows), rows, bias, experts, row_weights)


def add_bias_dots(rows: Array, bias: Array, experts: ExpertRows, dots: Array, backend: str) -> Array:
    """``dots[r] + <rows[r], bias>`` of each row's expert, [R] float32; ``dots`` must be the caller's own."""
    match backend:
        case "cpu":
            _backend.core.moe_add_bias_dots(rows, bias, *experts, dots)
            return dots
        case "cuda":
            return _device.add_bias_dots(rows, bias, experts, dots)
        case _:
            with np.errstate(all="ignore"):
                return _array.add_bias_dots(_backend.array_module(rows), rows, bias, experts, dots)


def bias_grad(rows: Array, experts: ExpertRows, row_weights: Array | None, backend: str) -> Array:
    """Sum of ``row_weights * rows`` over each expert's rows, [E, N] float32; exactly 0 for an expert without rows.

    float64 sums in row order, rounded once.
    """
    match backend:
        case "cpu":
            grad = _backend.empty((experts.expert_offsets.shape[0] - 1, rows.shape[1]), np.float32)
            _backend.core.moe_bias_grad(rows, *experts, row_weights, grad)
            return grad
        case "cuda":
            grad = _backend.empty_beside(rows, (experts.expert_offsets.shape[0] - 1, rows.shape[1]), np.float32)
            _device.bias_grad(rows, experts, row_weights, grad, False)
            return grad
        case _:
            with np.errstate(all="ignore"):
                return _array.bias_grad(_backend.array_module(rows), rows, experts, row_weights)
