"""The activation and bias kernels of the MoE layer: equal bytes on every floor, errors against float64."""

import numpy as np
import pytest
from conftest import assert_same_bytes, guarded, poison
from oracle import moe as oracle
from oracle import moe_bounds as bounds

import pyroute
from pyroute import _activation, _backend
from pyroute._activation import PROGRAMS, ExpertRows

BF16 = _backend.BFLOAT16
COUNTS = (3, 0, 9, 1, 0)  # tokens per expert: some experts have none
ROUNDOFF = {np.dtype(np.float32): 2.0**-24, BF16: 2.0**-8}


def expert_rows(counts=COUNTS, alignment=4):
    padded = [-(-count // alignment) * alignment for count in counts]
    tokens = [
        token if token < count else -1 for count, rows in zip(counts, padded, strict=True) for token in range(rows)
    ]
    return ExpertRows(np.cumsum([0, *padded]).astype(np.int64), np.array(tokens, np.int32))


class Case:
    """Rows of every expert, padding among them, with the specials that a diverged model produces."""

    def __init__(self, activation, dtype, inner, *, bias=None, weighted=False, scale=3.0, seed=1):
        rng = np.random.default_rng(seed)
        self.program = PROGRAMS[activation]
        self.experts = expert_rows()
        rows, width = len(self.experts.row_to_token), inner * (1 + self.program.gated)
        self.gate_up = (rng.normal(size=(rows, width)) * scale).astype(dtype)
        self.grad_hidden = rng.normal(size=(rows, inner)).astype(dtype)
        self.bias = None if bias is None else rng.normal(size=(len(COUNTS), width)).astype(bias)
        self.row_weights = rng.random(rows, dtype=np.float32) if weighted else None
        self.real = self.experts.row_to_token >= 0

    def forward(self, backend):
        return _activation.activate(self.gate_up, self.bias, self.experts, self.row_weights, self.program, backend)

    def backward(self, backend):
        return _activation.activate_backward(
            self.gate_up, self.bias, self.experts, self.row_weights, self.program, self.grad_hidden, backend
        )


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", PROGRAMS)
@pytest.mark.parametrize("bias", [None, np.float32, BF16], ids=["unbiased", "bias32", "bias16"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_every_floor_gives_the_same_bytes(cpu_floor, activation, dtype, bias, weighted):
    for inner in (1, 7, 8, 9, 16, 131):
        case = Case(activation, dtype, inner, bias=bias, weighted=weighted, scale=6.0, seed=inner)
        case.gate_up[0, 0], case.gate_up[1, -1], case.gate_up[2, 0] = np.nan, np.inf, -np.inf
        case.gate_up[4] = 1e30
        case.gate_up[5, ::2], case.grad_hidden[5, 0] = -0.0, np.nan
        hidden = case.forward("cpu")
        assert_same_bytes(hidden, case.forward("numpy"))
        results = case.backward("cpu")
        for got, expected in zip(results, case.backward("numpy"), strict=True):
            assert_same_bytes(got, expected)
        assert_same_bytes(results[0], hidden)


def layer_of(activation, bias=None):
    empty = np.zeros((len(COUNTS), 1, 1))
    return oracle.Layer(empty, empty, bias, None, activation)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", PROGRAMS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_error_against_float64(floor, activation, dtype, scale):
    case = Case(activation, dtype, 37, bias=np.float32, weighted=True, scale=scale)
    expert = np.searchsorted(case.experts.expert_offsets[1:], np.arange(len(case.real)), side="right")
    row_bias = bounds.exact(case.bias[expert].astype(np.float64))
    z = bounds.plus(bounds.exact(case.gate_up.astype(np.float64)), row_bias)
    hidden, d_gate, d_up = bounds.activation(layer_of(activation), z)
    weights = bounds.exact(case.row_weights.astype(np.float64)[:, None])
    grad = bounds.exact(case.grad_hidden.astype(np.float64))
    roundoff = ROUNDOFF[np.dtype(dtype)]

    got_hidden, got_grad, got_dots = case.backward(floor.backend)
    check(got_hidden, bounds.rounded(bounds.times(hidden, weights), roundoff), case.real)
    weighted = bounds.times(grad, weights)
    grads = [bounds.times(weighted, d_gate)] + ([bounds.times(weighted, d_up)] if case.program.gated else [])
    expected = bounds.Bounded(*(np.concatenate(parts, axis=1) for parts in zip(*grads, strict=True)))
    check(got_grad, bounds.rounded(expected, roundoff), case.real)
    # eight lanes of 37 / 8 terms and three more additions, and the product's rounding
    check(got_dots, bounds.dot(grad, hidden, 37 / 8 + 5), case.real)


def check(got, expected, real):
    got = got.astype(np.float64)
    assert (np.abs(got - expected.value) <= expected.error)[real].all()
    assert (got[~real] == 0).all()
    assert np.count_nonzero(got[real]) > got[real].size // 3  # an oracle that says 0 everywhere checks nothing


@pytest.mark.parametrize("activation", PROGRAMS)
def test_oracle_slopes_by_finite_differences(activation, rng):
    layer, step = layer_of(activation), 1e-6
    for gate, up in rng.normal(size=(200, 2)) * 6:
        if min(abs(abs(gate) - 7), abs(abs(gate) - 10), abs(abs(up) - 7), abs(abs(up) - 10), abs(gate)) < 1e-3:
            continue
        _, d_gate, d_up = oracle.activation_point(layer, gate, up)
        value = lambda a, b: oracle.activation_point(layer, a, b)[0]  # noqa: E731
        by_gate = (value(gate + step, up) - value(gate - step, up)) / (2 * step)
        assert d_gate == pytest.approx(by_gate, abs=1e-7, rel=1e-7)
        if PROGRAMS[activation].gated:
            assert d_up == pytest.approx(
                (value(gate, up + step) - value(gate, up - step)) / (2 * step), abs=1e-7, rel=1e-7
            )


def single_row(floor, activation, gate, up, grad=1.0, limit=None):
    """Hidden value and gradients of one (gate, up) pair."""
    experts = ExpertRows(np.array([0, 1], np.int64), np.zeros(1, np.int32))
    program = _activation.activation_program("test", activation, limit, None)
    gate_up = np.array([[gate, up]], np.float32)
    grad_hidden = np.array([[grad]], np.float32)
    hidden, grads, _ = _activation.activate_backward(gate_up, None, experts, None, program, grad_hidden, floor.backend)
    return float(hidden[0, 0]), float(grads[0, 0]), float(grads[0, 1])


@pytest.mark.parametrize(("activation", "limit"), [("swiglu_clamp", 10.0), ("swiglu_oai", 7.0), ("swiglu_oai", 2.5)])
def test_the_gradient_stops_just_past_the_clip(floor, activation, limit):
    override = limit if limit == 2.5 else None
    above = float(np.nextafter(np.float32(limit), np.float32(np.inf)))
    at = single_row(floor, activation, limit, limit, limit=override)
    assert at[1] != 0
    assert at[2] != 0
    past = single_row(floor, activation, above, above, limit=override)
    assert past == (at[0], 0.0, 0.0)
    low = single_row(floor, activation, -above, -above, limit=override)  # the gate has no lower clip
    assert low[1] != 0
    assert low[2] == 0
    # an infinite gradient that arrives at a clipped position is dropped, not multiplied by zero
    assert single_row(floor, activation, above, above, grad=np.inf, limit=override)[1:] == (0.0, 0.0)


def test_values_that_models_publish(floor):
    silu = 1 / (1 + np.exp(-2.0)) * 2
    assert single_row(floor, "swiglu", 2, 3)[0] == pytest.approx(silu * 3, rel=1e-6)
    assert single_row(floor, "swiglu_clamp", 12, -30)[0] == pytest.approx(10 / (1 + np.exp(-10)) * -10, rel=1e-6)
    assert single_row(floor, "swiglu_oai", 2, 3)[0] == pytest.approx(2 / (1 + np.exp(-1.702 * 2)) * 4, rel=1e-6)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (2 + 0.044715 * 8))
    assert single_row(floor, "geglu", 2, 3)[0] == pytest.approx((1 + tanh) * 3, rel=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamp", "swiglu_oai", "geglu"])
def test_huge_finite_gates_stay_finite(floor, activation):
    for gate in (-3e38, -1e19, -200.0, 200.0, 1e19, 3e38):
        hidden, grad_gate, grad_up = single_row(floor, activation, gate, 1.0)
        assert np.isfinite([hidden, grad_gate, grad_up]).all(), gate


def test_relu2_keeps_nan_and_erases_the_negative(floor):
    experts = ExpertRows(np.array([0, 1], np.int64), np.zeros(1, np.int32))
    gate_up = np.array([[np.nan, -np.inf, -1.0, 3.0]], np.float32)
    hidden = _activation.activate(gate_up, None, experts, None, PROGRAMS["relu2"], floor.backend)
    np.testing.assert_array_equal(hidden, [[np.nan, 0, 0, 9]])


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_threads_and_neighbours_change_no_byte(cpu_floor, threads, dtype):
    case = Case("swiglu", dtype, 4100, bias=np.float32, weighted=True)  # rows long enough to be shared out
    alone = pyroute.get_num_threads()
    results = [case.forward("cpu"), *case.backward("cpu")]
    pyroute.set_num_threads(1)
    for got, expected in zip(results, [case.forward("cpu"), *case.backward("cpu")], strict=True):
        assert_same_bytes(got, expected)
    pyroute.set_num_threads(alone)
    row = 5  # of expert 2, whose first row is 4
    one = ExpertRows(np.array([0, 0, 0, 1, 1, 1], np.int64), np.zeros(1, np.int32))
    weights = case.row_weights[row : row + 1]
    got = _activation.activate(case.gate_up[row : row + 1], case.bias, one, weights, case.program, "cpu")
    assert_same_bytes(got[0], results[0][row])


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 5, 8, 63, 64, 65, 200])
def test_bias_kernels(cpu_floor, dtype, columns, rng):
    experts = expert_rows()
    count, real = len(experts.row_to_token), experts.row_to_token >= 0
    rows = np.where(real[:, None], rng.normal(size=(count, columns)), 0).astype(dtype)
    rows[1, 0] = np.nan
    weights = np.where(real, rng.random(count), 0).astype(np.float32)
    dots = np.where(real, rng.normal(size=count), 0).astype(np.float32)
    bias = rng.normal(size=(len(COUNTS), columns)).astype(dtype)
    for row_weights in (None, weights):
        by_floor = [biased(rows, bias, experts, row_weights, b) for b in ("cpu", "numpy")]
        assert_same_bytes(*by_floor)
        assert (by_floor[0][~real] == 0).all()
        by_floor = [_activation.bias_grad(rows, experts, row_weights, b) for b in ("cpu", "numpy")]
        assert_same_bytes(*by_floor)
        for expert, (start, count) in enumerate(zip(experts.expert_offsets, COUNTS, strict=False)):
            scale = np.ones(count) if row_weights is None else row_weights[start : start + count].astype(np.float64)
            exact = scale @ rows[start : start + count].astype(np.float64)
            # float64 sums: what is left is the one rounding to float32
            np.testing.assert_allclose(by_floor[0][expert], exact, rtol=2.0**-24, atol=1e-12)
    by_floor = [_activation.add_bias_dots(rows, bias, experts, dots.copy(), b) for b in ("cpu", "numpy")]
    assert_same_bytes(*by_floor)
    assert (by_floor[0][~real] == 0).all()


def biased(rows, *arguments):
    rows = rows.copy()
    _activation.add_bias(rows, *arguments)
    return rows


def test_a_bias_is_added_once_and_weighted_once(floor):
    experts = ExpertRows(np.array([0, 2, 3], np.int64), np.array([0, 1, 0], np.int32))
    rows, bias = np.zeros((3, 2), np.float32), np.array([[1, 2], [10, 20]], np.float32)
    weights = np.array([0.5, 2.0, 3.0], np.float32)
    got = biased(rows, bias, experts, weights, floor.backend)
    np.testing.assert_array_equal(got, [[0.5, 1], [2, 4], [30, 60]])
    got = biased(rows, bias, experts, None, floor.backend)
    np.testing.assert_array_equal(got, [[1, 2], [1, 2], [10, 20]])


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_native_code_stays_inside_its_arrays(cpu_floor, dtype, at):
    """Every array touches an inaccessible page, every output holds 0x7f bytes before."""
    core = _backend.core
    for inner in (1, 7, 8, 11):
        case = Case("swiglu", dtype, inner, bias=dtype, weighted=True)
        expected = [case.forward("numpy"), *case.backward("numpy")]
        gate_up, bias, row_weights, grad_hidden, offsets, tokens = (
            guarded(array, at=at)
            for array in (case.gate_up, case.bias, case.row_weights, case.grad_hidden, *case.experts)
        )
        hidden, again = (guarded(poison(case.grad_hidden.shape, dtype), at=at) for _ in range(2))
        grad_gate_up = guarded(poison(gate_up.shape, dtype), at=at)
        dots = guarded(poison(len(row_weights), np.float32), at=at)
        core.moe_activate(gate_up, bias, offsets, tokens, row_weights, case.program, hidden)
        core.moe_activate_backward(
            gate_up, bias, offsets, tokens, row_weights, case.program, grad_hidden, again, grad_gate_up, dots
        )
        for got, wanted in zip((hidden, again, grad_gate_up, dots), expected, strict=True):
            assert_same_bytes(got, wanted)
        grad_bias = guarded(poison(bias.shape, np.float32), at=at)
        core.moe_bias_grad(gate_up, offsets, tokens, row_weights, grad_bias)
        assert_same_bytes(grad_bias, _activation.bias_grad(gate_up, case.experts, row_weights, "numpy"))
        rows = guarded(case.gate_up, at=at)
        core.moe_add_bias(rows, bias, offsets, tokens, row_weights)
        core.moe_add_bias_dots(gate_up, bias, offsets, tokens, dots)
        assert np.isfinite(rows.astype(np.float32)).all()


def test_native_code_rejects_what_would_break_memory(cpu_floor):
    core = _backend.core
    case = Case("swiglu", np.float32, 4, bias=np.float32, weighted=True)
    offsets, tokens = case.experts
    hidden = np.empty(case.grad_hidden.shape, np.float32)
    good = (case.gate_up, case.bias, offsets, tokens, case.row_weights, tuple(case.program), hidden)
    core.moe_activate(*good)
    read_only = hidden.copy()
    read_only.flags.writeable = False
    wrong = {
        0: [case.gate_up[:, :-1].copy(), case.gate_up[:-1], case.gate_up.astype(np.float64), case.gate_up[0]],
        1: [case.bias[:-1], case.bias[:, 1:].copy()],
        2: [
            offsets + 1,
            offsets * 2,
            offsets[::-1].copy(),
            offsets[[0, 3, 2, 1, 4, 5]],
            offsets.astype(np.int32),
            offsets[:0],
            offsets[:-1],
        ],
        3: [tokens[:-1], tokens.astype(np.int64)],
        4: [case.row_weights[:-1], case.row_weights.astype(np.float64)],
        5: [(3, 1.0, 1.0, 0.0), (-1, 1.0, 1.0, 0.0)],
        6: [hidden[:, :-1].copy(), hidden[::2], read_only, np.asfortranarray(hidden)],
    }
    for position, values in wrong.items():
        for value in values:
            arguments = list(good)
            arguments[position] = value
            with pytest.raises(ValueError, match="_core"):
                core.moe_activate(*arguments)


def test_no_rows_at_all(floor):
    experts = ExpertRows(np.zeros(4, np.int64), np.zeros(0, np.int32))
    gate_up, grad_hidden = np.empty((0, 6), np.float32), np.empty((0, 3), np.float32)
    program = PROGRAMS["swiglu"]
    assert _activation.activate(gate_up, None, experts, None, program, floor.backend).shape == (0, 3)
    results = _activation.activate_backward(gate_up, None, experts, None, program, grad_hidden, floor.backend)
    assert [result.shape for result in results] == [(0, 3), (0, 6), (0,)]
    assert_same_bytes(_activation.bias_grad(gate_up, experts, None, floor.backend), np.zeros((3, 6), np.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("gelu", None, None), ValueError, "moe_forward: activation must be one of 'swiglu', .*, got 'gelu'"),
        ((3, None, None), TypeError, "moe_forward: activation must be one of"),
        (("swiglu", 7.0, None), ValueError, "moe_forward: limit must be None with activation 'swiglu', got 7.0"),
        (("geglu", None, 1.0), ValueError, "moe_forward: alpha must be None with activation 'geglu', got 1.0"),
        (("swiglu_clamp", None, 1.0), ValueError, "moe_forward: alpha must be None"),
        (("swiglu_oai", -1.0, None), ValueError, "moe_forward: limit must be finite and at least 0.0, got -1.0"),
        (("swiglu_oai", "7", None), TypeError, "moe_forward: limit must be a number, got str"),
        (("swiglu_oai", None, float("nan")), ValueError, "moe_forward: alpha must be finite, got nan"),
    ],
)
def test_activation_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        _activation.activation_program("moe_forward", *arguments)
