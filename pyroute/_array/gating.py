"""Floor 0 of gating, forward: choice of experts and their weights, as array programs over ``xp``.

Arguments have been checked by pyroute/gating.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..router_config import RouterConfig
from . import elementary
from .gating_scores import at_slots, canonical, scores, sum_slots, to_scalar

Array = Any


def order_keys(xp: Any, values: Array) -> Array:
    """Integers in the order of the values: NaN lowest, then -inf, ..., -0 equal to +0, ..., +inf."""
    int_type, width = {"float32": (xp.int32, 32), "float64": (xp.int64, 64)}[values.dtype.name]
    bits = (values + values.dtype.type(0)).view(int_type)  # -0 + 0 is +0
    keys = bits ^ ((bits >> (width - 1)) & int_type(2 ** (width - 1) - 1))
    return xp.where(xp.isnan(values), int_type(-(2 ** (width - 1))), keys)


def best_first(xp: Any, keys: Array, count: int) -> Array:
    """Positions of the ``count`` largest keys along the last axis, best first; equal keys: lower position first."""
    return xp.argsort(~keys, axis=-1, kind="stable")[..., :count]


def kept_groups(xp: Any, values: Array, config: RouterConfig) -> Array:
    """Ids [T, topk_groups] of the groups that a token keeps, ascending, from what ranks its experts [T, E]."""
    grouped = values.reshape(-1, config.num_groups, config.experts_per_group)
    best = best_first(xp, order_keys(xp, grouped), config.group_topn)  # a group smaller than n gives all it has
    largest = xp.take_along_axis(grouped, best, axis=-1)
    group_scores = largest[..., 0]
    for i in range(1, largest.shape[-1]):
        group_scores = group_scores + largest[..., i]
    return xp.sort(best_first(xp, order_keys(xp, group_scores), config.topk_groups), axis=-1)


def choose_experts(xp: Any, z: Array, s: Array | None, bias: Array | None, config: RouterConfig) -> Array:
    """Ids [T, k], best first. Experts of the groups that are not kept are never candidates."""
    ranked = z if bias is None else s + bias
    if config.num_groups == 1:
        return best_first(xp, order_keys(xp, ranked), config.top_k).astype(xp.int32)
    kept = kept_groups(xp, s if bias is None else ranked, config)
    members = kept[:, :, None] * config.experts_per_group + xp.arange(config.experts_per_group)
    # ascending, so that equal keys still go to the lower id
    candidates = members.reshape(z.shape[0], config.topk_groups * config.experts_per_group)
    keys = order_keys(xp, xp.take_along_axis(ranked, candidates, axis=1))
    best = best_first(xp, keys, config.top_k)
    return xp.take_along_axis(candidates, best, axis=1).astype(xp.int32)


def softmax_of_slots(xp: Any, chosen: Array, routed: Array) -> Array:
    """Softmax [T, k] over the routed slots alone."""
    largest = xp.max(xp.where(routed, chosen, chosen.dtype.type(-np.inf)), axis=1, keepdims=True)
    e = elementary.exp(xp, chosen - largest)
    return e / sum_slots(xp, e, routed)


def denominator(xp: Any, total: Array, config: RouterConfig) -> Array:
    eps = total.dtype.type(config.renormalize_eps)
    return total + eps if config.renormalize == "sum" else xp.where(total < eps, eps, total)


def topk_gating(
    xp: Any, logits: Array, config: RouterConfig, bias: Array | None, topk_idx: Array | None, token_mask: Array | None
) -> tuple[Array, Array, Array]:
    """Ids [T, k] int32, weights [T, k], counts [E] int32."""
    with np.errstate(all="ignore"):
        z = to_scalar(xp, logits)
        is_post = config.score_stage == "post"
        s = None if is_post and bias is None else scores(xp, z, config.score)
        idx = choose_experts(xp, z, s, bias, config) if topk_idx is None else topk_idx.copy()
        if token_mask is not None:
            idx = xp.where(token_mask[:, None], idx, xp.int32(-1))
        routed = idx >= 0
        weights = softmax_of_slots(xp, at_slots(xp, z, idx), routed) if is_post else at_slots(xp, s, idx)
        if config.renormalize:
            weights = weights / denominator(xp, sum_slots(xp, weights, routed), config)
        weights = xp.where(routed, weights * z.dtype.type(config.scaling_factor), z.dtype.type(0))
        counts = xp.bincount(idx[routed], minlength=config.num_experts)
        return idx, canonical(xp, weights), counts.astype(xp.int32)


# --- expert choice ----------------------------------------------------------------------------------------------------


def expert_choice(xp: Any, logits: Array, capacity: int, tokens: Array) -> tuple[Array, Array]:
    """Token ids [E, C] int32 and weights [E, C] among ``tokens`` (ascending ids); -1 and 0 past the last of them."""
    num_experts = logits.shape[1]
    taken = min(capacity, tokens.size)
    with np.errstate(all="ignore"):
        z = to_scalar(xp, logits[tokens])
        p = scores(xp, z, "softmax").T
        best = best_first(xp, order_keys(xp, p), taken)
        idx = xp.full((num_experts, capacity), -1, xp.int32)
        weights = xp.zeros((num_experts, capacity), z.dtype)
        idx[:, :taken] = tokens[best]
        weights[:, :taken] = canonical(xp, xp.take_along_axis(p, best, axis=1))
    return idx, weights


def by_token(xp: Any, token_idx: Array, token_weights: Array, num_tokens: int) -> tuple[Array, Array, Array]:
    """[E, C] as ids [T, K], weights [T, K] and counts [E]; a token's experts ascend, -1 and 0 fill the rest."""
    num_experts, capacity = token_idx.shape
    experts = xp.repeat(xp.arange(num_experts, dtype=xp.int32), capacity)
    tokens, weights = token_idx.reshape(-1), token_weights.reshape(-1)
    taken = xp.nonzero(tokens >= 0)[0]
    order = taken[xp.argsort(tokens[taken], kind="stable")]  # by token, then by expert
    tokens = tokens[order]
    per_token = xp.bincount(tokens, minlength=num_tokens)
    first = xp.cumsum(per_token) - per_token
    slot = xp.arange(tokens.size) - first[tokens]
    top_k = max(1, int(per_token.max()) if num_tokens else 1)
    idx = xp.full((num_tokens, top_k), -1, xp.int32)
    by_slot = xp.zeros((num_tokens, top_k), token_weights.dtype)
    idx[tokens, slot] = experts[order]
    by_slot[tokens, slot] = weights[order]
    counts = xp.bincount(experts[order], minlength=num_experts)
    return idx, by_slot, counts.astype(xp.int32)
