"""Gating: DeepSeek-V3's grouped sigmoid router and softmax top-k, at decode and at prefill."""

import numpy as np
import pytest

import pyroute
from pyroute.bench.suite import shapes

CASES = [
    ("deepseek-v3", 1),
    ("deepseek-v3", 64),
    ("deepseek-v3", 4096),
    ("mixtral", 4096),
    ("qwen3-moe", 1),
    ("qwen3-moe", 4096),
]


@pytest.mark.parametrize(("model", "tokens"), CASES)
def test_topk_gating(shape, timed, model, tokens):
    s = shape(model, tokens)
    logits = shapes.logits(s)
    bias = (
        np.random.default_rng(4).normal(0, 0.01, s.num_experts).astype(np.float32)
        if "sigmoid" in str(s.config)
        else None
    )
    ours = pyroute.topk_gating(logits, s.config, bias=bias)
    reference = pyroute.topk_gating(logits, s.config, bias=bias, backend="numpy")
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, reference, strict=True))
    timed(
        "topk_gating",
        s.name,
        lambda: pyroute.topk_gating(logits, s.config, bias=bias),
        nbytes=logits.nbytes + 8 * s.tokens * s.top_k,
    )


@pytest.mark.parametrize("losses", [False, True], ids=["weights", "losses"])
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-moe"])
def test_topk_gating_backward(shape, timed, model, losses):
    s = shape(model, 4096)
    logits, gating = shapes.logits(s), shapes.gating(s)
    grad = np.random.default_rng(5).normal(size=(s.tokens, s.top_k)).astype(np.float32)
    coefficients = {"balance_loss_coef": 1e-3, "z_loss_coef": 1e-3} if losses else {}

    def backward(backend=None):
        return pyroute.topk_gating_backward(grad, logits, gating, s.config, backend=backend, **coefficients)

    assert backward().tobytes() == backward("numpy").tobytes()
    timed(
        "topk_gating_backward",
        s.name + (" with losses" if losses else ""),
        backward,
        nbytes=2 * logits.nbytes + 8 * s.tokens * s.top_k,
    )
