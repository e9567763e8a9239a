"""Grouped GEMM in the masked layout [E, M, K]: the bytes of the same rows as segments, and nothing of those behind."""

from __future__ import annotations

import numpy as np
import pytest
from bad_input import BACKENDS, HUGE, INTEGERS, Case, assert_refused, table, wrong_arrays, wrong_outputs
from conftest import CPU_FLOORS, FLOORS, assert_same_bytes, guarded
from grouped_gemm_operands import BF16, MIXES, ROW_BLOCK, WEIGHT_BLOCK, integers, offsets_of, operand
from oracle import grouped_gemm as oracle

from pyroute import Fp8Array, _backend, grouped_gemm

COUNTS = [((3, 0, 5, 1), 5), ((1,), 1), ((0, 0), 3), ((13, 1, 0, 27), 30), ((40, 40), 40)]  # and the rows of an expert


@pytest.fixture(params=FLOORS)
def backend(request):
    """Each floor, as the name of its backend."""
    if not request.param.startswith("cpu-"):
        yield request.param
        return
    before = _backend.core.isa()
    _backend.core.set_isa(request.param.removeprefix("cpu-"))
    yield "cpu"
    _backend.core.set_isa(before)


def spoilt(x, counts):
    """The operand with 0xff in every byte behind an expert's rows, scales of single rows too: NaN in all types."""
    parts = [x.codes.view(np.uint8), x.scales] if isinstance(x, Fp8Array) else [x]
    parts = [part.copy() for part in parts]
    for part in parts:
        if part.shape[1] == x.shape[1]:
            for e, count in enumerate(counts):
                part[e, count:].view(np.uint8)[...] = 0xFF
    return Fp8Array(parts[0], parts[1], x.block, x.format) if isinstance(x, Fp8Array) else parts[0]


def as_segments(x, counts):
    """The rows that exist, one expert's after another's; FP8 ones have a scale for each row."""
    if isinstance(x, Fp8Array):
        codes, scales = (np.concatenate([p[e, :c] for e, c in enumerate(counts)]) for p in (x.codes, x.scales))
        return Fp8Array(codes, scales, x.block, x.format)
    return np.concatenate([x[e, :c] for e, c in enumerate(counts)])


def poisoned(shape, dtype):
    return np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xC1, np.uint8).view(dtype).reshape(shape)


def check(a, b, counts, backend, out_dtype="float32"):
    shape = (*a.shape[:2], b.shape[1])
    out = poisoned(shape, BF16 if out_dtype == "bfloat16" else np.float32)
    got = grouped_gemm(spoilt(a, counts), b, tokens_per_expert=np.array(counts), out=out, backend=backend)
    assert got is out
    want = poisoned(shape, out.dtype)
    rows = grouped_gemm(as_segments(a, counts), b, offsets_of(*counts), out_dtype=out_dtype, backend=backend)
    for e, part in enumerate(np.split(rows, np.cumsum(counts)[:-1])):
        want[e, : counts[e]] = part
    assert_same_bytes(got, want)


@pytest.mark.parametrize(("kind_a", "kind_b"), MIXES)
def test_rows_are_those_of_segments_and_no_others_are_written(backend, kind_a, kind_b, rng):
    for i, (counts, room) in enumerate(COUNTS):
        n, k = [(5, 130), (26, 9), (1, 1), (17, 257), (48, 128)][i]
        a, _ = operand(rng, kind_a, (len(counts), room, k), ROW_BLOCK)
        b, _ = operand(rng, kind_b, (len(counts), n, k), WEIGHT_BLOCK)
        check(a, b, counts, backend, ("float32", "bfloat16")[i % 2])


def test_against_the_oracle(backend, rng):
    counts = (3, 0, 5)
    a, a_values = operand(rng, "e4m3", (3, 7, 300), ROW_BLOCK)
    b, b_values = operand(rng, "e4m3", (3, 9, 300), WEIGHT_BLOCK)
    got = grouped_gemm(a, b, tokens_per_expert=np.array(counts), out_dtype="float32", backend=backend)
    for e, count in enumerate(counts):
        product, magnitude = oracle.forward(a_values[e, :count], b_values[e : e + 1], [0, count])
        error = np.abs(got[e, :count] - product)
        assert (error <= oracle.bound(product, magnitude, 23)).all()


@pytest.mark.parametrize("block", [(128, 128), (4, 128), (3, 5), (1, 64)])
def test_scale_blocks_of_several_rows_belong_to_one_expert(backend, block, rng):
    """Seven rows an expert: a block of four is cut where the next expert begins."""
    counts = (7, 2, 0, 5)
    grid = lambda shape: (2.0 ** rng.integers(-2, 3, shape)).astype(np.float32)  # noqa: E731
    a, a_values = integers(rng, "e4m3", (4, 7, 140), block, grid)
    b, b_values = integers(rng, "bfloat16", (4, 6, 140), WEIGHT_BLOCK)
    got = grouped_gemm(a, b, tokens_per_expert=np.array(counts), out_dtype="float32", backend=backend)
    for e, count in enumerate(counts):
        np.testing.assert_array_equal(got[e, :count], (a_values[e, :count] @ b_values[e].T).astype(np.float32))


def test_nothing_to_do(backend):
    for experts, room, n, k in [(0, 4, 3, 8), (2, 0, 3, 8), (2, 4, 0, 8), (2, 4, 3, 0), (2, 4, 3, 8)]:
        a, b = np.ones((experts, room, k), np.float32), np.ones((experts, n, k), np.float32)
        out = poisoned((experts, room, n), np.float32)
        counts = np.zeros(experts, np.int32)
        grouped_gemm(a, b, tokens_per_expert=counts, out=out, backend=backend)
        assert_same_bytes(out, poisoned(out.shape, np.float32))
    got = grouped_gemm(np.ones((1, 2, 0), np.float32), np.ones((1, 3, 0), np.float32), tokens_per_expert=np.array([2]))
    assert not got.any()


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.skipif(not CPU_FLOORS, reason="needs the compiled floor")
def test_no_byte_outside_the_arrays_is_touched(cpu_floor, at, rng):
    for counts, room, n, k in [((2, 0, 3), 4, 5, 129), ((13, 14), 14, 27, 131)]:
        a, b = (guarded(operand(rng, "bfloat16", (len(counts), m, k))[0], at=at) for m in (room, n))
        out = guarded(poisoned((len(counts), room, n), np.float32), at=at)
        tokens = guarded(np.array(counts, np.int32), at=at)
        grouped_gemm(a, b, tokens_per_expert=tokens, out=out, backend="cpu")
        want = poisoned(out.shape, np.float32)
        grouped_gemm(np.array(a), np.array(b), tokens_per_expert=np.array(counts), out=want, backend="cpu")
        assert_same_bytes(np.array(out), want)


def test_a_strided_operand_and_every_integer(backend, rng):
    a = rng.standard_normal((6, 5, 9)).astype(np.float32)[::2]
    b = rng.standard_normal((9, 4, 3)).astype(np.float32).T
    want = poisoned((3, 5, 4), np.float32)
    grouped_gemm(a.copy(), b.copy(), tokens_per_expert=np.array([1, 5, 0]), out=want, backend=backend)
    for name in INTEGERS:
        out = poisoned((3, 5, 4), np.float32)
        grouped_gemm(a, b, tokens_per_expert=np.array([1, 5, 0], name), out=out, backend=backend)
        assert_same_bytes(out, want)


E, M, N, K = 3, 5, 4, 6


def legal():
    return {
        "a": np.ones((E, M, K), np.float32),
        "b": np.ones((E, N, K), np.float32),
        "tokens_per_expert": np.array([2, 0, M]),
    }


def wrong_counts():
    for name in ("int64", "int32", "int8", "uint64"):
        values = {M + 1, np.iinfo(name).max} | ({-1, np.iinfo(name).min} if name[0] == "i" else {2**32})
        for value in sorted(int(value) for value in values):
            words = f"tokens_per_expert[1] must be in 0..{M} (rows of an expert), got {value}"
            counts = np.array([2, value, M], name)
            yield Case(f"{name} {value}", {"tokens_per_expert": counts}, ValueError, words)


def fp8(*shape):
    return Fp8Array(np.zeros(shape, np.uint8), np.ones((*shape[:-1], 1), np.float32))


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    ("function", "given", "case"),
    table(
        (
            grouped_gemm,
            legal,
            [
                *wrong_arrays("a", (E, M, K), ("float32", "bfloat16"), "..."),
                *wrong_arrays("b", (E, N, K), ("float32", "bfloat16"), "x.x"),
                *wrong_arrays("tokens_per_expert", (E,), INTEGERS, "x", none_is_legal=True),
                *wrong_counts(),
                *wrong_outputs("out", (E, M, N), "float32", any_of=("float32", "bfloat16")),
                Case(
                    "rows of two axes", {"a": np.ones((E * M, K), np.float32)}, ValueError, "a must be of shape [E, M"
                ),
                Case("fp8 rows of two axes", {"a": fp8(E * M, K)}, ValueError, "a must be of shape [E, M, K]"),
                Case("fp8 of other experts", {"a": fp8(E + 1, M, K)}, ValueError, "b must be of shape"),
                Case(
                    "both",
                    {"expert_offsets": np.array([0, 2, 2, 5])},
                    ValueError,
                    "tokens_per_expert must be None together with expert_offsets",
                ),
                Case(
                    "neither",
                    {"a": np.ones((M, K), np.float32), "tokens_per_expert": None},
                    TypeError,
                    "expert_offsets must be",
                ),
            ],
        )
    ),
)
def test_refused(backend_name, function, given, case):
    assert_refused(function, {**given(), "backend": backend_name}, case)


@pytest.mark.skipif(not CPU_FLOORS, reason="needs the compiled floor")
@pytest.mark.parametrize(
    "change",
    [
        {"a": (np.ones((3, 5), np.float32), "float32", None, 1, 1, False)},
        {"a": (np.ones((2, 5, 6), np.float32), "float32", None, 1, 1, False)},
        {"tokens_per_expert": np.array([0, 6, 0], np.int32)},
        {"tokens_per_expert": np.array([0, -1, 0], np.int32)},
        {"tokens_per_expert": np.array([0, 1], np.int32)},
        {"tokens_per_expert": np.array([0, 1, 1])},
        {"out": np.ones((3, 4), np.float32)},
        {"out_type": "bfloat16"},
    ],
)
def test_the_extension_itself_refuses_what_does_not_fit(change):
    native = {
        "a": (np.ones((3, 5, 6), np.float32), "float32", None, 1, 1, False),
        "b": (np.ones((3, 4, 6), np.float32), "float32", None, 1, 1, False),
        "tokens_per_expert": np.array([2, 0, 5], np.int32),
        "out": np.ones((3, 5, 4), np.float32),
        "out_type": "float32",
    }
    _backend.core.grouped_gemm_masked(**native)
    with pytest.raises(ValueError, match=r"^_core: "):
        _backend.core.grouped_gemm_masked(**{**native, **change})


def test_room_for_very_many_rows_costs_nothing(backend):
    """Pages that are never touched."""
    a = np.empty((2, HUGE >> 20, 64), np.float32)
    a[0, :2], a[1, :1] = 1, 2
    out = np.empty((2, HUGE >> 20, 4), np.float32)
    grouped_gemm(a, np.ones((2, 4, 64), np.float32), tokens_per_expert=np.array([2, 1]), out=out, backend=backend)
    assert (out[0, :2] == 64).all()
    assert (out[1, :1] == 128).all()
