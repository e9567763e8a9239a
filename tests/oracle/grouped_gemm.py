"""Grouped GEMM and its gradients in float64, with the magnitude that bounds an element's error."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def block_values(codes, scales, block, expert_offsets=None):
    """float64 ``code * scale``, exact; ``codes`` is an ml_dtypes float8 array [..., rows, cols]."""
    rows, cols = codes.shape[-2:]
    row_block = np.arange(rows) // block[0]
    used = rows
    if expert_offsets is not None:
        first = 0
        used = int(expert_offsets[-1])
        for begin, end in pairwise(expert_offsets):
            row_block[begin:end] = first + np.arange(end - begin) // block[0]
            first += -(-int(end - begin) // block[0])
    values = codes.astype(np.float64)
    values[..., used:, :] = 0
    values[..., :used, :] *= scales.astype(np.float64)[..., row_block[:used, None], np.arange(cols) // block[1]]
    return values


def forward(a, b, expert_offsets):
    """``(a @ b.T, abs(a) @ abs(b).T)`` per segment, float64 [R, N]; zero outside the segments."""
    return _by_segment(a, b.swapaxes(1, 2), expert_offsets)


def dgrad(grad_out, b, expert_offsets):
    """``(grad_out @ b, abs(grad_out) @ abs(b))`` per segment, float64 [R, K]; zero outside the segments."""
    return _by_segment(grad_out, b, expert_offsets)


def wgrad(grad_out, a, expert_offsets):
    """``(grad_out.T @ a, abs(grad_out).T @ abs(a))`` per segment, float64 [E, N, K]; zero for empty segments."""
    shape = (len(expert_offsets) - 1, grad_out.shape[1], a.shape[1])
    product, magnitude = np.zeros(shape), np.zeros(shape)
    for e in range(shape[0]):
        rows = slice(expert_offsets[e], expert_offsets[e + 1])
        product[e] = grad_out[rows].T @ a[rows]
        magnitude[e] = np.abs(grad_out[rows]).T @ np.abs(a[rows])
    return product, magnitude


def _by_segment(x, matrices, expert_offsets):
    shape = (x.shape[0], matrices.shape[2])
    product, magnitude = np.zeros(shape), np.zeros(shape)
    for e in range(matrices.shape[0]):
        rows = slice(expert_offsets[e], expert_offsets[e + 1])
        product[rows] = x[rows] @ matrices[e]
        magnitude[rows] = np.abs(x[rows]) @ np.abs(matrices[e])
    return product, magnitude


def bound(product, magnitude, mantissa_bits, units=4):
    """Largest allowed error per element: ``units * 2**-24`` of the magnitude and half an ULP of the output type.

    The half ULP is taken where the unrounded float32 sum may lie, one error above the product.
    """
    sum_error = units * 2.0**-24 * magnitude
    _, exponent = np.frexp(np.abs(product) + sum_error)
    return sum_error + np.ldexp(0.5, np.maximum(exponent, -125) - mantissa_bits - 1)


def worst_case_units(length):
    """Roundings that a product can go through on its way into a sum over ``length``, each at most 2**-24 of it.

    Two when operands are dequantised, one of the product itself (without a fused multiply-add), 15 additions in a
    lane's block, the block's scale and its application, an addition per block, three when lanes are added.
    """
    return 23 + -(-length // 128)
