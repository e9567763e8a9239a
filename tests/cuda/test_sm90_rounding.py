"""What Hopper's FP8 kernels lose where the tensor cores keep 14 bits, against float64 and a bound for each element.

The emulated GPU adds products as DeepSeek measured Hopper to do it (PYROUTE_EMULATED_FP8_BITS, products.cpp): the 32
products of one instruction and the sum so far are cut off at 2**-13 of the largest of them. So an instruction loses
less than that for each of its terms, where the largest is no larger than the largest product and the products before it
together. Four instructions make a block of 128, whose sum is scaled and added in float32: nothing is lost across blocks
that float32 keeps, which is what the promotion every 128 is for.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulated import to_device, to_host
from sm90_operands import E4M3, ROWS, Operand

import pyroute

BITS = 14
UNIT = 2.0 ** -(BITS - 1)
ANY_DATA = (32 + 3 * 33) * UNIT  # of the magnitude: no sum of products is larger than all of them
SIMILAR = 2.0**-7  # products of similar size: 32 terms lose 2**-13, 33 each 2**-8, 2**-7 and 2**-7, of 128


@pytest.fixture(autouse=True)
def few_bits(monkeypatch):
    monkeypatch.setenv("PYROUTE_EMULATED_FP8_BITS", str(BITS))
    monkeypatch.setenv("PYROUTE_EMULATED_SMS", "3")


def lost(x, y, offsets=None):
    """How much sums of ``x`` [M, L] and ``y`` [N, L] may be off per element, and their magnitude, all [M, N].

    ``x`` and ``y`` are (codes, scales of every block of 128, [M or N, blocks]).
    """
    (x, x_scales), (y, y_scales) = x, y
    bound, magnitude = np.zeros((2, len(x), len(y)))
    for d in range(x_scales.shape[1]):
        scale = np.abs(np.outer(x_scales[:, d], y_scales[:, d]))
        before = np.zeros_like(scale)
        for first in range(128 * d, min(128 * (d + 1), x.shape[1]), 32):
            terms = np.abs(x[:, None, first : first + 32] * y[None, :, first : first + 32])
            unit = UNIT * np.maximum(terms.max(2), before)
            cut = np.minimum(terms, unit[..., None]).sum(2) + np.minimum(before, unit)
            bound += scale * cut
            before += terms.sum(2)
        magnitude += scale * before
    return bound, magnitude


def check(got, exact, bound, magnitude, blocks, mantissa_bits):
    """Per element: the model's loss, a rounding of float32 for the scales and for each block, half an ULP."""
    within = bound + (blocks + 3) * 2.0**-24 * magnitude
    assert (within <= (ANY_DATA + 2.0**-18) * magnitude).all()
    _, exponent = np.frexp(np.abs(exact) + within)
    error = np.abs(got.astype(np.float64) - exact)
    allowed = within + np.ldexp(0.5, exponent - mantissa_bits - 1)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), f"{error[worst]} at {worst}, allowed {allowed[worst]}"
    return error


def heavy(rng, shape):
    """One element in 64 is a thousand times the others."""
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 1 / 64, 100, 0.1)


DATA = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 8,
    "of one sign": lambda rng, shape: rng.uniform(0, 2, shape),
    "heavy": heavy,
}


def rows(rng, data, dtype, shape):
    values = DATA[data](rng, shape).astype(dtype)
    scales = rng.uniform(0.5, 2, (shape[0], -(-shape[1] // 128))).astype(np.float32)
    return Operand(values, scales, (1, 128)), values.astype(np.float64), scales.astype(np.float64)


def weights(rng, data, n, k):
    values = DATA[data](rng, (2, n, k)).astype(E4M3)
    scales = rng.uniform(0.5, 2, (2, -(-n // 128), -(-k // 128))).astype(np.float32)
    return Operand(values, scales, (128, 128)), values.astype(np.float64), scales.astype(np.float64)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["fp8", "e5m2_e4m3"])
@pytest.mark.parametrize(("op", "depth"), [("forward", 1040), ("dgrad", 528)])
@pytest.mark.parametrize("num_rows", [40, 150])
def test_rows_keep_to_the_bound(data, kind, op, depth, num_rows):
    """Tiles of 64 and of 128 rows; a last block of 16 elements."""
    rng = np.random.default_rng(20)
    a, a_codes, a_scales = rows(rng, data, ROWS[kind], (num_rows, depth))
    n, k = (48, depth) if op == "forward" else (depth, 48)
    b, b_codes, b_scales = weights(rng, data, n, k)
    offsets = [0, num_rows // 3, num_rows]
    product = pyroute.grouped_gemm if op == "forward" else pyroute.grouped_gemm_dgrad
    given = a.device, b.device, to_device(np.asarray(offsets))
    got = {out: to_host(product(*given, out_dtype=out)) for out in ("float32", "bfloat16")}
    for e, (first, last) in enumerate(itertools.pairwise(offsets)):
        codes, scales = (b_codes[e], b_scales[e]) if op == "forward" else (b_codes[e].T, b_scales[e].T)
        per_col = np.repeat(scales, 128, 0)[:48]
        bounds = lost((a_codes[first:last], a_scales[first:last]), (codes, per_col))
        exact = a.exact[first:last] @ (b.exact[e].T if op == "forward" else b.exact[e])
        for out, bits in (("float32", 23), ("bfloat16", 7)):
            error = check(got[out][first:last], exact, *bounds, a_scales.shape[1], bits)
            if data == "of one sign" and out == "float32":
                assert (error <= SIMILAR * bounds[1]).all()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["fp8", "e5m2_e4m3"])
def test_wgrad_keeps_to_the_bound(data, kind):
    rng = np.random.default_rng(21)
    offsets = [0, 300, 340]
    values = [DATA[data](rng, (340, 48)).astype(dtype) for dtype in (ROWS[kind], E4M3)]
    scales = [rng.uniform(0.5, 2, ((340 + 2 * 127) // 128, 48)).astype(np.float32) for _ in range(2)]
    g, a = (Operand(v, s, (128, 1), offsets) for v, s in zip(values, scales, strict=True))
    got = to_host(pyroute.grouped_gemm_wgrad(g.device, a.device, to_device(np.asarray(offsets))))
    start = 0
    for e, (first, last) in enumerate(itertools.pairwise(offsets)):
        blocks = -(-(last - first) // 128)
        sides = [
            (v[first:last].astype(np.float64).T, s[start : start + blocks].astype(np.float64).T)
            for v, s in zip(values, scales, strict=True)
        ]
        start += blocks
        check(got[e], g.exact[first:last].T @ a.exact[first:last], *lost(*sides), blocks, 23)


def test_long_sums_lose_no_more_than_short_ones():
    """One sign: without a promotion every 128 each product would be cut off at 2**-13 of thousands."""
    share = {}
    for depth in (128, 4096):
        rng = np.random.default_rng(22)
        a, *_ = rows(rng, "of one sign", E4M3, (8, depth))
        b, *_ = weights(rng, "of one sign", 16, depth)
        got = pyroute.grouped_gemm(a.device, b.device, to_device(np.asarray([0, 8, 8])), out_dtype="float32")
        exact = a.exact @ b.exact[0].T
        share[depth] = (np.abs(to_host(got) - exact) / exact).max()
    assert 2.0**-11 < share[128] < SIMILAR
    assert share[4096] < share[128]


def test_the_model_cuts_off():
    """It is on: 127 products of 2**-13 of the first are gone, as they would not be in float32."""
    codes = np.full((1, 128), 2.0**-6)
    codes[0, 0] = 128
    a = Operand(codes.astype(E4M3), np.ones((1, 1), np.float32), (1, 128))
    b = Operand(np.ones((1, 16, 128), E4M3), np.ones((1, 1, 1), np.float32), (128, 128))
    got = pyroute.grouped_gemm(a.device, b.device, to_device(np.asarray([0, 1])), out_dtype="float32")
    below = codes.astype(np.float64)[0, 1:].sum()
    assert below > 1
    kept = to_host(got)[0, 0] - 128
    assert kept == below  # 2**-6 is 2**-13 of 128: the last bit that is kept
    codes[0, 1:] = 2.0**-7
    a = Operand(codes.astype(E4M3), np.ones((1, 1), np.float32), (1, 128))
    got = pyroute.grouped_gemm(a.device, b.device, to_device(np.asarray([0, 1])), out_dtype="float32")
    assert to_host(got)[0, 0] == 128
