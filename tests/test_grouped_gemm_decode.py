"""Grouped GEMM for a few rows per expert: the path that streams the weights gives the bytes of the tiles.

A segment of up to eight rows takes it, a longer one takes the tiles, so each row is computed alone, among few and
among many. Of the instruction sets the scalar one spells the sums out.
"""

import numpy as np
import pytest
from conftest import CPU_FLOORS, assert_same_bytes, guarded, poison
from grouped_gemm_operands import BF16, FLOAT8, MIXES, ROW_BLOCK, WEIGHT_BLOCK, offsets_of, operand

import pyroute
from pyroute import Fp8Array, _backend, grouped_gemm

pytestmark = pytest.mark.skipif(not CPU_FLOORS, reason="needs the compiled floor")

MANY = 24  # rows of a segment that takes the tiles


def rows_of(x, rows):
    return Fp8Array(x.codes[rows], x.scales[rows], x.block, x.format) if isinstance(x, Fp8Array) else x[rows]


def codes_of(rng, kind, shape, block=WEIGHT_BLOCK):
    """Any code but NaN and infinity, subnormals and both zeros among them."""
    plain, _ = operand(rng, kind, shape, block)
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) >= (0x7F if kind == "e4m3" else 0x7C)] = 0x80
    return Fp8Array(codes.view(FLOAT8[kind]), plain.scales, block, kind)


def by_tiles(a, b, out_dtype="float32"):
    """Every row of ``a`` times the one expert of ``b``, computed in a segment of many rows."""
    count = a.shape[0]
    rows = np.arange(-(-count // MANY) * MANY) % count
    return grouped_gemm(rows_of(a, rows), b, offsets_of(len(rows)), out_dtype=out_dtype, backend="cpu")[:count]


def assert_like_tiles(a, b, counts=(1,)):
    """Rows of ``a`` in segments of these lengths, each with the same expert, against the tiles."""
    expected = by_tiles(a, b)
    for count in counts:
        for first in range(0, a.shape[0] - count + 1, count):
            got = grouped_gemm(
                rows_of(a, slice(first, first + count)), b, offsets_of(count), out_dtype="float32", backend="cpu"
            )
            assert_same_bytes(got, expected[first : first + count])


@pytest.mark.parametrize(("kind_a", "kind_b"), MIXES)
def test_rows_alone_have_the_bytes_of_the_tiles(cpu_floor, kind_a, kind_b, rng):
    """1 to 20 rows: alone, by the register tiles of every size, around the place where the tiles take over."""
    counts = list(range(1, 21))
    n, k = 37, 300
    b, _ = operand(rng, kind_b, (1, n, k), WEIGHT_BLOCK)
    a, _ = operand(rng, kind_a, (sum(counts), k), ROW_BLOCK)
    expected = by_tiles(a, b)
    first = 0
    for count in counts:
        rows = rows_of(a, slice(first, first + count))
        for out_dtype in ("float32", "bfloat16"):
            got = grouped_gemm(rows, b, offsets_of(count), out_dtype=out_dtype, backend="cpu")
            assert_same_bytes(got, expected[first : first + count].astype(got.dtype))
        first += count


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e4m3", "e5m2"])
@pytest.mark.parametrize("k", [1, 7, 8, 9, 31, 33, 40, 63, 64, 65, 127, 128, 129, 160, 161, 255, 257, 1001])
def test_lengths_of_the_contraction_and_numbers_of_columns(cpu_floor, kind, k, rng):
    for n in (1, 2, 3, 5, 8, 9, 17):
        b, _ = operand(rng, kind, (1, n, k), WEIGHT_BLOCK)
        a, _ = operand(rng, "bfloat16", (6, k), ROW_BLOCK)
        assert_like_tiles(a, b, counts=(1, 2, 6))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (3, 256), (17, 384), (128, 64), (5, 7), (64, 1)])
def test_scale_blocks_of_any_shape(cpu_floor, kind, block, rng):
    for n, k in [(40, 400), (131, 128), (300, 260)]:
        b = codes_of(rng, kind, (1, n, k), block)
        a, _ = operand(rng, "bfloat16", (4, k))
        x, _ = operand(rng, "e4m3", (4, k), (2, 128))
        assert_like_tiles(a, b, counts=(1, 4))
        expected = grouped_gemm(x, b, offsets_of(4), out_dtype="float32", backend="cpu")
        for row in range(4):
            alone = Fp8Array(x.codes[row : row + 1], x.scales[row // 2 : row // 2 + 1], (2, 128), "e4m3")
            assert_same_bytes(
                grouped_gemm(alone, b, offsets_of(1), out_dtype="float32", backend="cpu"), expected[row : row + 1]
            )


def test_experts_of_few_and_of_many_rows_together(threads, rng):
    """More experts than one batch of segments holds, empty ones and crowded ones between."""
    counts = rng.choice([0, 1, 2, 5, 8, 9, 30], 150)
    n, k = 24, 140
    b, _ = operand(rng, "e4m3", (150, n, k), WEIGHT_BLOCK)
    a, _ = operand(rng, "bfloat16", (int(counts.sum()) + 2, k))
    offsets = offsets_of(*counts)
    got = grouped_gemm(a, b, offsets, out=poison((len(a), n), np.float32), backend="cpu")
    for e in range(150):
        rows = slice(offsets[e], offsets[e + 1])
        one = Fp8Array(b.codes[e : e + 1], b.scales[e : e + 1], b.block, b.format)
        if counts[e]:
            assert_same_bytes(got[rows], by_tiles(a[rows], one))
    assert not got[offsets[-1] :].any()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e4m3", "e5m2"])
def test_threads_share_the_columns(kind, threads, rng):
    """Several tasks a thread, the last one short."""
    b, _ = operand(rng, kind, (3, 1000, 1040), WEIGHT_BLOCK)
    a, _ = operand(rng, "bfloat16", (6, 1040))
    got = grouped_gemm(a, b, offsets_of(1, 2, 3), out_dtype="float32", backend="cpu")
    pyroute.set_num_threads(1)
    assert_same_bytes(got, grouped_gemm(a, b, offsets_of(1, 2, 3), out_dtype="float32", backend="cpu"))


# --- a single row: columns one after another, up to 32 blocks of the contraction at a time ----------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e4m3", "e5m2"])
@pytest.mark.parametrize("blocks", [2, 3, 4, 5, 6, 7, 8, 31, 32, 33, 35, 66])
def test_blocks_of_a_long_contraction(cpu_floor, kind, blocks, rng):
    for n, k in [(3, 128 * blocks), (131, 128 * blocks), (2, 128 * blocks + 17)]:
        b, _ = operand(rng, kind, (1, n, k), WEIGHT_BLOCK)
        a, _ = operand(rng, "bfloat16", (2, k))
        assert_like_tiles(a, b)
        x, _ = operand(rng, "e4m3", (1, k), ROW_BLOCK)
        assert_like_tiles(x, b)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (3, 256), (5, 512), (128, 64)])
def test_columns_whose_scales_change(cpu_floor, kind, block, rng):
    b = codes_of(rng, kind, (1, 260, 1408), block)
    a, _ = operand(rng, "bfloat16", (2, 1408))
    assert_like_tiles(a, b)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("place", [0, 2, 8, 33])
def test_one_block_of_a_row_that_no_power_of_two_fits(cpu_floor, kind, place, rng):
    """It takes its run of up to 32 blocks with it, not the run before."""
    n, k = 20, (9 if place < 9 else 35) * 128
    b = codes_of(rng, kind, (1, n, k))
    for edge in ("far apart", "2^48", "below 2^40", "smallest that 2^48 allows"):
        a = rng.standard_normal((1, k)).astype(np.float32)
        a[0, 512:640] *= 1000
        a[0, 128 * place : 128 * (place + 1)] = rng.choice(np.float32(EDGES[edge]), 128)
        assert_like_tiles(a, b)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_a_code_that_is_no_number_in_every_block(cpu_floor, kind, rng):
    """Each column has one, at another place of another block; the columns between keep their bytes."""
    n, k = 2 * 11 * 4, 11 * 128
    clean = codes_of(rng, kind, (1, n, k))
    a = rng.standard_normal((1, k)).astype(np.float32)
    a[0, 640:768] *= 1000
    before = by_tiles(a, clean)
    for special in [0x7F, 0xFF] if kind == "e4m3" else [0x7C, 0xFE]:
        codes = clean.codes.copy()
        cols = np.arange(0, n, 2)
        codes.view(np.uint8)[0, cols, cols // 2 % 11 * 128 + rng.integers(0, 128, len(cols))] = special
        b = Fp8Array(codes, clean.scales, clean.block, kind)
        assert_like_tiles(a, b)
        got = grouped_gemm(a, b, offsets_of(1), backend="cpu")
        assert_same_bytes(np.ascontiguousarray(got[:, 1::2]), np.ascontiguousarray(before[:, 1::2]))
        assert not np.isfinite(got[:, cols]).any()


# --- activations and codes at the edges of what a power of two may hide ----------------------------------------------

TINY = [1e-45, -1e-45, 2.0**-126, -(2.0**-140), 0.0, -0.0]
EDGES = {
    "below 2^8": [255.99, -255.99, *TINY],
    "2^8": [256.0, -256.0, 1.0, 2.0**-60],
    "2^8 beside subnormals": [256.0, *TINY],
    "below 2^16": [65535.9, *TINY],
    "2^16": [65536.0, -65536.0, 3.0, -0.0],
    "below 2^40": [np.nextafter(np.float32(2.0**40), 0), 1.7, 0.0],
    "2^40": [2.0**40, 1.7, 0.0],
    "below 2^48": [np.nextafter(np.float32(2.0**48), 0), 1.7, 0.0],
    "2^48": [2.0**48, -1.7],
    "smallest that 2^40 allows": [3e9, 2.0**-85, -1.9 * 2.0**-85, 0.0],
    "smaller": [3e9, np.nextafter(np.float32(2.0**-85), 0), -(2.0**-86)],
    "smallest that 2^48 allows": [3e9, 2.0**-78, -1.9 * 2.0**-78, -0.0],
    "smaller than that": [3e9, np.nextafter(np.float32(2.0**-78), 0), -(2.0**-79)],
    "far apart": [3e38, -3e38, 1e-45, 2.0**-126],
    "infinity": [np.inf, 1.0, -2.0],
    "both infinities": [np.inf, -np.inf, 0.0],
    "NaN": [np.nan, 1.0],
    "only tiny": TINY,
}


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("edge", EDGES)
def test_activations_at_the_edges(cpu_floor, kind, edge, rng):
    """Fine products underflow beside coarse ones: 13 bits of both operands' last places in every sum."""
    n, k = 40, 384
    b = codes_of(rng, kind, (1, n, k))
    b.scales[...] = rng.choice(np.float32([1.0, 0.37, 2.0**-40, 2.0**40]), b.scales.shape)
    a = rng.choice(np.float32(EDGES[edge]), (5, k))
    a *= np.where(np.abs(a) < 1, 1, rng.uniform(0.5, 1, a.shape)).astype(np.float32) if "2^" not in edge else 1
    a[1, 128:] = 1.5  # one block at the edge, ordinary ones after it
    a[2, rng.integers(0, k, 380)] = 0
    a[3] = rng.choice(np.float32(TINY), k)
    assert_like_tiles(a, b, counts=(1, 2, 5))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_a_tiny_product_beside_a_huge_activation(cpu_floor, kind):
    """The huge one meets a weight of zero, so that the sum is the tiny product, to its last bit."""
    for exponent in range(-110, -60):
        tiny = np.nextafter(np.float32(2.0) ** exponent, np.float32(0))
        for code in (1, 3):
            codes = np.zeros((1, 2, 128), np.uint8)
            codes[0, 1, 9] = code
            b = Fp8Array(codes.view(FLOAT8[kind]), np.ones((1, 1, 1), np.float32), WEIGHT_BLOCK, kind)
            a = np.zeros((1, 128), np.float32)
            a[0, 0], a[0, 9] = 3e9, tiny
            expected = np.float32([[0, tiny * codes.view(FLOAT8[kind])[0, 1, 9].astype(np.float32)]])
            assert_same_bytes(grouped_gemm(a, b, offsets_of(1), backend="cpu"), expected)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**45, 2.0**-110])
def test_codes_that_are_no_numbers(cpu_floor, kind, scale, rng):
    """One NaN or infinity in each of some columns, at every kind of place; other columns keep their bytes."""
    n, k = 30, 300
    clean = codes_of(rng, kind, (1, n, k))
    a = (rng.standard_normal((3, k)) * scale).astype(np.float32)
    a[:, 5] = 0
    before = by_tiles(a, clean)
    specials = [0x7F, 0xFF] if kind == "e4m3" else [0x7C, 0xFC, 0x7D, 0xFD, 0x7F, 0xFF]
    for special in specials:
        codes = clean.codes.copy()
        places = {1: 0, 4: 5, 8: 31, 9: 32, 13: 127, 20: 128, 28: 255, 29: 299}
        for col, place in places.items():
            codes.view(np.uint8)[0, col, place] = special
        b = Fp8Array(codes, clean.scales, clean.block, kind)
        assert_like_tiles(a, b, counts=(1, 3))
        untouched = [col for col in range(n) if col not in places]
        got = grouped_gemm(a, b, offsets_of(3), out_dtype="float32", backend="cpu")
        assert_same_bytes(np.ascontiguousarray(got[:, untouched]), np.ascontiguousarray(before[:, untouched]))
        assert not np.isfinite(got[:, list(places)[2:]]).any()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_every_code_alone(floor, kind):
    """One product: the value of each code, in every lane of a step and at both places of a pair of columns."""
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(FLOAT8[kind]).astype(np.float32)
    b = np.zeros((1, 256, 64), np.uint8)
    for place in (0, 3, 12, 29, 34, 63):
        b[...] = 0
        b[0, :, place] = codes
        a = np.zeros((1, 64), np.float32)
        for x in (1.0, -1.0, 300.0, 1e12, 2.0**-100):
            a[0, place] = x
            weights = Fp8Array(b.view(FLOAT8[kind]), np.ones((1, 2, 1), np.float32), WEIGHT_BLOCK, kind)
            got = grouped_gemm(a, weights, offsets_of(1), backend=floor.backend)[0]
            np.testing.assert_array_equal(got, np.where(np.isnan(values), np.nan, values * np.float32(x)))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e4m3", "e5m2"])
@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_outside_is_touched(cpu_floor, kind, at, rng):
    for counts, n, k in [((1, 0, 2), 3, 5), ((1, 3, 0), 9, 131), ((8, 1, 7), 70, 33), ((2, 2, 2), 8, 128)]:
        a, _ = operand(rng, "bfloat16", (sum(counts), k))
        b, _ = operand(rng, kind, (3, n, k), WEIGHT_BLOCK)
        expected = grouped_gemm(a, b, offsets_of(*counts), out_dtype="float32", backend="cpu")
        if isinstance(b, Fp8Array):
            codes = guarded(b.codes.view(np.uint8), at=at).view(b.codes.dtype)
            b = Fp8Array(codes, guarded(b.scales, at=at), b.block, b.format)
        else:
            b = guarded(b, at=at)
        out = guarded(poison(expected.shape, np.float32), at=at)
        grouped_gemm(guarded(a, at=at), b, offsets_of(*counts), out=out, backend="cpu")
        assert_same_bytes(out, expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e4m3"])
def test_memory_at_any_address(cpu_floor, kind, rng):
    """Weights and rows that begin on no boundary but their own items'."""

    def shifted(x, items):
        raw = np.empty(x.size + items, x.dtype)
        raw[items:] = x.reshape(-1)
        return raw[items:].reshape(x.shape)

    a, _ = operand(rng, "bfloat16", (3, 261))
    b, _ = operand(rng, kind, (1, 21, 261), WEIGHT_BLOCK)
    expected = grouped_gemm(a, b, offsets_of(3), backend="cpu")
    for items in (1, 3, 7):
        if isinstance(b, Fp8Array):
            there = Fp8Array(shifted(b.codes, items), shifted(b.scales, items), b.block, b.format)
        else:
            there = shifted(b, items)
        assert_same_bytes(grouped_gemm(shifted(a, items), there, offsets_of(3), backend="cpu"), expected)


def test_numpy_gives_the_same_bytes_where_products_are_exact(cpu_floor, rng):
    n, k = 21, 300
    a = rng.standard_normal((7, k)).astype(BF16)
    b = codes_of(rng, "e4m3", (3, n, k))
    b.scales[...] = 2.0 ** rng.integers(-8, 8, b.scales.shape)
    for counts in [(1, 0, 2), (4, 3, 0)]:
        rows = a[: sum(counts)]
        wide = grouped_gemm(rows, b, offsets_of(*counts), out_dtype="float32", backend="numpy")
        assert_same_bytes(wide, grouped_gemm(rows, b, offsets_of(*counts), out_dtype="float32", backend="cpu"))


def test_the_instruction_sets_agree_at_the_edges(rng):
    """The tiles of the scalar floor are the reference that no other kernel shares code with."""
    before = _backend.core.isa()
    try:
        for kind in ("e4m3", "e5m2"):
            b = codes_of(rng, kind, (1, 33, 290))
            for edge in EDGES.values():
                a = rng.choice(np.float32(edge), (2, 290))
                _backend.core.set_isa("scalar")
                expected = by_tiles(a, b)
                for name in _backend.core.isas():
                    _backend.core.set_isa(name)
                    assert_same_bytes(grouped_gemm(a, b, offsets_of(2), out_dtype="float32", backend="cpu"), expected)
    finally:
        _backend.core.set_isa(before)
