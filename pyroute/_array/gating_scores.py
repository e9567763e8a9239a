"""Floor 0 of gating: scores, and sums in the order of the contract.

float32 and float64 run the same programs. Every value is a stated sequence of IEEE operations (docs/ops/gating.md), so
the C++ floor gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import elementary

Array = Any

LANES = 32
# Below these logits sqrt(log1p(exp z)) is exp(z / 2): the relative difference, exp(z) / 4, is less than an eighth of
# an ULP, and so is that of the derivative, whose quotient form would end in 0 / 0.
SMALL_LOGIT = {"float32": -20.0, "float64": -40.0}


def to_scalar(xp: Any, logits: Array) -> Array:
    """The type that the programs run in: float64 stays, everything else becomes float32, exactly."""
    return logits if logits.dtype == xp.float64 else logits.astype(xp.float32)


def canonical(xp: Any, x: Array) -> Array:
    """Every NaN as the one quiet positive NaN, so that equal results have equal bytes."""
    return xp.where(xp.isnan(x), x.dtype.type(np.nan), x)


def sum_experts(xp: Any, x: Array) -> Array:
    """Sum of [T, E] over E: lane l adds experts l, l + 32, ... from +0, then a tree of halves. [T, 1]."""
    lanes = xp.zeros((x.shape[0], LANES), x.dtype)
    for start in range(0, x.shape[1], LANES):
        part = x[:, start : start + LANES]
        lanes[:, : part.shape[1]] += part
    for half in (16, 8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def sum_slots(xp: Any, x: Array, routed: Array) -> Array:
    """Sum of [T, k] over the routed slots 0..k-1 in order, from +0. [T, 1]."""
    total = xp.zeros((x.shape[0], 1), x.dtype)
    for j in range(x.shape[1]):
        total = xp.where(routed[:, j : j + 1], total + x[:, j : j + 1], total)
    return total


def scatter_slots(xp: Any, values: Array, topk_idx: Array, num_experts: int) -> Array:
    """[T, k] added into zeros [T, E] at the routed ids, slot 0..k-1 in order: an id that comes twice adds twice."""
    dense = xp.zeros((values.shape[0], num_experts), values.dtype)
    for j in range(values.shape[1]):
        rows = xp.nonzero(topk_idx[:, j] >= 0)[0]
        dense[rows, topk_idx[rows, j]] += values[rows, j]
    return dense


def at_slots(xp: Any, dense: Array, topk_idx: Array) -> Array:
    """[T, E] at the ids: [T, k]. Slots that are not routed read expert 0; the caller masks them."""
    return xp.take_along_axis(dense, xp.maximum(topk_idx, 0).astype(xp.int64), axis=1)


# --- scores -----------------------------------------------------------------------------------------------------------


def softmax(xp: Any, z: Array) -> tuple[Array, Array]:
    """Probabilities [T, E] and logsumexp [T, 1]. NaN probabilities in rows with a NaN or without a finite maximum."""
    largest = xp.max(z, axis=1, keepdims=True)
    e = elementary.exp(xp, z - largest)
    total = sum_experts(xp, e)
    return e / total, largest + elementary.log_normal(total)


def sigmoid(xp: Any, z: Array) -> tuple[Array, Array]:
    """sigmoid(z) and its derivative, both with a small relative error for every z."""
    e = elementary.exp(xp, -xp.abs(z))
    one = z.dtype.type(1)
    large, small = one / (one + e), e / (one + e)
    return xp.where(z >= 0, large, small), large * small


def sqrtsoftplus(xp: Any, z: Array) -> tuple[Array, Array]:
    """sqrt(log(1 + exp z)) and its derivative; neither overflows nor divides by 0."""
    zero, half = z.dtype.type(0), z.dtype.type(0.5)
    softplus = xp.where(z > 0, z, zero) + elementary.log1p_unit(elementary.exp(xp, -xp.abs(z)))
    root, small = xp.sqrt(softplus), elementary.exp(xp, half * z)
    is_small = z < SMALL_LOGIT[z.dtype.name]
    return xp.where(is_small, small, root), xp.where(is_small, half * small, sigmoid(xp, z)[0] / (root + root))


def scores(xp: Any, z: Array, score: str) -> Array:
    """The router's scores [T, E] of logits [T, E]."""
    return {"softmax": softmax, "sigmoid": sigmoid, "sqrtsoftplus": sqrtsoftplus}[score](xp, z)[0]
