"""The MoE layer on the emulated GPU.

Small and odd sizes take the GEMM kernels that have the CPU floor's bytes, and so has the whole layer. Larger ones take
tensor cores and are held to the float64 oracle's bounds, element by element.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulated import to_device, to_host
from moe_problems import ACTIVATIONS, KINDS, NAMES, WEIGHT_ON, Problem

import pyroute

WEIGHTS = NAMES[2:]


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
    assert not to_host(saved.gate_up)[rows:].astype(np.float32).any()
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
