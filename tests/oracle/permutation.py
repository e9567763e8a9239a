"""Routes by loops over experts, tokens and slots."""

from __future__ import annotations

import numpy as np


def plan(topk_idx: np.ndarray, num_experts: int, alignment: int = 1):
    """(tokens_per_expert, expert_offsets, row_to_token, token_to_row) as lists."""
    slots = [[] for _ in range(num_experts)]
    for t, row in enumerate(topk_idx.tolist()):
        for j, expert in enumerate(row):
            if expert >= 0:
                slots[expert].append((t, j))
    offsets, row_to_token = [0], []
    token_to_row = [[-1] * topk_idx.shape[1] for _ in range(topk_idx.shape[0])]
    for mine in slots:
        for t, j in sorted(mine):
            token_to_row[t][j] = len(row_to_token)
            row_to_token.append(t)
        while len(row_to_token) % alignment:
            row_to_token.append(-1)
        offsets.append(len(row_to_token))
    return [len(mine) for mine in slots], offsets, row_to_token, token_to_row


def permute(x: np.ndarray, row_to_token) -> np.ndarray:
    rows = np.zeros((len(row_to_token), x.shape[1]), x.dtype)
    for r, t in enumerate(row_to_token):
        if t >= 0:
            rows[r] = x[t]
    return rows


def unpermute(rows: np.ndarray, token_to_row, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and the sum of magnitudes that error bounds are relative to."""
    total = np.zeros((len(token_to_row), rows.shape[1]))
    magnitude = np.zeros_like(total)
    for t, slots in enumerate(token_to_row):
        for j, r in enumerate(slots):
            if r >= 0:
                term = rows[r].astype(np.float64) * (1.0 if weights is None else float(weights[t, j]))
                total[t] += term
                magnitude[t] += np.abs(term)
    return total, magnitude


def unpermute_float32(rows: np.ndarray, token_to_row, weights) -> np.ndarray:
    """The promised program, one scalar operation at a time: products and sums in float32 in slot order."""
    out = np.zeros((len(token_to_row), rows.shape[1]), np.float32)
    for t, slots in enumerate(token_to_row):
        for h in range(rows.shape[1]):
            total = np.float32(0)
            for j, r in enumerate(slots):
                if r >= 0:
                    total = np.float32(total + np.float32(np.float32(weights[t, j]) * np.float32(rows[r, h])))
            out[t, h] = total
    return out


def dot_float32(a: np.ndarray, b: np.ndarray) -> np.float32:
    """32 lanes in column order, then pairs at distance 16, 8, 4, 2, 1."""
    lanes = [np.float32(0)] * 32
    for h in range(a.shape[0]):
        lanes[h % 32] = np.float32(lanes[h % 32] + np.float32(np.float32(a[h]) * np.float32(b[h])))
    for distance in (16, 8, 4, 2, 1):
        lanes = [np.float32(lanes[i] + lanes[i ^ distance]) for i in range(32)]
    return lanes[0]


def unpermute_backward(grad_y, rows, token_to_row, weights):
    """(grad_rows, grad_weights) in float64."""
    grad_rows = np.zeros(rows.shape)
    grad_weights = np.zeros(np.shape(token_to_row))
    for t, slots in enumerate(token_to_row):
        for j, r in enumerate(slots):
            if r >= 0:
                grad_rows[r] = float(weights[t, j]) * grad_y[t].astype(np.float64)
                grad_weights[t, j] = grad_y[t].astype(np.float64) @ rows[r].astype(np.float64)
    return grad_rows, grad_weights
