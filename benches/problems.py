"""The work that columns compete at: inputs, the least that must be moved and computed, and the answer.

Weights are exactly code * scale, and rows are bfloat16 numbers, so one float64 answer serves every format: what a
column loses is then its own arithmetic, and its own formats where it cannot take these.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import shapes

import pyroute

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Largest error of a row by what the numbers pass through: |row - exact| / |exact| in the 2-norm, except where a
# problem says otherwise. 1e-5 allows any order of a float32 sum over 2048, the others allow their rounding.
TOLERANCES = {
    "exact": 0.0,
    "float32": 1e-5,
    "bfloat16": 2e-2,
    "float16": 2e-3,
    "fp8": 2e-2,  # FP8 weights as they are, bfloat16 rows
    "fp8 both": 6e-2,  # rows in FP8 too
    "q8_0": 2e-2,  # weights and rows in 8 bits of its own blocks
    "codes": 0.04,  # quantisation to e4m3: half a step below 448, over the largest of the block
    "cast": 0.07,  # a bare cast to e4m3: half a step, relative
}


class Problem:
    """``memo`` keeps what peers derive from the inputs for as long as the problem lives."""

    op = ""
    case = ""
    nbytes = 0
    flops = 0
    reads = False  # whether reading, not copying, is its limit

    def memo(self, key: Any, make: Any) -> Any:
        kept = self.__dict__.setdefault("_memo", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def error(self, result: Any) -> float:
        """The worst row's distance from the answer."""
        raise NotImplementedError


def worst_row(rows: np.ndarray, exact: np.ndarray) -> float:
    rows = np.asarray(rows).astype(np.float64)
    if rows.shape != exact.shape or not np.isfinite(rows).all():
        return float("inf")
    norms = np.linalg.norm(exact, axis=-1)
    return float((np.linalg.norm(rows - exact, axis=-1) / np.where(norms > 0, norms, 1)).max())


class Gate(Problem):
    op = "gate"

    def __init__(self, s: shapes.Shape):
        self.shape, self.config, self.case = s, s.config, s.name
        self.logits = shapes.logits(s)
        sigmoid = s.config.score == "sigmoid" and s.config.num_groups > 1
        self.bias = np.random.default_rng(4).normal(0, 0.01, s.num_experts).astype(np.float32) if sigmoid else None
        self.nbytes = self.logits.nbytes + 8 * s.tokens * s.top_k

    def error(self, result: Any) -> float:
        """Relative error of the worst weight; one token in a thousand may choose otherwise, where two keys tie."""
        exact = pyroute.topk_gating(self.logits, self.config, bias=self.bias, backend="numpy")
        (weights, ids), tokens = result, np.arange(self.shape.tokens)[:, None]
        dense = np.zeros((2, *self.logits.shape))
        dense[0][tokens, np.asarray(ids)] = weights
        dense[1][tokens, exact.topk_idx] = exact.topk_weights
        same = ((dense[0] != 0) == (dense[1] != 0)).all(axis=1)
        if np.count_nonzero(~same) > self.shape.tokens // 1000:
            return float("inf")
        return float((np.abs(dense[0] - dense[1]) / np.where(dense[1], dense[1], 1))[same].max())


class Move(Problem):
    """Rows to their experts ("permute") and back, weighted ("unpermute")."""

    def __init__(self, s: shapes.Shape, op: str, dtype: str):
        self.shape, self.op, self.case, self.dtype = s, op, f"{s.name} {dtype}", dtype
        self.gating = shapes.gating(s)
        self.plan = pyroute.plan_routes(self.gating.topk_idx, s.num_experts)
        self.x = shapes.states(s, dtype)
        self.rows = pyroute.permute(self.x, self.plan)
        self.nbytes = self.x.nbytes + self.rows.nbytes

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The float64 answer for every 64th token (or row)."""
        if self.op == "permute":
            return self.rows[::64].astype(np.float64)
        rows = self.rows[self.plan.token_to_row[::64]].astype(np.float64)
        return np.einsum("tkh,tk->th", rows, self.gating.topk_weights[::64].astype(np.float64))

    def error(self, result: Any) -> float:
        count = (self.rows if self.op == "permute" else self.x).shape[0]
        return worst_row(result[::64], self.exact) if len(result) == count else float("inf")


class Quantize(Problem):
    op = "quantize"

    def __init__(self, s: shapes.Shape, dtype: str):
        self.shape, self.case, self.dtype = s, f"{s.name} {dtype} 1x128", dtype
        self.x = shapes.states(s, dtype)
        self.nbytes = self.x.nbytes + self.x.size + 4 * self.x.size // 128

    def error(self, result: Any) -> float:
        """Largest distance in units of its block's largest; without scales (a bare cast) relative to the element."""
        codes, scales = result
        x = self.x[:256].astype(np.float64)
        got = np.asarray(codes)[:256].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        if scales is None:
            return float((np.abs(got - x) / np.maximum(np.abs(x), 2.0**-6)).max())
        blocks = x.reshape(len(x), -1, 128)
        distance = np.abs(got.reshape(blocks.shape) * np.asarray(scales, np.float64)[:256, :, None] - blocks)
        return float((distance / np.abs(blocks).max(axis=-1, keepdims=True)).max())


@functools.lru_cache(maxsize=2)
def expert_weights(num_experts: int, outer: int, inner: int) -> pyroute.Fp8Array:
    return shapes.weights(num_experts, outer, inner, "fp8")


@functools.lru_cache(maxsize=2)
def wide_weights(num_experts: int, outer: int, inner: int, dtype: str) -> np.ndarray:
    """The FP8 weights' values. bfloat16 holds them only after rounding, and so do the answers of its columns."""
    fp8 = expert_weights(num_experts, outer, inner)
    w = np.empty((num_experts, outer, inner), shapes.DTYPES[dtype])
    for e in range(num_experts):
        w[e] = fp8[e].dequantize(dtype)
    return w


class Gemm(Problem):
    """``gemm``, ``dgrad`` or ``wgrad`` of rows grouped by expert with weights [E, N, K]."""

    def __init__(self, op: str, case: str, counts: np.ndarray, outer: int, inner: int, *, plan: Any = None):
        self.op, self.case, self.plan = op, case, plan
        self.sizes = (len(counts), outer, inner)
        self.counts = np.asarray(counts)
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        generator, rows = np.random.default_rng(6), int(self.offsets[-1])
        tokens = rows if plan is None else plan.num_tokens
        self.x16 = generator.standard_normal((tokens, inner), np.float32).astype(BFLOAT16)
        self.a16 = self.x16 if plan is None else self.x16[plan.row_to_token]
        self.a = self.a16.astype(np.float32)
        if op != "gemm":
            self.grad16 = generator.standard_normal((rows, outer), np.float32).astype(BFLOAT16)
            self.grad = self.grad16.astype(np.float32)
        self.flops = 2 * rows * outer * inner
        self.used = int(np.count_nonzero(counts))

    @property
    def w8(self) -> pyroute.Fp8Array:
        return expert_weights(*self.sizes)

    @property
    def w32(self) -> np.ndarray:
        return wide_weights(*self.sizes, "float32")

    @property
    def w16(self) -> np.ndarray:
        return wide_weights(*self.sizes, "bfloat16")

    def bytes_with(self, bytes_per_weight: float) -> int:
        return int(self.used * self.sizes[1] * self.sizes[2] * bytes_per_weight)

    @functools.cached_property
    def sample(self) -> list[tuple[int, int]]:
        """Eight rows with their experts."""
        rows = np.unique(np.linspace(0, self.offsets[-1] - 1, 8).astype(int))
        return [(int(r), int(np.searchsorted(self.offsets, r, side="right")) - 1) for r in rows]

    @functools.cached_property
    def exact(self) -> np.ndarray:
        if self.op == "wgrad":  # eight rows of the first expert's gradient
            segment = slice(self.offsets[0], self.offsets[1])
            return self.grad[segment, :8].astype(np.float64).T @ self.a[segment].astype(np.float64)
        rows = self.grad if self.op == "dgrad" else self.a
        w = [self.w8[e].dequantize().astype(np.float64) for _, e in self.sample]
        w = [x if self.op == "dgrad" else x.T for x in w]
        return np.stack([rows[r].astype(np.float64) @ x for (r, _), x in zip(self.sample, w, strict=True)])

    def error(self, result: Any) -> float:
        if self.op == "wgrad":
            return worst_row(result[0, :8], self.exact)
        return worst_row(result[[r for r, _ in self.sample]], self.exact)


def decode(s: shapes.Shape) -> Gemm:
    """The gate_up projection of a few tokens at their experts, rows sorted by expert."""
    plan = pyroute.plan_routes(shapes.gating(s).topk_idx, s.num_experts)
    p = Gemm("gemm", f"decode T={s.tokens}", np.diff(plan.expert_offsets), 2 * s.intermediate, s.hidden, plan=plan)
    p.reads = True
    return p


def prefill(op: str, s: shapes.Shape) -> Gemm:
    """As many rows for every expert as there are tokens."""
    name = f"{s.num_experts} x {s.tokens} x {s.hidden} x {s.intermediate}"
    return Gemm(op, name, np.full(s.num_experts, s.tokens), s.intermediate, s.hidden)
