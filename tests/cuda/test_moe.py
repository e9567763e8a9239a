"""The MoE layer on the emulated GPU.

Small and odd sizes take the GEMM kernels that have the CPU floor's bytes, and so has the whole layer. Larger ones take
tensor cores and are held to the float64 oracle's bounds, element by element.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulated import library, memory, to_device, to_host
from moe_problems import ACTIVATIONS, KINDS, NAMES, WEIGHT_ON, Problem

import pyroute
from pyroute import MoeGradients


def on_gpu(x):
    if isinstance(x, pyroute.Fp8Array):
        return pyroute.Fp8Array(to_device(x.codes), to_device(x.scales), x.block, x.format)
    return to_device(x) if isinstance(x, np.ndarray) else x


def forward(problem, **options):
    """(y, saved), on the GPU."""
    options = {name: on_gpu(value) for name, value in (problem.options | options).items()}
    return pyroute.moe_forward(*map(on_gpu, problem.arguments), **options, return_saved=True)


def same(got, expected, name=""):
    got = to_host(got)
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes(), f"{name}: {(got != expected).sum()} of {got.size} differ"


def same_bytes_as_the_cpu(problem, alignment=1):
    y, saved = forward(problem, alignment=alignment)
    expected, kept = problem.forward("cpu", return_saved=True, alignment=alignment)
    rows = kept.plan.num_rows
    same(saved.gate_up[:rows], kept.gate_up, "gate_up")
    same(y, expected, "y")
    gradients = pyroute.moe_backward(to_device(problem.grad_y), saved)
    for name, value in pyroute.moe_backward(problem.grad_y, kept)._asdict().items():
        got = getattr(gradients, name)
        if value is None:
            assert got is None
        else:
            same(got, value, name)
    return saved


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_cpu_floors_bytes(activation, kind, weight_on):
    bias = (ACTIVATIONS.index(activation) + WEIGHT_ON.index(weight_on)) % 2 == 0
    same_bytes_as_the_cpu(Problem(kind, activation, weight_on, bias), alignment=4 if bias else 1)


@pytest.mark.parametrize("kind", ["float32", "fp8_training"])
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 3, 8, 8), (1, 1, 1, 1, 1), (5, 4, 4, 15, 7), (40, 2, 70, 3, 5), (3, 2, 3, 0, 4), (3, 2, 3, 4, 0)],
    ids=["no tokens", "ones", "every expert", "more experts", "hidden 0", "inner 0"],
)
def test_ordinary_edges(sizes, kind):
    problem = Problem(kind, sizes=sizes, bias=True)
    same_bytes_as_the_cpu(problem, alignment=3)
    problem.topk_idx[...] = -1
    same_bytes_as_the_cpu(problem)


def test_nan_stays_in_its_token():
    problem = Problem("float32", bias=True)
    problem.x[3, 4], problem.topk_weights[5, 0] = np.nan, np.inf
    problem.grad_y[6, 1] = -np.inf
    with np.errstate(invalid="ignore"):
        same_bytes_as_the_cpu(problem)


def test_ids_that_are_no_experts_are_not_routed():
    problem, routed = Problem("float32", bias=True), Problem("float32", bias=True)
    problem.topk_idx[0], problem.topk_idx[4, 1] = 5, -(2**62)
    routed.topk_idx[0], routed.topk_idx[4, 1] = -1, -1
    y, saved = forward(problem)
    same(y, routed.forward("cpu"))
    gradients = pyroute.moe_backward(to_device(problem.grad_y), saved)
    for got, expected in zip(gradients, routed.gradients("cpu"), strict=True):
        same(got, expected)


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", ["float32", "fp8_training"])
def test_out_accumulate_and_wanted(kind, weight_on):
    problem = Problem(kind, "swiglu_oai", weight_on, bias=True)
    out = to_device(np.full_like(problem.x, 7))
    y, saved = forward(problem, out=out)
    assert y is out
    _, kept = problem.forward("cpu", return_saved=True)
    grad_y = to_device(problem.grad_y)
    whole = pyroute.moe_backward(problem.grad_y, kept)
    for wanted in (*((name,) for name in NAMES), ("x", "topk_weights"), ()):
        gradients = pyroute.moe_backward(grad_y, saved, wanted=wanted)
        for name in NAMES:
            if name in wanted:
                same(getattr(gradients, name), getattr(whole, name), f"{name} of {wanted}")
            else:
                assert getattr(gradients, name) is None
    rng = np.random.default_rng(1)
    before = MoeGradients(*(rng.normal(size=g.shape).astype(g.dtype) for g in whole))
    expected = MoeGradients(*(g.copy() for g in before))
    into = MoeGradients(*map(to_device, before))
    assert pyroute.moe_backward(grad_y, saved, out=into, accumulate=True).w_down is into.w_down
    pyroute.moe_backward(problem.grad_y, kept, out=expected, accumulate=True)
    for got, value in zip(into, expected, strict=True):
        same(got, value)


def as_bounded(problem, results, gate_up, plan):
    """Every element within the bound that the oracle propagates, from the rows that the forward pass kept."""
    rows = to_host(plan.token_to_row)[problem.topk_idx >= 0]
    bounds = problem.bounds(gate_up[rows].astype(np.float64))
    for name, got in results.items():
        value, error = bounds[name]
        excess = np.abs(got.astype(np.float64) - value) - error
        assert excess.max() <= 0, f"{name}: {excess.max()} past {error.flat[excess.argmax()]}"


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_for_tensor_cores(kind):
    sizes = (70, 2, 3, 272, 144)  # two blocks of 128, the last one partial
    problem = Problem(kind, "swiglu", "output", sizes=sizes, seed=2)
    y, saved = forward(problem, alignment=128)
    gradients = pyroute.moe_backward(to_device(problem.grad_y), saved)
    results = {"y": to_host(y)} | {name: to_host(getattr(gradients, name)) for name in NAMES[:4]}
    as_bounded(problem, results, to_host(saved.gate_up), saved.plan)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8_training"])
def test_a_whole_step_is_captured_into_a_graph(kind, monkeypatch):
    """Nothing asks for a value: replayed with other tokens, ids and weights the graph does their step."""
    driver = library()
    first, second = (Problem(kind, "swiglu", bias=True, seed=seed) for seed in (5, 6))
    second.weights, second.biases = first.weights, first.biases
    second.options |= {"b_gate_up": first.biases[0], "b_down": first.biases[1]}
    stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuStreamCreate(ctypes.byref(stream), 0)
    monkeypatch.setattr(memory, "stream", lambda: stream.value)
    inputs = [to_device(x) for x in (first.x, first.topk_idx, first.topk_weights, first.grad_y)]
    rest = {name: on_gpu(value) for name, value in first.options.items()}
    weights = [on_gpu(w) for w in first.weights]
    assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
    y, saved = pyroute.moe_forward(*inputs[:3], *weights, **rest, return_saved=True)
    gradients = pyroute.moe_backward(inputs[3], saved)
    assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_uint64(0)) == 0
    for problem in (first, second, first):
        for array, value in zip(
            inputs, (problem.x, problem.topk_idx, problem.topk_weights, problem.grad_y), strict=True
        ):
            ctypes.memmove(array.pointer, np.ascontiguousarray(value).ctypes.data, value.nbytes)
        assert driver.cuGraphLaunch(executable, stream) == 0
        same(y, problem.forward("cpu"))
        for got, expected in zip(gradients, problem.gradients("cpu"), strict=True):
            same(got, expected)
