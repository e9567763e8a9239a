"""Hopper's grouped GEMM on the emulated GPU, through the public API.

Codes in {-1, 0, 1} and scales that are powers of two make every partial sum exact, so that results are compared byte by
byte; what tells rows, columns, blocks of depth and experts apart is keyed into the scales or into one-hot rows.
"""

from __future__ import annotations

import itertools

import emulated
import ml_dtypes
import numpy as np
import pytest
from emulated import to_device, to_host

import pyroute
from pyroute.quantization import unchecked_fp8

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
OUTS = {"bfloat16": BF16, "float32": np.float32}


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    monkeypatch.setenv("PYROUTE_EMULATED_SMS", "3")


def small_integers(rng, shape, dtype):
    return rng.integers(-1, 2, shape).astype(np.float32).astype(dtype)


def powers_of_two(rng, shape):
    return (2.0 ** rng.integers(-2, 3, shape)).astype(np.float32)


def repeated(scales, block, rows, cols):
    return np.repeat(np.repeat(scales, block[0], -2), block[1], -1)[..., :rows, :cols]


class Operand:
    """Rows or weights on both sides: on the device, and as float64."""

    def __init__(self, values, scales=None, block=None, offsets=None):
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
        self.device = unchecked_fp8(to_device(values), to_device(scales), block, "e4m3", segments)


def rows_and_weights(rng, kind, rows, experts, n, k, transposed=False):
    depth = n if transposed else k
    if kind == "bfloat16":
        return Operand(small_integers(rng, (rows, depth), BF16)), Operand(small_integers(rng, (experts, n, k), BF16))
    blocks = -(-n // 128), -(-k // 128)
    return (
        Operand(small_integers(rng, (rows, depth), E4M3), powers_of_two(rng, (rows, -(-depth // 128))), (1, 128)),
        Operand(small_integers(rng, (experts, n, k), E4M3), powers_of_two(rng, (experts, *blocks)), (128, 128)),
    )


def expected(a, b, offsets, rows, out_dtype, transposed=False):
    out = np.zeros((rows, b.shape[2] if transposed else b.shape[1]))
    for e, (first, last) in enumerate(itertools.pairwise(offsets)):
        out[first:last] = a[first:last] @ (b[e] if transposed else b[e].T)
    return out.astype(np.float32).astype(out_dtype)


def same_bytes(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got + 0, want + 0)  # no sign of zero


def forward(rng, kind, offsets, n, k, rows=None, out="bfloat16", transposed=False):
    rows = offsets[-1] if rows is None else rows
    a, b = rows_and_weights(rng, kind, rows, len(offsets) - 1, n, k, transposed)
    op = pyroute.grouped_gemm_dgrad if transposed else pyroute.grouped_gemm
    emulated.launched()
    got = op(a.device, b.device, to_device(np.asarray(offsets, np.int64)), out_dtype=out)
    kernels = emulated.launched()
    assert kernels[0] == "make_tiles", kernels
    assert kernels[-1].startswith("fp8" if kind == "fp8" else "bf16"), kernels
    same_bytes(to_host(got), expected(a.exact, b.exact, offsets, rows, OUTS[out], transposed))
    return kernels[-1]


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_ragged_experts_and_rows_past_the_last(kind, out):
    offsets = [0, 130, 130, 131, 258, 515, 643]
    name = forward(np.random.default_rng(0), kind, offsets, 256, 256, rows=700, out=out)
    assert "_128" in name


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_few_rows_an_expert(kind, out):
    name = forward(np.random.default_rng(1), kind, [0, 1, 64, 64, 129, 130, 130, 195, 196], 256, 384, out=out)
    assert "_64" in name


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 6, 11, 33, 40])
def test_any_number_of_blocks_of_depth(kind, blocks):
    """Around the number of stages (5, of 128 and of 64 elements), and beyond the 32 scales that a warp holds."""
    depth = blocks * (128 if kind == "fp8" else 64)
    forward(np.random.default_rng(blocks), kind, [0, 131], 128, depth)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("n", [8, 64, 72, 200, 328])
@pytest.mark.parametrize("k", [16, 144, 256])
def test_columns_and_depths_that_are_no_tiles(kind, n, k):
    forward(np.random.default_rng(n), kind, [0, 128, 190, 260], n, k)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_many_tiles_for_each_block(kind):
    """Several tiles in a block's loop: stages, phases and staging go on from tile to tile."""
    forward(np.random.default_rng(2), kind, [0, 300, 428, 700, 1024], 384, 384)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize(("n", "k"), [(256, 384), (128, 208), (192, 128)])
def test_dgrad(kind, out, n, k):
    forward(np.random.default_rng(3), kind, [0, 130, 130, 131, 400], n, k, rows=450, out=out, transposed=True)
