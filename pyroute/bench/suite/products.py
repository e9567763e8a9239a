"""Products of rows grouped by expert, and whole layers: the problems of problems.py that have weights."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import pyroute

from . import shapes
from .problems import BFLOAT16, Problem, worst_row


@functools.lru_cache(maxsize=2)
def expert_weights(num_experts: int, outer: int, inner: int) -> Any:
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
    def w8(self) -> Any:
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
    def exact(self) -> Any:
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
    p = Gemm(
        "gemm",
        f"decode {s.name.partition(' ')[2]}",
        np.diff(plan.expert_offsets),
        2 * s.intermediate,
        s.hidden,
        plan=plan,
    )
    p.reads, p.nbytes = True, p.bytes_with(1) + p.a16.nbytes + 2 * len(p.a) * p.sizes[1]  # weights of one byte
    return p


def prefill(op: str, s: shapes.Shape) -> Gemm:
    """As many rows for every expert as there are tokens."""
    name = f"{s.num_experts} x {s.tokens} x {s.hidden} x {s.intermediate}"
    return Gemm(op, name, np.full(s.num_experts, s.tokens), s.intermediate, s.hidden)


def routed(op: str, s: shapes.Shape) -> Gemm:
    """The gate_up projection of all rows that the router sends to each expert."""
    counts = shapes.gating(s).tokens_per_expert
    name = f"{s.name} x {s.hidden} x {2 * s.intermediate}"
    return Gemm(op, name, counts, 2 * s.intermediate, s.hidden)


class LayerWeights(Problem):
    """A layer's FP8 weights and their values in wider types; shared by the layer's problems, with what peers derive."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int):
        self.gate_up8 = shapes.weights(num_experts, 2 * intermediate, hidden, "fp8")
        self.down8 = shapes.weights(num_experts, hidden, intermediate, "fp8")

    def pair(self, kind: str) -> tuple[Any, Any]:
        """gate_up and down as "fp8", "float32" or "bfloat16"."""
        if kind == "fp8":
            return self.gate_up8, self.down8
        wide: tuple[Any, Any] = self.memo(kind, lambda: (_wide(self.gate_up8, kind), _wide(self.down8, kind)))
        return wide


def _wide(w: pyroute.Fp8Array, kind: str) -> np.ndarray:
    out = np.empty(w.shape, shapes.DTYPES[kind])
    for e in range(len(out)):
        out[e] = w[e].dequantize(kind)
    return out


@functools.lru_cache(maxsize=1)
def layer_weights(num_experts: int, hidden: int, intermediate: int, wide: bool) -> LayerWeights:
    """One at a time: with what peers derive a group of columns holds up to 8 GB."""
    return LayerWeights(num_experts, hidden, intermediate)


class Layer(Problem):
    """Routed experts of a layer, given ids and weights of every token: "layer" forward, "training" with gradients.

    ``wide`` problems compare float32 columns, the others those with weights of 8 or 16 bits.
    """

    reads = True

    def __init__(self, op: str, s: shapes.Shape, *, wide: bool):
        self.op, self.shape, self.wide = op, s, wide
        self.case = f"{'float32' if wide else '8 and 16 bits'} {s.name.partition(' ')[2]}"
        self.logits, self.gating = shapes.logits(s), shapes.gating(s)
        self.x16 = shapes.states(s, "bfloat16")
        self.x = self.x16.astype(np.float32)
        self.flops = 6 * s.tokens * s.top_k * s.hidden * s.intermediate * (3 if op == "training" else 1)
        used = int(np.count_nonzero(self.gating.tokens_per_expert))
        self.nbytes = used * 3 * s.hidden * s.intermediate + 2 * self.x16.nbytes  # weights of one byte
        self.grad_y = shapes.states(s._replace(tokens=s.tokens + 1))[1:]

    @property
    def weights(self) -> LayerWeights:
        return layer_weights(self.shape.num_experts, self.shape.hidden, self.shape.intermediate, self.wide)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return np.unique(np.linspace(0, self.shape.tokens - 1, 6).astype(int))

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """Some tokens, in float64."""
        rows, w = [], self.weights
        for t in self.tokens:
            x, y = self.x[t].astype(np.float64), 0.0
            for expert, weight in zip(self.gating.topk_idx[t], self.gating.topk_weights[t], strict=True):
                gate, up = np.split(w.gate_up8[int(expert)].dequantize().astype(np.float64) @ x, 2)
                hidden = gate / (1 + np.exp(-gate)) * up
                y = y + float(weight) * (w.down8[int(expert)].dequantize().astype(np.float64) @ hidden)
            rows.append(y)
        return np.stack(rows)

    def error(self, result: Any) -> float:
        """Of training also the gradients: the layer is linear in down, so <grad down, down> = <y, grad y>."""
        if self.op == "layer":
            return worst_row(result[self.tokens], self.exact)
        y, grad_x, grad_gate_up, grad_down = result
        error = worst_row(y[self.tokens], self.exact)
        _, down = self.weights.pair("float32")
        found = sum(np.vdot(g, w) for g, w in zip(grad_down, down, strict=True))
        expected = np.vdot(y.astype(np.float64), self.grad_y)
        size = np.linalg.norm(y) * np.linalg.norm(self.grad_y)
        linear = abs(found - expected) / size
        ours = self.memo("reference gradients", self._gradients)
        others = [worst_row(a, b) for a, b in zip((grad_x[:4], grad_gate_up[0, :8]), ours, strict=True)]
        return float(max(error, linear, *others))

    def _gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 gradients of the first tokens of x, and of some rows of the first expert's gate_up."""
        w, g = self.weights, self.gating
        grad_x, grad_rows = np.zeros((4, self.shape.hidden)), np.zeros((8, self.shape.hidden))
        cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for t in range(self.shape.tokens):
            for expert, weight in zip(g.topk_idx[t], g.topk_weights[t], strict=True):
                if t >= 4 and expert != 0:
                    continue
                e = int(expert)
                if e not in cache:
                    cache[e] = tuple(x[e].dequantize().astype(np.float64) for x in (w.gate_up8, w.down8))
                gate_up, down = cache[e]
                x = self.x[t].astype(np.float64)
                gate, up = np.split(gate_up @ x, 2)
                s = 1 / (1 + np.exp(-gate))
                grad_hidden = float(weight) * (self.grad_y[t].astype(np.float64) @ down)
                grad_z = np.concatenate([grad_hidden * up * s * (1 + gate * (1 - s)), grad_hidden * gate * s])
                if t < 4:
                    grad_x[t] += grad_z @ gate_up
                if e == 0:
                    grad_rows += np.outer(grad_z[:8], x)
        return grad_x[: self.shape.tokens], grad_rows
