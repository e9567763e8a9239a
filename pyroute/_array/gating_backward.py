"""Floor 0 of gating, backward: one gradient from the weights, the balance loss and the z-loss. Ids are constants."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..router_config import RouterConfig
from . import elementary
from .gating import denominator, softmax_of_slots
from .gating_losses import BALANCE_EPS, BalanceTerms
from .gating_scores import (
    at_slots,
    canonical,
    scatter_slots,
    sigmoid,
    softmax,
    sqrtsoftplus,
    sum_experts,
    sum_slots,
    to_scalar,
)

Array = Any


def topk_gating_backward(
    xp: Any, grad_weights: Array, logits: Array, topk_idx: Array, config: RouterConfig,
    token_mask: Array | None, balance: BalanceTerms | None, z_scale: float,
) -> Array:  # fmt: skip
    """Gradient [T, E] of the weights, the balance loss and the z-loss, added in this order."""
    with np.errstate(all="ignore"):
        z = to_scalar(xp, logits)
        idx = topk_idx if token_mask is None else xp.where(token_mask[:, None], topk_idx, xp.int32(-1))
        p, logsumexp = softmax(xp, z) if config.score == "softmax" or z_scale else (None, None)
        grad = weights_backward(xp, grad_weights, z, p, idx, config)
        if balance is not None:
            grad = grad + balance_backward(xp, z, p, config, balance)
        if z_scale:
            grad = grad + (z.dtype.type(z_scale) * logsumexp) * p
        if token_mask is not None:
            grad = xp.where(token_mask[:, None], grad, z.dtype.type(0))
        return canonical(xp, grad)


def weights_backward(
    xp: Any, grad_weights: Array, z: Array, p: Array | None, idx: Array, config: RouterConfig
) -> Array:
    """From the gradient of the final weights [T, k] to that of the logits [T, E]; ids are constants."""
    routed = idx >= 0
    dw = grad_weights * z.dtype.type(config.scaling_factor)
    chosen = at_slots(xp, z, idx)
    if config.score_stage == "post":
        return slots_backward(xp, dw, chosen, idx, config)
    if config.score != "softmax":
        values, slopes = {"sigmoid": sigmoid, "sqrtsoftplus": sqrtsoftplus}[config.score](xp, chosen)
        ds, _ = renormalize_backward(xp, dw, values, routed, config)
        return scatter_slots(xp, ds * slopes, idx, config.num_experts)
    ds, inner = renormalize_backward(xp, dw, at_slots(xp, p, idx), routed, config)
    dense = p * (scatter_slots(xp, ds, idx, config.num_experts) - inner)
    dense = xp.where(xp.any(routed, axis=1, keepdims=True), dense, z.dtype.type(0))
    if not config.renormalize:
        return dense
    return xp.where(eps_vanishes(xp, z, chosen, routed, config), slots_backward(xp, dw, chosen, idx, config), dense)


def renormalize_backward(xp: Any, dw: Array, values: Array, routed: Array, config: RouterConfig) -> tuple[Array, Array]:
    """Gradient [T, k] of the scores before renormalisation, and its inner product [T, 1] with those scores."""
    if not config.renormalize:
        return dw, sum_slots(xp, values * dw, routed)
    total = sum_slots(xp, values, routed)
    divisor = denominator(xp, total, config)
    inner = sum_slots(xp, (values / divisor) * dw, routed)
    eps = dw.dtype.type(config.renormalize_eps)
    if config.renormalize == "sum":
        return (dw - inner) / divisor, inner * (eps / divisor)
    clamped = total < eps
    return xp.where(clamped, dw, dw - inner) / divisor, xp.where(clamped, inner, dw.dtype.type(0))


def eps_vanishes(xp: Any, z: Array, chosen: Array, routed: Array, config: RouterConfig) -> Array:
    """Rows [T, 1] where softmax and renormalisation are a softmax over the chosen logits, found without E exponentials.

    With m the largest of the E logits the sum of the chosen scores is at least sum_j exp(z_j - m) / E.
    """
    largest = xp.max(z, axis=1, keepdims=True)
    least = sum_slots(xp, elementary.exp(xp, chosen - largest), routed) / z.dtype.type(config.num_experts)
    eps = z.dtype.type(config.renormalize_eps)
    return least + eps == least if config.renormalize == "sum" else least >= eps


def slots_backward(xp: Any, dw: Array, chosen: Array, idx: Array, config: RouterConfig) -> Array:
    """Backward of a softmax over the routed slots; experts that were not chosen get exactly 0."""
    routed = idx >= 0
    p = softmax_of_slots(xp, chosen, routed)
    dz = p * (dw - sum_slots(xp, p * dw, routed))
    return scatter_slots(xp, dz, idx, config.num_experts)


def balance_backward(xp: Any, z: Array, p: Array | None, config: RouterConfig, balance: BalanceTerms) -> Array:
    fractions, scale = balance.fractions[balance.sequence], balance.scales[balance.sequence][:, None]
    if config.score == "softmax":
        return p * (scale * (fractions - sum_experts(xp, p * fractions)))
    values, slopes = {"sigmoid": sigmoid, "sqrtsoftplus": sqrtsoftplus}[config.score](xp, z)
    total = sum_experts(xp, values) + z.dtype.type(BALANCE_EPS)
    inner = sum_experts(xp, (values / total) * fractions)
    return slopes * ((scale / total) * (fractions - inner))
