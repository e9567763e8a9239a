"""The public shapes that the benchmarks run: models by name, tokens as decode, small batch and prefill have them."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import pyroute
from pyroute.router_presets import model_shape

from . import options

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
    load: str = "random"  # how rows are spread over the experts; "zipf:1.5" has its exponent with it
    of_experts: int = 0  # of the model, where fewer are kept

    @property
    def name(self) -> str:
        experts = f" {self.num_experts} of {self.of_experts} experts" * (self.of_experts > self.num_experts)
        return f"{self.model} T={self.tokens}{experts}" + f" {self.load}" * (self.load != "random")

    @property
    def top_k(self) -> int:
        return self.config.top_k


def shape(model: str, tokens: int) -> Shape:
    """Of a preset, or of options.LIKE."""
    if model in options.LIKE:
        num_experts, top_k, hidden, intermediate = options.LIKE[model]
        config = pyroute.RouterConfig(num_experts, top_k, "sigmoid", renormalize="sum")
        return Shape(model, tokens, hidden, intermediate, num_experts, config)
    sizes = model_shape(model)
    config = pyroute.RouterConfig.preset(model)
    return Shape(model, tokens, sizes.hidden, sizes.intermediate, sizes.num_experts, config)


def small(s: Shape) -> Shape:
    """At most 64 tokens and 8 experts of 512 x 256: where cases only have to run."""
    config = pyroute.RouterConfig(8, min(2, s.top_k), s.config.score, renormalize="sum")
    return s._replace(tokens=min(64, s.tokens), hidden=512, intermediate=256, num_experts=8, config=config)


def few_tokens(s: Shape) -> Shape:
    """The same for what has no weights: the model's own router."""
    return s._replace(tokens=min(64, s.tokens))


def fitting(s: Shape, num_bytes: int) -> Shape:
    """The model's layer with its widths, and as many of its experts as leave the float32 weights within the bytes.

    As many rows for each expert as before, which is what one of several devices gets that share the experts.
    """
    kept = s.num_experts
    while kept > 2 and 12 * kept * s.hidden * s.intermediate > num_bytes:
        kept = -(-kept // 2)
    if kept == s.num_experts:
        return s
    top_k = min(s.top_k, kept)
    tokens = max(1, round(s.tokens * s.top_k * kept / (s.num_experts * top_k)))
    config = pyroute.RouterConfig(kept, top_k, "softmax", renormalize="sum")
    return s._replace(tokens=tokens, num_experts=kept, config=config, of_experts=s.num_experts)


def logits(s: Shape) -> np.ndarray:
    """Normal numbers, which spread rows almost evenly, and what the load adds to them."""
    x = np.random.default_rng(1).normal(size=(s.tokens, s.num_experts)).astype(np.float32)
    return x if s.load == "random" else x + preference(s)


def preference(s: Shape) -> np.ndarray:
    """[T, E] or [E], larger where tokens are to go, 0 for a random load; 50 is beyond normal numbers and biases."""
    name, _, exponent = s.load.partition(":")
    experts, wanted = np.arange(s.num_experts), np.zeros(s.num_experts, np.float32)
    match name:
        case "balanced":
            slots = np.arange(s.tokens * s.top_k).reshape(s.tokens, s.top_k) % s.num_experts
            wanted = np.zeros((s.tokens, s.num_experts), np.float32)
            np.put_along_axis(wanted, slots, np.float32(50), axis=1)
        case "one-hot":
            wanted[: s.top_k] = 50
        case "half-empty":
            wanted[s.num_experts // 2 :] = -50 if s.num_experts // 2 >= s.top_k else 0
        case "zipf":  # in an order that has nothing to do with groups of neighbours
            order = np.random.default_rng(9).permutation(experts)
            wanted[order] = -float(exponent or 1) * np.log(experts + 1)
    return wanted.astype(np.float32)


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
