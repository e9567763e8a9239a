"""Routes: the plan, and rows moved to their experts and back; 4096 tokens to 8 of 64 experts, hidden 2048."""

import numpy as np
import pytest

import pyroute
from pyroute.bench.suite import shapes

MODEL, TOKENS = "olmoe", 4096
TYPES = ["float32", "bfloat16"]


@pytest.fixture
def s(shape):
    return shape(MODEL, TOKENS)


@pytest.fixture
def plan(s):
    return pyroute.plan_routes(shapes.gating(s).topk_idx, s.num_experts)


def test_plan_routes(s, timed):
    topk_idx = shapes.gating(s).topk_idx
    ours = pyroute.plan_routes(topk_idx, s.num_experts)
    reference = pyroute.plan_routes(topk_idx, s.num_experts, backend="numpy")
    assert ours.row_to_token.tobytes() == reference.row_to_token.tobytes()
    assert ours.token_to_row.tobytes() == reference.token_to_row.tobytes()
    timed("plan_routes", s.name, lambda: pyroute.plan_routes(topk_idx, s.num_experts), nbytes=3 * topk_idx.nbytes)


@pytest.mark.parametrize("dtype", TYPES)
def test_permute(s, plan, timed, dtype):
    x = shapes.states(s, dtype)
    out = np.empty((plan.num_rows, s.hidden), x.dtype)
    pyroute.permute(x, plan, out=out)
    assert out.tobytes() == pyroute.permute(x, plan, backend="numpy").tobytes()
    timed("permute", f"{s.name} {dtype}", lambda: pyroute.permute(x, plan, out=out), nbytes=x.nbytes + out.nbytes)


@pytest.mark.parametrize("dtype", TYPES)
def test_permute_quantize(s, plan, timed, dtype):
    x = shapes.states(s, dtype)
    ours, reference = pyroute.permute_quantize(x, plan), pyroute.permute_quantize(x, plan, backend="numpy")
    assert ours.codes.tobytes() == reference.codes.tobytes()
    assert ours.scales.tobytes() == reference.scales.tobytes()
    timed(
        "permute_quantize",
        f"{s.name} {dtype}",
        lambda: pyroute.permute_quantize(x, plan),
        nbytes=x.nbytes + ours.nbytes,
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_unpermute(s, plan, timed, dtype):
    rows = pyroute.permute(shapes.states(s, dtype), plan)
    weights = shapes.gating(s).topk_weights
    out = np.empty((s.tokens, s.hidden), rows.dtype)
    pyroute.unpermute(rows, plan, weights, out=out)
    assert out.tobytes() == pyroute.unpermute(rows, plan, weights, backend="numpy").tobytes()
    timed(
        "unpermute",
        f"{s.name} {dtype}",
        lambda: pyroute.unpermute(rows, plan, weights, out=out),
        nbytes=rows.nbytes + out.nbytes,
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_unpermute_backward(s, plan, timed, dtype):
    grad = shapes.states(s, dtype)
    rows = pyroute.permute(grad, plan)
    weights = shapes.gating(s).topk_weights
    ours = pyroute.unpermute_backward(grad, rows, plan, weights)
    reference = pyroute.unpermute_backward(grad, rows, plan, weights, backend="numpy")
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, reference, strict=True))
    timed(
        "unpermute_backward",
        f"{s.name} {dtype}",
        lambda: pyroute.unpermute_backward(grad, rows, plan, weights),
        nbytes=grad.nbytes + 2 * rows.nbytes,
    )
