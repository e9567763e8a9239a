"""transformers' experts modules, forward and backward: the grouped_mm implementation and the eager loop."""

from __future__ import annotations

import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from . import Work, column, package_version
from .torch_eager import array, set_threads, tensor

NAME = "transformers"
__all__ = ["NAME", "set_threads", "version"]
FORWARDS = {
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
    "eager": lambda module, *inputs: Qwen3MoeExperts.forward(module, *inputs),
}


def version() -> str:
    return package_version("transformers")


def experts(p, kind: str, *, trains: bool) -> torch.nn.Module:
    """Qwen3's experts (gate_up and down in one tensor each, SwiGLU) around the problem's weights."""
    s = p.shape
    config = Qwen3MoeConfig(
        num_experts=s.num_experts, hidden_size=s.hidden, moe_intermediate_size=s.intermediate, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    for name, w in zip(("gate_up_proj", "down_proj"), p.weights.pair(kind), strict=True):
        setattr(module, name, torch.nn.Parameter(tensor(w), requires_grad=trains))
    return module


def forward(p, implementation: str, kind: str):
    if p.wide != (kind == "float32"):
        return None
    if implementation == "batched_mm" and p.shape.tokens > 1:  # copies every token's weights: 4 s at 16 tokens
        return None
    module, x = experts(p, kind, trains=False), tensor(p.x if kind == "float32" else p.x16)
    ids, weights = torch.from_numpy(p.gating.topk_idx).long(), tensor(p.gating.topk_weights).to(x.dtype)

    @torch.no_grad()
    def run():
        return FORWARDS[implementation](module, x, ids, weights)

    return Work(run, array)


def training(p, implementation: str):
    module, x = experts(p, "float32", trains=True), tensor(p.x).clone().requires_grad_()
    ids, weights = torch.from_numpy(p.gating.topk_idx).long(), tensor(p.gating.topk_weights).clone().requires_grad_()
    grad_y, trained = tensor(p.grad_y), [x, weights, *module.parameters()]

    def run():
        for parameter in trained:
            parameter.grad = None
        y = FORWARDS[implementation](module, x, ids, weights)
        y.backward(grad_y)
        return y

    return Work(run, lambda y: (array(y), *map(array, (x.grad, module.gate_up_proj.grad, module.down_proj.grad))))


def _register(implementation: str, kind: str) -> None:
    tolerance = "float32" if kind == "float32" else "bfloat16"

    @column("layer", f"transformers {implementation} {kind}", kind=tolerance)
    def layer(p):
        return forward(p, implementation, kind)


for _implementation in FORWARDS:
    for _kind in ("float32", "bfloat16"):
        _register(_implementation, _kind)


@column("training", "transformers grouped_mm float32")
def train_grouped(p):
    return training(p, "grouped_mm")


@column("training", "transformers eager float32")
def train_eager(p):
    """A gradient as large as all experts together for every expert: a minute at 64 of them, so only for few."""
    return training(p, "eager") if p.shape.num_experts <= 16 else None
