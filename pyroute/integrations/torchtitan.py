"""torchtitan: its router and the product of its experts on pyroute.

    --override.imports pyroute.integrations.torchtitan.router pyroute.integrations.torchtitan.experts

or, without a configuration, :func:`install`. Parameters, checkpoints, dispatchers and load balancing stay torchtitan's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchtitan
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts as TitanExperts
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from ..pytorch import grouped_gemm, router_logits
from ._stack import Bindings, gate, leave_alone, warn_if_untested
from .transformer_engine import dense_scores

TESTED = ("0.3",)

_bindings = Bindings()
_their_routing = TokenChoiceTopKRouter.forward
_their_product = TitanExperts._grouped_mm


def install() -> None:
    """Every router and every ``GroupedExperts``, built before or after, computes with pyroute; idempotent.

    Subclasses that have their own ``forward`` or ``_grouped_mm`` (low-precision converters) keep it.
    """
    if _bindings:
        return
    warn_if_untested("torchtitan", "torchtitan", torchtitan.__version__, TESTED)
    _bindings.bind(TokenChoiceTopKRouter, "forward", route)
    _bindings.bind(TitanExperts, "_grouped_mm", product)


def uninstall() -> None:
    """Give torchtitan its methods back."""
    _bindings.restore()


def route(self: Any, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of ``TokenChoiceTopKRouter``: scores [B, L, K] float32, ids [B, L, K] int64, all scores [B, L, E].

    The product is float32 of the operands as they are. Best first; equal scores go to the lower expert. DTensors and
    gates that are not a plain linear map are routed by torchtitan.
    """
    reason = _unserved(self, x_BLD)
    if reason:
        leave_alone("torchtitan", "a router", reason)
        return _their_routing(self, x_BLD, expert_bias_E)
    x = x_BLD.flatten(0, -2)
    gate_weight, gate_bias = self.gate.weight, self.gate.bias
    if x.dtype == torch.float64:
        logits = torch.nn.functional.linear(x, gate_weight.double())
    else:
        logits = router_logits(_to_float32(x), _to_float32(gate_weight))
    if gate_bias is not None:
        logits = logits + gate_bias.to(logits.dtype)
    given = None
    if self._debug_force_load_balance:
        slots = torch.arange(x.shape[0] * self.top_k, dtype=torch.int32, device=x.device)
        given = slots.reshape(-1, self.top_k) % self.num_experts
    groups = {}
    if self.num_expert_groups is not None:
        groups = {
            "num_groups": self.num_expert_groups, "topk_groups": self.num_limited_groups, "group_score": "top2_sum",
        }  # fmt: skip
    gating = gate(
        logits,
        (self.num_experts, self.top_k, self.score_func),
        None if expert_bias_E is None else expert_bias_E.to(logits.dtype),
        topk_idx=given,
        renormalize=self.route_norm,
        scaling_factor=float(self.route_scale),
        **groups,
    )
    scores = dense_scores(logits, self.score_func)
    results = gating.topk_weights, gating.topk_idx.long(), scores
    weights, ids, scores = (t.unflatten(0, x_BLD.shape[:-1]) for t in results)
    return weights, ids, scores


def product(self: Any, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    """The ``_grouped_mm`` of ``GroupedExperts``: rows of expert e times ``B_t[e]`` [k, n]; the rest is 0."""
    offsets = torch.nn.functional.pad(offs.long(), (1, 0))
    weights = B_t.transpose(-2, -1)
    if weights.is_contiguous():
        return grouped_gemm(A, weights, offsets).to(A.dtype)
    return grouped_gemm(A, B_t, offsets, transposed=True).to(A.dtype)


class TopKRouter(TokenChoiceTopKRouter):
    """``TokenChoiceTopKRouter`` with :func:`route`."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        pass

    forward = route


class GroupedExperts(TitanExperts):
    """``GroupedExperts`` with :func:`product`: the same bfloat16 operands, sums in pyroute's order."""

    @dataclass(kw_only=True, slots=True)
    class Config(TitanExperts.Config):
        pass

    _grouped_mm = product


@override(target=TokenChoiceTopKRouter.Config, exact=True, description="routing on pyroute")
def router(config: Any) -> Any:
    """For ``override.imports``: plain routers become :class:`TopKRouter`."""
    return derive(config, TopKRouter.Config)


@override(target=TitanExperts.Config, exact=True, description="grouped products on pyroute")
def experts(config: Any) -> Any:
    """For ``override.imports``: plain experts become :class:`GroupedExperts`."""
    return derive(config, GroupedExperts.Config)


def _unserved(self: Any, x: Tensor) -> str:
    if isinstance(x, DTensor) or isinstance(self.gate.weight, DTensor):
        return "its input or weight is a DTensor"
    if type(self.gate).forward is not torch.nn.Linear.forward:
        return f"its gate, a {type(self.gate).__name__}, is not a plain linear map"
    return ""


def _to_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
