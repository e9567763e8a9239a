"""Grouped GEMM: DeepSeek-V2-Lite's gate_up projection, 64 experts of 2816 x 2048, from decode to prefill."""

import numpy as np
import pytest

import pyroute
from pyroute.bench.suite import shapes

MODEL = "deepseek-v2-lite"
KINDS = ["float32", "bfloat16", "fp8"]


class Problem:
    """Rows of ``tokens`` tokens at their experts; FP8 weights come with bfloat16 rows, or with FP8 rows too."""

    def __init__(self, s, kind, *, rows="as weights"):
        plan = pyroute.plan_routes(shapes.gating(s).topk_idx, s.num_experts)
        self.offsets, self.used = plan.expert_offsets, int(np.count_nonzero(plan.tokens_per_expert))
        self.b = shapes.weights(s.num_experts, 2 * s.intermediate, s.hidden, kind)
        x = shapes.states(s, "float32" if kind == "float32" else "bfloat16")
        self.a = pyroute.permute_quantize(x, plan) if rows == "fp8" else pyroute.permute(x, plan)
        self.flops = 2 * plan.num_rows * s.hidden * 2 * s.intermediate
        self.weight_bytes = self.b.nbytes * self.used // s.num_experts


def float64(x):
    return (x.dequantize() if isinstance(x, pyroute.Fp8Array) else x).astype(np.float64)


def assert_rows_within_bound(out, p):
    """Every element of some rows, by the contract; half an ULP of the output type on top."""
    half_ulp = 2.0**-9 if out.dtype != np.float32 else 2.0**-25
    rows = float64(p.a)
    for row in np.unique(np.linspace(0, out.shape[0] - 1, 8).astype(int)):
        expert = int(np.searchsorted(p.offsets, row, side="right")) - 1
        a, b = rows[row], float64(p.b[expert])
        exact, magnitude = b @ a, np.abs(b) @ np.abs(a)
        bound = 4 * 2.0**-24 * magnitude * 1.01 + 2 * half_ulp * np.abs(exact)
        assert (np.abs(out[row].astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("tokens", [1, 8, 32, 512])
@pytest.mark.parametrize(("kind", "rows"), [(kind, "as weights") for kind in KINDS] + [("fp8", "fp8")])
def test_grouped_gemm(shape, timed, kind, rows, tokens):
    s = shape(MODEL, tokens)
    p = Problem(s, kind, rows=rows)
    out = pyroute.grouped_gemm(p.a, p.b, p.offsets)
    assert_rows_within_bound(out, p)
    timed(
        "grouped_gemm",
        f"{s.name} {kind}" + (" both" if rows == "fp8" else ""),
        lambda: pyroute.grouped_gemm(p.a, p.b, p.offsets, out=out),
        nbytes=p.a.nbytes + p.weight_bytes + out.nbytes,
        flops=p.flops,
        reads=True,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_gemm_dgrad(shape, timed, kind):
    s = shape(MODEL, 512)
    p = Problem(s, kind)
    grad = pyroute.grouped_gemm(p.a, p.b, p.offsets)
    out = pyroute.grouped_gemm_dgrad(grad, p.b, p.offsets)
    expert = int(np.argmax(np.diff(p.offsets)))
    row = int(p.offsets[expert])
    exact = float64(grad[row]) @ float64(p.b[expert])
    assert np.abs(out[row].astype(np.float64) - exact).max() < 0.01 * np.abs(exact).max()
    timed(
        "grouped_gemm_dgrad",
        f"{s.name} {kind}",
        lambda: pyroute.grouped_gemm_dgrad(grad, p.b, p.offsets, out=out),
        nbytes=grad.nbytes + p.weight_bytes + out.nbytes,
        flops=p.flops,
    )


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_grouped_gemm_wgrad(shape, timed, kind):
    s = shape(MODEL, 512)
    p = Problem(s, kind)
    grad = pyroute.grouped_gemm(p.a, p.b, p.offsets)
    out = pyroute.grouped_gemm_wgrad(grad, p.a, p.offsets)
    expert = int(np.argmax(np.diff(p.offsets)))
    rows = slice(p.offsets[expert], p.offsets[expert + 1])
    exact = float64(grad[rows]).T @ float64(p.a[rows])
    assert np.abs(out[expert] - exact).max() < 1e-4 * np.abs(exact).max()
    timed(
        "grouped_gemm_wgrad",
        f"{s.name} {kind}",
        lambda: pyroute.grouped_gemm_wgrad(grad, p.a, p.offsets, out=out),
        nbytes=grad.nbytes + p.a.nbytes + out.nbytes,
        flops=p.flops,
    )
