"""The public shapes that the benchmarks run: models by name, tokens as decode, small batch and prefill have them."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import pyroute
from pyroute.router_presets import model_shape

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}


class Shape(NamedTuple):
    """One MoE layer of a model reading ``tokens`` tokens."""

    model: str
    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    config: pyroute.RouterConfig

    @property
    def name(self) -> str:
        return f"{self.model} T={self.tokens}"

    @property
    def top_k(self) -> int:
        return self.config.top_k


def shape(model: str, tokens: int) -> Shape:
    sizes = model_shape(model)
    config = pyroute.RouterConfig.preset(model)
    return Shape(model, tokens, sizes.hidden, sizes.intermediate, sizes.num_experts, config)


def small(s: Shape) -> Shape:
    """At most 64 tokens and 8 experts of 1024 x 512: where cases only have to run."""
    config = pyroute.RouterConfig(8, min(2, s.top_k), s.config.score)
    return s._replace(tokens=min(64, s.tokens), hidden=1024, intermediate=512, num_experts=8, config=config)


def logits(s: Shape) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(s.tokens, s.num_experts)).astype(np.float32)


def states(s: Shape, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(2).normal(size=(s.tokens, s.hidden)).astype(DTYPES[dtype])


def gating(s: Shape) -> pyroute.Gating:
    return pyroute.topk_gating(logits(s), s.config)


def weights(num_experts: int, outer: int, inner: int, kind: str) -> Any:
    """[E, outer, inner] of "float32", "bfloat16" or "fp8": one random matrix, differently scaled for every expert.

    Drawing every expert's own would take longer than all benchmarks; times do not depend on the values.
    """
    matrix = np.random.default_rng(3).normal(0, inner**-0.5, (outer, inner)).astype(np.float32)
    scales = np.linspace(0.5, 1.5, num_experts, dtype=np.float32)
    if kind == "fp8":
        one = pyroute.quantize_fp8(matrix, block=(128, 128))
        codes = np.repeat(one.codes[None], num_experts, axis=0)
        return pyroute.Fp8Array(codes, one.scales * scales[:, None, None], one.block)
    w = np.empty((num_experts, outer, inner), DTYPES[kind])
    for e in range(num_experts):
        w[e] = matrix * scales[e]
    return w
