"""The sizes that scaling goes through, and what is run at each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import pyroute

from . import shapes
from .peers import Work

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOADS = ("balanced", "zipf", "one-hot")
WITH_WEIGHTS = ("gemm", "layer")


class Sizes(NamedTuple):
    """Tokens, slots, experts, hidden, intermediate, and how rows are spread over experts."""

    T: int
    k: int = 1
    E: int = 1
    H: int = 1
    I: int = 1  # noqa: E741
    load: str = "balanced"

    def along(self, axis: str, value: int) -> Sizes:
        changed: dict[str, Any] = {axis: value}
        return self._replace(**changed)


def ids(s: Sizes) -> Any:
    """[T, k]; the same number of rows for every load. One-hot puts each slot's rows on one expert."""
    slots = np.arange(s.T * s.k).reshape(s.T, s.k)
    if s.load == "balanced":
        return (slots % s.E).astype(np.int32)
    if s.load == "one-hot":
        return np.broadcast_to(np.arange(s.k, dtype=np.int32), (s.T, s.k)).copy()
    chances = 1 / np.arange(1, s.E + 1)
    keys = np.random.default_rng(7).gumbel(size=(s.T, s.E)) + np.log(chances)
    return np.argsort(-keys, axis=1)[:, : s.k].astype(np.int32)


def plan(s: Sizes) -> pyroute.RoutePlan:
    return pyroute.plan_routes(ids(s), s.E)


def normal(*shape: int, dtype: np.dtype = BFLOAT16) -> np.ndarray:
    return np.random.default_rng(8).standard_normal(shape, np.float32).astype(dtype)


def topk_weights(s: Sizes) -> np.ndarray:
    return np.full((s.T, s.k), 1 / s.k, np.float32)


def gate(s: Sizes) -> Work:
    logits, config = normal(s.T, s.E, dtype=np.dtype(np.float32)), pyroute.RouterConfig(s.E, s.k, renormalize="sum")
    return Work(lambda: pyroute.topk_gating(logits, config))


def permute(s: Sizes) -> Work:
    x, routes = normal(s.T, s.H), plan(s)
    out = pyroute.permute(x, routes)
    return Work(lambda: pyroute.permute(x, routes, out=out))


def unpermute(s: Sizes) -> Work:
    routes, weights = plan(s), topk_weights(s)
    rows = pyroute.permute(normal(s.T, s.H), routes)
    out = pyroute.unpermute(rows, routes, weights)
    return Work(lambda: pyroute.unpermute(rows, routes, weights, out=out))


def quantize(s: Sizes) -> Work:
    x = normal(s.T, s.H)
    return Work(lambda: pyroute.quantize_fp8(x))


def gemm(s: Sizes) -> Work:
    routes, w = plan(s), shapes.weights(s.E, s.I, s.H, "fp8")
    rows = pyroute.permute(normal(s.T, s.H), routes)
    out = pyroute.grouped_gemm(rows, w, routes.expert_offsets)
    return Work(lambda: pyroute.grouped_gemm(rows, w, routes.expert_offsets, out=out))


def layer(s: Sizes) -> Work:
    x, topk_idx, weights = normal(s.T, s.H), ids(s), topk_weights(s)
    gate_up, down = shapes.weights(s.E, 2 * s.I, s.H, "fp8"), shapes.weights(s.E, s.H, s.I, "fp8")
    return Work(lambda: pyroute.moe_forward(x, topk_idx, weights, gate_up, down))


BUILD: dict[str, Callable[[Sizes], Work]] = {
    "gate": gate,
    "permute": permute,
    "unpermute": unpermute,
    "quantize": quantize,
    "gemm": gemm,
    "layer": layer,
}


def work(op: str, s: Sizes) -> float:
    """What the time should be proportional to when one size changes a little."""
    return {
        "gate": s.T * s.E,
        "permute": s.T * (s.k + 1) * s.H,
        "unpermute": s.T * (s.k + 1) * s.H,
        "quantize": s.T * s.H,
        "gemm": s.T * s.k * s.H * s.I,
        "layer": s.T * s.k * s.H * s.I,
    }[op]


def least(op: str, s: Sizes) -> tuple[int, int]:
    """Bytes that must be moved and operations that must be computed at least, each once."""
    rows, codes = s.T * s.k, s.T * s.H
    used = np.count_nonzero(np.bincount(ids(s).reshape(-1))) if op in WITH_WEIGHTS else 0
    return {
        "gate": (4 * s.T * s.E + 8 * rows, 0),
        "permute": (2 * (s.T + rows) * s.H, 0),
        "unpermute": (2 * (s.T + rows) * s.H, 0),
        "quantize": (3 * codes + 4 * s.T * -(-s.H // 128), 0),
        "gemm": (used * s.H * s.I + 2 * rows * (s.H + s.I), 2 * rows * s.H * s.I),
        "layer": (3 * used * s.H * s.I + 4 * s.T * s.H, 6 * rows * s.H * s.I),
    }[op]


def _decades(low: int, steps: int = 9) -> list[int]:
    """From low to 100 low."""
    return [round(low * 100 ** (i / (steps - 1))) for i in range(steps)]


def _along(axis: str, low: int, base: Sizes) -> list[Sizes]:
    return [base.along(axis, value) for value in _decades(low)]


_MOVE = Sizes(T=1024, k=4, E=64, H=1024)
_GEMM = Sizes(T=256, k=4, E=16, H=1024, I=512)
_SMALL = Sizes(T=128, E=128, H=256, I=256)  # every expert has rows, whatever k


def _per_expert(low: int, base: Sizes, rows: int) -> list[Sizes]:
    """Growing numbers of experts, each with as many rows."""
    return [base._replace(E=e, k=2, T=rows * e // 2) for e in _decades(low)]


_MOVES = {
    "T": _along("T", 128, _MOVE),
    "k": _along("k", 1, _MOVE._replace(T=256, E=128)),
    "E": _along("E", 8, _MOVE),
    "H": _along("H", 64, _MOVE._replace(T=2048)),
}
_PRODUCTS = {
    "T": _along("T", 32, _GEMM),
    "k": _along("k", 1, _SMALL),
    "E": _per_expert(2, _GEMM, 32),
    "H": _along("H", 64, _GEMM),
    "I": _along("I", 64, _GEMM),
}
GROWTH: dict[str, dict[str, list[Sizes]]] = {
    "gate": {
        "T": _along("T", 64, Sizes(1, 8, 256)),
        "k": _along("k", 1, Sizes(1024, 1, 256)),
        "E": _along("E", 16, Sizes(1024, 8)),
    },
    "permute": _MOVES,
    "unpermute": _MOVES,
    "quantize": {"T": _along("T", 128, Sizes(1, H=2048)), "H": _along("H", 128, Sizes(1024))},
    "gemm": _PRODUCTS,
    "layer": _PRODUCTS,
}

LARGE: dict[str, Sizes] = {
    "gate": Sizes(8192, 8, 256),
    "permute": Sizes(4096, 8, 64, 2048),
    "unpermute": Sizes(4096, 8, 64, 2048),
    "quantize": Sizes(4096, H=7168),
    "gemm": Sizes(1024, 4, 64, 2048, 1408),
    "layer": Sizes(512, 4, 64, 1024, 704),
}

# around which the odd sizes are: three layers of up to 512 experts are in memory at once
MIDDLE: dict[str, Sizes] = {
    **LARGE,
    "permute": Sizes(2048, 4, 64, 1024),
    "unpermute": Sizes(2048, 4, 64, 1024),
    "gemm": Sizes(512, 4, 64, 1024, 512),
    "layer": Sizes(512, 4, 64, 512, 512),
}

_EXPERTS = [("E", 56, 60, 64), ("E", 64, 96, 128), ("E", 128, 160, 192), ("E", 256, 384, 512)]
_HIDDEN = [("H", 896, 1023, 1024), ("H", 1024, 1025, 1152)]
_INNER = [("I", 384, 511, 512), ("I", 512, 513, 640)]
ODD: dict[str, list[tuple[str, int, int, int]]] = {
    "gate": _EXPERTS,
    "permute": [*_EXPERTS, *_HIDDEN],
    "unpermute": [*_EXPERTS, *_HIDDEN],
    "quantize": [("H", 7040, 7167, 7168), ("H", 7168, 7169, 7296)],
    "gemm": [*_EXPERTS, *_HIDDEN, *_INNER],
    "layer": [*_EXPERTS, ("H", 384, 511, 512), ("H", 512, 513, 640), *_INNER],
}


def parts_of(op: str) -> tuple[str, ...]:
    """Loads mean nothing where rows do not go to experts."""
    return ("growth", "threads", "sizes") if op in ("gate", "quantize") else ("growth", "threads", "loads", "sizes")
