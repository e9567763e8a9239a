"""Routes as array code: a stable sort of the slots by expert, gathers by the maps, sums in slot order."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

LANES = 32  # partial sums of a dot product, as in every sum over experts


def plan_routes(xp: Any, topk_idx: Array, num_experts: int, alignment: int) -> tuple[Array, Array, Array, Array]:
    """(tokens_per_expert, expert_offsets, row_to_token, token_to_row) of ids in -1..num_experts-1."""
    num_tokens, top_k = topk_idx.shape
    ids = topk_idx.reshape(-1)
    slots = xp.flatnonzero(ids >= 0)
    slots = slots[xp.argsort(ids[slots], kind="stable")]  # expert, then token, then slot
    experts = ids[slots]

    counts = xp.bincount(experts, minlength=num_experts)
    padded = -(-counts // alignment) * alignment
    offsets = xp.zeros(num_experts + 1, xp.int64)
    offsets[1:] = xp.cumsum(padded)
    if int(offsets[-1]) > np.iinfo(np.int32).max:
        raise OverflowError(f"{int(offsets[-1])} rows")
    first = xp.cumsum(counts) - counts
    rows = offsets[experts] + xp.arange(slots.size) - first[experts]

    row_to_token = xp.full(int(offsets[-1]), -1, xp.int32)
    row_to_token[rows] = slots // top_k
    token_to_row = xp.full(num_tokens * top_k, -1, xp.int32)
    token_to_row[slots] = rows
    return counts.astype(xp.int32), offsets, row_to_token, token_to_row.reshape(num_tokens, top_k)


def permute(xp: Any, x: Array, row_to_token: Array) -> Array:
    """Row r is token ``row_to_token[r]``; padding rows are zero."""
    rows = xp.zeros((row_to_token.size, *x.shape[1:]), x.dtype)
    real = row_to_token >= 0
    rows[real] = x[row_to_token[real]]
    return rows


def unpermute(xp: Any, rows: Array, token_to_row: Array, topk_weights: Array | None) -> Array:
    """Weighted sum of each token's rows in slot order, in float32 (float64 rows: float64), rounded once.

    Without weights a token with one row gets that row's bytes, and more than one are summed.
    """
    num_tokens, top_k = token_to_row.shape
    routed = token_to_row >= 0
    if top_k == 1 and topk_weights is None:
        return permute(xp, rows, token_to_row.reshape(-1))
    wide = accumulator(rows.dtype)
    total = xp.zeros((num_tokens, *rows.shape[1:]), wide)
    with np.errstate(all="ignore"):
        for slot in range(top_k):
            token = xp.flatnonzero(routed[:, slot])
            row = rows[token_to_row[token, slot]].astype(wide)
            if topk_weights is not None:
                row = topk_weights[token, slot, None].astype(wide) * row
            total[token] = total[token] + row
        result = canonical(xp, total).astype(rows.dtype)
    if topk_weights is None:
        single = xp.flatnonzero(routed.sum(axis=1) == 1)
        result[single] = rows[token_to_row[single].max(axis=1)]
    return result


def unpermute_backward(
    xp: Any, grad_y: Array, rows: Array, token_to_row: Array, topk_weights: Array
) -> tuple[Array, Array]:
    """Gradients of the weighted unpermute: each row's ``weight * grad_y``, and ``<grad_y, row>`` of each slot."""
    top_k = token_to_row.shape[1]
    wide = accumulator(rows.dtype)
    grad_rows = xp.zeros(rows.shape, rows.dtype)
    grad_weights = xp.zeros(token_to_row.shape, wide)
    with np.errstate(all="ignore"):
        for slot in range(top_k):
            token = xp.flatnonzero(token_to_row[:, slot] >= 0)
            row = token_to_row[token, slot]
            grad = grad_y[token].astype(wide)
            weight = topk_weights[token, slot, None].astype(wide)
            grad_rows[row] = canonical(xp, weight * grad).astype(rows.dtype)
            grad_weights[token, slot] = canonical(xp, dot(xp, grad, rows[row].astype(wide)))
    return grad_rows, grad_weights


def dot(xp: Any, a: Array, b: Array) -> Array:
    """Row-wise inner products: lane l adds columns l, l + 32, ... in order, from +0; then the tree 16, 8, 4, 2, 1."""
    steps = -(-a.shape[1] // LANES)
    products = xp.zeros((a.shape[0], steps * LANES), a.dtype)
    products[:, : a.shape[1]] = a * b
    lanes = xp.zeros((a.shape[0], LANES), a.dtype)
    for step in range(steps):
        lanes = lanes + products[:, step * LANES : (step + 1) * LANES]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def accumulator(dtype: Any) -> Any:
    """The type that sums run in: float64 for float64, else float32."""
    return np.float64 if dtype == np.float64 else np.float32


def canonical(xp: Any, x: Array) -> Array:
    """Every NaN as the one quiet NaN, so that bytes agree between machines."""
    return xp.where(xp.isnan(x), x.dtype.type(np.nan), x)
