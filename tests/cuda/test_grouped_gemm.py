"""Grouped GEMM on the emulated GPU: the general kernels against the CPU floor, byte for byte."""

import numpy as np
import pytest
from emulated import to_device, to_host
from grouped_gemm_operands import FLOAT8, MIXES, ROW_BLOCK, TOKEN_BLOCK, TYPES, WEIGHT_BLOCK, fp8, offsets_of, operand

from pyroute import Fp8Array, grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from pyroute.quantization import unchecked_fp8


@pytest.fixture(autouse=True)
def general_kernels(monkeypatch):
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", "general")


def device(x, **place):
    """A copy of an operand on the GPU."""
    if not isinstance(x, Fp8Array):
        return to_device(x, **place)
    offsets = None if x.expert_offsets is None else to_device(x.expert_offsets)
    codes, scales = to_device(x.codes.view(np.uint8), **place), to_device(x.scales, **place)
    return unchecked_fp8(codes, scales, x.block, x.format, offsets)


def same_bytes(got, expected):
    got = to_host(got)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    items = np.dtype(f"V{got.itemsize}")
    wrong = np.argwhere(got.view(items) != expected.view(items))
    assert not len(wrong), f"{len(wrong)} elements differ, the first at {wrong[0]}"


def poisoned(shape, dtype):
    return to_device(np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xC1, np.uint8).view(dtype).reshape(shape))


def check_rows(op, a, b, offsets, out_type="float32", at=None):
    expected = op(a, b, offsets, out_dtype=out_type, backend="cpu")
    out = poisoned(expected.shape, expected.dtype)
    got = op(device(a, at=at), device(b, at=at), to_device(offsets), out=out, out_dtype=out_type)
    assert got is out
    same_bytes(got, expected)


def check_wgrad(grad_out, a, offsets):
    operands = device(grad_out), device(a), to_device(offsets)
    expected = grouped_gemm_wgrad(grad_out, a, offsets, backend="cpu")
    out = poisoned(expected.shape, np.float32)
    same_bytes(grouped_gemm_wgrad(*operands, out=out), expected)
    old = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    total = grouped_gemm_wgrad(*operands, accumulate_into=to_device(old))
    grouped_gemm_wgrad(grad_out, a, offsets, accumulate_into=old, backend="cpu")
    same_bytes(total, old)


# Segments around a tile's rows, empty ones, rows past the last offset (the second number).
SEGMENTS = [((2, 0, 3), 1), ((0, 0), 4), ((63, 64, 0, 65), 0), ((1,), 0), ((9, 8, 7), 70), ((0, 37, 0), 3)]
SIZES = [(1, 1), (7, 2), (8, 33), (9, 4), (127, 65), (128, 12), (129, 31), (256, 64), (263, 6)]  # contraction x columns


@pytest.mark.parametrize(("type_a", "type_b"), MIXES)
def test_rows_have_the_cpus_bytes(type_a, type_b, rng):
    start = MIXES.index((type_a, type_b))
    for i in range(3):
        length, cols = SIZES[(3 * start + i) % len(SIZES)]
        counts, past = SEGMENTS[(start + i) % len(SEGMENTS)]
        offsets = offsets_of(*counts)
        a, _ = operand(rng, type_a, (offsets[-1] + past, length), ROW_BLOCK)
        b, _ = operand(rng, type_b, (len(counts), cols, length), WEIGHT_BLOCK)
        check_rows(grouped_gemm, a, b, offsets, ("float32", "bfloat16")[i % 2])
        b, _ = operand(rng, type_b, (len(counts), length, cols), WEIGHT_BLOCK)
        check_rows(grouped_gemm_dgrad, a, b, offsets, ("float32", "bfloat16")[i % 2])


@pytest.mark.parametrize(("type_g", "type_a"), MIXES)
@pytest.mark.parametrize("restart", [True, False])
def test_wgrad_has_the_cpus_bytes(type_g, type_a, restart, rng):
    start = MIXES.index((type_g, type_a))
    cases = [(1, 1, (1,), 0), (5, 33, (2, 0, 7), 1), (65, 4, (127, 130), 1), (26, 9, (0, 257), 0)]
    n, k, counts, past = cases[start % len(cases)]
    offsets = offsets_of(*counts)
    restarts = offsets if restart else None
    g, _ = operand(rng, type_g, (offsets[-1] + past, n), TOKEN_BLOCK, restarts)
    a, _ = operand(rng, type_a, (offsets[-1] + past, k), TOKEN_BLOCK, restarts)
    check_wgrad(g, a, offsets)


@pytest.mark.parametrize("block", [(1, 128), (1, 64), (3, 5), (128, 128), (7, 256), (4, 100000), (128, 1), (1, 1)])
def test_any_scale_block(block, rng):
    """Blocks that do not fit the contraction's 128 are multiplied in first; segments start inside blocks."""
    offsets = offsets_of(5, 0, 140)
    n, k = 19, 300
    a, _ = operand(rng, "e4m3", (150, k), block)
    b, _ = operand(rng, "e5m2", (3, n, k), block)
    g, _ = operand(rng, "e4m3", (150, n), block)
    check_rows(grouped_gemm, a, b, offsets)
    check_rows(grouped_gemm_dgrad, g, b, offsets)
    check_wgrad(g, a, offsets)


def test_restarting_blocks_of_rows(rng):
    offsets = offsets_of(5, 0, 140)
    for block in [(2, 128), (3, 7)]:
        a, _ = operand(rng, "e4m3", (150, 130), block, offsets)
        b, _ = operand(rng, "float32", (3, 9, 130))
        check_rows(grouped_gemm, a, b, offsets)


@pytest.mark.parametrize("kind", TYPES)
def test_unaligned_arrays_against_an_inaccessible_page(kind, rng):
    offsets = offsets_of(5, 0, 70)
    a, _ = operand(rng, kind, (75, 37))
    b, _ = operand(rng, kind, (3, 35, 37))
    check_rows(grouped_gemm, a, b, offsets, at="end")
    check_rows(grouped_gemm_dgrad, operand(rng, kind, (75, 35))[0], b, offsets, at="end")


@pytest.mark.parametrize("num_experts", [1, 255, 256, 257, 700])
def test_many_experts(num_experts, rng):
    counts = rng.integers(0, 3, num_experts)
    counts[rng.integers(num_experts)] = 70
    offsets = offsets_of(*counts)
    a, _ = operand(rng, "bfloat16", (offsets[-1] + 5, 9))
    b, _ = operand(rng, "float32", (num_experts, 3, 9))
    check_rows(grouped_gemm, a, b, offsets)
    check_wgrad(operand(rng, "float32", (offsets[-1] + 5, 2))[0], a, offsets)


@pytest.mark.parametrize(
    "offsets", [[0, -5, 3, 2], [7, 7, 7, 7], [0, 1 << 40, -(1 << 40), 10], [0, 10, 0, 10], [-(1 << 62)] * 4]
)
def test_offsets_of_any_value_stay_within_the_rows(offsets, rng):
    """They come from the device and cannot be judged: no access leaves an array, every row is written."""
    a, _ = operand(rng, "float32", (10, 20))
    b, _ = operand(rng, "float32", (3, 6, 20))
    safe = np.maximum.accumulate(np.clip([0, *offsets[1:]], 0, 10))
    out = poisoned((10, 6), np.float32)
    same_bytes(grouped_gemm(device(a), device(b), to_device(np.array(offsets)), out=out), grouped_gemm(a, b, safe))
    g, _ = operand(rng, "e4m3", (10, 6), (2, 1), safe)
    got = grouped_gemm_wgrad(device(g), device(a), to_device(np.array(offsets)))
    same_bytes(got, grouped_gemm_wgrad(g, a, safe))


def test_nothing_to_do(rng):
    offsets = offsets_of(0, 0)
    for rows, n, k in [(0, 4, 8), (0, 0, 0), (3, 0, 8), (3, 4, 0)]:
        a, b = np.ones((rows, k), np.float32), np.ones((2, n, k), np.float32)
        check_rows(grouped_gemm, a, b, offsets)
        check_rows(grouped_gemm_dgrad, np.ones((rows, n), np.float32), b, offsets)
        check_wgrad(np.ones((rows, n), np.float32), a, offsets)


def test_nan_and_infinity_stay_in_their_row_and_their_expert(rng):
    offsets = offsets_of(4, 5)
    codes = (rng.standard_normal((9, 130)) * 8).astype(np.float32)
    codes[3, 7], codes[6, 129] = np.nan, np.inf
    b, _ = operand(rng, "float32", (2, 20, 130))
    check_rows(grouped_gemm, codes, b, offsets)
    got = to_host(grouped_gemm(to_device(codes), to_device(b), to_device(offsets)))
    assert np.isnan(got[3]).all()
    assert not np.isfinite(got[6]).any()
    assert np.isfinite(np.delete(got, [3, 6], 0)).all()
    check_wgrad(codes[:, :20], codes, offsets)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_code(format, rng):
    codes = np.tile(np.arange(256, dtype=np.uint8), (3, 1)).view(operand(rng, format, (1, 1))[0].codes.dtype)
    a, _ = fp8(codes, np.ones((3, 2), np.float32), ROW_BLOCK)
    b = np.eye(256, dtype=np.float32)[None]
    check_rows(grouped_gemm_dgrad, a, b, offsets_of(3))


def test_the_last_block_has_no_steps_past_its_end():
    """All lanes underflow to -0, which one more step of zeros would turn into +0."""
    a = np.full((1, 136), -(2.0**-9), np.float32)
    a[:, 128:] = -(2.0**-149)
    codes = np.ones((1, 1, 136), np.float32)
    codes[..., 128:] = 2.0**-9
    b, _ = fp8(codes.astype(FLOAT8["e4m3"]), np.full((1, 1, 2), 2.0**-149, np.float32), WEIGHT_BLOCK)
    assert np.signbit(grouped_gemm(a, b, offsets_of(1), backend="cpu")).all()
    check_rows(grouped_gemm, a, b, offsets_of(1))
