"""The work that columns compete at: inputs, the least that must be moved and computed, and the answer.

Weights are exactly code * scale, and rows are bfloat16 numbers, so one float64 answer serves every format: what a
column loses is then its own arithmetic, and its own formats where it cannot take these.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

import pyroute

from . import shapes

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
    "limit": 0.0,  # the machine's own rate: nothing is computed
}


class Problem:
    """``memo`` keeps what peers derive from the inputs for as long as the problem lives."""

    op = ""
    case = ""
    nbytes = 0
    written = 0  # of them, where reading and writing have limits of their own
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
        sigmoid = s.config.score == "sigmoid" and s.config.renormalize == "sum"
        self.bias = np.random.default_rng(4).normal(0, 0.01, s.num_experts).astype(np.float32) if sigmoid else None
        self.nbytes = self.logits.nbytes + 8 * s.tokens * s.top_k

    @property
    def formula(self) -> str:
        """Which of the two common routers this is, for those who have written them: "" if neither."""
        c = self.config
        if self.bias is not None:
            return "grouped sigmoid" if c.num_groups == 1 or c.group_score == "top2_sum" else ""
        plain = c.score == "softmax" and c.num_groups == 1 and c.scaling_factor == 1
        return "softmax" if plain and (c.renormalize == "sum" or c.score_stage == "post") else ""

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


class GateBackward(Problem):
    """Gradients of the logits from those of the weights, with the balance loss."""

    op = "gate backward"
    balance = 1e-3

    def __init__(self, s: shapes.Shape):
        self.gate = Gate(s)
        self.case, self.config = s.name, s.config
        self.logits, self.gating = self.gate.logits, pyroute.topk_gating(self.gate.logits, s.config)
        self.grad = np.random.default_rng(5).normal(size=(s.tokens, s.top_k)).astype(np.float32)
        self.nbytes = 2 * self.logits.nbytes + 8 * s.tokens * s.top_k
        self.written = self.logits.nbytes

    def error(self, result: Any) -> float:
        exact = pyroute.topk_gating_backward(
            self.grad.astype(np.float64), self.logits.astype(np.float64), self._wide(), self.config,
            balance_loss_coef=self.balance, backend="numpy",
        )  # fmt: skip
        # Renormalised weights hardly change with their logits where one expert has it all: what cancellation leaves of
        # such a row is measured by what cancels, the gradient that came in.
        sizes = np.maximum(np.linalg.norm(exact, axis=-1), 0.1 * np.linalg.norm(self.grad, axis=-1))
        distance = np.linalg.norm(np.asarray(result, np.float64) - exact, axis=-1)
        return float((distance / sizes).max()) if np.isfinite(distance).all() else float("inf")

    def _wide(self) -> pyroute.Gating:
        ids = self.gating.topk_idx
        return pyroute.topk_gating(self.logits.astype(np.float64), self.config, topk_idx=ids, backend="numpy")


class Plan(Problem):
    """Where every slot's row goes, from the ids alone; there is one right answer."""

    op = "plan"

    def __init__(self, s: shapes.Shape):
        self.shape, self.case = s, s.name
        self.ids = shapes.gating(s).topk_idx
        self.nbytes, self.written = 3 * self.ids.nbytes, 2 * self.ids.nbytes

    def error(self, result: Any) -> float:
        exact = pyroute.plan_routes(self.ids, self.shape.num_experts, backend="numpy")
        parts = (exact.row_to_token, exact.token_to_row, exact.expert_offsets)
        same = all(np.array_equal(got, part) for got, part in zip(result, parts, strict=True))
        return 0.0 if same else float("inf")


class Move(Problem):
    """Rows to their experts ("permute") and back, weighted ("unpermute"); into FP8 on the way ("permute quantize"), and
    the gradients of the way back ("unpermute backward")."""

    def __init__(self, s: shapes.Shape, op: str, dtype: str):
        self.shape, self.op, self.case, self.dtype = s, op, f"{s.name} {dtype}", dtype
        self.gating = shapes.gating(s)
        self.plan = pyroute.plan_routes(self.gating.topk_idx, s.num_experts)
        self.x = shapes.states(s, dtype)
        self.rows = pyroute.permute(self.x, self.plan)
        codes = self.rows.size + 4 * (self.rows.size // 128)
        self.nbytes = self.x.nbytes + (codes if op == "permute quantize" else self.rows.nbytes)
        self.nbytes += self.rows.nbytes * (op == "unpermute backward")  # which reads the rows and writes theirs
        self.written = {"unpermute": self.x.nbytes, "permute quantize": codes}.get(op, self.rows.nbytes)

    @functools.cached_property
    def exact(self) -> Any:
        """The float64 answer for every 64th token (or row)."""
        if self.op == "permute":
            return self.rows[::64].astype(np.float64)
        rows = self.rows[self.plan.token_to_row[::64]].astype(np.float64)
        return np.einsum("tkh,tk->th", rows, self.gating.topk_weights[::64].astype(np.float64))

    @functools.cached_property
    def exact_gradients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every 64th row, and of the weights of every 64th token with the size of what is summed, in float64."""
        slot = np.zeros(len(self.rows), np.int64)
        slot[self.plan.token_to_row] = np.arange(self.plan.token_to_row.shape[1])
        tokens = self.plan.row_to_token[::64]
        weights = self.gating.topk_weights[tokens, slot[::64]].astype(np.float64)
        grad = self.x[::64].astype(np.float64)
        rows = self.rows[self.plan.token_to_row[::64]].astype(np.float64)
        of_weights = np.einsum("th,tkh->tk", grad, rows)
        sizes = np.linalg.norm(grad, axis=-1)[:, None] * np.linalg.norm(rows, axis=-1) / grad.shape[1] ** 0.5
        return self.x[tokens].astype(np.float64) * weights[:, None], of_weights, sizes

    def error(self, result: Any) -> float:
        if self.op == "permute quantize":
            return code_error(self.rows[::64], *(part[::64] for part in result))
        if self.op == "unpermute backward":
            (rows, weights), (exact, of_weights, sizes) = result, self.exact_gradients
            distance = np.abs(np.asarray(weights)[::64].astype(np.float64) - of_weights) / sizes
            finite = np.isfinite(distance).all()
            return max(worst_row(rows[::64], exact), float(distance.max()) if finite else float("inf"))
        count = (self.rows if self.op == "permute" else self.x).shape[0]
        return worst_row(result[::64], self.exact) if len(result) == count else float("inf")


def code_error(x: np.ndarray, codes: Any, scales: Any) -> float:
    """Largest distance in units of its 1x128 block's largest; without scales (a bare cast) relative to the element."""
    x = x.astype(np.float64)
    got = np.asarray(codes).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if got.shape != x.shape or not np.isfinite(got).all():
        return float("inf")
    if scales is None:
        return float((np.abs(got - x) / np.maximum(np.abs(x), 2.0**-6)).max())
    blocks = x.reshape(len(x), -1, 128)
    distance = np.abs(got.reshape(blocks.shape) * np.asarray(scales, np.float64)[:, :, None] - blocks)
    return float((distance / np.abs(blocks).max(axis=-1, keepdims=True)).max())


class Quantize(Problem):
    """To e4m3 in blocks of 1x128 ("quantize") and back ("dequantize")."""

    def __init__(self, s: shapes.Shape, dtype: str, op: str = "quantize"):
        self.op, self.shape, self.case, self.dtype = op, s, f"{s.name} {dtype} 1x128", dtype
        self.x = shapes.states(s, dtype)
        codes = self.x.size + 4 * self.x.size // 128
        self.nbytes = self.x.nbytes + codes
        self.written = codes if op == "quantize" else self.x.nbytes

    @functools.cached_property
    def codes(self) -> pyroute.Fp8Array:
        return pyroute.quantize_fp8(self.x)

    def error(self, result: Any) -> float:
        if self.op == "quantize":
            return code_error(self.x[:256], *(part if part is None else part[:256] for part in result))
        few = self.codes.codes[:256].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        exact = few.reshape(len(few), -1, 128) * self.codes.scales[:256, :, None].astype(np.float64)
        return worst_row(result[:256], exact.reshape(few.shape)) if len(result) == len(self.x) else float("inf")
