"""Grouped GEMM: the same bytes on every instruction set, for any number of threads and in any batch."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import CPU_FLOORS, assert_same_bytes
from grouped_gemm_operands import BF16, FLOAT8, MIXES, ROW_BLOCK, TOKEN_BLOCK, TYPES, WEIGHT_BLOCK, offsets_of, operand

import pyroute
from pyroute import Fp8Array, _backend, grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad

needs_core = pytest.mark.skipif(not CPU_FLOORS, reason="needs the compiled floor")


def wild(rng, kind, shape, block, expert_offsets=None):
    """Any code or bit pattern of the type: infinities, NaN, subnormal and huge numbers."""
    if kind in FLOAT8:
        plain, _ = operand(rng, kind, shape, block, expert_offsets)
        codes = rng.integers(0, 256, shape, np.uint8)
        return Fp8Array(codes, plain.scales, block, kind, expert_offsets)
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.float32(2) ** rng.integers(-60, 60, shape)
    x.flat[rng.integers(0, x.size, 1 + x.size // 500)] = rng.choice([np.inf, -np.inf, np.nan, -0.0, 1e-45, 3e38])
    return x.astype(BF16 if kind == "bfloat16" else np.float32)


def all_three(rng, kind_a, kind_b, counts, n, k, make):
    """Forward, dgrad and wgrad on one set of operands, as functions of nothing."""
    offsets = offsets_of(*counts)
    rows = int(offsets[-1]) + 1
    a, b = make(rng, kind_a, (rows, k), ROW_BLOCK), make(rng, kind_b, (len(counts), n, k), WEIGHT_BLOCK)
    g = make(rng, kind_a, (rows, n), ROW_BLOCK)
    tall_g = make(rng, kind_a, (rows, n), TOKEN_BLOCK, offsets)
    tall_a = make(rng, kind_b, (rows, k), TOKEN_BLOCK, offsets)
    return (
        lambda: grouped_gemm(a, b, offsets, backend="cpu"),
        lambda: grouped_gemm(a, b, offsets, out_dtype="float32", backend="cpu"),
        lambda: grouped_gemm_dgrad(g, b, offsets, out_dtype="float32", backend="cpu"),
        lambda: grouped_gemm_wgrad(tall_g, tall_a, offsets, backend="cpu"),
        lambda: grouped_gemm_wgrad(g, a, offsets, backend="cpu"),
    )


@needs_core
@pytest.mark.parametrize(("kind_a", "kind_b"), MIXES)
def test_every_instruction_set_gives_the_same_bytes(kind_a, kind_b, rng):
    before = _backend.core.isa()
    try:
        for counts, n, k in [((1, 0, 3), 5, 260), ((13, 30), 26, 131), ((2,), 1, 7)]:
            for op in all_three(rng, kind_a, kind_b, counts, n, k, wild):
                results = []
                for floor in CPU_FLOORS:
                    _backend.core.set_isa(floor.removeprefix("cpu-"))
                    results.append(op())
                for other in results[1:]:
                    assert_same_bytes(results[0], other)
    finally:
        _backend.core.set_isa(before)


@needs_core
@pytest.mark.parametrize(("kind_a", "kind_b"), [("float32", "float32"), ("bfloat16", "e4m3"), ("e4m3", "e4m3")])
def test_threads_do_not_change_bytes(kind_a, kind_b, threads, rng):
    """One crowded expert (two runs of 360 rows), several column panels."""
    ops = all_three(rng, kind_a, kind_b, (2, 0, 700, 20), 400, 270, lambda *args: operand(*args)[0])
    several = [op() for op in ops]
    pyroute.set_num_threads(1)
    for op, result in zip(ops, several, strict=True):
        assert_same_bytes(op(), result)


@needs_core
def test_more_rows_than_are_packed_at_a_time(threads, rng):
    """19 MiB of packed rows in five runs: several rounds, and runs of one expert in different rounds."""
    counts, n, k = (2050, 9, 41), 5, 2304
    offsets = offsets_of(*counts)
    a, b = rng.integers(-3, 4, (2100, k)).astype(BF16), rng.integers(-3, 4, (3, n, k)).astype(BF16)
    expected = np.concatenate(
        [a[i:j].astype(np.float32) @ b[e].T.astype(np.float32) for e, (i, j) in enumerate(itertools.pairwise(offsets))]
    )
    np.testing.assert_array_equal(grouped_gemm(a, b, offsets, out_dtype="float32", backend="cpu"), expected)


@needs_core
def test_many_callers_at_once(rng):
    ops = all_three(rng, "bfloat16", "e4m3", (5, 0, 40), 60, 130, lambda *args: operand(*args)[0])
    alone = [op() for op in ops]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: ops[i % len(ops)](), range(80)))
    for i, result in enumerate(together):
        assert_same_bytes(alone[i % len(ops)], result)


# --- a row's result does not depend on its batch ---------------------------------------------------------------------

# Rows before and after the row under test in its segment: alone, within a tile, at its edges, past one group of 12,
# past one run of 516.
NEIGHBOURS = [(0, 0), (0, 1), (1, 1), (2, 0), (3, 8), (5, 6), (11, 0), (11, 1), (12, 0), (12, 13), (40, 2), (515, 1)]


def take_rows(x, rows):
    return Fp8Array(x.codes[rows], x.scales[rows], x.block, x.format) if isinstance(x, Fp8Array) else x[rows]


def spoil_others(x, keep):
    """Every other row NaN, half of the times infinite."""
    values = x.codes if isinstance(x, Fp8Array) else x
    copy = values.copy()
    copy[np.arange(len(copy)) != keep] = np.nan
    return Fp8Array(copy, x.scales, x.block, x.format) if isinstance(x, Fp8Array) else copy


@pytest.mark.parametrize(
    ("kind_a", "kind_b"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "e4m3"), ("e4m3", "e4m3"), ("float32", "e5m2")],
)
def test_batch_invariance(floor, kind_a, kind_b, rng):
    n, k = 14, 140
    b, _ = operand(rng, kind_b, (3, n, k), WEIGHT_BLOCK)
    pool, _ = operand(rng, kind_a, (600, k), ROW_BLOCK)
    grads, _ = operand(rng, kind_a, (600, n), ROW_BLOCK)
    row = 550
    for op, rows in ((grouped_gemm, pool), (grouped_gemm_dgrad, grads)):
        alone = [
            op(take_rows(rows, [row]), b, offsets_of(*(int(i == e) for i in range(3))), backend=floor.backend)[0]
            for e in range(3)
        ]
        for i, (before, after) in enumerate(NEIGHBOURS):
            e = i % 3
            counts = rng.integers(0, 15, 3)
            counts[e] = before + 1 + after
            place = int(counts[:e].sum()) + before
            picks = rng.integers(0, 600, counts.sum())
            picks[place] = row
            batch = take_rows(rows, picks)
            for neighbours in (batch, spoil_others(batch, place)):
                got = op(neighbours, b, offsets_of(*counts), backend=floor.backend)
                assert_same_bytes(got[place], alone[e])


@pytest.mark.parametrize("kind", TYPES)
def test_a_column_does_not_depend_on_the_others(floor, kind, rng):
    counts, k = (3, 14), 140
    a, _ = operand(rng, kind, (17, k))
    b = rng.standard_normal((2, 30, k)).astype(np.float32)
    whole = grouped_gemm(a, b, offsets_of(*counts), backend=floor.backend)
    for begin, end in [(0, 1), (1, 5), (29, 30), (7, 20)]:
        part = grouped_gemm(a, b[:, begin:end], offsets_of(*counts), backend=floor.backend)
        assert_same_bytes(part, np.ascontiguousarray(whole[:, begin:end]))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("restart", [True, False])
def test_an_experts_wgrad_depends_on_its_own_rows_alone(floor, kind, restart, rng):
    """Another start of the segment, other experts' rows full of NaN: the same bytes."""
    n, k, count = 13, 9, 135
    block = TOKEN_BLOCK if restart else ROW_BLOCK

    def make(cols, before, after):
        offsets = offsets_of(before, count, after)
        restarts = offsets if restart else None
        x, _ = operand(np.random.default_rng(cols), kind, (int(offsets[-1]), cols), block, restarts)
        y, _ = operand(np.random.default_rng(1), kind, (count, cols), block, offsets_of(count) if restart else None)
        own = slice(before, before + count)
        if not isinstance(x, Fp8Array):
            x[...] = np.nan
            x[own] = y
            return x
        codes, scales = x.codes.copy(), x.scales.copy()
        codes[...] = np.nan
        codes[own] = y.codes
        first = -(-before // 128) if restart else before
        scales[first : first + len(y.scales)] = y.scales
        return Fp8Array(codes, scales, block, kind, restarts)

    alone = grouped_gemm_wgrad(make(n, 0, 0), make(k, 0, 0), offsets_of(0, count, 0), backend=floor.backend)
    for before, after in [(1, 0), (128, 3), (77, 20)]:
        together = grouped_gemm_wgrad(
            make(n, before, after), make(k, before, after), offsets_of(before, count, after), backend=floor.backend
        )
        assert_same_bytes(together[1], alone[1])


# --- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_nan_stays_in_its_row_and_its_expert_and_is_canonical(floor, kind, rng):
    counts, n, k = (4, 9, 15), 13, 140
    offsets = offsets_of(*counts)
    a, _ = operand(rng, kind, (28, k))
    b = rng.standard_normal((3, n, k)).astype(np.float32)
    clean = grouped_gemm(a, b, offsets, backend=floor.backend)
    assert np.isfinite(clean).all()
    if isinstance(a, Fp8Array):
        a.codes.view(np.uint8)[20, 139] = 0xFF
    else:
        a[20, 139] = -np.nan
    b[0, 3, 0] = -np.nan
    got = grouped_gemm(a, b, offsets, backend=floor.backend)
    expected = clean.copy()
    expected[20] = np.nan
    expected[:4, 3] = np.nan
    assert_same_bytes(got, expected)
    in_bf16 = grouped_gemm(a, b, offsets, out_dtype="bfloat16", backend=floor.backend)
    assert (in_bf16.view(np.uint16)[np.isnan(expected)] == 0x7FC0).all()


def test_overflow_is_infinite_and_cancelling_infinities_are_nan(floor):
    a = np.array([[3e38, 3e38], [np.inf, -np.inf], [np.inf, 1]], np.float32)
    out = grouped_gemm(a, np.ones((1, 1, 2), np.float32), offsets_of(3), backend=floor.backend)
    np.testing.assert_array_equal(out[:, 0], np.array([np.inf, np.nan, np.inf], np.float32))


@needs_core
def test_numpy_gives_the_bytes_of_the_kernels_where_products_are_exact(rng):
    """bfloat16 operands, and FP8 ones whose scales are powers of two: a fused multiply-add changes nothing."""
    offsets, n, k = offsets_of(5, 0, 300), 17, 300
    a, b = rng.standard_normal((305, k)).astype(BF16), rng.standard_normal((3, n, k)).astype(BF16)
    g = rng.standard_normal((305, n)).astype(BF16)
    codes = (rng.standard_normal((3, n, k)) * 8).astype(FLOAT8["e4m3"])
    weights = Fp8Array(codes, (2.0 ** rng.integers(-8, 8, (3, 1, 3))).astype(np.float32), WEIGHT_BLOCK)
    for op, x, y in ((grouped_gemm, a, b), (grouped_gemm, a, weights), (grouped_gemm_dgrad, g, b)):
        wide = op(x, y, offsets, out_dtype="float32", backend="numpy")
        assert_same_bytes(wide, op(x, y, offsets, out_dtype="float32", backend="cpu"))
        assert_same_bytes(wide.astype(BF16), op(x, y, offsets, backend="cpu"))
    assert_same_bytes(
        grouped_gemm_wgrad(g, a, offsets, backend="numpy"), grouped_gemm_wgrad(g, a, offsets, backend="cpu")
    )


@needs_core
@pytest.mark.parametrize(
    ("counts", "n", "k"), [((48, 0, 7), 1030, 1040), ((3, 131, 129), 1030, 1040), ((5, 3), 1500, 1501)]
)
def test_large_gradients_have_the_bytes_of_small_ones(cpu_floor, counts, n, k, rng):
    """Large gradients in whole lines go past the caches, those of one expert or into odd addresses do not."""
    offsets = offsets_of(*counts)
    g, a = wild(rng, "float32", (offsets[-1], n), ROW_BLOCK), wild(rng, "float32", (offsets[-1], k), ROW_BLOCK)
    shape = (len(counts), n, k)
    memory = np.full(np.prod(shape) + 32, np.float32(7))
    line = -memory.ctypes.data // 4 % 16  # where a cache line begins
    for start in (line, line + 1):
        out = memory[start : start + np.prod(shape)].reshape(shape)
        grouped_gemm_wgrad(g, a, offsets, out=out, backend="cpu")
        for e, (begin, end) in enumerate(itertools.pairwise(offsets)):
            alone = grouped_gemm_wgrad(g[begin:end], a[begin:end], np.array([0, end - begin]), backend="cpu")
            assert_same_bytes(out[e : e + 1], alone)
