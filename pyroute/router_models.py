"""From a model's own configuration to a RouterConfig.

A configuration file names the sizes in one of a dozen spellings and leaves most of the rule to the model's code. So
``model_type`` picks the rule, and the file fills in what the model's code reads from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import _check
from .router_config import GroupScore, RouterConfig, Score, ScoreStage, WeightOn

_FUNCTION = "RouterConfig.from_model_config"

# Every spelling of a field, the commonest first. `top_k` comes last and counts only alone: older transformers wrote the
# sampling default `top_k: 50` into every configuration.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_k",
        "moe_topk",
        "moe_top_k",
        "top_k",
    ),
    "score": ("scoring_func", "score_func", "score_function", "moe_router_activation_func"),
    "num_groups": ("n_group", "num_expert_group"),
    "topk_groups": ("topk_group",),
    "group_score": ("topk_method",),
    "renormalize": ("norm_topk_prob", "moe_renormalize"),
    "renormalize_eps": ("moe_norm_min",),
    "scaling_factor": ("routed_scaling_factor", "router_scaling_factor", "route_scale"),
}
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
_TOPK_METHODS: dict[str, GroupScore | None] = {
    "greedy": None,
    "group_limited_greedy": "max",
    "noaux_tc": "top2_sum",
}


class _Rule(NamedTuple):
    """What the code of a model type does that its configuration does not say."""

    score: Score | None = (
        "softmax"  # the rule's own; a scoring function in the configuration goes first; None: must be there
    )
    renormalize: str | None = None  # "sum", "clamp", None, or "flag": norm_topk_prob decides
    eps: float = 1e-20
    group_score: GroupScore | None = None  # None: the model's code has no groups, whatever the configuration says
    scaled: bool = False  # the code multiplies by the routed scaling factor
    score_stage: ScoreStage = "pre"
    weight_on: WeightOn = "output"


_NOAUX_TC = _Rule("sigmoid", "flag", group_score="top2_sum", scaled=True)
_SOFTMAX_FLAG = _Rule(renormalize="flag")
_SOFTMAX_SUM = _Rule(renormalize="sum")
_POST_SOFTMAX = _Rule(score_stage="post")
_UNKNOWN = _Rule(None, "flag", scaled=True)  # all that the configuration can say, it must say

_RULES: dict[str, _Rule] = {
    "afmoe": _Rule("sigmoid", "sum", scaled=True),
    "deepseek_v2": _Rule("softmax", "flag", group_score="max", scaled=True),
    "deepseek_v3": _NOAUX_TC,
    "deepseek_v32": _NOAUX_TC,
    "deepseek_v4": _Rule("sqrtsoftplus", "sum", scaled=True),
    "dots1": _NOAUX_TC,
    "ernie4_5_moe": _Rule("softmax", "clamp", eps=1e-12),
    "exaone_moe": _NOAUX_TC,
    "flex_olmo": _SOFTMAX_FLAG,
    "glm4_moe": _NOAUX_TC,
    "glm4_moe_lite": _NOAUX_TC,
    "glm4v_moe_text": _NOAUX_TC,
    "glm_moe_dsa": _NOAUX_TC,
    "gpt_oss": _POST_SOFTMAX,
    "granitemoe": _POST_SOFTMAX,
    "granitemoehybrid": _POST_SOFTMAX,
    "granitemoeshared": _POST_SOFTMAX,
    "hy_v3": _Rule("sigmoid", "sum", scaled=True),
    "jamba": _Rule("softmax"),
    "kimi_k2": _NOAUX_TC,
    "kimi_linear": _NOAUX_TC,
    "lfm2_moe": _Rule("sigmoid", "flag", eps=1e-6, scaled=True),
    "llama4_text": _Rule("sigmoid", weight_on="input"),
    "minimax": _SOFTMAX_SUM,
    "minimax_m2": _Rule("sigmoid", "sum"),
    "mistral4": _Rule("softmax", "flag", group_score="top2_sum", scaled=True),
    "mixtral": _SOFTMAX_SUM,
    "olmoe": _SOFTMAX_FLAG,
    "qwen2_moe": _SOFTMAX_FLAG,
    "qwen3_5_moe_text": _SOFTMAX_SUM,
    "qwen3_moe": _SOFTMAX_FLAG,
    "qwen3_next": _SOFTMAX_FLAG,
    "qwen3_vl_moe_text": _SOFTMAX_SUM,
    "solar_open": _NOAUX_TC,
}

_NOT_COVERED = {
    "gemma4_text": "a learnt factor per expert",
    "longcat_flash": "identity experts",
    "nllb_moe": "dropping by capacity",
    "phimoe": "sparsemixer",
    "switch_transformers": "dropping by capacity",
}


def from_model_config(model_config: Any) -> RouterConfig:
    """What :meth:`RouterConfig.from_model_config` returns."""
    if isinstance(model_config, (str, os.PathLike)):
        model_config = _from_file(model_config)
    config = _text_part(_as_mapping(model_config))
    model_type = config.get("model_type")
    reason = _NOT_COVERED.get(str(model_type))
    if reason:
        expected = "a configuration whose routing RouterConfig covers"
        raise _check.value_error(_FUNCTION, "model_config", expected, f"'{model_type}' ({reason})")
    rule = _RULES.get(str(model_type), _UNKNOWN)
    needed = ["num_experts", "top_k"]
    needed += ["score"] if rule.score is None else []
    needed += ["renormalize"] if rule.renormalize == "flag" else []
    needed += ["scaling_factor"] if rule.scaled and rule is not _UNKNOWN else []
    _require(config, model_type, needed)

    fields: dict[str, Any] = {"num_experts": _read(config, "num_experts"), "top_k": _read(config, "top_k")}
    score = _read(config, "score")
    if score is not None:
        _check.one_of(_FUNCTION, "scoring_func", score, ("softmax", "sigmoid", "sqrtsoftplus"))
    fields["score"] = score or rule.score
    fields |= _groups(config, rule, model_type)
    fields["renormalize"] = _read(config, "renormalize") if rule.renormalize == "flag" else rule.renormalize
    if fields["renormalize"]:
        fields["renormalize_eps"] = rule.eps
        if rule.renormalize == "clamp" and _read(config, "renormalize_eps") is not None:
            fields["renormalize_eps"] = _read(config, "renormalize_eps")
    if rule.scaled and _read(config, "scaling_factor") is not None:
        fields["scaling_factor"] = _read(config, "scaling_factor")
    return RouterConfig(score_stage=rule.score_stage, weight_on=rule.weight_on, **fields)


def num_experts_of(model_config: Mapping[str, Any]) -> int | None:
    """What a configuration says of its language model's routed experts; None if nothing, or a number per layer."""
    number = _read(_text_part(model_config), "num_experts")
    return number if isinstance(number, int) else None


def _as_mapping(model_config: Any) -> Mapping[str, Any]:
    if hasattr(model_config, "to_dict") and not isinstance(model_config, type):
        model_config = model_config.to_dict()
    if not isinstance(model_config, Mapping):
        expected = "a transformers configuration, a dict or the path of a config.json"
        raise _check.type_error(_FUNCTION, "model_config", expected, _check.describe(model_config))
    return model_config


def _from_file(place: str | os.PathLike[str]) -> Any:
    path = Path(place)
    try:
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{_FUNCTION}: model_config must be a file or folder that exists, got {path}")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or not UTF-8
        raise _check.value_error(_FUNCTION, "model_config", "the path of a JSON file", f"{path} ({error})") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _check.unreadable(_FUNCTION, "model_config", error) from None


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal configuration: the first nesting that counts experts."""
    for _ in _NESTED:  # no deeper: a configuration that contains itself has an end too
        if _read(config, "num_experts") is not None:
            break
        inner = next((config[key] for key in _NESTED if config.get(key) is not None), None)
        if inner is None:
            break
        config = {"model_type": config.get("model_type"), **_as_mapping(inner)}
    return config


def _read(config: Mapping[str, Any], field: str) -> Any:
    """The value under the first spelling that is there; two spellings that disagree are an error."""
    found = [(key, config[key]) for key in _SPELLINGS[field] if config.get(key) is not None]
    if len(found) > 1 and found[-1][0] == "top_k":
        found.pop()
    for key, value in found[1:]:
        if value != found[0][1]:
            expected = f"equal to {found[0][0]} ({found[0][1]})"
            raise _check.value_error(_FUNCTION, key, expected, value)
    value = found[0][1] if found else None
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]  # one number per layer, all the same
    return value


def _require(config: Mapping[str, Any], model_type: object, fields: list[str]) -> None:
    missing = [" or ".join(_SPELLINGS[field]) for field in fields if _read(config, field) is None]
    if missing:
        got = f"one without (model_type {model_type!r}{'' if str(model_type) in _RULES else ', which is not known'})"
        raise _check.value_error(_FUNCTION, "model_config", "a configuration with " + ", and ".join(missing), got)


def _groups(config: Mapping[str, Any], rule: _Rule, model_type: object) -> dict[str, Any]:
    """num_groups, topk_groups and group_score; empty for a router without groups.

    DeepSeek's configurations name the rule in ``topk_method``, which goes before the model type: models of type
    deepseek_v2 exist with each of the three.
    """
    group_score = rule.group_score
    num_groups = _read(config, "num_groups")
    if num_groups in (None, 0, 1) or (group_score is None and rule is not _UNKNOWN):
        return {}
    method = _read(config, "group_score")
    if method is not None:
        group_score = _TOPK_METHODS[_check.one_of(_FUNCTION, "topk_method", method, tuple(_TOPK_METHODS))]
        if group_score is None:
            return {}
    _require(config, model_type, ["topk_groups"] if group_score else ["topk_groups", "group_score"])
    return {"num_groups": num_groups, "topk_groups": _read(config, "topk_groups"), "group_score": group_score}
