"""MoE classes of transformers that its experts interface does not cover, each with the forward that it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...pytorch import grouped_gemm, moe_forward, permute, plan_routes, topk_gating, unpermute
from ...router_config import RouterConfig
from .experts import experts_forward


def llama4_moe(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``Llama4TextMoe``: only the chosen experts see a token, which its gate multiplies before them.

    The class itself runs every expert on every token, those that are not chosen on zeros.
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    _, router_logits = self.router(x)  # called as a module, whose logits transformers records
    gating = topk_gating(router_logits, RouterConfig(self.num_experts, self.top_k, "sigmoid", weight_on="input"))
    plan = plan_routes(gating.topk_idx.reshape(-1, 1), self.num_experts)  # a slot is a token with one expert
    slots = (x.unsqueeze(1) * gating.topk_weights.to(x.dtype).unsqueeze(-1)).flatten(0, 1)
    rows, experts = permute(slots, plan), self.experts
    gate_up = grouped_gemm(rows, experts.gate_up_proj, plan.expert_offsets, transposed=True).to(x.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    rows = grouped_gemm(up * experts.act_fn(gate), experts.down_proj, plan.expert_offsets, transposed=True)
    routed = unpermute(rows.to(x.dtype), plan).unflatten(0, (-1, self.top_k)).sum(dim=1)
    return self.shared_expert(x) + routed, router_logits


def dbrx_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``DbrxExperts``: three flat weights [num_experts * intermediate, hidden], the last one not transposed."""
    x = hidden_states.reshape(-1, self.hidden_size)
    plan = plan_routes(top_k_index, self.num_experts)
    w1, v1, w2 = (w.view(self.num_experts, self.ffn_hidden_size, -1) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    rows = permute(x, plan)
    gate, up = (grouped_gemm(rows, w, plan.expert_offsets).to(x.dtype) for w in (w1, v1))
    rows = grouped_gemm(self.mlp.activation_fn(gate) * up, w2, plan.expert_offsets, transposed=True)
    return unpermute(rows.to(x.dtype), plan, top_k_weights.float()).reshape(hidden_states.shape)


def longcat_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``LongcatFlashExperts``: the last ``zero_expert_num`` experts return their input."""
    num_routed = self.num_routed_experts
    identity = top_k_index >= num_routed
    same = (top_k_weights * identity).sum(dim=-1, keepdim=True).to(hidden_states.dtype) * hidden_states
    if self.gate_up_proj is None:
        return same
    ids = top_k_index.masked_fill(identity, -1)
    return same + moe_forward(hidden_states, ids, top_k_weights, self.gate_up_proj[:num_routed], self.down_proj)


def jetmoe_experts(self: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """``JetMoeParallelExperts``: rows by expert times its matrix, in the MLP and in the attention of JetMoE."""
    offsets = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0)
    return grouped_gemm(inputs, self.weight, offsets).to(inputs.dtype)


def step3p7_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``Step3p7Experts``: the interface's layout without its decorator."""
    self.has_gate, self.has_bias, self.is_transposed = True, False, False
    self.is_concatenated, self.has_post_expert_norm = True, False
    return experts_forward(self, hidden_states, top_k_index, top_k_weights)


FORWARDS: dict[str, Callable[..., Any]] = {
    "DbrxExperts": dbrx_experts,
    "JetMoeParallelExperts": jetmoe_experts,
    "Llama4TextMoe": llama4_moe,
    "LongcatFlashExperts": longcat_experts,
    "Step3p7Experts": step3p7_experts,
}

# Classes that stay as they are, and why.
REASONS = {
    "DogeCDMoE": "its experts are vectors, retrieved by keys",
    "NllbMoeSparseMLP": "it drops tokens by capacity",
    "SwitchTransformersSparseMLP": "it drops tokens by capacity",
}
