"""FP8 with block scales: codes and scales are the same bytes as the oracle's on every floor."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import CPU_FLOORS, assert_same_bytes, guarded
from oracle import quantization as oracle

from pyroute import Fp8Array, _backend, dequantize_fp8, plan_routes, quantize_fp8
from pyroute._array import quantization as array_floor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
FORMATS = ["e4m3", "e5m2"]
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
TYPES = [np.dtype("float32"), BFLOAT16, np.dtype("float16"), np.dtype("float64")]


def codes_of(q: Fp8Array) -> np.ndarray:
    return q.codes.view(np.uint8)


def check(x, floor, *, block=(1, 128), format="e4m3", scale_format="float32", expert_offsets=None):
    """The floor's result, held to the oracle's bytes."""
    q = quantize_fp8(
        x,
        block=block,
        format=format,
        scale_format=scale_format,
        expert_offsets=expert_offsets,
        backend=floor.backend,
    )
    codes, scales = oracle.quantize(x, block, format, scale_format, expert_offsets)
    assert q.codes.dtype == FLOAT8[format]
    assert_same_bytes(q.scales, scales)
    assert_same_bytes(codes_of(q), codes)
    return q


def with_scale(values, scale, format):
    """``values`` [n] in blocks of 1x128 whose first element fixes the scale (values are smaller in magnitude)."""
    values = np.asarray(values, np.float32)
    rows = -(-values.size // 127)
    x = np.zeros((rows, 128), np.float32)
    padded = np.zeros(rows * 127, np.float32)
    padded[: values.size] = values
    x[:, 1:] = padded.reshape(rows, 127)
    x *= np.float32(scale)
    x[:, 0] = np.float32(LARGEST[format]) * np.float32(scale)
    return x


# --- the cast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_oracle_agrees_with_ml_dtypes(format):
    """The oracle's table against another library's, where that library's answer is not a matter of taste."""
    codes = np.arange(256, dtype=np.uint8)
    table = np.array([oracle.code_value(int(code), format) for code in codes])
    np.testing.assert_array_equal(table, codes.view(FLOAT8[format]).astype(np.float64))
    patterns = np.arange(65536, dtype=np.uint16)
    for dtype in (BFLOAT16, np.dtype("float16")):
        with np.errstate(all="ignore"):
            x = patterns.view(dtype).astype(np.float32)
        x = x[np.abs(x) <= LARGEST[format]]
        theirs = x.astype(FLOAT8[format]).view(np.uint8)
        np.testing.assert_array_equal(oracle.cast(x, format), theirs)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("e4m3", [0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0x7F, 0x7F, 0x7F, 0x7F]),
        ("e5m2", [0x5F, 0x5F, 0x5F, 0x5F, 0x60, 0x7B, 0x7E, 0x7E, 0x7E, 0x7E]),
    ],
)
def test_ten_values_where_libraries_disagree(format, expected):
    x = np.array([448, 449, 464, 465, 480, 1e9, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    assert array_floor.cast(np, x, format).tolist() == expected
    assert oracle.cast(x, format).tolist() == expected


@pytest.mark.parametrize("format", FORMATS)
def test_array_cast_of_wide_range(format, rng):
    """Values far beyond the largest code, which quantize_fp8 itself never passes to the cast."""
    bits = rng.integers(0, 2**32, 2_000_000, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        assert_same_bytes(array_floor.cast(np, x, format), oracle.cast(x, format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype("float16")], ids=str)
def test_every_16_bit_pattern(floor, dtype, format):
    """All 65,536, shuffled into blocks so that each block has its own scale, and alone in a block of one."""
    patterns = np.random.default_rng(7).permutation(65536).astype(np.uint16)
    x = patterns.view(dtype).reshape(512, 128)
    check(x, floor, format=format)
    check(x[:, :32], floor, format=format, block=(1, 1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 2.0**-40, 2.0**100, 0.3, 1.7e-30, 3.1e29])
def test_every_code_tie_and_neighbour(floor, format, scale):
    """Finite codes, the midpoints between them and the float32 neighbours of those, at several scales."""
    values = oracle.finite_values(format).astype(np.float32)
    midpoints = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    around = [values, midpoints, np.nextafter(midpoints, np.float32(0)), np.nextafter(midpoints, np.float32(np.inf))]
    around = np.concatenate(around)
    x = with_scale(np.concatenate([around, -around]), scale, format)
    q = check(x, floor, format=format)
    if scale == 1.0:
        assert np.unique(codes_of(q)).size == 2 * values.size
        again = quantize_fp8(dequantize_fp8(q, backend=floor.backend), format=format, backend=floor.backend)
        assert_same_bytes(codes_of(again), codes_of(q))


@pytest.mark.parametrize("format", FORMATS)
def test_random_float32_equals_the_array_floor(cpu_floor, format, rng):
    """Millions of patterns of every exponent: a wrong half-way case shows in 4 of 10 million uniform values."""
    x = rng.integers(0, 2**32, (16384, 128), dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = rng.normal(0, 100, (8192, 128)).astype(BFLOAT16).astype(np.float32)  # many exact ties
    for sample in (x, near):
        ours = quantize_fp8(sample, format=format, backend="cpu")
        base = quantize_fp8(sample, format=format, backend="numpy")
        assert_same_bytes(ours.scales, base.scales)
        assert_same_bytes(codes_of(ours), codes_of(base))


# --- the scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("format", FORMATS)
def test_amax_extremes(floor, format, scale_format):
    tiny, most = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    threshold = np.float32(LARGEST[format] * 2.0**-126)
    below = np.nextafter(threshold, np.float32(0))
    amax = [0.0, -0.0, tiny, 1e-40, 1e-37, below, threshold, 1.0, 1e30, 3e38, most, np.inf, np.nan]
    x = np.zeros((len(amax), 128), np.float32)
    x[:, 5] = amax
    x[:, 6] = -np.array(amax, np.float32) / 3
    q = check(x, floor, format=format, scale_format=scale_format)
    scales = q.scales[:, 0]
    assert (scales >= 2.0**-126).all()
    assert np.isfinite(scales).all()
    assert scales[:6].tolist() == [1.0] * 6
    assert scales[6] == 2.0**-126
    nan = oracle.NAN_CODE[format]
    assert ((codes_of(q) & 0x7F) == nan).sum(axis=1).tolist() == [0] * 11 + [2, 2]
    if scale_format == "ue8m0":
        assert (np.frexp(scales)[0] == 0.5).all()
        assert (q.scales >= quantize_fp8(x, format=format, backend=floor.backend).scales).all()


def test_ue8m0_rounds_up_and_keeps_exact_powers(floor):
    x = np.zeros((4, 128), np.float32)
    x[:, 0] = [448.0, np.nextafter(np.float32(448), np.float32(999)), 447.0, 448.0 * 2.0**-126]
    q = check(x, floor, scale_format="ue8m0")
    assert q.scales[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0**-126]


def test_a_zero_block_keeps_signed_zeros(floor):
    x = np.zeros((2, 128), np.float32)
    x[1] = -0.0
    q = check(x, floor)
    assert q.scales.tolist() == [[1.0], [1.0]]
    assert (codes_of(q)[0] == 0).all()
    assert (codes_of(q)[1] == 0x80).all()
    assert_same_bytes(dequantize_fp8(q, backend=floor.backend), x)


def test_non_finite_values_do_not_reach_the_scale_or_their_neighbours(floor, rng):
    x = rng.normal(size=(3, 256)).astype(np.float32)
    clean = check(x, floor)
    x[1, :4] = [np.inf, -np.inf, np.nan, -np.nan]
    q = check(x, floor)
    assert (codes_of(q)[1, :4] == 0x7F).all()
    for row in (0, 2):
        assert_same_bytes(codes_of(q)[row], codes_of(clean)[row])
        assert_same_bytes(q.scales[row], clean.scales[row])


def test_float64_is_rounded_to_float32_first(floor):
    x = np.zeros((4, 128))
    x[:, 0] = 448.0
    x[0, 1] = 17 + 2.0**-40  # above the tie between 16 and 18 in float64, on it in float32
    x[1, 1] = 1e300  # beyond float32: infinite, hence the NaN code
    x[2, 1] = -1e-320
    x[3, 1] = 1e-45
    q = check(x, floor)
    assert codes_of(q)[0, 1] == oracle.cast(np.float32([16]), "e4m3")[0]
    assert codes_of(q)[1, 1] == 0x7F
    assert codes_of(q)[2, 1] == 0x80


# --- blocks ---------------------------------------------------------------------------------------------------------

BLOCKS = [(1, 128), (128, 128), (128, 1), (1, 1), (1, 7), (3, 5), (2, 8), (16, 16), (1, 300), (64, 12), (1000, 1000)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_any_block_and_partial_blocks(floor, block, dtype, rng):
    for rows, cols in [(1, 1), (5, 64), (3, 127), (131, 129), (2, 255), (129, 8)]:
        x = (rng.normal(size=(rows, cols)) * 10.0 ** rng.uniform(-4, 4, (rows, cols))).astype(dtype)
        check(x, floor, block=block)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_stacks_of_matrices(floor, format, scale_format, rng):
    w = rng.normal(size=(3, 130, 257)).astype(BFLOAT16)
    q = check(w, floor, block=(128, 128), format=format, scale_format=scale_format)
    assert q.scales.shape == (3, 2, 3)
    for e in range(3):
        alone = quantize_fp8(w[e], block=(128, 128), format=format, scale_format=scale_format, backend=floor.backend)
        assert_same_bytes(codes_of(q[e]), codes_of(alone))
        assert_same_bytes(q[e].scales, alone.scales)
    assert q[1:].shape == (2, 130, 257)
    check(rng.normal(size=(2, 2, 3, 130)).astype(np.float32), floor)


@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (0, 0), (0, 128, 128), (2, 0, 64)])
def test_nothing_to_quantise(floor, shape):
    q = check(np.zeros(shape, np.float32), floor, block=(1, 128))
    assert q.shape == shape
    assert dequantize_fp8(q, "bfloat16", backend=floor.backend).shape == shape


OFFSETS = [
    [0, 5],
    [0, 0, 1, 32, 64, 65, 200],
    [0, 128, 128, 256],
    [0, 31, 63, 96, 140],
    [0, 3, 3, 10],
    [0, 0, 0],
]


@pytest.mark.parametrize("block", [(128, 1), (128, 128), (32, 16), (1, 128)], ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_blocks_restart_at_each_expert(floor, block, offsets, rng):
    """Rows past the last offset are not read: NaN there changes nothing, and their codes are zero."""
    x = rng.normal(size=(offsets[-1] + 6, 130)).astype(np.float32)
    x[offsets[-1] :] = np.nan
    q = check(x, floor, block=block, expert_offsets=np.array(offsets))
    assert q.scales.shape[0] == q.row_block_starts[-1]
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        alone = quantize_fp8(x[start:end], block=block, backend=floor.backend)
        assert_same_bytes(codes_of(q)[start:end], codes_of(alone))
        assert_same_bytes(q.scales[q.row_block_starts[e] : q.row_block_starts[e + 1]], alone.scales)
    values = dequantize_fp8(q, backend=floor.backend)
    assert_same_bytes(values, oracle.dequantize(codes_of(q), q.scales, block, "e4m3", offsets))
    assert (values[offsets[-1] :].view(np.uint32) == 0).all()


@pytest.mark.parametrize("counts", [1, 31, 32, 33, 44])
def test_counts_that_no_block_divides(floor, counts, rng):
    x = rng.normal(size=(3 * counts, 64)).astype(BFLOAT16)
    q = check(x, floor, block=(32, 1), expert_offsets=np.arange(4) * counts)
    assert (q.row_block_starts[1:] - q.row_block_starts[:-1]).tolist() == [-(-counts // 32)] * 3


def test_one_block_with_a_zero_column_repeats_exactly(floor, rng):
    """A group of exactly one block with an all-zero channel: the same bytes 50 times."""
    x = rng.normal(size=(128, 33)).astype(np.float32)
    x[:, 9] = 0
    first = check(x, floor, block=(128, 1), expert_offsets=np.array([0, 128]))
    assert first.scales[0, 9] == 1.0
    for _ in range(50):
        again = quantize_fp8(x, block=(128, 1), expert_offsets=np.array([0, 128]), backend=floor.backend)
        assert_same_bytes(codes_of(again), codes_of(first))
        assert_same_bytes(again.scales, first.scales)


# --- dequantise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_dequantise_every_code(floor, format, dtype):
    """Every code, the NaN ones included, times scales that reach subnormal results, overflow and non-finite values."""
    scales = np.array([1.0, 0.3, 2.0**-126, 1e-30, 2.0**-140, 1e38, 0.0, np.inf, np.nan, -1.5], np.float32)
    codes = np.tile(np.arange(256, dtype=np.uint8), (scales.size, 1))
    q = Fp8Array(codes, scales[:, None], (1, 256), format)
    result = dequantize_fp8(q, dtype, backend=floor.backend)
    exact = oracle.dequantize(codes, q.scales, (1, 256), format)
    with np.errstate(all="ignore"):
        expected = exact.astype(dtype)
    nan = np.isnan(exact)
    expected[nan] = np.float32(np.nan)
    assert_same_bytes(result, expected)
    assert set(result[nan].view(f"u{dtype.itemsize}").tolist()) == {
        int(np.array(np.float32(np.nan)).astype(dtype).view(f"u{dtype.itemsize}"))
    }


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_dequantise_any_block(floor, block, dtype, rng):
    for shape in [(131, 129), (2, 33, 64), (5, 7)]:
        q = quantize_fp8(rng.normal(size=shape).astype(np.float32), block=block, backend="numpy")
        expected = oracle.dequantize(codes_of(q), q.scales, block, "e4m3").astype(dtype)
        assert_same_bytes(dequantize_fp8(q, dtype, backend=floor.backend), expected)
    assert_same_bytes(q.dequantize(dtype), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_error(floor, format, rng):
    """Half the spacing of the codes, relative to the value or to the block's smallest normal value, plus the two
    roundings of the scaling (each 2**-24, one more for the product of the way back)."""
    mantissa_bits, smallest = (3, 2.0**-6) if format == "e4m3" else (2, 2.0**-14)
    x = rng.normal(size=(64, 512)).astype(np.float32)
    q = quantize_fp8(x, format=format, backend=floor.backend)
    error = np.abs(dequantize_fp8(q, backend=floor.backend).astype(np.float64) - x)
    scale = np.repeat(q.scales, 128, axis=1).astype(np.float64)
    bound = np.maximum(np.abs(x), scale * smallest) * (2.0 ** -(mantissa_bits + 1) + 4 * 2.0**-24)
    assert (error <= bound).all()


# --- floors, threads, memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1), (3, 5)], ids=str)
def test_any_number_of_threads(cpu_floor, threads, block, rng):
    x = rng.normal(size=(700, 520)).astype(np.float32)
    offsets = np.array([0, 3, 3, 400, 690])
    for extra in ({}, {"expert_offsets": offsets}):
        ours = quantize_fp8(x, block=block, backend="cpu", **extra)
        base = quantize_fp8(x, block=block, backend="numpy", **extra)
        assert_same_bytes(codes_of(ours), codes_of(base))
        assert_same_bytes(ours.scales, base.scales)
        assert_same_bytes(dequantize_fp8(ours, "bfloat16", backend="cpu"), dequantize_fp8(base, "bfloat16"))


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, 32)])
@pytest.mark.parametrize(("dtype", "cols"), [(np.float32, 2048), (ml_dtypes.bfloat16, 2112), (np.float32, 2100)])
def test_codes_that_pass_the_caches(cpu_floor, threads, block, dtype, cols, rng):
    """The same bytes as in pieces that are too small to; rows of whole cache lines and others, and one infinity."""
    x = rng.normal(size=(4224, cols)).astype(dtype)
    x[700, 5] = np.inf
    whole = quantize_fp8(x, block=block, backend="cpu")
    assert whole.codes.size > 8 << 20
    for first in range(0, len(x), 1024):
        part = quantize_fp8(x[first : first + 1024], block=block, backend="cpu")
        scale_rows = slice(first // block[0], first // block[0] + len(part.scales))
        assert_same_bytes(whole.codes[first : first + 1024], part.codes)
        assert_same_bytes(whole.scales[scale_rows], part.scales)


def test_a_row_does_not_depend_on_its_neighbours(floor, rng):
    x = rng.normal(size=(257, 300)).astype(np.float32)
    alone = [quantize_fp8(x[r : r + 1], backend=floor.backend) for r in range(0, 257, 16)]
    x[np.arange(257) % 16 != 0] = np.float32(3e38)
    q = quantize_fp8(x, backend=floor.backend)
    for i, row in enumerate(range(0, 257, 16)):
        assert_same_bytes(codes_of(q)[row], codes_of(alone[i])[0])
        assert_same_bytes(q.scales[row], alone[i].scales[0])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("at", ["end", "start"])
def test_nothing_beyond_the_buffers_is_touched(floor, dtype, at, rng):
    for cols in [1, 7, 8, 9, 31, 64, 127, 128, 129, 255]:
        x = guarded(rng.normal(size=(3, cols)).astype(dtype), at=at)
        for block in [(1, 128), (2, 128), (128, 1), (2, 3)]:
            q = check(x, floor, block=block)
            held = Fp8Array(guarded(codes_of(q), at=at), guarded(q.scales, at=at), block)
            assert_same_bytes(dequantize_fp8(held, dtype, backend=floor.backend), dequantize_fp8(q, dtype))


def test_strided_unaligned_and_read_only_inputs(floor, rng):
    x = rng.normal(size=(40, 300)).astype(np.float32)
    views = [x[::2, ::3], x.T, x[::-1, ::-1], np.asfortranarray(x), np.broadcast_to(x[:1], (9, 300))]
    unaligned = np.frombuffer(bytearray(x.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    for view in [*views, unaligned, read_only]:
        before = np.array(view)
        q = check(view, floor)
        assert_same_bytes(codes_of(q), codes_of(quantize_fp8(before, backend=floor.backend)))
        np.testing.assert_array_equal(view, before)


# --- Fp8Array -------------------------------------------------------------------------------------------------------


def test_deepseek_checkpoint_loads_as_it_is(rng):
    """``weight`` (float8_e4m3fn) and ``weight_scale_inv`` (float32, one per 128x128) make an Fp8Array with no work."""
    weight = rng.integers(0, 0x7E, (192, 300), dtype=np.uint8).view(FLOAT8["e4m3"])
    weight_scale_inv = rng.uniform(0.1, 2, (2, 3)).astype(np.float32)
    q = Fp8Array(weight, weight_scale_inv, (128, 128))
    assert np.shares_memory(q.codes, weight)
    assert np.shares_memory(q.scales, weight_scale_inv)
    expected = weight.astype(np.float32) * np.repeat(np.repeat(weight_scale_inv, 128, 0)[:192], 128, 1)[:, :300]
    assert_same_bytes(q.dequantize(), expected)
    assert q.nbytes == 192 * 300 + 24
    assert q.shape == (192, 300)
    assert_same_bytes(Fp8Array(weight.view(np.uint8), weight_scale_inv, (128, 128)).dequantize(), expected)


def test_scale_types_of_checkpoints_widen_exactly():
    e8m0 = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).reshape(255, 1)
    q = Fp8Array(np.zeros((255, 8), np.uint8), e8m0)
    assert q.scales[:, 0].tolist() == [2.0 ** (i - 127) for i in range(255)]
    bf16 = np.array([[1.5]], BFLOAT16)
    assert Fp8Array(np.zeros((1, 8), np.uint8), bf16).scales.tolist() == [[1.5]]


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (7, 56), (129, 2), (2, 5, 3)])
def test_column_major_scales(shape, rng):
    scales = rng.normal(size=shape).astype(np.float32)
    q = Fp8Array(np.zeros((*shape[:-1], shape[-1] * 128), np.uint8), scales)
    layout = q.scales_column_major()
    assert_same_bytes(np.ascontiguousarray(layout), scales)
    assert layout.strides[-2:] == (4, -(-shape[-2] // 4) * 16)
    assert layout.ctypes.data % 16 == 0


def codes(*shape):
    return np.zeros(shape, np.uint8)


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"scales must be of shape \[4, 2\] .* got \[4, 1\]", lambda: Fp8Array(codes(4, 200), ones(4, 1))),
        (ValueError, "scales must be", lambda: Fp8Array(codes(256, 256), ones(2, 1), (128, 128))),
        (ValueError, "scales must be", lambda: Fp8Array(codes(2, 4, 128), ones(4, 1))),
        (ValueError, "at least two axes", lambda: Fp8Array(codes(4), ones(1))),
        (TypeError, "codes must be", lambda: Fp8Array(ones(4, 128), ones(4, 1))),
        (TypeError, "codes must be", lambda: Fp8Array(codes(4, 128).view(FLOAT8["e5m2"]), ones(4, 1))),
        (TypeError, "scales must be", lambda: Fp8Array(codes(4, 128), ones(4, 1).astype(np.float64))),
        (TypeError, "block must be", lambda: Fp8Array(codes(4, 128), ones(4, 1), 128)),
        (ValueError, "block must be", lambda: Fp8Array(codes(4, 128), ones(4, 1), (1, 0))),
        (ValueError, "format must be", lambda: Fp8Array(codes(4, 128), ones(4, 1), (1, 128), "e3m4")),
        (
            TypeError,
            "codes must be of three axes or more",
            lambda: Fp8Array(codes(4, 128), ones(4, 1))[0],
        ),
        (TypeError, "index must be", lambda: Fp8Array(codes(1, 4, 128), ones(1, 4, 1))[None]),
        (
            ValueError,
            "scales must be",
            lambda: Fp8Array(codes(4, 128), ones(4, 1), (4, 128), expert_offsets=np.array([0, 4])),
        ),
        (
            ValueError,
            "of two axes",
            lambda: Fp8Array(codes(1, 4, 128), ones(1, 4, 1), expert_offsets=np.array([0, 4])),
        ),
        (TypeError, "x must be", lambda: quantize_fp8(codes(4, 128))),
        (TypeError, "x must be an array", lambda: quantize_fp8([[1.0]])),
        (TypeError, "x must be", lambda: quantize_fp8(ones(4, 128).astype(">f4"))),
        (ValueError, "x must be of at least two axes", lambda: quantize_fp8(ones(4))),
        (ValueError, "block must be in 1..2147483647", lambda: quantize_fp8(ones(4, 4), block=(0, 1))),
        (TypeError, "block must be a pair", lambda: quantize_fp8(ones(4, 4), block=4)),
        (TypeError, "block must be an integer", lambda: quantize_fp8(ones(4, 4), block=(1.0, 2))),
        (ValueError, "format must be one of 'e4m3', 'e5m2'", lambda: quantize_fp8(ones(4, 4), format="e4m3fn")),
        (ValueError, "scale_format must be", lambda: quantize_fp8(ones(4, 4), scale_format="e8m0")),
        (ValueError, "expert_offsets must be", lambda: quantize_fp8(ones(4, 4), expert_offsets=np.array([0, 3, 2]))),
        (ValueError, "expert_offsets must be", lambda: quantize_fp8(ones(4, 4), expert_offsets=np.array([0, 5]))),
        (ValueError, "expert_offsets must be", lambda: quantize_fp8(ones(4, 4), expert_offsets=np.array([1, 4]))),
        (ValueError, "expert_offsets must be", lambda: quantize_fp8(ones(4, 4), expert_offsets=np.array([0]))),
        (TypeError, "expert_offsets must be", lambda: quantize_fp8(ones(4, 4), expert_offsets=np.array([0.0, 4.0]))),
        (ValueError, "of two axes", lambda: quantize_fp8(ones(1, 4, 4), expert_offsets=np.array([0, 4]))),
        (ValueError, "backend must be", lambda: quantize_fp8(ones(4, 4), backend="gpu")),
        (TypeError, "q must be an Fp8Array", lambda: dequantize_fp8(ones(4, 4))),
        (ValueError, "dtype must be", lambda: dequantize_fp8(quantize_fp8(ones(1, 4)), "int8")),
        (TypeError, "dtype must be", lambda: dequantize_fp8(quantize_fp8(ones(1, 4)), np.int8)),
    ],
)
def test_a_mistake_is_one_sentence(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not CPU_FLOORS, reason="needs the extension")
@pytest.mark.parametrize(
    ("block", "format", "offsets", "col_blocks"),
    [
        ((1, 2), "e4m3", None, 1),
        ((0, 2), "e4m3", None, 2),
        ((1, 2), "e3m4", None, 2),
        ((1, 2), "e4m3", [0, 3], 2),
        ((1, 2), "e4m3", [0, 2, 1], 2),
        ((1, 2), "e4m3", [1, 2], 2),
        ((1, 2), "e4m3", [0], 2),
    ],
)
def test_the_extension_itself_refuses_what_does_not_fit(block, format, offsets, col_blocks):
    offsets = None if offsets is None else np.array(offsets)
    x, written, scales = ones(1, 2, 3), codes(1, 2, 3), ones(1, 2, col_blocks)
    with pytest.raises(ValueError, match="_core"):
        _backend.core.quantize_fp8(x, block, format, False, offsets, written, scales)
    with pytest.raises(ValueError, match="_core"):
        _backend.core.dequantize_fp8(written, scales, block, format, offsets, x)


def test_offsets_of_a_plan_are_taken_as_they_are(floor, rng):
    plan = plan_routes(rng.integers(0, 5, (40, 2)), 5, alignment=16, backend=floor.backend)
    x = rng.normal(size=(plan.num_rows, 20)).astype(np.float32)
    check(x, floor, block=(128, 1), expert_offsets=plan.expert_offsets)
