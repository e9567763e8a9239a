"""vLLM's routing on a CPU, asked for by ``PYROUTE_VLLM=1`` (:mod:`.plugins`) or by :func:`install`.

It replaces how ``CPURouter`` computes; experts, placement and everything on other devices stay vLLM's.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ._stack import Bindings, gate, leave_alone, warn_if_untested

TESTED = ("0.32",)

_ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"

_bindings = Bindings()
_theirs: Any = None


def install() -> None:
    """Route on pyroute in this process; a second call changes nothing. ImportError if vLLM has no router for CPUs."""
    global _theirs
    if _bindings:
        return
    router = importlib.import_module(_ROUTER).CPURouter
    warn_if_untested("vllm", "vLLM", importlib.import_module("vllm").__version__, TESTED)
    _theirs = router._compute_routing
    _bindings.bind(router, "_compute_routing", compute_routing)


def uninstall() -> None:
    """Give vLLM its method back."""
    _bindings.restore()


def compute_routing(
    self: Any, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, *,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``CPURouter._compute_routing``: weights float32 and ids int32 [num_tokens, top_k], best first.

    Groups, selection bias, softmax before or after the choice, DeepSeek-V4's scores and its hash-routed layers; scores
    are float32 whatever the logits' type. A model's own routing function is vLLM's to call.
    """
    reason = _unserved(self, router_logits)
    if reason:
        leave_alone("vllm", "a router", reason)
        return _theirs(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
    scale = float(self.routed_scaling_factor)
    bias, ids = self.e_score_correction_bias, None
    rule: dict[str, Any]
    if self.use_grouped_topk:
        groups = {"num_groups": self.num_expert_group, "topk_groups": self.topk_group}
        group_score = "max" if bias is None else "top2_sum"
        rule = {"renormalize": self.renormalize, "scaling_factor": scale, "group_score": group_score, **groups}
    elif self.scoring_func == "sqrtsoftplus":
        rule = {"renormalize": True, "scaling_factor": scale}
        if self._hash_indices_table is not None:
            bias, ids = None, self._hash_indices_table[input_ids]
    else:  # neither bias nor scale, whatever the attributes are
        rule, bias = {"score_stage": "post" if self.renormalize else "pre"}, None
    bias = None if bias is None else bias.detach().float()
    shape = (router_logits.shape[-1], self.top_k, self.scoring_func)
    gating = gate(router_logits, shape, bias, topk_idx=ids, **rule)
    return gating.topk_weights, gating.topk_idx


def _unserved(self: Any, router_logits: Tensor) -> str:
    if not router_logits.is_cpu:
        return "its logits are not on the CPU"
    if self.use_grouped_topk:
        return "" if self.scoring_func in ("softmax", "sigmoid") else f"groups of {self.scoring_func} scores"
    if self.custom_routing_function is not None:
        return "it has a routing function of its own"
    return "" if self.scoring_func in ("softmax", "sqrtsoftplus") else f"{self.scoring_func} scores without groups"
