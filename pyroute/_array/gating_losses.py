"""Floor 0 of the auxiliary losses: what the balance loss needs of the assignments, and sums over tokens.

The counting is integer work on [T, k] ids and serves every host floor; the per-token terms [T] that it weighs come from
the floor that was chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..router_config import RouterConfig
from .gating_scores import scores, softmax, sum_experts, to_scalar

Array = Any

BALANCE_EPS = 1e-20

TOKEN_CHUNK = 64  # sums over tokens: chunks of this many in token order, then the chunks in order


class BalanceTerms(NamedTuple):
    """sum_t weights[s(t)] * <fractions[s(t)], P_t> is the balance loss; one sequence s holds all tokens by default."""

    fractions: Array  # [N, E] f of each sequence, in the type of the scores
    weights: Array  # float64 [N]: 1 / (number of sequences * tokens of the sequence)
    scales: Array  # [N] coefficient * weights, in the type of the scores
    sequence: Array  # int32 [T], the sequence of each token; any valid value for tokens that the mask leaves out


def real_tokens(xp: Any, token_mask: Array | None, num_tokens: int) -> Array:
    return xp.ones(num_tokens, bool) if token_mask is None else token_mask


def balance_terms(
    xp: Any, topk_idx: Array, num_experts: int, dtype: Any, *, coef: float = 1.0, token_mask: Array | None = None,
    sequence_ids: Array | None = None, global_counts: tuple[Array, int] | None = None,
) -> BalanceTerms:  # fmt: skip
    """f, normalisations and sequences from the actual assignments; all counts are exact integers."""
    num_tokens, top_k = topk_idx.shape
    real = real_tokens(xp, token_mask, num_tokens)
    sequence = xp.zeros(num_tokens, xp.int32)
    num_sequences = 1
    if sequence_ids is not None:
        present, inverse = xp.unique(sequence_ids[real], return_inverse=True)
        sequence[real] = inverse.astype(xp.int32)
        num_sequences = max(1, present.size)
    if global_counts is not None:
        counts, total = global_counts
        counts = counts.astype(xp.int64)[None, :]
        tokens = xp.full(1, total, xp.int64)
    else:
        routed = (topk_idx >= 0) & real[:, None]
        slots = (sequence[:, None].astype(xp.int64) * num_experts + topk_idx)[routed]
        counts = xp.bincount(slots, minlength=num_sequences * num_experts).reshape(num_sequences, num_experts)
        tokens = xp.bincount(sequence[real], minlength=num_sequences)
    tokens = xp.maximum(tokens, 1)  # without real tokens nothing is summed
    shares = (num_experts * counts).astype(xp.float64) / (top_k * tokens).astype(xp.float64)[:, None]
    weights = 1.0 / (num_sequences * tokens).astype(xp.float64)
    return BalanceTerms(shares.astype(dtype), weights, (coef * weights).astype(dtype), sequence)


def sum_tokens(xp: Any, values: Array, token_mask: Array | None) -> float:
    """Sum of float64 [T] over the real tokens, in chunks of 64 in token order: the same for any number of threads.

    A NaN is the canonical one: which payload an addition keeps is the processor's choice.
    """
    if token_mask is not None:
        values = xp.where(token_mask, values, 0.0)
    chunks = xp.zeros(-(-values.size // TOKEN_CHUNK) * TOKEN_CHUNK)
    chunks[: values.size] = values
    chunks = chunks.reshape(-1, TOKEN_CHUNK)
    sums = xp.zeros(chunks.shape[0])
    for i in range(TOKEN_CHUNK):
        sums = sums + chunks[:, i]
    total = 0.0
    for chunk in sums.tolist():  # not sum(): Python 3.12 compensates there
        total += chunk
    return total if total == total else float("nan")


def balance_loss_terms(xp: Any, logits: Array, config: RouterConfig, balance: BalanceTerms) -> Array:
    """float64 [T]: the inner product of a token's normalised scores with its sequence's f."""
    with np.errstate(all="ignore"):
        z = to_scalar(xp, logits)
        fractions = balance.fractions[balance.sequence]
        p = scores(xp, z, config.score)
        if config.score != "softmax":
            p = p / (sum_experts(xp, p) + z.dtype.type(BALANCE_EPS))
        return sum_experts(xp, p * fractions)[:, 0].astype(xp.float64)


def z_loss_terms(xp: Any, logits: Array) -> Array:
    """float64 [T]: logsumexp squared."""
    with np.errstate(all="ignore"):
        logsumexp = softmax(xp, to_scalar(xp, logits))[1][:, 0].astype(xp.float64)
        return logsumexp * logsumexp
