"""TopKRouter: from hidden states to experts and weights, with the state that training needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _check
from .._gating_contract import router as check_config
from ..router_config import RouterConfig
from ._library import define
from .gating import config_text, topk_gating
from .router_logits import router_logits


class Routing(NamedTuple):
    """What a router decided for T tokens.

    Attributes
    ----------
    topk_idx : int32 [T, top_k], -1 where not routed
    topk_weights : float32 [T, top_k]
    tokens_per_expert : int32 [num_experts]
    logits : float32 [T, num_experts]
    """

    topk_idx: Tensor
    topk_weights: Tensor
    tokens_per_expert: Tensor
    logits: Tensor


class TopKRouter(nn.Module):
    """Any :class:`pyroute.RouterConfig` as a module.

    The product with ``weight`` and the scores are float32 whatever the model's type, and a token's experts do not
    depend on the rest of the batch. float64 inputs are routed in float64.

    Parameters
    ----------
    config : RouterConfig
    hidden_size : int
    bias : bool
        A bias of the logits, which is trained (gpt-oss).
    selection_bias : bool
        A bias that only chooses (DeepSeek-V3): the buffer ``e_score_correction_bias``, which gets no gradient and stays
        float32 through ``.to(torch.bfloat16)`` and ``.half()``; :meth:`update_bias` moves it.
    balance_loss_coef, z_loss_coef : float
        In training the gradients of both losses join the router's gradient; nothing has to be added to the loss.
    balance_loss_scope : {"batch", "sequence"}
        "sequence": the mean of each sequence's loss. Sequences are the rows of a three-axis input, or ``sequence_ids``.
    bias_update_rate : float
        Of :meth:`update_bias`.

    Attributes
    ----------
    tokens_per_expert : int64 [num_experts]
        Loads since the last :meth:`update_bias`, counted in training mode, and once where checkpointing runs a forward
        twice.
    aux_loss_scale : float32 []
        Multiplies both coefficients; see :func:`set_aux_loss_scale`.
    """

    def __init__(
        self, config: RouterConfig, hidden_size: int, *, bias: bool = False, selection_bias: bool = False,
        balance_loss_coef: float = 0.0, balance_loss_scope: str = "batch", z_loss_coef: float = 0.0,
        bias_update_rate: float = 1e-3, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = check_config("TopKRouter", config)
        self.hidden_size = _check.integer("TopKRouter", "hidden_size", hidden_size, 1)
        self.balance_loss_coef = _check.real("TopKRouter", "balance_loss_coef", balance_loss_coef)
        _check.one_of("TopKRouter", "balance_loss_scope", balance_loss_scope, ("batch", "sequence"))
        self.balance_loss_scope = balance_loss_scope
        self.z_loss_coef = _check.real("TopKRouter", "z_loss_coef", z_loss_coef)
        self.bias_update_rate = _check.real("TopKRouter", "bias_update_rate", bias_update_rate, minimum=0.0)
        num_experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        correction = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        scale = torch.ones((), device=device, dtype=torch.float32)
        self.register_buffer("aux_loss_scale", scale, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias as ``torch.nn.Linear`` starts them."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, *, topk_idx: Tensor | None = None, token_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """Route the tokens of ``x`` [..., hidden_size], in the order of ``x.flatten(0, -2)``.

        Parameters
        ----------
        topk_idx : integer [..., top_k], optional
            Use these experts and compute their weights: replay, or the table of a hash-routed layer.
        token_mask : bool [...], optional
            False: padding, which is not routed and counts in no loss.
        sequence_ids : integer [...], optional
        """
        top_k = self.config.top_k
        logits = self.logits(x.reshape(-1, x.shape[-1]))
        with_losses = self.training and bool(self.balance_loss_coef or self.z_loss_coef)
        if with_losses and self.balance_loss_scope == "sequence" and sequence_ids is None:
            sequence_ids = _sequences(x)
        bias = self.e_score_correction_bias
        gating = topk_gating(
            logits,
            self.config,
            bias=None if bias is None else bias.to(logits.dtype),
            topk_idx=None if topk_idx is None else topk_idx.reshape(-1, top_k),
            token_mask=None if token_mask is None else token_mask.reshape(-1),
            balance_loss_coef=self.balance_loss_coef if with_losses else 0.0,
            z_loss_coef=self.z_loss_coef if with_losses else 0.0,
            sequence_ids=sequence_ids.reshape(-1) if with_losses and sequence_ids is not None else None,
            aux_loss_scale=self.aux_loss_scale if with_losses else None,
        )
        if self.training:
            _count_load(self.tokens_per_expert, gating.tokens_per_expert)
        return Routing(*gating, logits)

    def logits(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` in float32, or in float64 for float64 x: [T, num_experts]."""
        if x.dtype == torch.float64:
            logits = nn.functional.linear(x, self.weight.double())
        else:
            logits = router_logits(_to_float32(x), _to_float32(self.weight))
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    @torch.no_grad()
    def update_bias(self, rate: float | None = None, *, group: Any = None) -> None:
        """Move the selection bias by the loads since the last call, and set the loads to zero.

        ``bias += rate * sign(mean(loads) - loads)``, as :func:`pyroute.update_bias` has it. Call it after the
        optimizer's step, or let :func:`update_biases_after` do it.

        Parameters
        ----------
        rate : float, optional
            ``bias_update_rate`` by default.
        group : torch.distributed process group, optional
            Loads are summed over its processes first; over all of them if torch.distributed is in use and none is
            given.
        """
        loads = self.tokens_per_expert
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(loads, group=group)
        if self.e_score_correction_bias is not None:
            direction = torch.sign(loads.sum() - loads.numel() * loads).to(self.e_score_correction_bias.dtype)
            self.e_score_correction_bias += (self.bias_update_rate if rate is None else rate) * direction
        loads.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """Conversions move the selection bias and the loss scale, and never narrow them."""
        kept = {name: self._buffers[name] for name in ("e_score_correction_bias", "aux_loss_scale")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{config_text('TopKRouter', self.config)}, hidden_size={self.hidden_size}"


def set_aux_loss_scale(model: nn.Module, scale: float) -> None:
    """Multiply the balance and z losses of every router in ``model`` by this from the next forward on.

    The scale that the model's own loss gets before ``backward``: that of a gradient scaler, or one over the number of
    micro-batches.
    """
    for module in model.modules():
        if isinstance(module, TopKRouter):  # a new tensor: a backward that is still to come reads the old one
            module.aux_loss_scale = torch.full_like(module.aux_loss_scale, scale)


def update_biases_after(optimizer: torch.optim.Optimizer, model: nn.Module, *, group: Any = None) -> Any:
    """Every router of ``model`` moves its selection bias after each step of ``optimizer``; returns the handle."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]

    def update(*_: Any) -> None:
        for router in routers:
            router.update_bias(group=group)

    return optimizer.register_step_post_hook(update)


def _to_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


def _sequences(x: Tensor) -> Tensor:
    if x.dim() != 3:
        expected = "[num_sequences, length, hidden_size] with balance_loss_scope 'sequence', or sequence_ids given"
        raise _check.value_error("TopKRouter", "x", expected, list(x.shape))
    return torch.arange(x.shape[0], device=x.device)[:, None].expand(x.shape[:2])


def _count_load_kernel(loads: Tensor, tokens_per_expert: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:  # in a backward pass this is a forward that ran before
        loads += tokens_per_expert


_count_load = define(
    "count_load(Tensor(a!) loads, Tensor tokens_per_expert) -> ()", _count_load_kernel, lambda *_: None, mutates=True
)
