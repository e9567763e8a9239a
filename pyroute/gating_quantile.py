"""Quantile balancing: the selection bias with which every expert would have taken its share of the tokens seen."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _backend, _check
from . import _gating_contract as contract
from ._array import gating_quantile as array_quantile
from ._array.gating_scores import scores, to_scalar
from ._check import Array
from .gating import topk_gating
from .router_config import RouterConfig


def quantile_bias(
    logits: Any, config: RouterConfig, bias: Any, *, token_mask: Any = None, backend: str | None = None
) -> Array:
    """The selection bias that gives every expert its share of these tokens, as far as one step can tell.

    A token's cutoff is its largest ``score + bias`` that was not chosen. Were the cutoffs to stay, each expert's new
    bias is the largest with which at most ``floor(tokens * top_k / num_experts)`` tokens would choose it. No rate has
    to be tuned; a few steps over the same tokens balance them.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [num_tokens, num_experts]
    config : RouterConfig
        Without groups, ``top_k`` below ``num_experts``.
    bias : float32 [num_experts], float64 for float64 logits
        The bias that chose these tokens' experts; finite.
    token_mask : bool [num_tokens], optional
        False: padding, which does not count. Nor does a token with a score that is NaN or infinite.
    backend : {None, "numpy", "cupy", "cpu", "cuda"}
        ``cpu`` computes the scores, the rest is array code; on a GPU it takes CuPy's arrays and waits for the device.

    Returns
    -------
    bias : [num_experts], a new array of the same type
        Its mean is 0 up to rounding, since only differences choose. As given where no token counts. The same bytes on
        every backend.

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype, shape or router, before any work.

    Notes
    -----
    One step of coordinate descent on the dual of the balanced assignment. Megatron-Core's ``qb_dual_update`` has it
    for routers that rank logits, with the opposite sign. It sees one batch: use :func:`bias_histogram` for the batch of
    all devices and micro-batches. 4096 tokens of 256 experts take 17 ms on one core of Zen 4, where the gate takes
    1.1 ms: two partitions of all keys.
    """
    function = "quantile_bias"
    needed, b = _needed_bias(function, logits, config, bias, token_mask, backend)
    if needed.shape[0] == 0:
        return b.copy()
    xp = _backend.array_module(needed)
    return array_quantile.centred(xp, array_quantile.quantile(xp, needed, config.top_k), b.dtype)


def bias_histogram(
    logits: Any, config: RouterConfig, bias: Any, bounds: tuple[float, float], num_bins: int = 1000, *,
    token_mask: Any = None, backend: str | None = None,
) -> Array:  # fmt: skip
    """How many tokens need which bias of every expert: add these up over micro-batches and devices.

    Parameters
    ----------
    logits, config, bias, token_mask, backend
        As in :func:`quantile_bias`.
    bounds : (float, float)
        Of the bins, which are equally wide; what lies outside counts in the first or the last. Scores of 0 to 1 need
        ``(bias.min() - 1, bias.max() + 1)``.
    num_bins : int

    Returns
    -------
    int64 [num_experts, num_bins]
        Every row adds up to the number of tokens that count.

    Notes
    -----
    Technical report of Kimi K3, section 2.3.3 and appendix D; TransformerEngine's ``qb_histogram`` has the same counts.
    """
    function = "bias_histogram"
    limits = _bounds(function, bounds)
    bins = _check.integer(function, "num_bins", num_bins, 1, 2**20)
    needed, _ = _needed_bias(function, logits, config, bias, token_mask, backend)
    return array_quantile.histogram(_backend.array_module(needed), needed, limits, bins)


def bias_from_histogram(histogram: Any, bounds: tuple[float, float], top_k: int) -> Array:
    """The bias of :func:`quantile_bias`, from counts instead of tokens: before centring at most one bin off.

    Parameters
    ----------
    histogram : integer [num_experts, num_bins]
        Sums of :func:`bias_histogram`; at least one token.
    bounds : (float, float)
        As given there.
    top_k : int
        Of the router, below num_experts.

    Returns
    -------
    bias : float32 [num_experts]
        Of mean 0 up to rounding. Values are taken to lie evenly in their bin.
    """
    function = "bias_from_histogram"
    limits = _bounds(function, bounds)
    axes = (("num_experts", None), ("num_bins", None))
    counts = _host_or_cupy(
        function, "histogram", _backend.as_array(function, "histogram", histogram, _check.INTEGERS, axes)
    )
    num_experts, num_bins = counts.shape
    if num_experts < 2 or num_bins < 1:
        raise _check.value_error(function, "histogram", "of two experts and one bin at least", list(counts.shape))
    k = _check.integer(function, "top_k", top_k, 1, num_experts - 1, "num_experts - 1")
    xp = _backend.array_module(counts)
    counts = counts.astype(xp.int64)
    if counts.min() < 0 or counts.sum(axis=1).min() < 1:
        raise _check.value_error(function, "histogram", "counts of at least one token for every expert",
                                 f"{counts.min()} as the smallest, {counts.sum(axis=1).min()} tokens")  # fmt: skip
    return array_quantile.centred(xp, array_quantile.histogram_quantile(xp, counts, limits, k), np.float32)


def _needed_bias(
    function: str, logits: Any, config: Any, bias: Any, token_mask: Any, backend: str | None
) -> tuple[Array, Array]:
    router = contract.router(function, config)
    z = contract.logits_array(function, logits, router.num_experts)
    if router.num_groups > 1 or router.top_k == router.num_experts:
        what = f"{router.top_k} of {router.num_experts} experts in {router.num_groups} groups"
        raise _check.value_error(function, "config", "a router without groups that leaves an expert out", what)
    axes = (("num_experts", z.shape[1]),)
    b = _backend.as_array(function, "bias", bias, (contract.weight_dtype(z),), axes)
    mask = contract.mask_array(function, token_mask, z.shape[0])
    chosen = _backend.choose(function, backend, z, b, mask)
    _host_or_cupy(function, "logits", z)
    xp = _backend.array_module(z)
    if not xp.isfinite(b).all():
        raise _check.value_error(function, "bias", "finite", "NaN or infinity")
    with np.errstate(all="ignore"):
        s = _core_scores(z, router) if chosen == "cpu" else scores(xp, to_scalar(xp, z), router.score)
        return array_quantile.needed_bias(xp, s, b, router.top_k, mask), b


def _core_scores(z: Array, config: RouterConfig) -> Array:
    """A gate that is given all ids and chooses nothing."""
    every = np.broadcast_to(np.arange(z.shape[1], dtype=np.int32), z.shape)
    dense = RouterConfig(z.shape[1], z.shape[1], config.score)
    return topk_gating(z, dense, topk_idx=every, backend="cpu").topk_weights


def _host_or_cupy(function: str, argument: str, x: Array) -> Array:
    if _check.is_device_array(x):
        raise _check.type_error(function, argument, "a NumPy or CuPy array", _check.describe(x))
    return x


def _bounds(function: str, bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise _check.type_error(function, "bounds", "a pair of numbers", _check.describe(bounds))
    lower, upper = (_check.real(function, f"bounds[{i}]", bound) for i, bound in enumerate(bounds))
    if not np.float32(lower) < np.float32(upper):
        raise _check.value_error(function, "bounds", "a lower number and a higher one in float32", [lower, upper])
    return lower, upper
