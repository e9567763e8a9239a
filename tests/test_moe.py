"""The MoE layer against float64 loops, element by element, on every floor."""

import numpy as np
import pytest
from moe_problems import ACTIVATIONS, BF16, KINDS, NAMES, WEIGHT_ON, Problem, problem_of
from oracle import moe as oracle
from oracle import moe_bounds as bounds
from oracle import quantization

import pyroute
from pyroute._activation import PROGRAMS, ExpertRows, activate


def check(problem, floor, **options):
    """Forward and backward, every element of every result: end to end, and from the rows that the forward pass kept."""
    y, saved = problem.forward(floor.backend, return_saved=True, **options)
    gradients = pyroute.moe_backward(problem.grad_y, saved)
    assert y.dtype == gradients.x.dtype == problem.dtype
    kept = problem.slot_rows(saved.gate_up, saved.plan)
    results = {"y": y, "gate_up": kept}
    for name in NAMES:
        gradient = getattr(gradients, name)
        if name.startswith("b_") and problem.options[name] is None:
            assert gradient is None
            continue
        assert name == "x" or gradient.dtype == np.float32
        results[name] = gradient
    for expected in (problem.expected, problem.bounds(kept)):
        for name, got in results.items():
            value, error = expected[name]
            assert got.shape == value.shape
            excess = np.abs(got.astype(np.float64) - value) - error
            worst = np.unravel_index(excess.argmax(), excess.shape)
            assert excess[worst] <= 0, f"{name}{list(worst)}: {got[worst]} for {value[worst]} within {error[worst]}"
    assert np.count_nonzero(y) > y.size // 2
    return y, saved


@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_gradients(floor, activation, weight_on, kind, bias):
    check(problem_of(kind, activation, weight_on, bias), floor)


# several 128-wide blocks, the last one partial, along both contractions
@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("kind", ["fp8_weights", "fp8", "fp8_training"])
def test_partial_blocks(floor, kind, scale_format, weight_on):
    sizes = (9, 2, 3, 150, 131)
    problem = problem_of(kind, "swiglu", weight_on, False, sizes, 3, None, None, scale_format)
    y, saved = check(problem, floor, alignment=4)
    if kind == "fp8_weights":
        return
    # The bounds above allow any rounding to FP8. Here both operands are quantised by definition, and the rest is tight.
    plan, layer, routed = saved.plan, problem.layer(), problem.topk_idx >= 0
    tokens, experts = np.nonzero(routed)[0], problem.topk_idx[routed]
    weights = problem.topk_weights[routed][:, None]
    rows = problem.x[tokens]
    if weight_on == "input":
        rows = (rows.astype(np.float32) * weights).astype(BF16)
    first = bounds.gemm(bounds.exact(quantised(rows, scale_format)), layer.w_gate_up[experts])
    assert_within(problem.slot_rows(saved.gate_up, plan), bounds.rounded(first, 2.0**-8))
    row_weights = np.zeros(plan.num_rows, np.float32)
    row_weights[plan.token_to_row[routed]] = weights[:, 0] if weight_on == "pre_down" else 1
    expert_rows = ExpertRows(plan.expert_offsets, plan.row_to_token)
    hidden = activate(saved.gate_up, None, expert_rows, row_weights, PROGRAMS["swiglu"], "numpy")
    hidden = problem.slot_rows(quantised(hidden, scale_format), plan)
    second = bounds.rounded(bounds.gemm(bounds.exact(hidden), layer.w_down[experts]), 2.0**-8)
    if weight_on == "output":
        second = bounds.times(second, bounds.exact(weights.astype(np.float64)))
    assert_within(y.astype(np.float64), bounds.rounded(bounds.by_token(second, tokens, *routed.shape), 2.0**-8))


def quantised(rows, scale_format):
    """What e4m3 with 1x128 blocks keeps of the rows, as float64."""
    codes, scales = quantization.quantize(rows, (1, 128), "e4m3", scale_format)
    return quantization.dequantize(codes, scales, (1, 128), "e4m3").astype(np.float64)


def assert_within(got, expected):
    assert (np.abs(got - expected.value) <= expected.error).all()


@pytest.mark.parametrize(
    ("activation", "limit", "alpha"), [("swiglu_clamp", 0.5, None), ("swiglu_oai", 0.7, None), ("swiglu_oai", 1.1, 0.3)]
)
def test_limit_and_alpha(floor, activation, limit, alpha):
    problem = problem_of("float32", activation, "output", True, (11, 3, 5, 21, 13), 4, limit, alpha)
    y, _ = check(problem, floor)
    plain = Problem("float32", "swiglu", bias=True, seed=4).forward(floor.backend)
    assert np.abs(y - plain).max() > 0.1


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_oracle_gradients_by_finite_differences(activation, weight_on, rng):
    """The formulas of the oracle along one random direction in all of its arguments at once."""
    problem = Problem("float32", activation, weight_on, bias=True, sizes=(6, 2, 3, 5, 4), limit=None)
    layer, (x, topk_idx, topk_weights) = problem.layer(), problem.inputs()
    grad_y = problem.grad_y.astype(np.float64)
    gradients = oracle.backward(layer, x, topk_idx, topk_weights, grad_y)
    point = {"x": x, "topk_weights": topk_weights} | {name: getattr(layer, name) for name in NAMES[2:]}
    directions = {name: rng.normal(size=array.shape) for name, array in point.items()}

    def loss(step):
        moved = {name: array + step * directions[name] for name, array in point.items()}
        shifted = layer._replace(**{name: moved[name] for name in NAMES[2:]})
        return (oracle.forward(shifted, moved["x"], topk_idx, moved["topk_weights"]) * grad_y).sum()

    slope = sum((gradients[name] * directions[name]).sum() for name in NAMES)
    assert (loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 0.1


def test_the_routes_of_the_weight_agree(floor):
    """Before the down projection or after it a weight is one factor, bias included; before the expert it is not."""
    results = [Problem("float32", "swiglu", on, bias=True).forward(floor.backend) for on in WEIGHT_ON]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert np.abs(results[0] - results[2]).max() > 0.1


def test_biases_alone(floor):
    """Weights of zero leave the biases: each slot adds its weight times its expert's down bias, once."""
    problem = Problem("float32", bias=True, sizes=(6, 3, 4, 8, 4))
    problem.weights = [np.zeros_like(w) for w in problem.weights]
    y, saved = problem.forward(floor.backend, return_saved=True)
    grad_y = np.ones_like(y)
    expected, counted = np.zeros_like(y), np.zeros((4, 8), np.float32)
    for token, slot in zip(*np.nonzero(problem.topk_idx >= 0), strict=True):
        weight, expert = problem.topk_weights[token, slot], problem.topk_idx[token, slot]
        expected[token] += weight * problem.biases[1][expert]
        counted[expert] += weight
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    gradients = pyroute.moe_backward(grad_y, saved)
    np.testing.assert_allclose(gradients.b_down, counted, rtol=1e-6)


def test_a_small_contribution_survives_the_sum(floor):
    """Slots of 1, 2**-9 and -1 leave 2**-9 behind: the sum over slots is float32, whatever the rows are."""
    x = np.ones((1, 1), BF16)
    w_gate_up, w_down = np.array([[[1]], [[1]], [[1]]], BF16), np.array([[[1]], [[2.0**-9]], [[-1]]], BF16)
    idx, weights = np.array([[0, 1, 2]]), np.ones((1, 3), np.float32)
    y = pyroute.moe_forward(x, idx, weights, w_gate_up, w_down, activation="relu2", backend=floor.backend)
    assert y.dtype == BF16
    assert float(y[0, 0]) == 2.0**-9
