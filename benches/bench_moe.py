"""The layer: DeepSeek-V2-Lite's 64 experts, top-6, hidden 2048, intermediate 1408; from decode to training."""

import numpy as np
import pytest

import pyroute
from pyroute.bench.suite import shapes

MODEL = "deepseek-v2-lite"
# weights, rows, quantised activations, largest relative distance of a row from float64
FORMATS = {
    "float32": ("float32", "float32", False, 1e-5),
    "bfloat16": ("bfloat16", "bfloat16", False, 2e-2),
    "fp8 weights": ("fp8", "bfloat16", False, 2e-2),
    "fp8": ("fp8", "bfloat16", True, 1e-1),
}


class Problem:
    def __init__(self, s, kind):
        self.kind, self.row_kind, self.quantize, self.tolerance = FORMATS[kind]
        self.x, self.gating = shapes.states(s, self.row_kind), shapes.gating(s)
        self.w_gate_up = shapes.weights(s.num_experts, 2 * s.intermediate, s.hidden, self.kind)
        self.w_down = shapes.weights(s.num_experts, s.hidden, s.intermediate, self.kind)
        used = int(np.count_nonzero(self.gating.tokens_per_expert))
        self.weight_bytes = (self.w_gate_up.nbytes + self.w_down.nbytes) * used // s.num_experts
        self.flops = 6 * s.tokens * s.top_k * s.hidden * s.intermediate

    def forward(self, **options):
        return pyroute.moe_forward(
            self.x,
            self.gating.topk_idx,
            self.gating.topk_weights,
            self.w_gate_up,
            self.w_down,
            quantize_activations=self.quantize,
            **options,
        )

    def assert_close(self, y):
        """The last token, against float64 on the dequantised weights."""
        x, exact = self.x[-1].astype(np.float64), 0.0
        for expert, weight in zip(self.gating.topk_idx[-1], self.gating.topk_weights[-1], strict=True):
            gate, up = np.split(float64(self.w_gate_up[int(expert)]) @ x, 2)
            exact = exact + float(weight) * (float64(self.w_down[int(expert)]) @ (gate / (1 + np.exp(-gate)) * up))
        assert np.linalg.norm(y[-1].astype(np.float64) - exact) <= self.tolerance * np.linalg.norm(exact)


def float64(x):
    return (x.dequantize() if isinstance(x, pyroute.Fp8Array) else x).astype(np.float64)


@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("kind", FORMATS)
def test_moe_forward(shape, timed, kind, tokens):
    s = shape(MODEL, tokens)
    p = Problem(s, kind)
    p.assert_close(p.forward())
    timed(
        "moe_forward",
        f"{s.name} {kind}",
        p.forward,
        nbytes=2 * p.x.nbytes + p.weight_bytes,
        flops=p.flops,
        reads=True,
    )


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_moe_backward(shape, timed, kind):
    s = shape(MODEL, 512)
    p = Problem(s, kind)
    y, saved = p.forward(return_saved=True)
    p.assert_close(y)
    gradients = pyroute.moe_backward(y, saved)
    # the layer is linear in w_down: <grad_w_down, w_down> = <y, y> where y is its own gradient
    lhs = sum(np.vdot(g.astype(np.float64), float64(w)) for g, w in zip(gradients.w_down, p.w_down, strict=True))
    assert lhs == pytest.approx(np.vdot(y.astype(np.float64), y.astype(np.float64)), rel=2 * p.tolerance)
    weight_gradients = gradients.w_gate_up.nbytes + gradients.w_down.nbytes
    timed(
        "moe_backward",
        f"{s.name} {kind}",
        lambda: pyroute.moe_backward(y, saved),
        nbytes=4 * p.x.nbytes + p.weight_bytes + weight_gradients,
        flops=2 * p.flops,
    )
