"""Top-k gating: which experts serve a token, and with which weights; forward, backward and replay."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _backend, _check
from . import _gating_contract as contract
from ._array import gating as array_gating
from ._array import gating_backward as array_backward
from ._array import gating_losses as array_losses
from ._check import Array
from .router_config import RouterConfig

_INT32 = _check.DTYPES["int32"]


class Gating(NamedTuple):
    """What a router decided; unpacks as ``topk_idx, topk_weights, tokens_per_expert``.

    Attributes
    ----------
    topk_idx : int32 [num_tokens, top_k]
        Expert ids, best first, distinct; -1 where the token is not routed. C-contiguous.
    topk_weights : float32 [num_tokens, top_k], float64 for float64 logits
        Weight of each chosen expert; exactly 0 where the id is -1.
    tokens_per_expert : int32 [num_experts]
        How many slots name each expert.
    """

    topk_idx: Array
    topk_weights: Array
    tokens_per_expert: Array


def topk_gating(
    logits: Any, config: RouterConfig, *, bias: Any = None, topk_idx: Any = None, token_mask: Any = None,
    backend: str | None = None,
) -> Gating:  # fmt: skip
    """Choose ``top_k`` experts for every token and weigh them.

    The scores are ``config.score(logits)`` in float32 (float64 for float64 logits). Without a bias the best *logits*
    win, since scores tie where they saturate; with a bias the best ``score + bias`` win and the weights are still the
    scores. With groups, a group is ranked by its largest scores (with a bias: ``score + bias``), and experts of groups
    that are not kept are never chosen. Equal keys: the lower id. NaN ranks below -inf.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [num_tokens, num_experts]
    config : RouterConfig
    bias : float32 [num_experts], optional
        Selection bias (float64 with float64 logits). It chooses and never weighs.
    topk_idx : integer [num_tokens, top_k], optional
        Replay: compute the weights of these ids instead of choosing; ``bias`` is then not used. -1 is not routed;
        an expert may come twice. For activation recompute, reinforcement learning and hash-routed layers.
    token_mask : bool [num_tokens], optional
        True for real tokens. The others get ids -1 and weights 0.
    backend : {None, "numpy", "cupy", "cpu", "cuda"}

    Returns
    -------
    Gating
        The same bytes on every backend, instruction set and thread count; a row depends on its own logits only.

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype, shape or id, before any work.

    Notes
    -----
    Reads the logits once and writes ``8 * top_k`` bytes a token. A row with a NaN logit has NaN softmax weights and
    valid ids. ``top_k = 1`` with renormalisation gives weight 1 and gradient 0: such a router learns from its losses
    alone. Group-limited choice: DeepSeek-V2, arXiv:2405.04434; bias: arXiv:2408.15664.

    Examples
    --------
    >>> config = pyroute.RouterConfig(4, 2, renormalize="sum")
    >>> gating = pyroute.topk_gating(np.array([[0.0, 2.0, 1.0, 2.0]], np.float32), config)
    >>> gating.topk_idx.tolist(), gating.topk_weights.tolist()
    ([[1, 3]], [[0.5, 0.5]])
    """
    function = "topk_gating"
    router = contract.router(function, config)
    z = contract.logits_array(function, logits, router.num_experts)
    b = contract.bias_array(function, bias, z)
    mask = contract.mask_array(function, token_mask, z.shape[0])
    ids = None if topk_idx is None else contract.expert_ids(function, "topk_idx", topk_idx, z.shape[0], router)
    match _backend.choose(function, backend, z, b, ids, mask):
        case "cpu":
            shape = (z.shape[0], router.top_k)
            idx, counts = _backend.empty(shape, _INT32), _backend.empty((router.num_experts,), _INT32)
            weights = _backend.empty(shape, _check.DTYPES[contract.weight_dtype(z)])
            fields = contract.core_router(router)
            _backend.core.topk_gating(fields, z, _check.DTYPE_NAMES[z.dtype], b, ids, mask, idx, weights, counts)
            return tuple.__new__(Gating, (idx, weights, counts))  # a NamedTuple's own constructor takes 0.1 us more
        case "cuda":
            from ._device import gating as device

            return Gating(*device.topk_gating(z, router, b, ids, mask))
        case _:
            xp = _backend.array_module(z)
            return Gating(*array_gating.topk_gating(xp, z, router, b, ids, mask))


def topk_gating_backward(
    grad_topk_weights: Any, logits: Any, gating: Gating, config: RouterConfig, *, bias: Any = None,
    balance_loss_coef: float = 0.0, balance_loss_scope: str = "batch", z_loss_coef: float = 0.0,
    token_mask: Any = None, sequence_ids: Any = None, global_counts: Any = None, loss_scale: Any = None,
    backend: str | None = None,
) -> Array:  # fmt: skip
    """Gradient of the logits, from the weights and both auxiliary losses together.

    ``d/d logits (<grad_topk_weights, topk_weights> + balance_loss_coef * balance_loss + z_loss_coef * z_loss)`` with
    the ids, the groups and the load fractions as constants.

    Parameters
    ----------
    grad_topk_weights : float32 [num_tokens, top_k]
        Gradient of ``gating.topk_weights``, in its type (float64 for float64 logits).
    logits : [num_tokens, num_experts]
        As given to :func:`topk_gating`.
    gating : Gating
        Its ``topk_idx`` is all that is read; replayed ids are as good as chosen ones.
    config : RouterConfig
    bias : float32 [num_experts], optional
        Checked and not used: a bias only chooses, so it has no gradient and no influence here.
    balance_loss_coef, z_loss_coef : float
        0 leaves a loss out.
    balance_loss_scope, sequence_ids, global_counts
        As in :func:`balance_loss`.
    token_mask : bool [num_tokens], optional
        False: gradient exactly 0, and the token counts in neither loss.
    loss_scale : float64 [], optional
        Multiplies both coefficients; on a GPU it is read there, so that nothing waits for a gradient scaler.
    backend : {None, "numpy", "cupy", "cpu", "cuda"}

    Returns
    -------
    grad_logits : float32 [num_tokens, num_experts], float64 for float64 logits
        The same bytes on every backend. Slots with id -1 contribute nothing.

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype, shape or id, before any work.

    Notes
    -----
    Scores are computed again from the logits, which costs less than keeping them. Softmax with renormalisation needs
    no exponential of the experts that were not chosen, unless the eps weighs in the sum.
    """
    function = "topk_gating_backward"
    router = contract.router(function, config)
    z = contract.logits_array(function, logits, router.num_experts)
    if not isinstance(gating, Gating):
        raise _check.type_error(function, "gating", "a Gating", _check.describe(gating))
    ids = contract.expert_ids(function, "gating.topk_idx", gating.topk_idx, z.shape[0], router)
    axes = (("num_tokens", z.shape[0]), ("top_k", router.top_k))
    grad = _backend.as_array(function, "grad_topk_weights", grad_topk_weights, (contract.weight_dtype(z),), axes)
    contract.bias_array(function, bias, z)
    mask = contract.mask_array(function, token_mask, z.shape[0])
    balance_coef = _check.real(function, "balance_loss_coef", balance_loss_coef)
    z_coef = _check.real(function, "z_loss_coef", z_loss_coef)
    _check.one_of(function, "balance_loss_scope", balance_loss_scope, contract.SCOPES)
    sequence = contract.sequences(function, balance_loss_scope, sequence_ids, z.shape[0])
    reduced = contract.reduced_counts(function, balance_loss_scope, global_counts, z.shape[1], mask, z.shape[0])
    scale = None if loss_scale is None else _backend.as_array(function, "loss_scale", loss_scale, ("float64",), ())
    chosen = _backend.choose(function, backend, z, ids, grad, mask, sequence, reduced and reduced[0], scale)
    if scale is not None and chosen != "cuda":
        balance_coef, z_coef = balance_coef * float(scale), z_coef * float(scale)

    xp = _backend.array_module(z)
    terms: dict[str, Any] = {"coef": balance_coef, "token_mask": mask, "sequence_ids": sequence}
    terms["global_counts"] = reduced
    if chosen == "cuda":
        from ._device import gating as device

        terms["loss_scale"] = scale
        loads = device.balance_terms(ids, router.num_experts, grad.dtype, **terms) if balance_coef else None
        return device.topk_gating_backward(grad, z, ids, router, mask, loads, z_coef, scale)
    balance = array_losses.balance_terms(xp, ids, router.num_experts, grad.dtype, **terms) if balance_coef else None
    num_real = z.shape[0] if mask is None else int(mask.sum())
    z_scale = 2.0 * z_coef / max(1, num_real)
    match chosen:
        case "cpu":
            out = _backend.empty(z.shape, grad.dtype)
            fractions, _, scales, of_token = balance or (None, None, None, None)
            fields = contract.core_router(router)
            _backend.core.topk_gating_backward(
                fields, grad, z, _check.DTYPE_NAMES[z.dtype], ids, mask, fractions, scales, of_token, z_scale, out
            )
            return out
        case _:
            return array_backward.topk_gating_backward(xp, grad, z, ids, router, mask, balance, z_scale)
