"""TransformerEngine's functions of routing and permutation, by their names and signatures, on CPU tensors.

    from pyroute.integrations.transformer_engine import fused_topk_with_score_function, moe_permute

They need no TransformerEngine: results, dense maps and gradients are its, the kernels pyroute's. :func:`install` puts
them into an installed TransformerEngine for tensors on the CPU, which it refuses; its own functions keep the others.
Permutation is in :mod:`.transformer_engine_permutation`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..gating_quantile import bias_histogram
from ..router_config import RouterConfig, Score
from ._stack import Bindings, gate, rule_text, warn_if_untested, where_on_cpu
from .transformer_engine_permutation import (
    moe_permute,
    moe_permute_and_pad_with_probs,
    moe_permute_with_probs,
    moe_sort_chunks_by_index,
    moe_sort_chunks_by_index_with_probs,
    moe_unpermute,
)

__all__ = [
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
    "fused_topk_with_score_function",
    "install",
    "moe_permute",
    "moe_permute_and_pad_with_probs",
    "moe_permute_with_probs",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
    "moe_unpermute",
    "uninstall",
]

TESTED = ("2.20",)  # signatures and formulas; its kernels run on CUDA only

_bindings = Bindings()


def install() -> None:
    """Let TransformerEngine's functions take CPU tensors; a second call changes nothing.

    Raises
    ------
    ImportError
        If TransformerEngine's PyTorch extension is not installed.
    """
    if _bindings:
        return
    package = importlib.import_module("transformer_engine.pytorch")
    version = importlib.import_module("transformer_engine").__version__
    warn_if_untested("transformer_engine", "TransformerEngine", version, TESTED)
    router = importlib.import_module("transformer_engine.pytorch.router")
    permutation = importlib.import_module("transformer_engine.pytorch.permutation")
    for function in FUNCTIONS:
        name = function.__name__
        theirs = next((vars(module)[name] for module in (router, permutation) if name in vars(module)), None)
        for module in (router, permutation, package):
            if theirs is not None and name in vars(module):
                _bindings.bind(module, name, where_on_cpu(function, theirs))


def uninstall() -> None:
    """Give TransformerEngine its functions back."""
    _bindings.restore()


def fused_topk_with_score_function(
    logits: Tensor, topk: int, use_pre_softmax: bool, num_groups: int | None, group_topk: int | None,
    scaling_factor: float | None, score_function: str, expert_bias: Tensor | None,
    routing_map_format: Any = "bytemap", topk_indices: Tensor | None = None, qb_histogram: Tensor | None = None,
    qb_bin_bounds: Tensor | None = None, qb_histogram_mode: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose ``topk`` experts of every token, as dense maps.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [..., num_experts]
        Computed in float32 (float64 in float64, which TransformerEngine refuses).
    use_pre_softmax : bool
        For "softmax": over all experts before the choice, or over the chosen ones after it. No renormalisation.
    num_groups, group_topk : int, optional
        A group is ranked by the sum of its ``topk // group_topk`` largest keys, whatever the score.
    scaling_factor : float, optional
        None and 0 are 1.
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}
        The weights of the last two are divided by their sum + 1e-20, unless topk is 1.
    expert_bias : [num_experts], optional
        It chooses and does not weigh; with "softmax" it is ignored.
    routing_map_format : {"bytemap", "bitmap_u8"} or its number
    topk_indices : integer [num_tokens, topk], optional
        Receives the ids, and is returned in place of the routing map.
    qb_histogram : int32 [num_experts, num_bins], optional
        Quantile balancing, with "sigmoid", a bias and no groups; :func:`pyroute.bias_histogram`'s counts are added.
    qb_bin_bounds : float32 [2]
        Lowest and highest bound of the bins.
    qb_histogram_mode : {"two_kernel", "fused_atomic"}
        Two ways of TransformerEngine's to the same counts.

    Returns
    -------
    probs : of logits' dtype and shape, 0 where not routed
    routing_map : bool [..., num_experts], or uint8 [..., ceil(num_experts / 8)], lowest bit first

    Notes
    -----
    Ties go to the lower expert id and NaN ranks last, as everywhere in pyroute.
    """
    function = "fused_topk_with_score_function"
    _check.one_of(function, "score_function", score_function, ("softmax", "sigmoid", "sqrtsoftplus"))
    map_format = _map_format(function, routing_map_format)
    z = logits.reshape(-1, logits.shape[-1])
    rule = _Rule(topk, score_function, use_pre_softmax, num_groups or 1, group_topk or 0, scaling_factor or 1.0)  # type: ignore[arg-type]
    if qb_histogram is not None or qb_bin_bounds is not None or qb_histogram_mode is not None:
        _check.one_of(function, "qb_histogram_mode", qb_histogram_mode, ("two_kernel", "fused_atomic"))
        _add_needed_biases(function, z, rule, expert_bias, qb_histogram, qb_bin_bounds)
    ids, weights = _choose(z, rule, expert_bias)
    probs = z.new_zeros(z.shape).scatter(1, ids, weights.to(z.dtype)).reshape(logits.shape)
    if topk_indices is not None:
        return probs, topk_indices.copy_(ids.reshape(topk_indices.shape))
    return probs, _routing_map(logits, ids, map_format)


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor, topk: int, score_function: str, routing_map_format: Any = "bytemap"
) -> tuple[Tensor, Tensor]:
    """What the balance loss is made of: a choice without bias and groups, and scores that sum to 1.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [..., num_experts]
    topk : int
    score_function : {"softmax", "sigmoid", "sqrtsoftplus"}
        The last two are divided by their sum + 1e-20.
    routing_map_format : {"bytemap", "bitmap_u8"} or its number

    Returns
    -------
    routing_map : bool or uint8, as of :func:`fused_topk_with_score_function`
    scores : float32 (float64 for float64 logits), of logits' shape
    """
    function = "fused_compute_score_for_moe_aux_loss"
    _check.one_of(function, "score_function", score_function, ("softmax", "sigmoid", "sqrtsoftplus"))
    map_format = _map_format(function, routing_map_format)
    z = logits.reshape(-1, logits.shape[-1])
    score: Score = score_function  # type: ignore[assignment]
    ids = gate(z.detach(), (z.shape[1], topk, score)).topk_idx.long()
    scores = dense_scores(z, score, normalized=score != "softmax")
    return _routing_map(logits, ids, map_format), scores.reshape(logits.shape)


def fused_moe_aux_loss(
    probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: int | Tensor, num_experts: int, topk: int, coeff: float
) -> Tensor:
    """The balance loss ``coeff E / (k T^2) sum_e tokens_per_expert[e] sum_t probs[t, e]``: coeff at perfect balance.

    Parameters
    ----------
    probs : [num_tokens, columns]
        Columns are experts, or experts of several sequences side by side; summed in float32 (float64 in float64).
    tokens_per_expert : [columns]
    total_num_tokens : int or Tensor []
    num_experts, topk : int
    coeff : float

    Returns
    -------
    of probs' dtype []
    """
    wide = torch.float64 if probs.dtype == torch.float64 else torch.float32
    tokens = total_num_tokens.to(wide) if isinstance(total_num_tokens, Tensor) else float(total_num_tokens)
    loss = torch.dot(probs.sum(0, dtype=wide), tokens_per_expert.to(wide))
    return (loss * (num_experts * coeff) / (topk * tokens * tokens)).to(probs.dtype)


def dense_scores(logits: Tensor, score: Score, *, normalized: bool = False) -> Tensor:
    """The scores of every expert, float32 (float64): a gate that is given all ids and chooses nothing."""
    num_tokens, num_experts = logits.shape
    everyone = torch.arange(num_experts, dtype=torch.int32, device=logits.device).expand(num_tokens, num_experts)
    return gate(logits, (num_experts, num_experts, score), topk_idx=everyone, renormalize=normalized).topk_weights


class _Rule(NamedTuple):
    topk: int
    score: Score
    pre_softmax: bool
    num_groups: int
    group_topk: int
    scaling_factor: float


def _groups(rule: _Rule) -> dict[str, Any]:
    if not rule.group_topk:
        return {}
    return {"num_groups": rule.num_groups, "topk_groups": rule.group_topk, "group_score": "topn_sum"}


def _add_needed_biases(
    function: str, z: Tensor, rule: _Rule, bias: Tensor | None, histogram: Tensor | None, bounds: Tensor | None
) -> None:
    """Quantile balancing's counts, added to the caller's histogram."""
    if rule.score != "sigmoid" or bias is None or rule.group_topk:
        expected = "given with score_function 'sigmoid', an expert_bias and no groups"
        got = f"'{rule.score}', {'no' if bias is None else 'a'} bias, group_topk {rule.group_topk}"
        raise _check.value_error(function, "qb_histogram", expected, got)
    if histogram is None or histogram.dtype != torch.int32 or histogram.ndim != 2 or len(histogram) != z.shape[1]:
        expected = f"int32 [num_experts={z.shape[1]}, num_bins]"
        raise _check.type_error(function, "qb_histogram", expected, _check.describe(histogram))
    if bounds is None or bounds.shape != (2,):
        raise _check.type_error(function, "qb_bin_bounds", "float32 [2]", _check.describe(bounds))
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    logits, keys = (t.detach().to(wide).numpy() for t in (z, bias))
    config = RouterConfig(z.shape[1], rule.topk, "sigmoid")
    counts = bias_histogram(logits, config, keys, tuple(bounds.tolist()), histogram.shape[1])
    histogram += torch.from_numpy(counts).to(torch.int32)


def _choose(z: Tensor, rule: _Rule, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids int64 and weights [T, topk]."""
    num_experts = z.shape[1]
    if rule.score == "softmax" and not rule.pre_softmax:
        return _choose_then_softmax(z, rule)
    renormalize = rule.score != "softmax" and rule.topk > 1
    if rule.score == "softmax":
        bias = None
    elif bias is not None:
        bias = bias.detach().to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    gating = gate(
        z,
        (num_experts, rule.topk, rule.score),
        bias,
        renormalize=renormalize,
        scaling_factor=rule.scaling_factor,
        **_groups(rule),
    )
    return gating.topk_idx.long(), gating.topk_weights


def _choose_then_softmax(z: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
    """Groups are ranked by logits here, which RouterConfig has no rule for: the best ones' logits are laid side by side
    and gated without groups."""
    num_experts = z.shape[1]
    size, kept = num_experts, None
    if rule.group_topk:
        rule_text(num_experts, rule.topk, "softmax", **_groups(rule))  # checks the sizes
        size = num_experts // rule.num_groups
        keys = z.detach().to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        keys = keys.masked_fill(keys.isnan(), -torch.inf).unflatten(1, (rule.num_groups, size))
        best = keys.topk(rule.topk // rule.group_topk).values.sum(-1).sort(descending=True, stable=True).indices
        kept = best[:, : rule.group_topk].sort().values
        chosen = kept[:, :, None].expand(-1, -1, size)
        z = z.unflatten(1, (rule.num_groups, size)).gather(1, chosen).flatten(1)
    gating = gate(z, (z.shape[1], rule.topk, "softmax"), score_stage="post", scaling_factor=rule.scaling_factor)
    ids = gating.topk_idx.long()
    if kept is not None:
        ids = kept.gather(1, ids // size) * size + ids % size
    return ids, gating.topk_weights


def _map_format(function: str, given: Any) -> str:
    """The name, also for TransformerEngine's enum and its numbers."""
    names = ("bytemap", "bitmap_u8")
    name = given
    if not isinstance(given, str):
        number = int(given)
        name = names[number] if number in (0, 1) else given
    _check.one_of(function, "routing_map_format", name, names)
    return str(name)


def _routing_map(logits: Tensor, ids: Tensor, map_format: str) -> Tensor:
    num_experts = logits.shape[-1]
    dense = torch.zeros((ids.shape[0], num_experts), dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    if map_format == "bytemap":
        return dense.reshape(logits.shape)
    bits = torch.nn.functional.pad(dense, (0, -num_experts % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    packed = (bits << torch.arange(8, dtype=torch.uint8, device=ids.device)).sum(-1, dtype=torch.uint8)
    return packed.reshape(*logits.shape[:-1], -1)


FUNCTIONS: tuple[Callable[..., Any], ...] = (
    fused_topk_with_score_function,
    fused_compute_score_for_moe_aux_loss,
    fused_moe_aux_loss,
    moe_permute,
    moe_permute_with_probs,
    moe_permute_and_pad_with_probs,
    moe_unpermute,
    moe_sort_chunks_by_index,
    moe_sort_chunks_by_index_with_probs,
)
