"""Moves on a GPU: outputs beside the inputs, and the calls of ``pyroute._cuda``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend, _check
from . import arrays
from .route_plan import maps

Array = Any

FLOATS = ("float32", "bfloat16", "float16", "float64")  # in the order of csrc/float_type.h
ONE = 0x3F800000  # 1.0 as float32


def permute(x: Array, plan: Any, out: Array | None, padding: int = 0, segments_only: bool = False) -> Array:
    """Row r is token ``row_to_token[r]``; padding rows are the 32 bits of ``padding`` over and over.

    With ``segments_only``, here and below, rows past the last segment are not written.
    """
    return _move(x, maps(plan), (plan.num_rows, x.shape[1]), out, padding, rows_end(plan, segments_only))


def move_back(rows: Array, plan: Any, out: Array | None) -> Array:
    """unpermute where nothing is summed, top-1 without weights: tokens are the rows of the mirrored maps."""
    mirrored = (plan.num_rows, 1, plan.num_tokens, arrays.pointer(plan.token_to_row), arrays.pointer(plan.row_to_token))
    return _move(rows, mirrored, (plan.num_tokens, rows.shape[1]), out, 0)


def rows_end(plan: Any, segments_only: bool = True) -> int:
    """The address of the end of the last segment; 0 if all rows are meant."""
    return arrays.pointer(plan.expert_offsets) + 8 * plan.num_experts if segments_only else 0


def _move(
    x: Array, maps: tuple[int, ...], shape: tuple[int, int], out: Array | None, padding: int, end: int = 0
) -> Array:
    out = arrays.empty(x, shape, x.dtype) if out is None else out
    row_bytes = x.shape[1] * x.dtype.itemsize
    _backend.cuda.permute(*arrays.place(x), maps, row_bytes, padding, arrays.pointer(x), arrays.pointer(out), end)
    return out


def permute_quantize(x: Array, plan: Any, power_of_two: bool, segments_only: bool = False) -> tuple[Array, Array]:
    """(codes, scales) of the e4m3 rows in 1x128 blocks."""
    hidden = x.shape[1]
    codes = arrays.empty(x, (plan.num_rows, hidden), np.uint8 if _check.is_cupy(x) else _backend.FLOAT8["e4m3"])
    scales = arrays.empty(x, (plan.num_rows, -(-hidden // 128)), np.float32)
    _backend.cuda.permute_quantize(
        *arrays.place(x), maps(plan), hidden, _type(x), arrays.pointer(x), power_of_two,
        arrays.pointer(codes), arrays.pointer(scales), rows_end(plan, segments_only),
    )  # fmt: skip
    return codes, scales


def unpermute(rows: Array, plan: Any, topk_weights: Array | None, out: Array | None) -> Array:
    """Each token's sum of its rows, in slot order."""
    hidden = rows.shape[1]
    out = arrays.empty(rows, (plan.num_tokens, hidden), rows.dtype) if out is None else out
    _backend.cuda.unpermute(
        *arrays.place(rows), maps(plan), hidden, _type(rows), arrays.pointer(rows), arrays.pointer(topk_weights),
        arrays.pointer(out),
    )  # fmt: skip
    return out


def unpermute_backward(grad_y: Array, rows: Array, plan: Any, topk_weights: Array) -> tuple[Array, Array]:
    """(grad_rows, grad_topk_weights)."""
    grad_rows = arrays.empty(rows, rows.shape, rows.dtype)
    grad_weights = arrays.empty(rows, topk_weights.shape, topk_weights.dtype)
    _backend.cuda.unpermute_backward(
        *arrays.place(rows), maps(plan), rows.shape[1], _type(rows), arrays.pointer(grad_y), arrays.pointer(rows),
        arrays.pointer(topk_weights), arrays.pointer(grad_rows), arrays.pointer(grad_weights),
    )  # fmt: skip
    return grad_rows, grad_weights


def _type(x: Array) -> int:
    return FLOATS.index(_check.DTYPE_NAMES[x.dtype])
