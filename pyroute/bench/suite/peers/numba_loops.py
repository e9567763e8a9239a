"""Routers as plain loops under numba, one pass a token, parallel over tokens: a good programmer's afternoon."""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit, prange

from . import Work, column, package_version

NAME = "numba"
numba.config.THREADING_LAYER = "omp"  # the same pool as torch and pyroute


def version() -> str:
    return package_version("numba")


def set_threads(n: int) -> None:
    numba.set_num_threads(n)


@njit(inline="always", fastmath=True)
def _insert(keys, ids, size, key, expert):
    """Insert into the descending list; equal keys keep the lower id first."""
    j = size - 1
    while j > 0 and keys[j - 1] < key:
        keys[j], ids[j] = keys[j - 1], ids[j - 1]
        j -= 1
    keys[j], ids[j] = key, expert


@njit(fastmath=True)
def _grouped_token(row, bias, groups, kept, top_k, scaling, weights, ids, scores, rank, keys):
    per_group = row.shape[0] // groups
    for g in range(groups):
        first = second = -math.inf
        for e in range(g * per_group, (g + 1) * per_group):
            scores[e] = np.float32(1) / (np.float32(1) + math.exp(-row[e]))
            key = scores[e] + bias[e]
            if key > first:
                first, second = key, first
            elif key > second:
                second = key
        rank[g] = first + second
    for j in range(top_k):
        keys[j] = -math.inf
    for _ in range(kept):
        best = 0
        for g in range(1, groups):
            if rank[g] > rank[best]:
                best = g
        rank[best] = -math.inf
        for e in range(best * per_group, (best + 1) * per_group):
            key = scores[e] + bias[e]
            if key > keys[top_k - 1]:
                _insert(keys, ids, top_k, key, e)
    total = np.float32(1e-20)
    for j in range(top_k):
        weights[j] = scores[ids[j]]
        total += weights[j]
    for j in range(top_k):
        weights[j] *= scaling / total


@njit(fastmath=True)
def _grouped_serial(logits, bias, groups, kept, top_k, scaling, weights, ids):
    scores, rank = np.empty(logits.shape[1], np.float32), np.empty(groups, np.float32)
    keys = np.empty(top_k, np.float32)
    for t in range(logits.shape[0]):
        _grouped_token(logits[t], bias, groups, kept, top_k, scaling, weights[t], ids[t], scores, rank, keys)


@njit(fastmath=True, parallel=True)
def _grouped_parallel(logits, bias, groups, kept, top_k, scaling, weights, ids):
    chunk = 64
    for c in prange((logits.shape[0] + chunk - 1) // chunk):
        part = slice(c * chunk, min(logits.shape[0], (c + 1) * chunk))
        _grouped_serial(logits[part], bias, groups, kept, top_k, scaling, weights[part], ids[part])


@njit(fastmath=True)
def _softmax_serial(logits, top_k, weights, ids):
    """Chosen by logit; weights that sum to one need the exponentials of the chosen only."""
    keys = np.empty(top_k, np.float32)
    for t in range(logits.shape[0]):
        for j in range(top_k):
            keys[j] = -math.inf
        for e in range(logits.shape[1]):
            if logits[t, e] > keys[top_k - 1]:
                _insert(keys, ids[t], top_k, logits[t, e], e)
        total = np.float32(0)
        for j in range(top_k):
            weights[t, j] = math.exp(keys[j] - keys[0])
            total += weights[t, j]
        for j in range(top_k):
            weights[t, j] /= total


@njit(fastmath=True, parallel=True)
def _softmax_parallel(logits, top_k, weights, ids):
    chunk = 64
    for c in prange((logits.shape[0] + chunk - 1) // chunk):
        part = slice(c * chunk, min(logits.shape[0], (c + 1) * chunk))
        _softmax_serial(logits[part], top_k, weights[part], ids[part])


@column("gate", "numba loops")
def gate(p):
    if not p.formula:
        return None
    c, logits, few = p.config, p.logits, p.logits.shape[0] < 16
    k = c.top_k

    def outputs():
        return np.empty((logits.shape[0], k), np.float32), np.empty((logits.shape[0], k), np.int32)

    def run():
        weights, ids = outputs()
        if p.bias is None:
            (_softmax_serial if few else _softmax_parallel)(logits, k, weights, ids)
        else:
            f, scaling = (_grouped_serial if few else _grouped_parallel), np.float32(c.scaling_factor)
            f(logits, p.bias, c.num_groups, c.topk_groups, k, scaling, weights, ids)
        return weights, ids

    return Work(run)


@njit(fastmath=True, parallel=True)
def _unpermute(rows, token_to_row, weights, out):
    for t in prange(out.shape[0]):
        for j in range(token_to_row.shape[1]):
            row, w = rows[token_to_row[t, j]], weights[t, j]
            if j == 0:
                for h in range(out.shape[1]):
                    out[t, h] = w * row[h]
            else:
                for h in range(out.shape[1]):
                    out[t, h] += w * row[h]


@column("unpermute", "numba loops")
def unpermute(p):
    if p.dtype != "float32":
        return None
    out = np.empty_like(p.x)

    def run():
        _unpermute(p.rows, p.plan.token_to_row, p.gating.topk_weights, out)
        return out

    return Work(run)
