"""The MoE layer's own kernels on a GPU: the activation between the two GEMMs and the experts' biases."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend, _check
from .._array.moe import ActivationProgram, ExpertRows
from . import arrays
from .route_plan import maps

Array = Any


def activate(
    gate_up: Array, bias: Array | None, experts: ExpertRows, row_weights: Array | None, program: ActivationProgram
) -> Array:
    """``act(gate_up + bias) * row_weights``: [R, I] in the type of ``gate_up``."""
    hidden = arrays.empty(gate_up, (gate_up.shape[0], _inner(gate_up, program)), gate_up.dtype)
    _backend.cuda.moe_activate(*_activation(gate_up, bias, experts, row_weights, program, hidden))
    return hidden


def can_quantize(gate_up: Array, program: ActivationProgram) -> bool:
    """Whether rows allow 16-byte loads, which :func:`activate_quantize` makes."""
    return _inner(gate_up, program) % 16 == 0 and arrays.pointer(gate_up) % 16 == 0


def activate_quantize(
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
    power_of_two: bool,
) -> tuple[Array, Array]:
    """Codes and scales of quantising what :func:`activate` gives in 1x128 blocks, which is never written."""
    inner = _inner(gate_up, program)
    kind = np.uint8 if _check.is_cupy(gate_up) else _backend.FLOAT8["e4m3"]
    codes = arrays.empty(gate_up, (gate_up.shape[0], inner), kind)
    scales = arrays.empty(gate_up, (gate_up.shape[0], -(-inner // 128)), np.float32)
    place, rows, is_bf16, gate_up_at, bias_at, weights_at, _, inner, program = _activation(
        gate_up, bias, experts, row_weights, program, None
    )
    _backend.cuda.moe_activate_quantize(
        place, rows, is_bf16, gate_up_at, bias_at, weights_at, inner, program, power_of_two,
        arrays.pointer(codes), arrays.pointer(scales),
    )  # fmt: skip
    return codes, scales


def activate_backward(
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
    grad_hidden: Array,
) -> tuple[Array, Array, Array]:
    """``(hidden, grad_gate_up, grad_row_weights)``, as the CPU floor gives them."""
    hidden = arrays.empty(gate_up, grad_hidden.shape, gate_up.dtype)
    grad_gate_up = arrays.empty(gate_up, gate_up.shape, gate_up.dtype)
    dots = arrays.empty(gate_up, gate_up.shape[:1], np.float32)
    _backend.cuda.moe_activate_backward(
        *_activation(gate_up, bias, experts, row_weights, program, hidden),
        *map(arrays.pointer, (grad_hidden, grad_gate_up, dots)),
    )
    return hidden, grad_gate_up, dots


def add_bias(rows: Array, bias: Array, experts: ExpertRows, row_weights: Array | None) -> None:
    """``rows += row_weights * bias`` of each row's expert, in place."""
    _backend.cuda.moe_add_bias(
        *_rows(rows, experts), arrays.pointer(rows), _bias(bias), arrays.pointer(row_weights), rows.shape[1]
    )


def add_bias_dots(rows: Array, bias: Array, experts: ExpertRows, dots: Array) -> Array:
    """``dots[r] + <rows[r], bias>`` of each row's expert, in place."""
    _backend.cuda.moe_add_bias_dots(
        *_rows(rows, experts), arrays.pointer(rows), _bias(bias), arrays.pointer(dots), rows.shape[1]
    )
    return dots


def bias_grad(rows: Array, experts: ExpertRows, row_weights: Array | None, into: Array, accumulate: bool) -> None:
    """Sums of ``row_weights * rows`` over each expert's rows, into or onto ``into`` [E, N] float32."""
    _backend.cuda.moe_bias_grad(
        *_rows(rows, experts), *map(arrays.pointer, (rows, row_weights, into)), rows.shape[1], accumulate
    )


def row_weights(topk_weights: Array, plan: Any) -> Array:
    """The weight of each row's slot, [R] float32; 0 on padding rows."""
    by_row = arrays.empty(topk_weights, (plan.num_rows,), np.float32)
    _backend.cuda.moe_row_values(
        arrays.place(topk_weights), maps(plan), arrays.pointer(topk_weights), arrays.pointer(by_row)
    )
    return by_row


def slot_values(by_row: Array, plan: Any, into: Array) -> None:
    """Each slot's value of its row, 0 where it is not routed, into ``into`` [T, k] float32."""
    _backend.cuda.moe_slot_values(arrays.place(by_row), maps(plan), arrays.pointer(by_row), arrays.pointer(into))


def _inner(gate_up: Array, program: ActivationProgram) -> int:
    return int(gate_up.shape[1]) // (1 + program.gated)


def _rows(rows: Array, experts: ExpertRows) -> tuple[Any, ...]:
    """Place, experts and type of rows in expert order, as csrc/bindings/cuda/moe.cpp takes them."""
    offsets, tokens = experts
    where = (rows.shape[0], offsets.shape[0] - 1, arrays.pointer(offsets), arrays.pointer(tokens))
    return arrays.place(rows), where, rows.dtype == _backend.BFLOAT16


def _activation(
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
    hidden: Array | None,
) -> tuple[Any, ...]:
    at = (arrays.pointer(gate_up), _bias(bias), arrays.pointer(row_weights), arrays.pointer(hidden))
    return *_rows(gate_up, experts), *at, _inner(gate_up, program), tuple(program)


def _bias(bias: Array | None) -> tuple[int, int]:
    """Its address as float32 and as bfloat16, one of them 0."""
    address = arrays.pointer(bias)
    return (0, address) if bias is not None and bias.dtype == _backend.BFLOAT16 else (address, 0)
