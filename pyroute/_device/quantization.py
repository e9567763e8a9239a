"""FP8 with block scales on a GPU: outputs beside the inputs, and the calls of ``pyroute._cuda``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _backend, _check
from . import arrays

Array = Any

FLOATS = ("float32", "bfloat16", "float16", "float64")  # in the order of csrc/float_type.h


def quantize(
    x: Array,
    block: tuple[int, int],
    format: str,
    power_of_two: bool,
    expert_offsets: Array | None,
    scales_shape: tuple[int, ...],
    segments_only: bool = False,
) -> tuple[Array, Array]:
    """Codes (the shape of x) and scales of ``x`` [..., rows, cols].

    Rows past the last segment get codes 0, or with ``segments_only`` keep what they hold.
    """
    codes = arrays.empty(x, x.shape, np.uint8 if _check.is_cupy(x) else _backend.FLOAT8[format])
    scales = arrays.empty(x, scales_shape, np.float32)
    _backend.cuda.quantize_fp8(
        *arrays.place(x), arrays.pointer(x), FLOATS.index(_check.DTYPE_NAMES[x.dtype]), _stack(x.shape), block, format,
        power_of_two, *_segments(expert_offsets), scales_shape[-2], arrays.pointer(codes), arrays.pointer(scales),
        segments_only,
    )  # fmt: skip
    return codes, scales


def dequantize(
    codes: Array, scales: Array, block: tuple[int, int], format: str, expert_offsets: Array | None, dtype: Any
) -> Array:
    """``code * scale`` in float32, rounded once to ``dtype``; rows past the last segment are zero."""
    out = arrays.empty(codes, codes.shape, dtype)
    _backend.cuda.dequantize_fp8(
        *arrays.place(codes), arrays.pointer(codes), arrays.pointer(scales), _stack(codes.shape), block, format,
        *_segments(expert_offsets), scales.shape[-2], arrays.pointer(out), FLOATS.index(_check.DTYPE_NAMES[out.dtype]),
    )  # fmt: skip
    return out


def transposed(x: Array, pitch: int | None = None) -> Array:
    """``x`` [..., rows, cols] of items of 1 or 4 bytes as [..., cols, pitch >= rows], zero from ``rows`` on."""
    *lead, rows, cols = x.shape
    pitch = rows if pitch is None else pitch
    to = arrays.empty(x, (*lead, cols, pitch), x.dtype)
    _backend.cuda.transpose(
        *arrays.place(x), arrays.pointer(x), _stack(x.shape), x.dtype.itemsize, pitch, arrays.pointer(to)
    )
    return to


def _stack(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """num_matrices, rows, cols."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _segments(expert_offsets: Array | None) -> tuple[int, int]:
    """The offsets' address and the number of experts."""
    return arrays.pointer(expert_offsets), 0 if expert_offsets is None else expert_offsets.shape[0] - 1
