"""Floor 0 of quantile balancing: what bias an expert needs for a token, its quantile over tokens, and its histogram."""

from __future__ import annotations

from typing import Any

from .gating_scores import sum_experts

Array = Any


def needed_bias(xp: Any, scores: Array, bias: Array, top_k: int, token_mask: Array | None) -> Array:
    """[n, E]: with more than this bias an expert would be chosen; for the tokens whose scores are all finite."""
    counted = xp.isfinite(scores).all(axis=1)
    if token_mask is not None:
        counted = counted & token_mask
    scores = scores[counted]
    place = scores.shape[1] - 1 - top_k  # of the key that just misses, in ascending order
    cutoff = xp.partition(scores + bias, place, axis=1)[:, place : place + 1]
    return cutoff - scores


def quantile(xp: Any, needed: Array, top_k: int) -> Array:
    """[E]: of every expert, the value that floor(n k / E) tokens come before."""
    num_tokens, num_experts = needed.shape
    place = num_tokens * top_k // num_experts
    return xp.partition(needed, place, axis=0)[place]


def centred(xp: Any, bias: Array, dtype: Any) -> Array:
    """Less the mean, which no choice depends on, in float64 and rounded once."""
    wide = bias.astype(xp.float64)
    return (wide - sum_experts(xp, wide[None])[0, 0] / wide.shape[0]).astype(dtype)


def histogram(xp: Any, needed: Array, bounds: tuple[float, float], num_bins: int) -> Array:
    """int64 [E, bins] over equal bins; values outside count in the first and the last."""
    scalar = needed.dtype.type
    lower, upper = (scalar(bound) for bound in bounds)
    bins = xp.floor((needed - lower) * (scalar(num_bins) / (upper - lower)))
    bins = xp.clip(bins, scalar(0), scalar(num_bins - 1)).astype(xp.int64)
    num_experts = needed.shape[1]
    flat = (bins + xp.arange(num_experts) * num_bins).reshape(-1)
    return xp.bincount(flat, minlength=num_experts * num_bins).reshape(num_experts, num_bins)


def histogram_quantile(xp: Any, counts: Array, bounds: tuple[float, float], top_k: int) -> Array:
    """float64 [E]: the same quantile of binned values, which lie evenly in their bin."""
    num_experts, num_bins = counts.shape
    up_to = xp.cumsum(counts, axis=1)
    wanted = up_to[:, -1] * top_k  # times E, so that the comparison is one of integers
    at = (up_to * num_experts <= wanted[:, None]).sum(axis=1)[:, None]
    inside = xp.take_along_axis(counts, at, axis=1)[:, 0]
    before = xp.take_along_axis(up_to, at, axis=1)[:, 0] - inside
    share = (wanted - before * num_experts) / (inside * num_experts).astype(xp.float64)
    return bounds[0] + (at[:, 0] + share) * ((bounds[1] - bounds[0]) / num_bins)
