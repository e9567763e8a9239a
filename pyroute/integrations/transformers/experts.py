"""The forward of transformers' experts modules on pyroute's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._activation import Activation
from ...pytorch import grouped_gemm, moe_forward, permute, plan_routes, unpermute

_ACTIVATION = "_pyroute_activation"
_Recognised = tuple[Activation, "float | None", "float | None"]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of the forward of an experts module ``self``.

    Parameters
    ----------
    self : the experts module
        Its weights, its flags (``is_transposed``, ``is_concatenated``, ``has_bias``, ``has_gate``,
        ``has_post_expert_norm``) and its own ``_apply_gate`` are honoured.
    hidden_states : float32 or bfloat16 [num_tokens, hidden]
    top_k_index : integer [num_tokens, top_k]
        ``num_experts`` is the sentinel of expert parallelism: not routed, no gradient.
    top_k_weights : [num_tokens, top_k]

    Returns
    -------
    [num_tokens, hidden] of hidden_states' dtype
    """
    num_experts = self.num_experts
    ids = top_k_index.masked_fill(top_k_index == num_experts, -1)
    activation = None if self.is_transposed or self.has_post_expert_norm else activation_of(self)
    if activation is not None:
        name, limit, alpha = activation
        up = self.gate_up_proj if self.has_gate else self.up_proj
        biases = {}
        if self.has_bias:
            up_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
            biases = {"b_gate_up": up_bias, "b_down": self.down_proj_bias}
        return moe_forward(
            hidden_states, ids, top_k_weights, up, self.down_proj, activation=name, limit=limit, alpha=alpha, **biases
        )
    return by_steps(self, hidden_states, ids, top_k_weights)


def by_steps(self: Any, hidden_states: Tensor, ids: Tensor, top_k_weights: Tensor) -> Tensor:
    """Any activation, layout and norm: the module's own code between pyroute's products."""
    plan = plan_routes(ids, self.num_experts)
    offsets = plan.expert_offsets
    experts = None
    if self.has_bias:  # of each row; any expert will do for rows past the last offset
        rows = torch.arange(plan.row_to_token.shape[0], device=ids.device)
        experts = torch.searchsorted(offsets[1:], rows, right=True).clamp(max=self.num_experts - 1)

    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = grouped_gemm(rows, weight, offsets, transposed=self.is_transposed)
        out = out.to(hidden_states.dtype)
        return out if bias is None else out + bias[experts].to(out.dtype)

    prefix = "gate_up_proj" if self.has_gate else "up_proj"
    bias = getattr(self, f"{prefix}_bias") if self.has_bias else None
    rows = project(permute(hidden_states, plan), getattr(self, prefix), bias)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = project(rows, self.down_proj, self.down_proj_bias if self.has_bias else None)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return unpermute(rows.to(hidden_states.dtype), plan, top_k_weights.float())


def activation_of(self: Any) -> _Recognised | None:
    """The activation of ``moe_forward`` that this module applies, with its limit and alpha; None for any other.

    Found by trying the module's own code on a grid of numbers, once, so that classes that nobody has heard of are
    honoured too. A compiler that meets a module before its first call takes the steps, which are right for all.
    """
    if _ACTIVATION not in self.__dict__:
        if torch.compiler.is_compiling():
            return None
        with torch.no_grad():
            self.__dict__[_ACTIVATION] = _recognise(self)
    return self.__dict__[_ACTIVATION]


def _recognise(self: Any) -> _Recognised | None:
    device = self.down_proj.device if self.down_proj.is_cuda else None  # an activation may have parameters
    axes = (torch.linspace(-24, 24, steps, device=device) for steps in (49, 33))
    gate, up = torch.meshgrid(*axes, indexing="ij")
    gate, up = gate.reshape(1, -1), up.reshape(1, -1)
    if not self.has_gate:
        got = self.act_fn(gate)
        return ("relu2", None, None) if torch.allclose(got, gate.relu().square(), rtol=1e-5, atol=1e-6) else None
    got = self._apply_gate(torch.cat([gate, up], dim=-1))
    if got.shape != gate.shape or not self.is_concatenated:
        return None
    limits, alphas = _numbers(self, "limit", "swiglu_limit"), _numbers(self, "alpha", "swiglu_alpha")
    candidates: list[_Recognised] = [("swiglu", None, None), ("geglu", None, None)]
    candidates += [("swiglu_clamp", limit, None) for limit in limits]
    candidates += [("swiglu_oai", limit, alpha) for limit in limits for alpha in alphas]
    for name, limit, alpha in candidates:
        if torch.allclose(got, _formula(name, limit, alpha, gate, up), rtol=1e-5, atol=1e-6):
            return name, limit, alpha
    return None


def _numbers(self: Any, *names: str) -> list[float]:
    values = (getattr(self, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, (int, float))]


def _formula(name: str, limit: Any, alpha: Any, gate: Tensor, up: Tensor) -> Tensor:
    if name == "geglu":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if name == "swiglu_oai":
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return torch.nn.functional.silu(gate) * up
