"""Grouped GEMM on a GPU: outputs, workspaces and what csrc/bindings/cuda/grouped_gemm.cpp takes apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _check
from . import arrays

Array = Any
Operand = Any  # an array or an Fp8Array

_TYPES = {"float32": 0, "bfloat16": 1, "e4m3": 2, "e5m2": 3}  # ElementType in csrc/grouped_gemm.h


def _cuda() -> Any:
    from .. import _cuda

    return _cuda


def _native(x: Operand) -> tuple[Any, ...]:
    """Address, type, address of scales, rows of scales of one matrix, their block, whether blocks restart."""
    if not hasattr(x, "codes"):
        return (arrays.pointer(x), _TYPES[_check.DTYPE_NAMES[x.dtype]], 0, 0, 1, 1, False)
    restarts = x.expert_offsets is not None
    return (arrays.pointer(x.codes), _TYPES[x.format], arrays.pointer(x.scales), x.scales.shape[-2], *x.block, restarts)


def grouped_gemm(
    a: Operand, b: Operand, expert_offsets: Array, out: Array, transposed: bool, segments_only: bool = False
) -> None:
    """Rows of ``a`` times their experts' ``b``, or with ``transposed`` times ``b`` transposed (dgrad), into ``out``.

    Rows past the last segment are zeros, or with ``segments_only`` keep what they hold.
    """
    copy = arrays.pointer(getattr(b, "codes_transposed", None)) if transposed else 0
    rows = (arrays.pointer(expert_offsets), 0, 0, a.shape[0], *b.shape, segments_only)
    _multiply(a, b, rows, out, transposed, copy)


def grouped_gemm_masked(a: Operand, b: Operand, tokens_per_expert: Array, out: Array) -> None:
    """The first rows of each ``a[e]`` [M, K] times ``b[e]`` transposed, into ``out[e]``."""
    experts, room = a.shape[:2]
    _multiply(a, b, (0, arrays.pointer(tokens_per_expert), room, experts * room, *b.shape, False), out, False, 0)


def _multiply(a: Operand, b: Operand, rows: tuple[int, ...], out: Array, transposed: bool, b_transposed: int) -> None:
    place = arrays.place(out)
    out_type = _TYPES[_check.DTYPE_NAMES[out.dtype]]
    given = (*place, _native(a), _native(b), rows, out_type, transposed, b_transposed)
    workspace = arrays.workspace(out, _cuda().grouped_gemm_workspace(*given))
    _cuda().grouped_gemm(*given, arrays.pointer(out), arrays.pointer(workspace))


def transposed_codes(b: Operand) -> Array | None:
    """Of FP8 weights [E, N, K] that dgrad reads along N: uint8 [E, K, N up to a multiple of 128]. None of others."""
    if b.ndim != 3:
        return None
    place, operand = arrays.place(b.codes), _native(b)
    if not _cuda().grouped_gemm_wants_transposed(place.device, operand, *b.shape):
        return None
    experts, n, k = b.shape
    copy = arrays.empty(b.codes, (experts, k, -(-n // 128) * 128), np.uint8)
    _cuda().grouped_gemm_transpose(*place, operand, *b.shape, arrays.pointer(copy))
    return copy


def grouped_gemm_wgrad(grad_out: Operand, a: Operand, expert_offsets: Array, out: Array, accumulate: bool) -> None:
    """``grad_out[segment e].T @ a[segment e]``, into or onto ``out`` [E, N, K] float32."""
    place = arrays.place(out)
    operands = (_native(grad_out), _native(a))
    sizes = (a.shape[0], *out.shape)
    workspace = arrays.workspace(out, _cuda().grouped_gemm_wgrad_workspace(*place, *operands, accumulate, *sizes))
    _cuda().grouped_gemm_wgrad(
        *place,
        *operands,
        arrays.pointer(expert_offsets),
        arrays.pointer(out),
        accumulate,
        *sizes,
        arrays.pointer(workspace),
    )
