"""Grouped GEMM and its gradients, on every floor, against float64 per element: one wrong row must fail."""

import numpy as np
import pytest
from conftest import assert_same_bytes, poison
from grouped_gemm_operands import (
    BF16,
    FLOAT8,
    MIXES,
    ROW_BLOCK,
    TOKEN_BLOCK,
    TYPES,
    WEIGHT_BLOCK,
    integers,
    offsets_of,
    operand,
)
from oracle import grouped_gemm as oracle

from pyroute import Fp8Array, grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad

MANTISSA_BITS = {"float32": 23, "bfloat16": 7}


def default_type(*kinds):
    return "float32" if "float32" in kinds else "bfloat16"


def assert_bounded(got, expected, out_type, units=4):
    product, magnitude = expected
    assert got.dtype.name == out_type
    assert got.shape == product.shape
    error = np.abs(got.astype(np.float64) - product)
    limit = oracle.bound(product, magnitude, MANTISSA_BITS[out_type], units)
    limit[magnitude == 0] = 0
    worst = np.unravel_index(np.argmax(error - limit), error.shape) if error.size else None
    assert not error.size or (error <= limit).all(), f"at {worst}: {error[worst]} over {limit[worst]}"


# Segments: lane, tile, group and chunk edges, empty experts, rows past the last offset (the second number).
SEGMENTS = [
    ((1,), 0),
    ((2, 0, 3), 1),
    ((0, 0), 4),
    ((4, 5, 0, 6), 0),
    ((7, 8, 9, 10, 11), 2),
    ((12, 13), 0),
    ((0, 37, 0, 0), 3),
]
# K x N; blocks of 128 along K, tiles of up to 12 along N.
SIZES = [(1, 1), (7, 2), (8, 3), (9, 4), (127, 5), (128, 12), (129, 13), (255, 7), (256, 25), (385, 6)]


def shapes():
    """Every K x N once and every segmentation at least once, cheaply."""
    return [(*size, *SEGMENTS[i % len(SEGMENTS)]) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize(("type_a", "type_b"), MIXES)
def test_forward_bound(floor, type_a, type_b, rng):
    for k, n, counts, past in shapes():
        offsets = offsets_of(*counts)
        a, a_values = operand(rng, type_a, (offsets[-1] + past, k), ROW_BLOCK)
        b, b_values = operand(rng, type_b, (len(counts), n, k), WEIGHT_BLOCK)
        expected = oracle.forward(a_values, b_values, offsets)
        got = grouped_gemm(a, b, offsets, backend=floor.backend)
        assert_bounded(got, expected, default_type(type_a, type_b))
        for out_type in MANTISSA_BITS:
            got = grouped_gemm(a, b, offsets, out_dtype=out_type, backend=floor.backend)
            assert_bounded(got, expected, out_type)


@pytest.mark.parametrize(("type_g", "type_b"), MIXES)
def test_dgrad_bound(floor, type_g, type_b, rng):
    for n, k, counts, past in shapes():
        offsets = offsets_of(*counts)
        g, g_values = operand(rng, type_g, (offsets[-1] + past, n), ROW_BLOCK)
        b, b_values = operand(rng, type_b, (len(counts), n, k), WEIGHT_BLOCK)
        got = grouped_gemm_dgrad(g, b, offsets, backend=floor.backend)
        assert_bounded(got, oracle.dgrad(g_values, b_values, offsets), default_type(type_g, type_b))


@pytest.mark.parametrize(("type_g", "type_a"), MIXES)
@pytest.mark.parametrize("restart", [True, False])
def test_wgrad_bound(floor, type_g, type_a, restart, rng):
    for n, k, counts, past in [
        (1, 1, (1,), 0),
        (5, 13, (2, 0, 7), 1),
        (12, 4, (8, 9, 0), 2),
        (3, 25, (127, 130), 1),
        (26, 9, (0, 257), 0),
    ]:
        offsets = offsets_of(*counts)
        restarts = offsets if restart else None
        g, g_values = operand(rng, type_g, (offsets[-1] + past, n), TOKEN_BLOCK, restarts)
        a, a_values = operand(rng, type_a, (offsets[-1] + past, k), TOKEN_BLOCK, restarts)
        got = grouped_gemm_wgrad(g, a, offsets, backend=floor.backend)
        assert_bounded(got, oracle.wgrad(g_values, a_values, offsets), "float32")


@pytest.mark.parametrize("block", [(1, 128), (1, 64), (3, 5), (128, 128), (7, 256), (4, 100000), (128, 1), (1, 1)])
def test_any_scale_block(floor, block, rng):
    """Blocks that do not fit the contraction's 128 are multiplied in first; segments start inside blocks.

    Small blocks of scales from 0.001 to 1 leave few products that matter, so the worst-case bound is the right one.
    """
    offsets = offsets_of(5, 0, 140)
    n, k = 19, 300
    a, a_values = operand(rng, "e4m3", (150, k), block)
    b, b_values = operand(rng, "e5m2", (3, n, k), block)
    g, g_values = operand(rng, "e4m3", (150, n), block)
    got = grouped_gemm(a, b, offsets, out_dtype="float32", backend=floor.backend)
    assert_bounded(got, oracle.forward(a_values, b_values, offsets), "float32", oracle.worst_case_units(k))
    got = grouped_gemm_dgrad(g, b, offsets, out_dtype="float32", backend=floor.backend)
    assert_bounded(got, oracle.dgrad(g_values, b_values, offsets), "float32", oracle.worst_case_units(n))
    got = grouped_gemm_wgrad(g, a, offsets, backend=floor.backend)
    assert_bounded(got, oracle.wgrad(g_values, a_values, offsets), "float32", oracle.worst_case_units(140))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [128, 2048])
def test_worst_case_bound_under_heavy_tails(floor, kind, k, rng):
    """A few products of the size of all the others together: each later addition rounds at the size of the sum."""
    offsets = offsets_of(5, 40)
    dtype = BF16 if kind == "bfloat16" else np.dtype(np.float32)
    tails = rng.lognormal(0, 2, (45, k)).astype(dtype), rng.lognormal(0, 2, (2, 30, k)).astype(dtype)
    outliers = [rng.uniform(0.5, 1, (45, k)), rng.uniform(0.5, 1, (2, 30, k))]
    outliers[0][:, :8] *= 4096
    for a, b in (tails, [x.astype(dtype) for x in outliers]):
        got = grouped_gemm(a, b, offsets, out_dtype="float32", backend=floor.backend)
        expected = oracle.forward(a.astype(np.float64), b.astype(np.float64), offsets)
        assert_bounded(got, expected, "float32", oracle.worst_case_units(k))
        assert_bounded(got, expected, "float32", 12)  # 5.5 measured; one plain chain of additions is near 38


@pytest.mark.parametrize("kind", TYPES)
def test_zipf_segments_and_long_contraction(floor, kind, rng):
    counts = np.sort(rng.zipf(1.3, 8).clip(max=70))[::-1]
    offsets = offsets_of(*counts)
    k, n = 2048, 18
    a, a_values = operand(rng, kind, (offsets[-1], k))
    b, b_values = operand(rng, kind, (8, n, k), (128, 128))
    got = grouped_gemm(a, b, offsets, out_dtype="float32", backend=floor.backend)
    assert_bounded(got, oracle.forward(a_values, b_values, offsets), "float32")


# --- exact results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_same_sign_integers_are_exact(floor, kind, rng):
    """Integers 1..3, K = 2048: every partial sum is below 2**24, so float32 sums are exact in any order."""
    offsets, k, n = offsets_of(3, 0, 14), 2048, 9
    a, a_values = integers(rng, kind, (17, k), ROW_BLOCK)
    b, b_values = integers(rng, kind, (3, n, k), WEIGHT_BLOCK)
    g, g_values = integers(rng, kind, (17, n), ROW_BLOCK)
    forward = grouped_gemm(a, b, offsets, out_dtype="float32", backend=floor.backend)
    dgrad = grouped_gemm_dgrad(g, b, offsets, out_dtype="float32", backend=floor.backend)
    wgrad = grouped_gemm_wgrad(g, a, offsets, backend=floor.backend)
    np.testing.assert_array_equal(forward, oracle.forward(a_values, b_values, offsets)[0])
    np.testing.assert_array_equal(dgrad, oracle.dgrad(g_values, b_values, offsets)[0])
    np.testing.assert_array_equal(wgrad, oracle.wgrad(g_values, a_values, offsets)[0])
    # the three are one trilinear form: <g, a b'> = <dgrad, a> = <wgrad, b>
    form = (g_values * forward.astype(np.float64)).sum()
    assert form == (dgrad.astype(np.float64) * a_values).sum() == (wgrad.astype(np.float64) * b_values).sum()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_scale_is_used_once_and_in_its_place(floor, format, rng):
    """Powers of two as scales and small integers as codes: sums below 2**20 in steps of 2**-4 are exact."""
    offsets, k, n = offsets_of(3, 0, 14, 130), 400, 270
    total = int(offsets[-1])

    def powers(shape):
        return (2.0 ** rng.integers(-2, 3, shape)).astype(np.float32)

    a, a_values = integers(rng, format, (total, k), ROW_BLOCK, powers)
    b, b_values = integers(rng, format, (4, n, k), WEIGHT_BLOCK, powers)
    g, g_values = integers(rng, format, (total, n), ROW_BLOCK, powers)
    tall_g, tall_g_values = integers(rng, format, (total, n), TOKEN_BLOCK, powers, offsets)
    tall_a, tall_a_values = integers(rng, format, (total, k), TOKEN_BLOCK, powers, offsets)
    forward = grouped_gemm(a, b, offsets, out_dtype="float32", backend=floor.backend)
    np.testing.assert_array_equal(forward, oracle.forward(a_values, b_values, offsets)[0])
    dgrad = grouped_gemm_dgrad(g, b, offsets, out_dtype="float32", backend=floor.backend)
    np.testing.assert_array_equal(dgrad, oracle.dgrad(g_values, b_values, offsets)[0])
    wgrad = grouped_gemm_wgrad(tall_g, tall_a, offsets, backend=floor.backend)
    np.testing.assert_array_equal(wgrad, oracle.wgrad(tall_g_values, tall_a_values, offsets)[0])


def test_weight_only_fp8_with_one_power_of_two_per_expert(floor):
    k, n, num_experts = 256, 6, 5
    a = np.ones((15, k), np.float32)
    codes = np.ones((num_experts, n, k), FLOAT8["e4m3"])
    scales = np.broadcast_to(np.float32(2.0) ** np.arange(5)[:, None, None], (num_experts, 1, 2)).astype(np.float32)
    out = grouped_gemm(a, Fp8Array(codes, scales, (128, 128)), offsets_of(1, 2, 3, 4, 5), backend=floor.backend)
    expert = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(out, np.broadcast_to((k * 2.0**expert)[:, None], (15, n)))


def test_float32_accumulates_below_bfloat16(floor):
    """256 + 1 - 256 would lose the 1 in a bfloat16 accumulator."""
    a = np.array([[256, 1, -256]], BF16)
    out = grouped_gemm(a, np.ones((1, 1, 3), BF16), offsets_of(1), backend=floor.backend)
    assert out.dtype == BF16
    assert out[0, 0] == 1


# --- rows outside the segments, outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("out_type", [np.dtype(np.float32), BF16])
def test_every_row_of_out_is_written(floor, out_type, rng):
    offsets = offsets_of(0, 3, 0, 13, 0)
    a = rng.standard_normal((20, 33)).astype(np.float32)
    a[7] = 0  # padding inside a segment
    a[16:] = np.nan  # past the last offset: never read into a result
    b = rng.standard_normal((5, 10, 33)).astype(np.float32)
    g = rng.standard_normal((20, 10)).astype(np.float32)
    g[7], g[16:] = 0, np.nan
    for op, x, shape in ((grouped_gemm, a, (20, 10)), (grouped_gemm_dgrad, g, (20, 33))):
        out = poison(shape, out_type)
        assert op(x, b, offsets, out=out, backend=floor.backend) is out
        assert_same_bytes(out, op(x, b, offsets, out_dtype=out_type, backend=floor.backend))
        assert not out[7].any()
        assert not out[16:].any()
        assert np.isfinite(out.astype(np.float32)).all()
        assert np.abs(out.astype(np.float32)[:7]).min() > 0


def test_wgrad_of_empty_experts_is_exactly_zero(floor, rng):
    offsets = offsets_of(0, 3, 0, 2, 0)
    g, a = rng.standard_normal((6, 5)).astype(np.float32), rng.standard_normal((6, 9)).astype(np.float32)
    g[5], a[5] = np.nan, np.nan
    out = poison((5, 5, 9), np.float32)
    assert grouped_gemm_wgrad(g, a, offsets, out=out, backend=floor.backend) is out
    assert out[[0, 2, 4]].tobytes() == bytes(3 * 5 * 9 * 4)
    assert np.isfinite(out).all()
    assert np.abs(out[[1, 3]]).min() > 0


def test_wgrad_accumulates_with_one_rounding(floor, rng):
    offsets = offsets_of(3, 0, 140)
    g, a = rng.standard_normal((143, 5)).astype(BF16), rng.standard_normal((143, 14)).astype(BF16)
    old = rng.standard_normal((3, 5, 14)).astype(np.float32)
    old[1, 0, 0] = -0.0
    fresh = grouped_gemm_wgrad(g, a, offsets, backend=floor.backend)
    into = old.copy()
    assert grouped_gemm_wgrad(g, a, offsets, accumulate_into=into, backend=floor.backend) is into
    expected = old + fresh
    expected[1] = old[1]  # no rows, no change: not even -0 to +0
    assert_same_bytes(into, expected)


@pytest.mark.parametrize(("rows", "k", "n", "experts"), [(0, 5, 4, 2), (3, 0, 4, 1), (3, 5, 0, 1), (0, 0, 0, 1)])
def test_nothing_to_do(floor, rows, k, n, experts):
    offsets = offsets_of(*([0] * (experts - 1)), rows)
    a, b, g = np.ones((rows, k), BF16), np.ones((experts, n, k), BF16), np.ones((rows, n), BF16)
    forward = grouped_gemm(a, b, offsets, backend=floor.backend)
    dgrad = grouped_gemm_dgrad(g, b, offsets, backend=floor.backend)
    wgrad = grouped_gemm_wgrad(g, a, offsets, backend=floor.backend)
    np.testing.assert_array_equal(forward, np.full((rows, n), k, np.float32))
    np.testing.assert_array_equal(dgrad, np.full((rows, k), n, np.float32))
    np.testing.assert_array_equal(wgrad, np.full((experts, n, k), rows if rows else 0, np.float32))
