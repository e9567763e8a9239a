"""What the functions of the gating room demand of their arguments, checked before memory is touched."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _backend, _check
from ._check import Array
from .router_config import RouterConfig

LOGITS = ("float32", "bfloat16", "float16", "float64")
SCOPES = ("batch", "sequence", "global")


def weight_dtype(logits: Array) -> str:
    """float64 for float64 logits, float32 for all others."""
    return "float64" if _check.DTYPE_NAMES[logits.dtype] == "float64" else "float32"


def router(function: str, config: Any) -> RouterConfig:
    if not isinstance(config, RouterConfig):
        raise _check.type_error(function, "config", "a RouterConfig", _check.describe(config))
    return config


def core_router(config: RouterConfig) -> tuple[Any, ...]:
    """The rule as the extension reads it; kept with the config, which is frozen."""
    fields: tuple[Any, ...] | None = config.__dict__.get("_core_fields")
    if fields is None:
        fields = _core_fields(config)
        config.__dict__["_core_fields"] = fields
    return fields


def _core_fields(config: RouterConfig) -> tuple[Any, ...]:
    return (
        config.num_experts, config.top_k, config.num_groups, config.topk_groups,
        config.group_topn if config.num_groups > 1 else 1, config.score, config.score_stage == "post",
        config.renormalize or "none", config.renormalize_eps, config.scaling_factor,
    )  # fmt: skip


def logits_array(function: str, logits: Any, num_experts: int | None) -> Array:
    z = _backend.as_array(function, "logits", logits, LOGITS, (("num_tokens", None), ("num_experts", num_experts)))
    if z.shape[1] < 1:
        raise _check.value_error(function, "logits", "of at least one expert", list(z.shape))
    return z


def bias_array(function: str, bias: Any, logits: Array) -> Array | None:
    """float32, or float64 with float64 logits: a bfloat16 bias would change choices (steps of 1/16 near 8)."""
    if bias is None:
        return None
    axes = (("num_experts", logits.shape[1]),)
    return _backend.as_array(function, "bias", bias, (weight_dtype(logits),), axes)


def mask_array(function: str, token_mask: Any, num_tokens: int) -> Array | None:
    if token_mask is None:
        return None
    return _backend.as_array(function, "token_mask", token_mask, ("bool",), (("num_tokens", num_tokens),))


def expert_ids(function: str, argument: str, topk_idx: Any, num_tokens: int, config: RouterConfig) -> Array:
    """Ids as int32 [T, k]: every value is -1 or an expert. On a GPU nothing looks at them, and others become -1."""
    axes = (("num_tokens", num_tokens), ("top_k", config.top_k))
    ids = _backend.as_array(function, argument, topk_idx, _check.INTEGERS, axes)
    _check.expert_ids(function, argument, ids, config.num_experts)
    if not _check.has_values(ids):
        from ._device import gating as device

        return device.int32_ids(ids, config.num_experts)
    return ids.astype(np.int32, copy=False)


def loads(function: str, argument: str, counts: Any, num_experts: int) -> Array:
    """Slots per expert as int64 [E]; int64 holds their sum times E, which the bias rule compares. On a GPU as given."""
    counts = _backend.as_array(function, argument, counts, _check.INTEGERS, (("num_experts", num_experts),))
    seen = _check.values(counts)
    if seen is not None and seen.size:
        least, most = int(seen.min()), int(seen.max())
        if least < 0 or most * num_experts > np.iinfo(np.int64).max:
            expected = f"at least 0 and at most 2**63 / num_experts ({num_experts})"
            raise _check.value_error(function, argument, expected, f"{least} to {most}")
    return counts.astype(np.int64, copy=False) if _check.has_values(counts) else counts


def sequences(function: str, scope: str, sequence_ids: Any, num_tokens: int) -> Array | None:
    if (scope == "sequence") != (sequence_ids is not None):
        expected = "given with scope 'sequence' and only then"
        raise _check.value_error(function, "sequence_ids", expected, f"{_check.describe(sequence_ids)} with '{scope}'")
    if sequence_ids is None:
        return None
    return _backend.as_array(function, "sequence_ids", sequence_ids, _check.INTEGERS, (("num_tokens", num_tokens),))


def reduced_counts(
    function: str, scope: str, global_counts: Any, num_experts: int, mask: Array | None, num_tokens: int
) -> tuple[Array, int] | None:
    """The pair (tokens_per_expert [E], num_tokens) that the caller has summed over its devices."""
    if (scope == "global") != (global_counts is not None):
        expected = "given with scope 'global' and only then"
        raise _check.value_error(
            function, "global_counts", expected, f"{_check.describe(global_counts)} with '{scope}'"
        )
    if global_counts is None:
        return None
    if not isinstance(global_counts, tuple) or len(global_counts) != 2:
        expected = "a pair (tokens_per_expert, num_tokens)"
        raise _check.type_error(function, "global_counts", expected, _check.describe(global_counts))
    counts = loads(function, "global_counts[0]", global_counts[0], num_experts)
    local = num_tokens
    if mask is not None:
        local = int(mask.sum()) if _check.has_values(mask) else 0
    return counts, _check.integer(function, "global_counts[1]", global_counts[1], local)
