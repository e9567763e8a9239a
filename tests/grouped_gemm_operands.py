"""Operands for the grouped GEMM tests, each with its exact values in float64."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
from oracle import grouped_gemm as oracle

from pyroute import Fp8Array

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
TYPES = ["float32", "bfloat16", "e4m3", "e5m2"]
MIXES = list(itertools.product(TYPES, TYPES))
ROW_BLOCK, WEIGHT_BLOCK, TOKEN_BLOCK = (1, 128), (128, 128), (128, 1)


def offsets_of(*counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def scale_shape(shape, block, expert_offsets=None):
    *lead, rows, cols = shape
    row_blocks = -(-rows // block[0])
    if expert_offsets is not None:
        row_blocks = int((-(-np.diff(expert_offsets) // block[0])).sum())
    return (*lead, row_blocks, -(-cols // block[1]))


def fp8(codes, scales, block, expert_offsets=None):
    kind = next(name for name, dtype in FLOAT8.items() if dtype == codes.dtype)
    values = oracle.block_values(codes, scales, block, expert_offsets)
    return Fp8Array(codes, scales, block, kind, expert_offsets), values


def operand(rng, kind, shape, block=ROW_BLOCK, expert_offsets=None):
    """A random operand of this type, and its values in float64."""
    if kind == "float32":
        x = rng.standard_normal(shape).astype(np.float32)
        return x, x.astype(np.float64)
    if kind == "bfloat16":
        x = rng.standard_normal(shape).astype(BF16)
        return x, x.astype(np.float64)
    codes = (rng.standard_normal(shape) * 8).astype(FLOAT8[kind])
    scales = 10.0 ** rng.uniform(-3, 0, scale_shape(shape, block, expert_offsets))
    return fp8(codes, scales.astype(np.float32), block, expert_offsets)


def integers(rng, kind, shape, block, scales=None, expert_offsets=None):
    """Integers 1..3, FP8 ones times these scales (a function of a shape) or 1."""
    x = rng.integers(1, 4, shape)
    if kind not in FLOAT8:
        return x.astype(BF16 if kind == "bfloat16" else np.float32), x.astype(np.float64)
    grid = scale_shape(shape, block, expert_offsets)
    scales = np.ones(grid, np.float32) if scales is None else scales(grid)
    return fp8(x.astype(FLOAT8[kind]), scales, block, expert_offsets)
