"""Released models by name: the rule of their router and the public sizes of their MoE layer.

Sources of the numbers are in docs/routers.md. Names carry a size where one family has several rules or shapes; the bare
name is then the model that the comment names.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from . import _check
from .router_config import RouterConfig


class ModelShape(NamedTuple):
    """Sizes of one MoE layer of a released model.

    ``hidden`` H and ``intermediate`` I (of one routed expert) are in elements; ``activation`` is a name that
    ``moe_forward`` takes; ``shared_intermediate`` is the width of all shared experts together, 0 without any.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    activation: str
    shared_intermediate: int


class _Model(NamedTuple):
    router: RouterConfig
    hidden: int
    intermediate: int
    shared_intermediate: int = 0
    activation: str = "swiglu"


def _noaux_tc(num_experts: int, top_k: int, scaling_factor: float) -> RouterConfig:
    """DeepSeek-V3's gate without groups: sigmoid scores, a bias that only chooses, weights that sum to the factor."""
    return RouterConfig(num_experts, top_k, "sigmoid", renormalize="sum", scaling_factor=scaling_factor)


_DEEPSEEK_V3 = _Model(
    RouterConfig(
        256,
        8,
        "sigmoid",
        num_groups=8,
        topk_groups=4,
        group_score="top2_sum",
        renormalize="sum",
        scaling_factor=2.5,
    ),
    7168,
    2048,
    2048,
)
_MIXTRAL = RouterConfig(8, 2, renormalize="sum")
_QWEN3_MOE = RouterConfig(128, 8, renormalize="sum")

_MODELS: dict[str, _Model] = {
    "deepseek-v2": _Model(RouterConfig(160, 6, num_groups=8, topk_groups=3, scaling_factor=16.0), 5120, 1536, 2 * 1536),
    "deepseek-v2-lite": _Model(RouterConfig(64, 6), 2048, 1408, 2 * 1408),
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
    "deepseek-v3.1": _DEEPSEEK_V3,
    "deepseek-v3.2": _DEEPSEEK_V3,
    "deepseek-v4": _Model(  # V4-Flash; its first three layers take their ids from a table: pass them as topk_idx
        RouterConfig(256, 6, "sqrtsoftplus", renormalize="sum", scaling_factor=1.5), 4096, 2048, 2048, "swiglu_clamp"
    ),
    "deepseek-v4-pro": _Model(
        RouterConfig(384, 6, "sqrtsoftplus", renormalize="sum", scaling_factor=2.5), 7168, 3072, 3072, "swiglu_clamp"
    ),
    "ernie-4.5": _Model(  # 21B-A3B
        RouterConfig(64, 6, renormalize="clamp", renormalize_eps=1e-12), 2560, 1536, 2 * 1536
    ),
    "glm-4.5": _Model(_noaux_tc(160, 8, 2.5), 5120, 1536, 1536),
    "glm-4.5-air": _Model(_noaux_tc(128, 8, 1.0), 4096, 1408, 1408),
    "gpt-oss": _Model(  # 120b
        RouterConfig(128, 4, score_stage="post"), 2880, 2880, 0, "swiglu_oai"
    ),
    "gpt-oss-20b": _Model(RouterConfig(32, 4, score_stage="post"), 2880, 2880, 0, "swiglu_oai"),
    "granite-moe": _Model(RouterConfig(32, 8, score_stage="post"), 1024, 512),  # 1B-A400M
    "granite-moe-3b": _Model(RouterConfig(40, 8, score_stage="post"), 1536, 512),
    "kimi-k2": _Model(_noaux_tc(384, 8, 2.827), 7168, 2048, 2048),
    "lfm2-moe": _Model(RouterConfig(32, 4, "sigmoid", renormalize="sum", renormalize_eps=1e-6), 2048, 1792),  # 8B-A1B
    "llama4": _Model(RouterConfig(16, 1, "sigmoid", weight_on="input"), 5120, 8192, 8192),  # Scout
    "llama4-maverick": _Model(RouterConfig(128, 1, "sigmoid", weight_on="input"), 5120, 8192, 8192),
    "minimax-m2": _Model(_noaux_tc(256, 8, 1.0), 3072, 1536),
    "mixtral": _Model(_MIXTRAL, 4096, 14336),  # 8x7B
    "mixtral-8x22b": _Model(_MIXTRAL, 6144, 16384),
    "olmoe": _Model(RouterConfig(64, 8), 2048, 1024),  # 1B-7B; the class default of transformers says 2048
    "qwen2-moe": _Model(RouterConfig(60, 4), 2048, 1408, 5632),  # Qwen1.5-MoE-A2.7B
    "qwen3-moe": _Model(_QWEN3_MOE, 2048, 768),  # 30B-A3B
    "qwen3-moe-235b": _Model(_QWEN3_MOE, 4096, 1536),
    "qwen3-next": _Model(RouterConfig(512, 10, renormalize="sum"), 2048, 512, 512),  # 80B-A3B
}


def presets() -> tuple[str, ...]:
    """The names that :meth:`RouterConfig.preset` and :func:`model_shape` know, sorted.

    Examples
    --------
    >>> "deepseek-v3" in pyroute.presets()
    True
    """
    return tuple(sorted(_MODELS))


def preset(name: str) -> RouterConfig:
    """What :meth:`RouterConfig.preset` returns."""
    return _find("RouterConfig.preset", name).router


def model_shape(name: str) -> ModelShape:
    """The MoE layer's sizes of the model ``name``; ValueError for a name that :func:`presets` does not list.

    Examples
    --------
    >>> model_shape("mixtral")
    ModelShape(hidden=4096, intermediate=14336, num_experts=8, top_k=2, activation='swiglu', shared_intermediate=0)
    """
    model = _find("model_shape", name)
    return ModelShape(
        model.hidden,
        model.intermediate,
        model.router.num_experts,
        model.router.top_k,
        model.activation,
        model.shared_intermediate,
    )


def _find(function: str, name: str) -> _Model:
    if not isinstance(name, str):
        raise _check.type_error(function, "name", "a string", _check.describe(name))
    if name not in _MODELS:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), _MODELS)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise _check.value_error(function, "name", "one of pyroute.presets()", repr(name) + hint)
    return _MODELS[name]
