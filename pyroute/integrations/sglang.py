"""SGLang's routing on a CPU, asked for by ``PYROUTE_SGLANG=1`` (:mod:`.plugins`) or by :func:`install`.

Four functions of ``sglang.srt.layers.moe.topk`` get an AROUND hook, by SGLang's own registry. What follows the choice
of experts (their placement, shared experts, records) and everything on other devices stay SGLang's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._stack import gate, leave_alone, warn_if_untested

TESTED = ("0.5",)

_TOPK = "sglang.srt.layers.moe.topk"
_hooked: list[type] = []
_active = False


def install() -> None:
    """Route on pyroute in this process, without a plug-in; a second call changes nothing."""
    register().apply_hooks()


def uninstall() -> None:
    """Let every hook pass its call on to SGLang. SGLang keeps hooks for good; these then do nothing else."""
    global _active
    _active = False


def register() -> Any:
    """Register the hooks once in SGLang's registry, which is returned; it applies those of all plug-ins together."""
    global _active
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry = hooks.HookRegistry
    if registry not in _hooked:
        warn_if_untested("sglang", "SGLang", importlib.import_module("sglang").__version__, TESTED)
        for name, rule in _RULES.items():
            hook = functools.partial(_around, name, rule)
            registry.register(f"{_TOPK}.{name}", hook, hooks.HookType.AROUND)
        _hooked.append(registry)
    _active = True
    return registry


def _around(name: str, rule: _Rule, theirs: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """``theirs`` computed by pyroute: weights float32 and ids int32 [num_tokens, top_k]; SGLang calls by keyword."""
    if not _active:
        return theirs(*args, **given)
    reason = _unserved(args, given)
    if reason:
        leave_alone("sglang", name, reason)
        return theirs(**given) if not args else theirs(*args, **given)
    score, fields = rule(given)
    scale = given.get("routed_scaling_factor") if given.get("apply_routed_scaling_factor_on_output") else None
    bias: Tensor | None = given.get("correction_bias")
    logits: Tensor = given["gating_output"]
    gating = gate(
        logits,
        (logits.shape[-1], given["topk"], score),
        None if bias is None else bias.detach().float(),
        renormalize=given["renormalize"],
        scaling_factor=float(scale or 1.0),
        **fields,
    )
    return gating.topk_weights, gating.topk_idx


_Rule = Callable[[dict[str, Any]], "tuple[str, dict[str, Any]]"]


def _plain(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return given.get("scoring_func", "softmax"), {}


def _grouped(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Without a bias a group is as good as its best expert; experts of other groups are out, not at 0."""
    return given.get("scoring_func", "softmax"), _groups(given, "max")


def _biased_grouped(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "sigmoid", _groups(given, "top2_sum")


def _groups(given: dict[str, Any], group_score: str) -> dict[str, Any]:
    return {"num_groups": given["num_expert_group"], "topk_groups": given["topk_group"], "group_score": group_score}


_RULES: dict[str, _Rule] = {
    "fused_topk": _plain,
    "fused_topk_native": _plain,
    "grouped_topk": _grouped,
    "biased_grouped_topk": _biased_grouped,
}


def _unserved(args: tuple[Any, ...], given: dict[str, Any]) -> str:
    if args:
        return "it is called by position"
    if not given["gating_output"].is_cpu:
        return "its logits are not on the CPU"
    if given.get("num_fused_shared_experts"):
        return "shared experts take part in the choice"
    if (
        given.get("correction_bias") is not None
        and given["correction_bias"].dim() > 1
        and len(given["correction_bias"]) > 1
    ):
        return "its bias differs from token to token"
    others = [name for name in ("packed_out", "num_token_non_padded") if given.get(name) is not None]
    return f"{others[0]} is given" if others else ""
