"""The MoE layer's own kernels on the emulated GPU: the CPU floor's bytes."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import to_device, to_host

import pyroute
from pyroute import _activation, _backend
from pyroute._activation import PROGRAMS, ExpertRows
from pyroute._device import activation as device

BF16 = _backend.BFLOAT16
TYPES = pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])


def expert_rows(counts=(3, 0, 9, 1, 0), alignment=4, tail=0):
    """Offsets and tokens of padded segments, and ``tail`` rows past the last, as plans on a GPU have them."""
    padded = [-(-count // alignment) * alignment for count in counts]
    tokens = [i if i < count else -1 for count, rows in zip(counts, padded, strict=True) for i in range(rows)]
    return ExpertRows(np.cumsum([0, *padded]).astype(np.int64), np.array(tokens + [-1] * tail, np.int32))


class Case:
    """Rows of every expert, padding among them, with what a diverged model produces; the same on the GPU."""

    def __init__(self, activation, dtype, inner, *, bias=None, weighted=False, offset=0, experts=None, seed=1):
        rng = np.random.default_rng(seed)
        self.program = PROGRAMS[activation]
        self.experts = expert_rows(tail=5) if experts is None else experts
        num_rows, num_experts = len(self.experts.row_to_token), len(self.experts.expert_offsets) - 1
        width = inner * (1 + self.program.gated)
        self.gate_up = (rng.normal(size=(num_rows, width)) * 6).astype(dtype)
        if num_rows > 5:
            self.gate_up[0, 0], self.gate_up[1, -1], self.gate_up[2, 0] = np.nan, np.inf, -np.inf
            self.gate_up[4] = 1e30
            self.gate_up[5, ::2] = -0.0
            self.gate_up[:3, inner // 2] = -95, -103.5, 91  # subnormal exponentials
        self.grad_hidden = rng.normal(size=(num_rows, inner)).astype(dtype)
        self.bias = None if bias is None else rng.normal(size=(num_experts, width)).astype(bias)
        self.row_weights = rng.random(num_rows, dtype=np.float32) if weighted else None
        self.offset = offset

    def given(self, on_gpu):
        copy = to_device if on_gpu else np.asarray
        moved = (lambda x: to_device(x, offset=self.offset)) if on_gpu else np.asarray
        bias = None if self.bias is None else copy(self.bias)
        weights = None if self.row_weights is None else copy(self.row_weights)
        return moved(self.gate_up), bias, ExpertRows(*map(copy, self.experts)), weights, self.program

    def results(self, backend):
        """Of the rows up to the last segment's end; no byte is written behind it on the GPU."""
        given, on_gpu = self.given(backend == "cuda"), backend == "cuda"
        grad = to_device(self.grad_hidden) if on_gpu else self.grad_hidden
        results = _activation.activate(*given, backend), *_activation.activate_backward(*given, grad, backend)
        return [self.used(result) for result in results]

    def used(self, result):
        end, whole = self.experts.expert_offsets[-1], to_host(result)
        if result is not whole and not emulated.REAL:
            assert (whole[end:].view(np.uint8) == emulated.POISON).all()
        return whole[:end]


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        a = to_host(a)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), np.argwhere(a.view(np.uint8) != b.view(np.uint8))[:5]


@TYPES
@pytest.mark.parametrize("activation", PROGRAMS)
@pytest.mark.parametrize("bias", [None, np.float32, BF16], ids=["unbiased", "bias32", "bias16"])
def test_activation_and_its_gradients(activation, dtype, bias):
    for inner in (1, 7, 8, 16, 131, 264, 520):
        for weighted, offset in ((False, 0), (True, 0), (True, 1)):
            case = Case(activation, dtype, inner, bias=bias, weighted=weighted, offset=offset, seed=inner)
            same(case.results("cuda"), case.results("cpu"))


@TYPES
def test_many_experts_and_none(dtype):
    rng = np.random.default_rng(2)
    for counts in ([0], [0] * 7, rng.integers(0, 3, 300), [40]):
        case = Case("swiglu", dtype, 24, bias=np.float32, weighted=True, experts=expert_rows(counts, alignment=2))
        same(case.results("cuda"), case.results("cpu"))


@TYPES
@pytest.mark.parametrize("activation", PROGRAMS)
@pytest.mark.parametrize("inner", [16, 128, 144, 400])
@pytest.mark.parametrize("card", [80, 90], indirect=True)
def test_quantised_rows_are_those_of_the_two_ops(card, activation, dtype, inner):
    """Values that the rows' type cannot hold are rounded to it before they are quantised."""
    for power_of_two in (False, True):
        case = Case(activation, dtype, inner, bias=np.float32, weighted=True, seed=inner)
        codes, scales = device.activate_quantize(*case.given(True), power_of_two)
        hidden = _activation.activate(*case.given(False), "cpu")
        expected = pyroute.quantize_fp8(hidden, scale_format="ue8m0" if power_of_two else "float32")
        same([case.used(x) for x in (codes, scales)], [case.used(x) for x in (expected.codes, expected.scales)])


@TYPES
@pytest.mark.parametrize("bias_type", [np.float32, BF16], ids=["bias32", "bias16"])
@pytest.mark.parametrize("columns", [1, 33, 256, 300])
def test_biases(dtype, bias_type, columns):
    rng = np.random.default_rng(3)
    experts = expert_rows(tail=3)
    num_rows = len(experts.row_to_token)
    rows = rng.normal(size=(num_rows, columns)).astype(dtype)
    rows[2, 0] = np.nan
    bias = rng.normal(size=(5, columns)).astype(bias_type)
    dots = rng.normal(size=num_rows).astype(np.float32)
    on = ExpertRows(*map(to_device, experts))
    for weights in (None, rng.normal(size=num_rows).astype(np.float32)):
        at = None if weights is None else to_device(weights)
        biased, got = rows.copy(), to_device(rows)
        _activation.add_bias(biased, bias, experts, weights, "cpu")
        _activation.add_bias(got, to_device(bias), on, at, "cuda")
        same((got,), (biased,))
        expected = _activation.bias_grad(rows, experts, weights, "cpu")
        same((_activation.bias_grad(to_device(rows), on, at, "cuda"),), (expected,))
        before = rng.normal(size=expected.shape).astype(np.float32)
        into = to_device(before)
        device.bias_grad(to_device(rows), on, at, into, True)
        empty = np.diff(experts.expert_offsets) == 0
        same((into,), (np.where(empty[:, None], before, before + expected),))
    got = _activation.add_bias_dots(to_device(rows), to_device(bias), on, to_device(dots), "cuda")
    same((got,), (_activation.add_bias_dots(rows, bias, experts, dots.copy(), "cpu"),))


def test_values_of_slots_and_rows():
    rng = np.random.default_rng(4)
    ids = rng.integers(-1, 6, (37, 3))
    plan = pyroute.plan_routes(to_device(ids), 6, alignment=4)
    by_slot = rng.normal(size=ids.shape).astype(np.float32)
    by_row = device.row_weights(to_device(by_slot), plan)
    rows = to_host(plan.token_to_row)
    expected = np.zeros(plan.num_rows, np.float32)
    expected[rows[rows >= 0]] = by_slot[rows >= 0]
    same((by_row,), (expected,))
    back = to_device(np.full(ids.shape, np.nan, np.float32))
    device.slot_values(by_row, plan, back)
    same((back,), (np.where(rows >= 0, by_slot, np.float32(0)),))


@pytest.mark.parametrize("offsets", [[9, 3, 1, 80, -5, 7], [2**62] * 6, [-(2**63), 5, 5, 3, 0, 2**63 - 1]])
@pytest.mark.usefixtures("races_allowed")
def test_nonsense_in_offsets_stays_within_the_arrays(offsets):
    experts = expert_rows()
    case = Case("swiglu", np.float32, 16, bias=np.float32, experts=ExpertRows(np.array(offsets), experts.row_to_token))
    case.results("cuda")
    given = case.given(True)
    _activation.bias_grad(given[0], given[2], None, "cuda")


@pytest.mark.parametrize("seed", range(4), indirect=True)
def test_any_order_of_threads(seed):
    case = Case("swiglu_clamp", BF16, 264, bias=BF16, weighted=True)
    same(case.results("cuda"), case.results("cpu"))
