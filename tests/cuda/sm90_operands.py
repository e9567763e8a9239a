"""Operands of Hopper's grouped GEMM for its tests: on the emulated GPU, and as float64.

Codes in {-1, 0, 1} and scales that are powers of two make every partial sum exact, so that results are compared byte by
byte.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
from emulated import to_device

from pyroute.quantization import unchecked_fp8

E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
ROWS = {"fp8": E4M3, "bfloat16": BF16, "e5m2_e4m3": E5M2, "e4m3_e5m2": E4M3, "e5m2_e5m2": E5M2}  # and gradients
WEIGHTS = {"fp8": E4M3, "bfloat16": BF16, "e5m2_e4m3": E4M3, "e4m3_e5m2": E5M2, "e5m2_e5m2": E5M2}
PAIRS = list(ROWS)
KINDS = PAIRS[:3]  # which differ by more than an instruction's name
OUTS = {"bfloat16": BF16, "float32": np.float32}


def small_integers(rng, shape, dtype):
    return rng.integers(-1, 2, shape).astype(np.float32).astype(dtype)


def powers_of_two(rng, shape):
    return (2.0 ** rng.integers(-2, 3, shape)).astype(np.float32)


def repeated(scales, block, rows, cols):
    return np.repeat(np.repeat(scales, block[0], -2), block[1], -1)[..., :rows, :cols]


class Operand:
    """Rows or weights on both sides: on the device, and as float64."""

    def __init__(self, values, scales=None, block=None, offsets=None):
        kind = "e5m2" if values.dtype == E5M2 else "e4m3"
        self.exact = values.astype(np.float64)
        if scales is None:
            self.device = to_device(values)
            return
        rows, cols = values.shape[-2:]
        if offsets is None:
            self.exact *= repeated(scales, block, rows, cols)
        else:
            start = 0
            for first, last in itertools.pairwise(offsets):
                count = -(-(last - first) // block[0])
                self.exact[first:last] *= repeated(scales[start : start + count], block, last - first, cols)
                start += count
        segments = None if offsets is None else to_device(np.asarray(offsets, np.int64))
        self.device = unchecked_fp8(to_device(values), to_device(scales), block, kind, segments)


def rows_and_weights(rng, kind, rows, experts, n, k, transposed=False):
    depth = n if transposed else k
    if kind == "bfloat16":
        return Operand(small_integers(rng, (rows, depth), BF16)), Operand(small_integers(rng, (experts, n, k), BF16))
    blocks = -(-n // 128), -(-k // 128)
    return (
        Operand(small_integers(rng, (rows, depth), ROWS[kind]), powers_of_two(rng, (rows, -(-depth // 128))), (1, 128)),
        Operand(
            small_integers(rng, (experts, n, k), WEIGHTS[kind]), powers_of_two(rng, (experts, *blocks)), (128, 128)
        ),
    )


def expected(a, b, offsets, rows, out_dtype, transposed=False):
    out = np.zeros((rows, b.shape[2] if transposed else b.shape[1]))
    for e, (first, last) in enumerate(itertools.pairwise(offsets)):
        out[first:last] = a[first:last] @ (b[e] if transposed else b[e].T)
    return out.astype(np.float32).astype(out_dtype)


def same_bytes(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got + 0, want + 0)  # no sign of zero


def gradient_operands(rng, kind, offsets, rows, n, k):
    if kind == "bfloat16":
        return Operand(small_integers(rng, (rows, n), BF16)), Operand(small_integers(rng, (rows, k), BF16))
    experts = len(offsets) - 1
    most = (rows + experts * 127) // 128  # what an Fp8Array on a device has
    return tuple(
        Operand(small_integers(rng, (rows, cols), dtype), powers_of_two(rng, (most, cols)), (128, 1), offsets)
        for cols, dtype in ((n, ROWS[kind]), (k, WEIGHTS[kind]))
    )
