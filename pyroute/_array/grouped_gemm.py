"""Grouped GEMM as array code: per expert one product ``x @ y.T``, summed in the order that all backends share.

A BLAS would be faster and picks its summation order from the shape of the batch, so that a token's bits would depend on
its neighbours. Element-wise products and sums over eight explicit lanes are the same IEEE operations for every element
whatever surrounds it: batch-invariant, and on bfloat16 operands, whose products are exact, the C++ kernels' bytes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from . import quantization

Array = Any

LANES = 8
STEPS_PER_BLOCK = 16  # blocks of 128 elements along the contraction
TILE_ROWS, TILE_COLS = 32, 256  # 256 KiB for the lanes of one tile: products and sums stay in cache


@np.errstate(all="ignore")
def grouped_gemm(xp: Any, a: Any, b: Any, expert_offsets: Array, out: Array) -> None:
    """Rows of segment e of ``a`` [R, K] times ``b[e]`` [N, K] transposed, into ``out`` [R, N]."""
    a = _values(xp, a)
    out[...] = 0
    for e, (begin, end) in enumerate(pairwise(expert_offsets.tolist())):
        if begin < end:
            out[begin:end] = _product(xp, a[begin:end], _values(xp, b[e])).astype(out.dtype)


@np.errstate(all="ignore")
def grouped_gemm_masked(xp: Any, a: Any, b: Any, tokens_per_expert: Array, out: Array) -> None:
    """The first ``tokens_per_expert[e]`` rows of ``a[e]`` [M, K] times ``b[e]`` [N, K] transposed, into ``out[e]``."""
    for e, count in enumerate(tokens_per_expert.tolist()):
        if count:
            out[e, :count] = _product(xp, _values(xp, a[e])[:count], _values(xp, b[e])).astype(out.dtype)


@np.errstate(all="ignore")
def grouped_gemm_dgrad(xp: Any, grad_out: Any, b: Any, expert_offsets: Array, out: Array) -> None:
    """Rows of segment e of ``grad_out`` [R, N] times ``b[e]`` [N, K], into ``out`` [R, K]."""
    grad_out = _values(xp, grad_out)
    out[...] = 0
    for e, (begin, end) in enumerate(pairwise(expert_offsets.tolist())):
        if begin < end:
            out[begin:end] = _product(xp, grad_out[begin:end], _values(xp, b[e]).T).astype(out.dtype)


@np.errstate(all="ignore")
def grouped_gemm_wgrad(xp: Any, grad_out: Any, a: Any, expert_offsets: Array, out: Array, accumulate: bool) -> None:
    """``grad_out[segment e].T @ a[segment e]``, into or onto ``out`` [E, N, K] float32."""
    grad_out, a = _values(xp, grad_out), _values(xp, a)
    for e, (begin, end) in enumerate(pairwise(expert_offsets.tolist())):
        if accumulate and begin < end:
            out[e] += _product(xp, grad_out[begin:end].T, a[begin:end].T)
        elif not accumulate:
            out[e] = _product(xp, grad_out[begin:end].T, a[begin:end].T) if begin < end else 0


def _values(xp: Any, x: Any) -> Array:
    """The float32 values of an operand, FP8 codes times their scales."""
    if not hasattr(x, "codes"):
        return x.astype(xp.float32, copy=False)
    segments = None if x.expert_offsets is None else (x.expert_offsets, x.row_block_starts)
    return quantization.dequantize(xp, x.codes.view(np.uint8), x.scales, x.block, x.format, segments, xp.float32)


def _product(xp: Any, x: Array, y: Array) -> Array:
    """``x @ y.T`` for float32 x [M, L] and y [N, L]."""
    out = xp.empty((x.shape[0], y.shape[0]), xp.float32)
    x, y = _lanes(xp, x), _lanes(xp, y)
    for i in range(0, out.shape[0], TILE_ROWS):
        for j in range(0, out.shape[1], TILE_COLS):
            rows, cols = slice(i, i + TILE_ROWS), slice(j, j + TILE_COLS)
            out[rows, cols] = _tile(xp, x[:, :, rows, None], y[:, :, None, cols])
    return xp.where(xp.isnan(out), np.float32(np.nan), out)


def _lanes(xp: Any, x: Array) -> Array:
    """[M, L] as [ceil(L / 8), 8, M]: element ``8 * s + l`` of a row goes to step s, lane l; zeros past the end."""
    rows, length = x.shape
    steps = -(-length // LANES)
    padded = xp.zeros((rows, steps * LANES), xp.float32)
    padded[:, :length] = x
    return xp.ascontiguousarray(padded.reshape(rows, steps, LANES).transpose(1, 2, 0))


def _tile(xp: Any, x: Array, y: Array) -> Array:
    """Sum over steps and lanes of ``x`` [steps, 8, m, 1] times ``y`` [steps, 8, 1, n]."""
    steps, _, m, _ = x.shape
    total = xp.zeros((LANES, m, y.shape[3]), xp.float32)
    for block in range(0, steps, STEPS_PER_BLOCK):
        partial = xp.zeros_like(total)
        for step in range(block, min(block + STEPS_PER_BLOCK, steps)):
            partial += x[step] * y[step]
        total += partial
    t = total
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))
