"""The emulated GPU's words of csrc/cuda/mma.cuh, from copies to sums."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest
from emulated import launch, to_device, to_host

SEEDS = pytest.mark.parametrize("seed", range(3), indirect=True)


class MmaProbeArgs(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("wrong", ctypes.c_uint32),
    ]


def run(kernel, a, b, *, wrong=0):
    given_a, given_b = to_device(a), to_device(b)
    out = to_device(np.zeros((16, 8), np.float32))
    sentence = launch(
        f"probe_mma_{kernel}",
        MmaProbeArgs(given_a.pointer, given_b.pointer, out.pointer, wrong),
        blocks=1,
        threads=32,
        shared=1024,
    )
    return to_host(out), sentence


def operands(rng, a_type, b_type):
    depth = 32 // np.dtype(a_type).itemsize
    a = rng.integers(-4, 5, (16, depth)).astype(a_type)
    b = rng.integers(-4, 5, (8, depth)).astype(b_type)
    start = np.zeros((16, 8), np.float32)
    start[8:, 1::2] = 1000
    return a, b, start + a.astype(np.float32) @ b.astype(np.float32).T


@SEEDS
@pytest.mark.parametrize(
    ("kernel", "a_type", "b_type"),
    [
        ("bf16", ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        ("f16", np.float16, np.float16),
        ("e4m3", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn),
        ("e4m3_e5m2", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
        ("e5m2_e5m2", ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
)
def test_products(kernel, a_type, b_type, seed, rng):
    a, b, expected = operands(rng, a_type, b_type)
    out, sentence = run(kernel, a, b)
    assert sentence == ""
    assert np.array_equal(out, expected)


def test_transposed_b(rng):
    a, b, expected = operands(rng, ml_dtypes.bfloat16, ml_dtypes.bfloat16)
    out, sentence = run("bf16_transposed", a, b.T)
    assert sentence == ""
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2), ("f16", np.float16)]
)
def test_every_code_means_what_it_means(kernel, dtype):
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    step = 1 if unsigned.itemsize == 1 else 257
    codes = np.arange(0, 1 << 8 * unsigned.itemsize, step).astype(unsigned)
    for row in np.resize(codes, (-(-codes.size // 16), 16)):
        a = np.zeros((16, 32 // unsigned.itemsize), unsigned)
        a[:, 0] = row
        b = np.zeros((8, a.shape[1]), np.float16 if kernel == "f16" else ml_dtypes.float8_e4m3fn)
        b[:, 0] = 1
        out, sentence = run(kernel, a.view(dtype), b)
        assert sentence == ""
        assert np.array_equal(out[:, 0], row.view(dtype).astype(np.float32), equal_nan=True)


@SEEDS
def test_planted_bugs(seed, rng):
    a, b, _ = operands(rng, ml_dtypes.bfloat16, ml_dtypes.bfloat16)
    out, sentence = run("bf16", a, b, wrong=1)
    assert sentence == ""
    assert (np.abs(out) > 1e30).all() or np.isnan(out).any()  # poison, not yet the operands
    _, sentence = run("bf16", a, b, wrong=2)
    assert "load_matrices with an address that is no multiple of 16" in sentence
    _, sentence = run("bf16", a, b, wrong=3)
    assert "a product" in sentence
