"""Grouped GEMM in the masked layout [E, M, K] on the emulated GPU, through all three families of kernels.

Whatever lies behind an expert's rows is NaN, and the result's bytes there stay what they were.
"""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import to_device, to_host
from grouped_gemm_operands import BF16, MIXES, ROW_BLOCK, WEIGHT_BLOCK, offsets_of, operand
from sm90_operands import E4M3, Operand, powers_of_two, rows_and_weights, same_bytes, small_integers

import pyroute
from pyroute import Fp8Array, grouped_gemm
from pyroute.quantization import unchecked_fp8

FAMILIES = ["general", "portable", ""]  # as PYROUTE_GROUPED_GEMM; "": Hopper's
NAMES = {"general": "grouped_gemm_few_rows", "portable": "_low"}
COUNTS = [((3, 0, 5, 1), 5), ((1,), 1), ((0, 0), 3), ((64, 1, 0), 64), ((64, 70, 0, 128), 130), ((200, 3, 65), 256)]


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    monkeypatch.setenv("PYROUTE_EMULATED_SMS", "3")
    if request.param:
        monkeypatch.setenv("PYROUTE_GROUPED_GEMM", request.param)
    return request.param


def poisoned(shape, dtype):
    return np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xC1, np.uint8).view(dtype).reshape(shape)


def device(x):
    if not isinstance(x, Fp8Array):
        return to_device(x)
    return unchecked_fp8(to_device(x.codes.view(np.uint8)), to_device(x.scales), x.block, x.format, None)


def spoil(rows, counts):
    """0xff, which is NaN in every type, behind each expert's rows of [E, M, ...]."""
    rows = rows.copy()
    for e, count in enumerate(counts):
        rows[e, count:].view(np.uint8)[...] = 0xFF
    return rows


def masked(a, b, counts, out):
    """The result and the kernel that gave it."""
    emulated.launched()
    got = grouped_gemm(a, b, tokens_per_expert=to_device(np.array(counts, np.int32)), out=to_device(out))
    plan, kernel = emulated.launched()
    assert plan == "grouped_gemm_plan"
    return to_host(got), kernel


@pytest.mark.parametrize("kind", ["fp8", "e5m2_e4m3", "bfloat16"])
@pytest.mark.parametrize("out_type", [BF16, np.float32])
def test_exact_on_small_integers(kind, out_type, family):
    rng = np.random.default_rng(30)
    for counts, room in COUNTS:
        experts, n, k = len(counts), 72, 272
        a, b = rows_and_weights(rng, kind, experts * room, experts, n, k)
        fp8 = kind != "bfloat16"
        rows = spoil(to_host(a.device.codes if fp8 else a.device).reshape(experts, room, k), counts)
        if fp8:
            scales = spoil(to_host(a.device.scales).reshape(experts, room, -1), counts)
            given = unchecked_fp8(to_device(rows), to_device(scales), ROW_BLOCK, a.device.format, None)
        else:
            given = to_device(rows)
        want = poisoned((experts, room, n), out_type)
        got, kernel = masked(given, b.device, counts, want)
        assert NAMES.get(family, "_64" if room <= 64 and kind != "e5m2_e4m3" else "_128") in kernel
        for e, count in enumerate(counts):
            exact = a.exact.reshape(experts, room, k)[e, :count] @ b.exact[e].T
            want[e, :count] = exact.astype(np.float32).astype(out_type)
        same_bytes(got, want)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_the_bytes_of_segments(kind, family):
    """Random values: the layout and its smaller tiles change no byte of a row."""
    rng = np.random.default_rng(31)
    counts, room, n, k = (129, 0, 77), 140, 136, 400
    experts = len(counts)
    if kind == "fp8":
        codes = rng.normal(size=(experts, room, k)).astype(E4M3)
        scales = rng.uniform(0.5, 2, (experts, room, -(-k // 128))).astype(np.float32)
        pick = [np.concatenate([x[e, :c] for e, c in enumerate(counts)]) for x in (codes, scales)]
        segments = Operand(*pick, ROW_BLOCK).device
        a = unchecked_fp8(to_device(spoil(codes, counts)), to_device(spoil(scales, counts)), ROW_BLOCK, "e4m3", None)
        shape = (experts, -(-n // 128), -(-k // 128))
        weights = rng.normal(size=(experts, n, k)).astype(E4M3)
        b = Operand(weights, rng.uniform(0.5, 2, shape).astype(np.float32), WEIGHT_BLOCK).device
    else:
        rows = rng.normal(size=(experts, room, k)).astype(BF16)
        segments = to_device(np.concatenate([rows[e, :c] for e, c in enumerate(counts)]))
        a, b = to_device(spoil(rows, counts)), to_device(rng.normal(size=(experts, n, k)).astype(BF16))
    want = to_host(grouped_gemm(segments, b, to_device(offsets_of(*counts))))
    got, _ = masked(a, b, counts, poisoned((experts, room, n), BF16))
    rows = np.concatenate([got[e, :c] for e, c in enumerate(counts)])
    np.testing.assert_array_equal(rows.view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize(("type_a", "type_b"), MIXES)
def test_general_kernels_have_the_cpus_bytes(type_a, type_b, rng, monkeypatch):
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", "general")
    start = MIXES.index((type_a, type_b))
    counts, room = COUNTS[start % 3]
    n, k = [(1, 1), (33, 129), (12, 7)][start % 3]
    a, _ = operand(rng, type_a, (len(counts), room, k), ROW_BLOCK)
    b, _ = operand(rng, type_b, (len(counts), n, k), WEIGHT_BLOCK)
    want = poisoned((len(counts), room, n), np.float32)
    grouped_gemm(a, b, tokens_per_expert=np.array(counts), out=want, backend="cpu")
    got, _ = masked(device(a), device(b), counts, poisoned(want.shape, np.float32))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("block", [(4, 128), (3, 5), (128, 128)])
def test_scale_blocks_of_several_rows_belong_to_one_expert(block, family, rng):
    counts, room = (7, 2, 0, 5), 7
    a = Operand(small_integers(rng, (4, 7, 144), E4M3), powers_of_two(rng, grid(7, 144, block)), block)
    b = Operand(small_integers(rng, (4, 16, 144), E4M3), powers_of_two(rng, grid(16, 144, (128, 128))),
                (128, 128))  # fmt: skip
    want = poisoned((4, room, 16), np.float32)
    got, _ = masked(a.device, b.device, counts, want)
    for e, count in enumerate(counts):
        want[e, :count] = a.exact[e, :count] @ b.exact[e].T
    same_bytes(got, want)


def grid(rows, cols, block):
    return (4, -(-rows // block[0]), -(-cols // block[1]))


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("counts", [(-1, 3), (2**31 - 1, -(2**31)), (90, 2), (45, 46)])
def test_counts_that_are_none_touch_nothing_outside(kind, counts, family):
    """They are kept within 0 and the room of an expert; arrays lie against inaccessible pages."""
    rng = np.random.default_rng(33)
    room = 45
    a, b = rows_and_weights(rng, kind, 2 * room, 2, 128, 128)
    if kind == "fp8":
        parts = (x.reshape(2, room, -1) for x in (a.device.codes, a.device.scales))
        given = unchecked_fp8(*parts, ROW_BLOCK, "e4m3", None)
    else:
        given = a.device.reshape(2, room, -1)
    want = poisoned((2, room, 128), np.float32)
    got, _ = masked(given, b.device, counts, want)
    for e, count in enumerate(np.clip(counts, 0, room)):
        want[e, :count] = a.exact.reshape(2, room, -1)[e, :count] @ b.exact[e].T
    same_bytes(got, want)


@pytest.mark.parametrize("num_experts", [1, 256, 300])
def test_many_experts(num_experts, family):
    rng = np.random.default_rng(34)
    counts = rng.integers(0, 3, num_experts)
    a, b = rows_and_weights(rng, "bfloat16", num_experts * 2, num_experts, 8, 16)
    want = poisoned((num_experts, 2, 8), np.float32)
    got, _ = masked(a.device.reshape(num_experts, 2, 16), b.device, counts, want)
    for e, count in enumerate(counts):
        want[e, :count] = a.exact.reshape(num_experts, 2, 16)[e, :count] @ b.exact[e].T
    same_bytes(got, want)


def test_nothing_to_do(family):
    for experts, room, n, k in [(2, 0, 16, 16), (2, 3, 0, 16), (2, 3, 16, 0)]:
        a, b = to_device(np.ones((experts, room, k), BF16)), to_device(np.ones((experts, n, k), BF16))
        got = grouped_gemm(a, b, tokens_per_expert=to_device(np.zeros(experts, np.int32)))
        assert to_host(got).shape == (experts, room, n)


def test_counts_of_another_type_are_refused_on_a_gpu():
    a, b = to_device(np.ones((2, 3, 16), BF16)), to_device(np.ones((2, 16, 16), BF16))
    with pytest.raises(TypeError, match=r"^grouped_gemm: tokens_per_expert must be int32, got int64$"):
        grouped_gemm(a, b, tokens_per_expert=to_device(np.zeros(2, np.int64)))
    with pytest.raises(TypeError, match="grouped_gemm: "):
        grouped_gemm(a, b, tokens_per_expert=np.zeros(2, np.int32))
    assert pyroute.grouped_gemm(a, b, tokens_per_expert=to_device(np.zeros(2, np.int32))).shape == (2, 3, 16)


@pytest.mark.parametrize("seed", range(3), indirect=True)
@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_every_order_of_threads_gives_the_same_bytes(kind, seed, family):
    test_exact_on_small_integers(kind, BF16, family)
