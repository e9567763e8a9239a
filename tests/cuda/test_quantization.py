"""quantize_fp8 and dequantize_fp8 on the emulated GPU: the CPU floor's bytes.

Rows that allow 16-byte loads take the kernels for 1x128, 128x128 and 128x1 blocks, which convert by the instruction
(emulator/conversions.h does what the manual says) or, on cards that have none, by integer steps; others the general
one, which takes those steps everywhere.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from emulated import launched, to_device, to_host

import pyroute
from pyroute._device import quantization as device

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}
FORMATS = ("e4m3", "e5m2")
BLOCKS = ((1, 128), (128, 128), (128, 1))
CARDS = pytest.mark.parametrize("card", [80, 90], indirect=True)  # by integer steps, by the instruction


def on_gpu(x, offset=0, **arguments):
    """quantize_fp8 of a copy on the GPU, checked against the CPU's bytes."""
    offsets = arguments.get("expert_offsets")
    at = {} if offsets is None else {"expert_offsets": to_device(offsets)}
    q = pyroute.quantize_fp8(to_device(x, offset=offset), **(arguments | at))
    expected = pyroute.quantize_fp8(x, backend="cpu", **arguments)
    assert (q.codes.dtype, q.shape, q.block) == (expected.codes.dtype, expected.shape, expected.block)
    np.testing.assert_array_equal(to_host(q.codes).view(np.uint8), expected.codes.view(np.uint8))
    scales, rows = to_host(q.scales), expected.scales.shape[-2]
    assert scales[..., :rows, :].tobytes() == expected.scales.tobytes()
    assert (scales[..., rows:, :] == 1).all()
    return q, expected


def values(shape, dtype, rng):
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 12, shape))
    return x.astype(dtype)


def with_specials(x, rng, fraction=0.02):
    """Zeros of both signs, NaN, infinities, subnormals and the largest numbers here and there."""
    x = x.copy()
    with np.errstate(over="ignore"):
        info = ml_dtypes.finfo(x.dtype)
        specials = np.array(
            [0.0, -0.0, np.nan, np.inf, -np.inf, info.smallest_subnormal, info.max, -info.tiny], x.dtype
        )
    where = rng.random(x.shape) < fraction
    x[where] = rng.choice(specials, int(where.sum()))
    return x


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@CARDS
def test_bytes(dtype, format, block, card):
    rng = np.random.default_rng(1)
    for scale_format in ("float32", "ue8m0"):
        x = with_specials(values((150, 272), TYPES[dtype], rng), rng)
        on_gpu(x, block=block, format=format, scale_format=scale_format)


def test_which_kernel_serves():
    x, odd = np.zeros((200, 272), np.float32), np.zeros((200, 271), np.float32)
    launched()
    for block in BLOCKS:
        for matrix, offset in ((x, 0), (x, 1), (odd, 0)):
            pyroute.quantize_fp8(to_device(matrix, offset=offset), block=block)
    fast = [f"quantize_{name}_float32_e4m3" for name in ("row128", "tile128", "column128")]
    assert launched() == [name for one in fast for name in (one, *["quantize_any_float32_e4m3"] * 2)]


@pytest.mark.parametrize("block", [*BLOCKS, (1, 64), (3, 5), (64, 16), (200, 300), (1, 2**31 - 1), (2**31 - 1, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 200), (130, 129), (129, 144), (3, 5, 160), (2, 2, 130, 48)])
def test_shapes_and_blocks(shape, block):
    rng = np.random.default_rng(2)
    on_gpu(with_specials(values(shape, np.float32, rng), rng, 0.001), block=block)
    on_gpu(values(shape, ml_dtypes.bfloat16, rng), block=block, offset=3)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 3, 4), (2, 0, 5)])
def test_nothing_to_quantise(shape):
    for block in BLOCKS:
        q, _ = on_gpu(np.zeros(shape, np.float32), block=block)
        assert pyroute.dequantize_fp8(q).shape == shape


def offsets_of(counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


FEW = [[300], [0, 0, 1, 0], [128, 0, 5, 127, 129, 1], [1] * 10]
MANY = [[0] * 260, [2, 0, 3] * 90]  # more experts than threads
RESTARTS = [(cols, block) for block in BLOCKS for cols in (48, 130)] + [(48, (16, 128)), (130, (100, 3)), (50, (1, 32))]


@pytest.mark.parametrize(
    ("counts", "cols", "block"),
    [(counts, *case) for counts in FEW for case in RESTARTS]
    + [(counts, cols, block) for counts in MANY for cols, block in ((16, (128, 1)), (5, (128, 128)))],
)
def test_blocks_restart_at_each_expert(counts, cols, block):
    """Rows past the last offset hold NaN and come out as codes 0."""
    rng = np.random.default_rng(3)
    offsets = offsets_of(counts)
    for tail in (0, 37):
        x = values((offsets[-1] + tail, cols), np.float32, rng)
        x[offsets[-1] :] = np.nan
        q, expected = on_gpu(x, block=block, expert_offsets=offsets)
        got = to_host(pyroute.dequantize_fp8(q))
        assert got.tobytes() == pyroute.dequantize_fp8(expected).tobytes()


@pytest.mark.parametrize("offsets", [[5, 3, 9], [0, -4, 90], [0, 10**12, 3], [-(2**63), 2**63 - 1, 0], [0, 99, 40]])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("races_allowed")
def test_nonsense_in_offsets_stays_within_the_arrays(offsets, block):
    """The fixture looks around every array; the guard pages end the process."""
    rng = np.random.default_rng(4)
    for cols in (64, 70):
        at = to_device(np.array(offsets, np.int64))
        q = pyroute.quantize_fp8(to_device(values((50, cols), np.float32, rng)), block=block, expert_offsets=at)
        assert to_host(pyroute.dequantize_fp8(q)).shape == (50, cols)


def in_blocks(x, largest, *, finite):
    """Rows of 126 values of ``x`` behind the value that fixes the scale at 1, and a NaN if not ``finite``."""
    rows = -(-x.size // 126)
    result = np.zeros((rows, 128), x.dtype)
    result[:, 2:].reshape(-1)[: x.size] = 0
    padded = np.zeros(rows * 126, x.dtype)
    padded[: x.size] = x
    result[:, 2:] = padded.reshape(rows, 126)
    result[:, 0] = largest
    result[:, 1] = 0 if finite else np.nan
    return result


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@CARDS
def test_every_16_bit_pattern(dtype, format, card):
    """In blocks of scale 1, and all by magnitude."""
    every = np.arange(2**16, dtype=np.uint16).view(TYPES[dtype])
    with np.errstate(invalid="ignore"):
        small = every[np.abs(every.astype(np.float32)) <= 448]
        ordered = every[np.argsort(np.abs(every.astype(np.float64)), kind="stable")]
    for finite in (True, False):
        on_gpu(in_blocks(small, 448 if format == "e4m3" else 57344, finite=finite), format=format)
    for offset in (0, 1):  # by the instruction, by integer steps
        on_gpu(ordered.reshape(512, 128), offset, format=format)


@pytest.mark.parametrize("format", FORMATS)
@CARDS
def test_float32_around_every_tie(format, card):
    """Each code, each tie between neighbours, the numbers beside them, every 4099th pattern, and random ones."""
    codes = np.arange(0x7F if format == "e4m3" else 0x7C, dtype=np.uint8)
    exact = codes.view(ml_dtypes.float8_e4m3fn if format == "e4m3" else ml_dtypes.float8_e5m2).astype(np.float64)
    points = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2]).astype(np.float32)
    around = np.concatenate([np.nextafter(points, np.float32(d)) for d in (-np.inf, np.inf)])
    bits = np.random.default_rng(5).integers(0, 2**32, 200_000, np.uint64).astype(np.uint32).view(np.float32)
    sweep = np.arange(0, exact[-1].astype(np.float32).view(np.uint32), 4099, dtype=np.uint32).view(np.float32)
    x = np.concatenate([points, around, sweep, bits[np.abs(bits) <= exact[-1]]])
    x = np.concatenate([x, -x])
    x = x[np.abs(x) <= exact[-1]]
    for finite, offset in itertools.product((True, False), (0, 1)):
        q, _ = on_gpu(in_blocks(x, exact[-1], finite=finite), offset, format=format)
        assert (to_host(q.scales) == 1).all()
    for dtype in TYPES.values():
        with np.errstate(over="ignore", invalid="ignore"):
            for offset in (0, 1):
                on_gpu(bits[: 128 * 800].astype(dtype).reshape(-1, 128), offset, format=format)


@pytest.mark.parametrize("dtype", TYPES)
def test_dequantise_every_code(dtype):
    rng = np.random.default_rng(6)
    for format, block, cols in itertools.product(FORMATS, [(1, 128), (128, 128), (2, 3), (128, 1), (5, 48)], [256, 77]):
        codes = np.tile(np.arange(256, dtype=np.uint8), (6, 2, 2))[..., :cols].copy()
        scales = np.exp2(rng.uniform(-140, 127, (6, -(-2 // block[0]), -(-cols // block[1])))).astype(np.float32)
        scales[0] = [[np.nan]]
        q = pyroute.Fp8Array(codes, scales, block, format)
        on = pyroute.Fp8Array(to_device(codes, offset=cols % 2), to_device(scales), block, format)
        assert on.codes.dtype == q.codes.dtype
        with np.errstate(all="ignore"):
            assert to_host(on.dequantize(dtype)).tobytes() == q.dequantize(dtype).tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (5, 200), (3, 130, 261), (2, 4, 33), (0, 5), (2, 5, 0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_transposed(shape, dtype):
    x = np.random.default_rng(7).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
    for pitch in (None, shape[-2] + 5, -(-shape[-2] // 16) * 16):
        for offset in (0, 3):
            got = to_host(device.transposed(to_device(x, offset=offset), pitch))
            rows = shape[-2]
            assert got[..., :rows].tobytes() == np.swapaxes(x, -1, -2).tobytes()
            assert not got[..., rows:].view(np.uint8).any()


@pytest.mark.parametrize("seed", range(6), indirect=True)
def test_any_order_of_threads(seed):
    """What a thread reads of others it waits for: the bytes are the same whichever thread runs first."""
    rng = np.random.default_rng(8)
    x = with_specials(values((260, 144), np.float32, rng), rng, 0.001)
    for block in (*BLOCKS, (100, 130)):
        on_gpu(x, block=block)
        on_gpu(x, block=block, expert_offsets=offsets_of([3, 0, 130, 1, 99]))


def test_a_mistake_is_one_sentence():
    x = to_device(np.zeros((4, 8), np.float32))
    with pytest.raises(TypeError, match="quantize_fp8: expert_offsets must be int64, got int32"):
        pyroute.quantize_fp8(x, expert_offsets=to_device(np.zeros(3, np.int32)))
    with pytest.raises(TypeError, match="quantize_fp8: arrays must be on one device"):
        pyroute.quantize_fp8(x, expert_offsets=np.zeros(3, np.int64))
    q = pyroute.quantize_fp8(x)
    with pytest.raises(ValueError, match="Fp8Array: scales must be of shape"):
        pyroute.Fp8Array(q.codes, to_device(np.zeros((3, 1), np.float32)))
    with pytest.raises(TypeError, match="scales_column_major: scales must be a NumPy or CuPy array, got float32"):
        q.scales_column_major()
