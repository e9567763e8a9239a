"""Losses and rules that keep experts evenly loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _backend, _check
from . import _gating_contract as contract
from ._array import gating_losses as array_losses
from ._check import Array
from .gating import Gating
from .router_config import RouterConfig


def balance_loss(
    logits: Any, gating: Gating, config: RouterConfig, *, scope: str = "batch", sequence_ids: Any = None,
    token_mask: Any = None, global_counts: Any = None, backend: str | None = None,
) -> float | Array:  # fmt: skip
    """Load balance: ``sum_e f_e * P_e``, 1 at perfect balance.

    ``f_e = E * count_e / (k * T)`` over the ids in ``gating``, ``P_e`` the mean over tokens of the softmax score, or of
    ``s_e / (sum s + 1e-20)`` for the other scores. T counts real tokens, routed or not.

    Parameters
    ----------
    logits : [num_tokens, num_experts]
    gating : Gating
        Its ``topk_idx`` is all that is read.
    config : RouterConfig
    scope : {"batch", "sequence", "global"}
        One loss over all tokens; the mean over sequences of each sequence's loss; or this device's share of the loss
        over all devices.
    sequence_ids : integer [num_tokens]
        With ``"sequence"``: tokens with equal values form a sequence. Any values, in any order.
    token_mask : bool [num_tokens], optional
        False: padding, which counts nowhere.
    global_counts : (integer [num_experts], int)
        With ``"global"``: ``tokens_per_expert`` and the number of real tokens, each summed over all devices. The values
        and the gradients of all devices then *add up* to those of the whole batch, however it is split; where a
        framework averages gradients over devices, multiply the coefficient by their number.
    backend : {None, "numpy", "cupy", "cpu", "cuda"}

    Returns
    -------
    float
        0.0 without real tokens. The same value on every backend; ``cuda``, which waits for nothing, gives it as a
        float64 array of no dimensions on the GPU. The gradient is part of :func:`topk_gating_backward`.

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype, shape or id, before any work.

    Notes
    -----
    Switch Transformer, arXiv:2101.03961, divided by k; sequence scope: DeepSeek-V3, arXiv:2412.19437.
    """
    function = "balance_loss"
    router = contract.router(function, config)
    z = contract.logits_array(function, logits, router.num_experts)
    if not isinstance(gating, Gating):
        raise _check.type_error(function, "gating", "a Gating", _check.describe(gating))
    ids = contract.expert_ids(function, "gating.topk_idx", gating.topk_idx, z.shape[0], router)
    mask = contract.mask_array(function, token_mask, z.shape[0])
    _check.one_of(function, "scope", scope, contract.SCOPES)
    sequence = contract.sequences(function, scope, sequence_ids, z.shape[0])
    reduced = contract.reduced_counts(function, scope, global_counts, z.shape[1], mask, z.shape[0])
    chosen = _backend.choose(function, backend, z, ids, mask, sequence, reduced and reduced[0])

    xp = _backend.array_module(z)
    parts: dict[str, Any] = {"token_mask": mask, "sequence_ids": sequence, "global_counts": reduced}
    if chosen == "cuda":
        from ._device import gating as device

        loads = device.balance_terms(ids, router.num_experts, contract.weight_dtype(z), **parts)
        return device.balance_loss(z, router.score, loads, mask)
    balance = array_losses.balance_terms(xp, ids, router.num_experts, contract.weight_dtype(z), **parts)
    match chosen:
        case "cpu":
            terms = _backend.empty(z.shape[:1], np.float64)
            arrays = balance.fractions, balance.scales, balance.sequence
            _backend.core.gating_loss_terms(router.score, z, _check.DTYPE_NAMES[z.dtype], *arrays, terms)
        case _:
            terms = array_losses.balance_loss_terms(xp, z, router, balance)
    return array_losses.sum_tokens(xp, terms * balance.weights[balance.sequence], mask)


def z_loss(logits: Any, *, token_mask: Any = None, backend: str | None = None) -> float | Array:
    """Mean over tokens of ``logsumexp(logits) ** 2``, which keeps logits small.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [num_tokens, num_experts]
    token_mask : bool [num_tokens], optional
        False: padding, which does not count.
    backend : {None, "numpy", "cupy", "cpu", "cuda"}

    Returns
    -------
    float
        0.0 without real tokens. The same value on every backend; ``cuda``, which waits for nothing, gives it as a
        float64 array of no dimensions on the GPU. The gradient is part of :func:`topk_gating_backward`.

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype or shape, before any work.

    Notes
    -----
    ST-MoE, arXiv:2202.08906.
    """
    z = contract.logits_array("z_loss", logits, None)
    mask = contract.mask_array("z_loss", token_mask, z.shape[0])
    chosen = _backend.choose("z_loss", backend, z, mask)
    xp = _backend.array_module(z)
    match chosen:
        case "cuda":
            from ._device import gating as device

            return device.z_loss(z, mask)
        case "cpu":
            terms = _backend.empty(z.shape[:1], np.float64)
            _backend.core.gating_loss_terms("softmax", z, _check.DTYPE_NAMES[z.dtype], None, None, None, terms)
        case _:
            terms = array_losses.z_loss_terms(xp, z)
    num_real = z.shape[0] if mask is None else int(mask.sum())
    return array_losses.sum_tokens(xp, terms, mask) / max(1, num_real)


def update_bias(bias: Any, tokens_per_expert: Any, rate: float = 1e-3, *, backend: str | None = None) -> Array:
    """The selection bias after a step: experts below the mean load gain ``rate``, those above lose it.

    ``bias + rate * sign(mean(tokens_per_expert) - tokens_per_expert)``; the comparison is exact, sign(0) = 0.

    Parameters
    ----------
    bias : float32 or float64 [num_experts]
    tokens_per_expert : integer [num_experts]
        Loads since the last optimiser step, summed over all devices. Not twice for a recomputed forward.
    rate : float, at least 0
    backend : {None, "numpy", "cupy", "cpu", "cuda"}
        All of them but ``cuda`` run the same few array operations.

    Returns
    -------
    bias : [num_experts], a new array of the same type

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype or shape, before any work.

    Notes
    -----
    Balancing without an auxiliary loss, arXiv:2408.15664.
    """
    function = "update_bias"
    b = _backend.as_array(function, "bias", bias, ("float32", "float64"), (("num_experts", None),))
    counts = contract.loads(function, "tokens_per_expert", tokens_per_expert, b.shape[0])
    rate = _check.real(function, "rate", rate, minimum=0.0)
    if _backend.choose(function, backend, b, counts) == "cuda":
        from ._device import gating as device

        return device.update_bias(b, counts, rate)
    step = b.dtype.type(rate)
    xp = _backend.array_module(b)
    return b + step * xp.sign(counts.sum() - b.shape[0] * counts).astype(b.dtype)
