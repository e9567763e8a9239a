"""DeepSeek-V3's FP8 training recipe: what is quantised, when, along which axis, and with which codes.

tests/test_moe.py bounds every element of this kind of layer, tests/test_moe_contract.py and test_moe_gradients.py hold
it to the layer's contract; here are the steps of the recipe.
"""

import numpy as np
import pytest
from conftest import assert_same_bytes
from moe_problems import BF16, NAMES, WEIGHT_ON, Problem
from oracle import moe as oracle
from oracle import moe_bounds as bounds
from oracle import quantization as fp8

import pyroute
from pyroute._activation import PROGRAMS, ExpertRows, activate_backward

SCALES = ("float32", "ue8m0")


def recipe(problem, saved, backend):
    """Every quantised operand of the backward pass by its step, and the gradients that they give."""
    plan, (w_gate_up, w_down) = saved.plan, problem.weights
    on, offsets = {"backend": backend}, saved.plan.expert_offsets
    routed, on_input = plan.token_to_row >= 0, problem.options["weight_on"] == "input"
    weights = np.zeros(plan.num_rows, np.float32)
    weights[plan.token_to_row[routed]] = problem.topk_weights[routed]

    def along_row(rows):
        return pyroute.quantize_fp8(rows, scale_format=problem.scale_format, **on)

    def along_tokens(rows):
        block = {"block": (128, 1), "expert_offsets": offsets}
        return pyroute.quantize_fp8(rows, scale_format=problem.scale_format, **block, **on)

    arriving = pyroute.permute(problem.grad_y, plan, **on)
    steps = {"down dgrad": along_row(arriving), "down wgrad of results": along_tokens(arriving)}
    grad_hidden = pyroute.grouped_gemm_dgrad(steps["down dgrad"], w_down, offsets, out_dtype=problem.dtype, **on)
    experts = ExpertRows(offsets, plan.row_to_token)
    program, b_gate_up = PROGRAMS[problem.options["activation"]], problem.options["b_gate_up"]
    hidden, grad_z, _ = activate_backward(
        saved.gate_up, b_gate_up, experts, None if on_input else weights, program, grad_hidden, backend
    )
    rows = pyroute.permute(problem.x, plan, **on)
    if on_input:
        rows = (rows.astype(np.float32) * weights[:, None]).astype(problem.dtype)
    steps |= {"down wgrad of hidden": along_tokens(hidden), "gate_up dgrad": along_row(grad_z)}
    steps |= {"gate_up wgrad of results": along_tokens(grad_z), "gate_up wgrad of rows": along_tokens(rows)}
    grad_rows = pyroute.grouped_gemm_dgrad(steps["gate_up dgrad"], w_gate_up, offsets, out_dtype=problem.dtype, **on)
    operands = {"w_down": ("down wgrad of results", "down wgrad of hidden")}
    operands["w_gate_up"] = ("gate_up wgrad of results", "gate_up wgrad of rows")
    gradients = {
        name: pyroute.grouped_gemm_wgrad(steps[left], steps[right], offsets, **on)
        for name, (left, right) in operands.items()
    }
    back = problem.topk_weights if on_input else None
    gradients["x"] = pyroute.unpermute(grad_rows, plan, back, **on)
    wide = {"down wgrad of results": arriving, "down wgrad of hidden": hidden, "gate_up wgrad of rows": rows}
    wide |= {"down dgrad": arriving, "gate_up dgrad": grad_z, "gate_up wgrad of results": grad_z}
    return steps, wide, gradients, operands


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("scale_format", SCALES)
def test_backward_is_its_steps(floor, scale_format, weight_on):
    """The layer's bytes are those of the recipe written out; its codes are the oracle's; its products are tight."""
    problem = Problem("fp8_training", "swiglu", weight_on, True, (300, 2, 4, 150, 70), 5, scale_format=scale_format)
    _, saved = problem.forward(floor.backend, return_saved=True)
    assert saved.plan.tokens_per_expert.max() > 128  # several blocks along tokens
    got = pyroute.moe_backward(problem.grad_y, saved)
    steps, wide, gradients, operands = recipe(problem, saved, floor.backend)
    for name, gradient in gradients.items():
        assert_same_bytes(getattr(got, name), gradient)
    offsets = saved.plan.expert_offsets
    values = {}
    for name, q in steps.items():
        by_expert = None if q.expert_offsets is None else offsets
        assert q.block == ((1, 128) if "dgrad" in name else (128, 1))
        codes, scales = fp8.quantize(wide[name], q.block, "e4m3", scale_format, by_expert)
        assert_same_bytes(q.codes.view(np.uint8), codes)
        assert_same_bytes(q.scales, scales)
        values[name] = fp8.dequantize(codes, scales, q.block, "e4m3", by_expert).astype(np.float64)
    experts = np.repeat(np.arange(problem.num_experts), np.diff(offsets))
    for name, pair in operands.items():
        expected = bounds.wgrad(*(bounds.exact(values[step]) for step in pair), experts, problem.num_experts)
        assert (np.abs(getattr(got, name) - expected.value) <= expected.error).all()


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_power_of_two_scales_give_numpys_bytes(cpu_floor, dtype, activation, weight_on):
    """Products of codes are exact and such scales add no rounding: without fused multiply-adds nothing changes."""
    problem = Problem("fp8_training", activation, weight_on, False, (150, 2, 3, 150, 70), 7, scale_format="ue8m0")
    problem.weights = [
        pyroute.quantize_fp8(w.dequantize(), block=(128, 128), scale_format="ue8m0") for w in problem.weights
    ]
    problem.dtype, problem.x, problem.grad_y = dtype, problem.x.astype(dtype), problem.grad_y.astype(dtype)
    y, saved = problem.forward("cpu", return_saved=True)
    gradients = pyroute.moe_backward(problem.grad_y, saved)
    numpy_y, numpy_saved = problem.forward("numpy", return_saved=True)
    assert_same_bytes(y, numpy_y)
    assert_same_bytes(saved.gate_up, numpy_saved.gate_up)
    numpy_gradients = pyroute.moe_backward(problem.grad_y, numpy_saved)
    for name in ("x", "w_gate_up", "w_down"):
        assert_same_bytes(getattr(gradients, name), getattr(numpy_gradients, name))


def test_what_fp8_holds_exactly_has_exact_gradients(floor, rng):
    """Few small whole numbers: every operand is its own FP8 value, so the recipe is the layer itself.

    relu2 of 0, 1 or 2 is 0, 1 or 4, its slope 0, 2 or 4; all sums stay below 16, which e4m3 holds with any scale that
    is a power of two.
    """
    problem = Problem("fp8_training", "relu2", "pre_down", sizes=(200, 1, 3, 32, 32), scale_format="ue8m0")
    problem.topk_idx[:] = rng.integers(0, 3, size=(200, 1))
    problem.topk_weights[:] = 1
    one_hot = np.eye(32, dtype=np.float32)
    problem.x = (one_hot[rng.integers(0, 32, 200)] * rng.integers(-2, 3, size=(200, 1))).astype(np.float32)
    problem.grad_y = (one_hot[rng.integers(0, 32, 200)] * rng.integers(-1, 2, size=(200, 1))).astype(np.float32)
    matrices = [np.stack([one_hot[rng.permutation(32)] for _ in range(3)]) for _ in range(2)]
    problem.weights = [pyroute.quantize_fp8(w, block=(128, 128), scale_format="ue8m0") for w in matrices]
    problem.dtype = np.dtype(np.float32)
    y, saved = problem.forward(floor.backend, return_saved=True)
    gradients = pyroute.moe_backward(problem.grad_y, saved)
    assert np.array_equal(y, oracle.forward(problem.layer(), *problem.inputs()))
    expected = oracle.backward(problem.layer(), *problem.inputs(), problem.grad_y.astype(np.float64))
    for name in NAMES[:4]:
        assert np.array_equal(getattr(gradients, name), expected[name])
        assert expected[name].any()


@pytest.mark.parametrize("scale_format", SCALES)
def test_an_experts_scales_do_not_feel_the_others(floor, scale_format):
    """The same tokens at expert 0; the rows of the others grow until a block that they shared would be all zeros."""
    problem = Problem("fp8_training", sizes=(40, 1, 3, 40, 24), scale_format=scale_format)
    problem.topk_idx[:] = np.arange(40)[:, None] % 3
    alone = problem.gradients(floor.backend)
    problem.x[problem.topk_idx[:, 0] > 0] *= 2.0**12
    problem.grad_y[problem.topk_idx[:, 0] > 0] *= 2.0**12
    beside = problem.gradients(floor.backend)
    for name in ("w_gate_up", "w_down"):
        assert_same_bytes(getattr(beside, name)[0], getattr(alone, name)[0])
        assert not np.array_equal(getattr(beside, name)[1], getattr(alone, name)[1])


def test_gradients_differ_from_the_wide_ones_by_the_quantisation_alone(floor):
    """A few percent of their norm, as FP8's 2**-4 leaves them, and not zero: the switch is on."""
    narrow = Problem("fp8_training", "swiglu", "output", False, (300, 2, 4, 150, 70), 5)
    wide = Problem("fp8", "swiglu", "output", False, (300, 2, 4, 150, 70), 5)
    got, expected = narrow.gradients(floor.backend), wide.gradients(floor.backend)
    for name in ("x", "w_gate_up", "w_down"):
        a, b = (np.asarray(getattr(g, name), np.float64) for g in (got, expected))
        assert 0.01 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.06, name


def test_gradients_need_quantised_activations():
    problem = Problem("fp8_weights")
    with pytest.raises(
        ValueError, match=r"^moe_forward: quantize_gradients must be False without quantize_activations, got True$"
    ):
        pyroute.moe_forward(*problem.arguments, quantize_gradients=True)
    with pytest.raises(TypeError, match=r"^moe_forward: quantize_gradients must be one of False, True, got int$"):
        pyroute.moe_forward(*problem.arguments, quantize_activations=True, quantize_gradients=1)
