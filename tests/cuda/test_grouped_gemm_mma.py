"""Grouped GEMM on the portable tensor-core kernels, on the emulated GPU.

Values in {-1, 0, 1} and scales that are powers of two make every partial sum exact, so that results are compared byte
by byte; random ones keep to a bound per element.
"""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import to_device, to_host
from grouped_gemm_operands import BF16, FLOAT8, fp8, offsets_of, operand, scale_shape
from oracle import grouped_gemm as oracle

from pyroute import Fp8Array, grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from pyroute.quantization import unchecked_fp8

ROWS, WEIGHTS, TOKENS = (1, 128), (128, 128), (128, 1)
E5M2 = [("e5m2", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e5m2")]
PAIRS = [("bfloat16", "bfloat16"), ("e4m3", "e4m3"), ("bfloat16", "e4m3"), *E5M2]
WGRAD_PAIRS = [("bfloat16", "bfloat16"), ("e4m3", "e4m3"), *E5M2]
NAMES = {("bfloat16", "bfloat16"): "bf16", ("e4m3", "e4m3"): "fp8", ("bfloat16", "e4m3"): "mixed"}

# Segments around a tile of 128 or 16 rows, empty ones, rows past the last offset (the second number).
TALL = [((127, 0, 129, 1), 2), ((128, 2, 33), 0), ((0, 200), 130)]
LOW = [((2, 0, 3, 16), 1), ((17, 0, 1), 0), ((0, 0), 3), ((1, 5, 0, 0, 7), 40)]


@pytest.fixture(autouse=True)
def arch(request, monkeypatch):
    """The card: without FP8 (80), with products of it (89), with conversions alone (90)."""
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", "portable")
    monkeypatch.setenv("PYROUTE_EMULATED_ARCH", str(getattr(request, "param", 90)))


def on_cards(pairs):
    """Each pair of types; of FP8 on every kind of card."""
    cases = [(pair, arch) for pair in pairs for arch in ((80, 89, 90) if pair[0] in FLOAT8 else (90,))]
    return pytest.mark.parametrize(("pair", "arch"), cases, indirect=["arch"])


def device(x, **place):
    if not isinstance(x, Fp8Array):
        return to_device(x, **place)
    offsets = None if x.expert_offsets is None else to_device(x.expert_offsets)
    codes, scales = to_device(x.codes.view(np.uint8), **place), to_device(x.scales, **place)
    return unchecked_fp8(codes, scales, x.block, x.format, offsets)


def exact(rng, kind, shape, block, expert_offsets=None):
    """Values in {-1, 0, 1}, FP8 ones times scales from 1/4 to 4, and the values in float64."""
    x = rng.integers(-1, 2, shape)
    if kind not in FLOAT8:
        return x.astype(BF16), x.astype(np.float64)
    scales = 2.0 ** rng.integers(-2, 3, scale_shape(shape, block, expert_offsets))
    return fp8(x.astype(FLOAT8[kind]), scales.astype(np.float32), block, expert_offsets)


def poisoned(shape, dtype):
    return to_device(np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xC1, np.uint8).view(dtype).reshape(shape))


def same_bytes(got, expected):
    got = to_host(got)
    items = np.dtype(f"V{got.itemsize}")
    wrong = np.argwhere(got.view(items) != expected.astype(got.dtype).view(items))
    assert not len(wrong), f"{len(wrong)} of {got.size} differ, the first at {wrong[0]}"


def run(op, a, b, offsets, out_type, kernel):
    """The result; the kernel that gave it is checked."""
    a, b = device(a), device(b)
    cols = b.shape[1] if op is grouped_gemm else b.shape[2]
    out = poisoned((a.shape[0], cols), BF16 if out_type == "bfloat16" else np.float32)
    emulated.launched()
    op(a, b, to_device(offsets), out=out)
    assert emulated.launched() == ["grouped_gemm_plan", kernel]
    return out


def name(pair, op, low):
    base = f"grouped_gemm_{NAMES.get(pair, '_'.join(pair))}"
    return base + ("_dgrad" if op is grouped_gemm_dgrad else "") + ("_low" if low else "")


# contraction x columns: tails of a chunk, a stage and a block; more stages than the ring has
SIZES = [(16, 16), (128, 136), (144, 8), (272, 128), (640, 40)]


@on_cards(PAIRS)
@pytest.mark.parametrize("low", [False, True])
def test_forward_is_exact_on_small_integers(pair, low, rng):
    for i, (k, n) in enumerate(SIZES):
        counts, past = (LOW if low else TALL)[i % 3]
        offsets = offsets_of(*counts)
        a, a_values = exact(rng, pair[0], (offsets[-1] + past, k), ROWS)
        b, b_values = exact(rng, pair[1], (len(counts), n, k), WEIGHTS)
        expected = oracle.forward(a_values, b_values, offsets)[0]
        for out_type in ("bfloat16", "float32"):
            same_bytes(run(grouped_gemm, a, b, offsets, out_type, name(pair, grouped_gemm, low)), expected)


@on_cards(PAIRS)
@pytest.mark.parametrize("low", [False, True])
def test_dgrad_is_exact_on_small_integers(pair, low, rng):
    for i, (n, k) in enumerate(SIZES):
        k = -(-k // 16) * 16
        counts, past = (LOW if low else TALL)[i % 3]
        offsets = offsets_of(*counts)
        g, g_values = exact(rng, pair[0], (offsets[-1] + past, n), ROWS)
        b, b_values = exact(rng, pair[1], (len(counts), n, k), WEIGHTS)
        expected = oracle.dgrad(g_values, b_values, offsets)[0]
        for out_type in ("bfloat16", "float32"):
            same_bytes(run(grouped_gemm_dgrad, g, b, offsets, out_type, name(pair, grouped_gemm_dgrad, low)), expected)


@on_cards(WGRAD_PAIRS)
def test_wgrad_is_exact_on_small_integers(pair, rng):
    for n, k, counts, past in [(16, 16, (1,), 0), (144, 48, (127, 0, 130), 3), (32, 272, (0, 64, 200), 0)]:
        offsets = offsets_of(*counts)
        g, g_values = exact(rng, pair[0], (offsets[-1] + past, n), TOKENS, offsets)
        a, a_values = exact(rng, pair[1], (offsets[-1] + past, k), TOKENS, offsets)
        expected = oracle.wgrad(g_values, a_values, offsets)[0]
        operands = device(g), device(a), to_device(offsets)
        emulated.launched()
        same_bytes(grouped_gemm_wgrad(*operands, out=poisoned(expected.shape, np.float32)), expected)
        assert emulated.launched() == ["grouped_gemm_plan", f"{name(pair, None, False)}_wgrad"]
        old = rng.standard_normal(expected.shape).astype(np.float32)
        total = old + expected.astype(np.float32)
        total[np.diff(offsets) == 0] = old[np.diff(offsets) == 0]
        same_bytes(grouped_gemm_wgrad(*operands, accumulate_into=to_device(old)), total)


def within(got, expected, mantissa_bits):
    """``2**-14`` of the magnitude and half an ULP of the output.

    Real products of FP8 codes keep 14 bits of the largest term and cut off the others' there: 128 terms of one sign
    lose ``2**-9`` of the magnitude in a model of that, and ``2**-7`` is allowed.
    """
    product, magnitude = expected
    error = np.abs(to_host(got).astype(np.float64) - product)
    lost = 2.0**-7 if emulated.REAL else 2.0**-14
    assert (error <= lost * magnitude + np.abs(product) * 2.0 ** -(mantissa_bits + 1)).all()


@on_cards(PAIRS)
def test_random_values_keep_to_the_bound(pair, rng):
    offsets = offsets_of(70, 0, 31)
    a, a_values = operand(rng, pair[0], (101, 272), ROWS)
    b, b_values = operand(rng, pair[1], (3, 144, 272), WEIGHTS)
    expected = oracle.forward(a_values, b_values, offsets)
    for out_type, bits in (("bfloat16", 7), ("float32", 23)):
        within(run(grouped_gemm, a, b, offsets, out_type, name(pair, grouped_gemm, False)), expected, bits)
    g, g_values = operand(rng, pair[0], (101, 144), ROWS)
    expected = oracle.dgrad(g_values, b_values, offsets)
    within(run(grouped_gemm_dgrad, g, b, offsets, "float32", name(pair, grouped_gemm_dgrad, False)), expected, 23)
    if pair in WGRAD_PAIRS:
        g, g_values = operand(rng, pair[0], (101, 144), TOKENS, offsets)
        a, a_values = operand(rng, pair[1], (101, 272), TOKENS, offsets)
        got = grouped_gemm_wgrad(device(g), device(a), to_device(offsets))
        within(got, oracle.wgrad(g_values, a_values, offsets), 23)


@on_cards(PAIRS)
def test_a_rows_bytes_do_not_depend_on_its_batch(pair, rng):
    """The tile of 16 rows and that of 128 give the same bytes, wherever in a tile the row lies."""
    a, _ = operand(rng, pair[0], (140, 144), ROWS)
    b, _ = operand(rng, pair[1], (1, 32, 144), WEIGHTS)
    tall = to_host(run(grouped_gemm, a, b, offsets_of(140), "float32", name(pair, grouped_gemm, False)))
    part = Fp8Array(a.codes[5:26], a.scales[5:26], ROWS, a.format) if isinstance(a, Fp8Array) else a[5:26]
    low = to_host(run(grouped_gemm, part, b, offsets_of(21), "float32", name(pair, grouped_gemm, True)))
    assert np.array_equal(low, tall[5:26])


@on_cards(PAIRS)
def test_every_code_and_nan_in_one_row(pair, rng):
    """Each value of `a` against one; the NaN row is NaN, an infinite one infinite, and no other row changes."""
    kind = pair[0]
    codes = np.zeros((256, 144), np.float32).astype(FLOAT8.get(kind, BF16))
    codes[:, 37] = np.arange(256, dtype=np.uint8).view(FLOAT8["e4m3" if kind == "bfloat16" else kind]).astype(BF16)
    b = np.ones((1, 144, 16), BF16)
    if pair[1] != "bfloat16":
        b = fp8(b.astype(FLOAT8[pair[1]]), np.ones((1, 2, 1), np.float32), WEIGHTS)[0]
    a = codes if kind == "bfloat16" else fp8(codes, np.ones((256, 2), np.float32), ROWS)[0]
    got = to_host(run(grouped_gemm_dgrad, a, b, offsets_of(256), "float32", name(pair, grouped_gemm_dgrad, False)))
    expected = np.repeat(codes[:, 37:38].astype(np.float32), 16, axis=1)
    expected[np.isnan(expected)] = np.float32(np.nan)
    same_bytes(got, np.where(expected == 0, np.float32(0), expected))


@pytest.mark.parametrize("across", [False, True])
def test_every_code_of_the_weights(across, rng):
    for kind, stored in PAIRS[1:]:
        expected = np.arange(256, dtype=np.uint8).view(FLOAT8[stored]).astype(np.float32)
        a = np.zeros((2, 16), np.float32)
        a[0, 3] = 1
        a = a.astype(BF16) if kind == "bfloat16" else fp8(a.astype(FLOAT8[kind]), np.ones((2, 1), np.float32), ROWS)[0]
        matrix = np.zeros((16, 256), np.uint8)
        matrix[3] = np.arange(256)
        matrix = matrix.view(FLOAT8[stored]) if across else matrix.T.copy().view(FLOAT8[stored])
        b = Fp8Array(matrix[None], np.ones((1, *scale_shape(matrix.shape, WEIGHTS)), np.float32), WEIGHTS, stored)
        op = grouped_gemm_dgrad if across else grouped_gemm
        got = to_host(run(op, a, b, offsets_of(2), "float32", name((kind, stored), op, True)))
        assert np.array_equal(got[0], expected, equal_nan=True)
        assert np.array_equal(np.isnan(got[1]), ~np.isfinite(expected))  # zero times NaN, zero times infinity


@pytest.mark.parametrize("what", ["a", "b", "k"])
def test_what_cannot_be_copied_by_16_bytes_goes_to_the_general_kernels(what, rng):
    k = 24 if what == "k" else 32
    offsets = offsets_of(3)
    a, _ = exact(rng, "e4m3", (3, k), ROWS)
    b, _ = exact(rng, "e4m3", (1, 8, k), WEIGHTS)
    expected = grouped_gemm(a, b, offsets, backend="cpu")
    arrays = [device(x, offset=1) if what == side else device(x) for side, x in (("a", a), ("b", b))]
    emulated.launched()
    same_bytes(grouped_gemm(*arrays, to_device(offsets)), expected)
    assert emulated.launched() == ["grouped_gemm_plan", "grouped_gemm_few_rows"]


@pytest.mark.parametrize("out_type", ["bfloat16", "float32"])
def test_results_at_odd_addresses_and_of_odd_width(out_type, rng):
    offsets = offsets_of(3, 2)
    a, a_values = exact(rng, "bfloat16", (5, 16), ROWS)
    for n in (7, 8):
        b, b_values = exact(rng, "bfloat16", (2, n, 16), WEIGHTS)
        out = to_device(np.zeros((5, n), BF16 if out_type == "bfloat16" else np.float32), offset=1)
        same_bytes(
            grouped_gemm(device(a), device(b), to_device(offsets), out=out),
            oracle.forward(a_values, b_values, offsets)[0],
        )


def test_a_models_layer_scaled_down(rng):
    """Eight experts of a skewed load, each product of a layer's forward and backward."""
    offsets = offsets_of(3, 0, 140, 17, 1, 0, 65, 60)
    rows, hidden, width = int(offsets[-1]), 256, 144
    x, x_values = exact(rng, "e4m3", (rows, hidden), ROWS)
    w, w_values = exact(rng, "e4m3", (8, width, hidden), WEIGHTS)
    same_bytes(
        run(grouped_gemm, x, w, offsets, "bfloat16", "grouped_gemm_fp8"), oracle.forward(x_values, w_values, offsets)[0]
    )
    g, g_values = exact(rng, "e4m3", (rows, width), ROWS)
    expected = oracle.dgrad(g_values, w_values, offsets)[0]
    same_bytes(run(grouped_gemm_dgrad, g, w, offsets, "bfloat16", "grouped_gemm_fp8_dgrad"), expected)


@pytest.mark.parametrize("seed", [1, 2, 3], indirect=True)
def test_any_order_of_threads_gives_the_same_bytes(seed, rng):
    """A missing barrier of the ring would show: stages are overwritten while others read them."""
    offsets = offsets_of(40, 3)
    a, a_values = exact(rng, "e4m3", (43, 1040), ROWS)
    b, b_values = exact(rng, "e4m3", (2, 24, 1040), WEIGHTS)
    expected = oracle.forward(a_values, b_values, offsets)[0]
    same_bytes(run(grouped_gemm, a, b, offsets, "float32", "grouped_gemm_fp8_low"), expected)


@pytest.mark.parametrize(
    ("block_a", "block_b"), [((1, 256), (64, 128)), ((3, 128), (256, 384)), ((5, 384), (1, 128)), ((4, 128), (7, 256))]
)
def test_scale_blocks_of_other_shapes_that_fit(block_a, block_b, rng):
    """Any multiple of 128 along the contraction, anything across; blocks of rows that restart, or that segments cut."""
    offsets = offsets_of(7, 0, 150)
    b, b_values = exact(rng, "e4m3", (3, 72, 784), block_b)
    for restarts in (None, offsets):
        a, a_values = exact(rng, "e4m3", (157, 784), block_a, restarts)
        expected = oracle.forward(a_values, b_values, offsets)[0]
        same_bytes(run(grouped_gemm, a, b, offsets, "float32", "grouped_gemm_fp8"), expected)
    b, b_values = exact(rng, "e4m3", (3, 784, 48), block_b[::-1])
    a, a_values = exact(rng, "bfloat16", (157, 784), None)
    expected = oracle.dgrad(a_values, b_values, offsets)[0]
    same_bytes(run(grouped_gemm_dgrad, a, b, offsets, "float32", "grouped_gemm_mixed_dgrad"), expected)
    offsets = offsets_of(0, 450, 7)
    g, g_values = exact(rng, "e5m2", (457, 48), block_a[::-1], offsets)
    a, a_values = exact(rng, "e4m3", (457, 32), block_b[::-1], offsets)
    emulated.launched()
    got = grouped_gemm_wgrad(device(g), device(a), to_device(offsets))
    assert emulated.launched() == ["grouped_gemm_plan", "grouped_gemm_e5m2_e4m3_wgrad"]
    same_bytes(got, oracle.wgrad(g_values, a_values, offsets)[0])
