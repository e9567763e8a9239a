"""The gating room for tensors: topk_gating and both losses, with their gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _gating_contract as contract
from .. import gating as core
from .. import gating_losses as core_losses
from ..gating import Gating
from ..router_config import RouterConfig
from ._library import constant, define, goes_direct
from ._tensors import array, check_tensors, ids_array, optional_array, tensor


def topk_gating(
    logits: Tensor, config: RouterConfig, *, bias: Tensor | None = None, topk_idx: Tensor | None = None,
    token_mask: Tensor | None = None, balance_loss_coef: float = 0.0, z_loss_coef: float = 0.0,
    sequence_ids: Tensor | None = None, aux_loss_scale: Tensor | None = None,
) -> Gating:  # fmt: skip
    """:func:`pyroute.topk_gating` on tensors, with its gradient.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [num_tokens, num_experts]
    config : RouterConfig
    bias, topk_idx, token_mask
        As in the core. A bias gets no gradient. Given ``topk_idx`` are replayed, and the gradient is for them.
    balance_loss_coef, z_loss_coef : float
        Where a gradient of ``topk_weights`` arrives, the gradients of ``coef * balance_loss`` and ``coef * z_loss``
        join it, as if both had been added to the model's loss. The values: :func:`balance_loss`, :func:`z_loss`.
    sequence_ids : integer [num_tokens], optional
        With it the balance loss is the mean of each sequence's loss.
    aux_loss_scale : float32 [], optional
        Multiplies both coefficients: the loss scale of mixed precision, or 1 / number of micro-batches.

    Returns
    -------
    Gating
        ``topk_idx`` int32, ``topk_weights`` float32 (float64 for float64 logits), ``tokens_per_expert`` int32: the
        bytes of the core.
    """
    given = (bias, topk_idx, token_mask, sequence_ids, aux_loss_scale)
    if goes_direct(logits, *given):
        router = contract.router("topk_gating", config)
        return _in_order(*_gating(logits, router, bias, topk_idx, token_mask))
    check_tensors("topk_gating", "logits", logits=logits, bias=bias, topk_idx=topk_idx, token_mask=token_mask)
    return _in_order(*_topk_gating(
        logits, config_text("topk_gating", config), bias, topk_idx, token_mask, sequence_ids, aux_loss_scale,
        balance_loss_coef, z_loss_coef,
    ))  # fmt: skip


def topk_gating_by_text(logits: Tensor, config: str, bias: Tensor | None, topk_idx: Tensor | None) -> Gating:
    """:func:`topk_gating` without losses by ``str(config)``, for code under a compiler that makes its own config."""
    if goes_direct(logits, bias, topk_idx):
        return _in_order(*_gating(logits, RouterConfig.from_string(config), bias, topk_idx, None))
    check_tensors("topk_gating", "logits", logits=logits, bias=bias, topk_idx=topk_idx)
    return _in_order(*_topk_gating(logits, config, bias, topk_idx, None, None, None, 0.0, 0.0))


def _in_order(weights: Tensor, idx: Tensor, counts: Tensor) -> Gating:
    """The op gives the differentiable result first, since opcheck sums the results in the type of the first."""
    return Gating(idx, weights, counts)


def balance_loss(
    logits: Tensor, gating: Gating, config: RouterConfig, *, token_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`pyroute.balance_loss` as a tensor with a gradient: float64 []."""
    text = config_text("balance_loss", config)
    return _router_loss(logits, gating.topk_idx, text, token_mask, sequence_ids, 1.0, 0.0)


def z_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """:func:`pyroute.z_loss` as a tensor with a gradient: float64 []."""
    text = f"num_experts={logits.shape[-1]},top_k=1"
    ids = torch.full((logits.shape[0], 1), -1, dtype=torch.int32, device=logits.device)
    return _router_loss(logits, ids, text, token_mask, None, 0.0, 1.0)


@constant
def config_text(function: str, config: RouterConfig) -> str:
    """The config as an op carries it. A compiler keeps the text and guards on the config it was made of."""
    return _text(contract.router(function, config))


_text = functools.lru_cache(maxsize=256)(str)
torch.utils._pytree.register_constant(RouterConfig)


# --- topk_gating ------------------------------------------------------------------------------------------------------


def _gating(
    logits: Tensor, router: RouterConfig, bias: Tensor | None, topk_idx: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    function = "topk_gating"
    idx, weights, counts = core.topk_gating(
        array(function, "logits", logits),
        router,
        bias=optional_array(function, "bias", bias),
        topk_idx=None if topk_idx is None else ids_array(function, "topk_idx", topk_idx),
        token_mask=optional_array(function, "token_mask", token_mask),
    )
    return tensor(weights), tensor(idx), tensor(counts)


def _gating_kernel(
    logits: Tensor, config: str, bias: Tensor | None, topk_idx: Tensor | None, token_mask: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gating(logits, RouterConfig.from_string(config), bias, topk_idx, token_mask)


def _gating_fake(
    logits: Tensor, config: str, bias: Tensor | None, topk_idx: Tensor | None, token_mask: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors("topk_gating", "logits", logits=logits, bias=bias, topk_idx=topk_idx, token_mask=token_mask)
    router = RouterConfig.from_string(config)
    idx = logits.new_empty((logits.shape[0], router.top_k), dtype=torch.int32)
    return torch.empty_like(idx, dtype=_wide(logits)), idx, idx.new_empty(router.num_experts)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _gating_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.config, _, _, token_mask, sequence_ids, scale, ctx.balance_coef, ctx.z_coef = inputs
    ctx.save_for_backward(logits, output[1], token_mask, sequence_ids, scale)


def _gating_grad(ctx: Any, grad_weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, topk_idx, token_mask, sequence_ids, scale = ctx.saved_tensors
    grad = _topk_gating_backward(
        grad_weights, logits, topk_idx, ctx.config, token_mask, sequence_ids, scale, ctx.balance_coef, ctx.z_coef
    )
    return (grad.to(logits.dtype), *(None,) * 8)


def _gating_backward_kernel(
    grad_weights: Tensor, logits: Tensor, topk_idx: Tensor, config: str, token_mask: Tensor | None,
    sequence_ids: Tensor | None, scale: Tensor | None, balance_coef: float, z_coef: float,
) -> Tensor:  # fmt: skip
    function = "topk_gating_backward"
    loss_scale = None if scale is None else scale.to(torch.float64)
    ids = ids_array(function, "topk_idx", topk_idx)
    grad = core.topk_gating_backward(
        array(function, "grad_topk_weights", grad_weights),
        array(function, "logits", logits),
        Gating(ids, None, None),
        RouterConfig.from_string(config),
        balance_loss_coef=balance_coef,
        balance_loss_scope="batch" if sequence_ids is None else "sequence",
        z_loss_coef=z_coef,
        token_mask=optional_array(function, "token_mask", token_mask),
        sequence_ids=optional_array(function, "sequence_ids", sequence_ids),
        loss_scale=optional_array(function, "aux_loss_scale", loss_scale),
    )
    return tensor(grad)


def _gating_backward_fake(grad_weights: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=_wide(logits))


_topk_gating_backward = define(
    "topk_gating_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_idx, str config, Tensor? token_mask, "
    "Tensor? sequence_ids, Tensor? aux_loss_scale, float balance_loss_coef, float z_loss_coef) -> Tensor",
    _gating_backward_kernel,
    _gating_backward_fake,
)
_topk_gating = define(
    "topk_gating(Tensor logits, str config, Tensor? bias, Tensor? topk_idx, Tensor? token_mask, "
    "Tensor? sequence_ids, Tensor? aux_loss_scale, float balance_loss_coef, float z_loss_coef) "
    "-> (Tensor topk_weights, Tensor topk_idx, Tensor tokens_per_expert)",
    _gating_kernel,
    _gating_fake,
    backward=_gating_grad,
    save=_gating_save,
)

# For torch.utils.checkpoint.create_selective_checkpoint_contexts: recompute takes the first time's ids and weights.
OPS_TO_SAVE = [torch.ops.pyroute.topk_gating.default]


# --- losses -----------------------------------------------------------------------------------------------------------


def _loss_kernel(
    logits: Tensor, topk_idx: Tensor, config: str, token_mask: Tensor | None, sequence_ids: Tensor | None,
    balance_coef: float, z_coef: float,
) -> Tensor:  # fmt: skip
    function = "balance_loss" if balance_coef else "z_loss"
    z = array(function, "logits", logits)
    mask = optional_array(function, "token_mask", token_mask)
    value: Any = 0.0
    if balance_coef:
        value += balance_coef * _number(core_losses.balance_loss(
            z,
            Gating(ids_array(function, "topk_idx", topk_idx), None, None),
            RouterConfig.from_string(config),
            scope="batch" if sequence_ids is None else "sequence",
            sequence_ids=optional_array(function, "sequence_ids", sequence_ids),
            token_mask=mask,
        ))  # fmt: skip
    if z_coef:
        value += z_coef * _number(core_losses.z_loss(z, token_mask=mask))
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _number(value: Any) -> Any:
    """A loss: a float on the CPU, on a GPU a tensor of one, which nobody waits for."""
    return value if isinstance(value, float) else tensor(value)


def _loss_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=torch.float64)


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, topk_idx, ctx.config, token_mask, sequence_ids, ctx.balance_coef, ctx.z_coef = inputs
    ctx.save_for_backward(logits, topk_idx, token_mask, sequence_ids)


def _loss_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, topk_idx, token_mask, sequence_ids = ctx.saved_tensors
    none = torch.zeros_like(topk_idx, dtype=_wide(logits))
    grad_logits = _topk_gating_backward(
        none, logits, topk_idx, ctx.config, token_mask, sequence_ids, grad, ctx.balance_coef, ctx.z_coef
    )
    return (grad_logits.to(logits.dtype), *(None,) * 6)


_router_loss = define(
    "router_loss(Tensor logits, Tensor topk_idx, str config, Tensor? token_mask, Tensor? sequence_ids, "
    "float balance_loss_coef, float z_loss_coef) -> Tensor",
    _loss_kernel,
    _loss_fake,
    backward=_loss_grad,
    save=_loss_save,
)
