"""What the functions of the gating room demand of their arguments, checked before memory is touched."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import _backend, _check
from ._check import Array
from .router_config import RouterConfig

LOGITS = ("float32", "bfloat16", "float16", "float64")
SCOPES = ("batch", "sequence", "global")


dtype_name = functools.cache(lambda dtype: str(dtype.name))  # dtype.name costs 2 us, a call for one token 5


def weight_dtype(logits: Array) -> str:
    """float64 for float64 logits, float32 for all others."""
    return "float64" if logits.dtype == np.float64 else "float32"


def router(function: str, config: Any) -> RouterConfig:
    if not isinstance(config, RouterConfig):
        raise _check.type_error(function, "config", "a RouterConfig", _check.describe(config))
    return config


def core_router(config: RouterConfig) -> tuple[Any, ...]:
    """The rule as the extension reads it."""
    return (
        config.num_experts, config.top_k, config.num_groups, config.topk_groups,
        config.group_topn if config.num_groups > 1 else 1, config.score, config.score_stage == "post",
        config.renormalize or "none", config.renormalize_eps, config.scaling_factor,
    )  # fmt: skip


def logits_array(function: str, logits: Any, num_experts: int | None) -> Array:
    z = _backend.as_array(function, "logits", logits)
    _check.array(function, "logits", z, LOGITS, (("num_tokens", None), ("num_experts", num_experts)))
    if num_experts is None and z.shape[1] < 1:
        raise _check.value_error(function, "logits", "of at least one expert", list(z.shape))
    return z


def bias_array(function: str, bias: Any, logits: Array) -> Array | None:
    """float32, or float64 with float64 logits: a bfloat16 bias would change choices (steps of 1/16 near 8)."""
    if bias is None:
        return None
    b = _backend.as_array(function, "bias", bias)
    _check.array(function, "bias", b, (weight_dtype(logits),), (("num_experts", logits.shape[1]),))
    return b


def mask_array(function: str, token_mask: Any, num_tokens: int) -> Array | None:
    if token_mask is None:
        return None
    mask = _backend.as_array(function, "token_mask", token_mask)
    _check.array(function, "token_mask", mask, ("bool",), (("num_tokens", num_tokens),))
    return mask


def integer_array(function: str, argument: str, x: Any, axes: tuple[_check.Axis, ...]) -> Array:
    ids = _backend.as_array(function, argument, x)
    if ids.dtype.kind not in "iu" or not ids.dtype.isnative:
        raise _check.type_error(function, argument, "an integer array", _check.describe(ids))
    _check.shape(function, argument, ids, axes)
    return ids


def expert_ids(function: str, argument: str, topk_idx: Any, num_tokens: int, config: RouterConfig) -> Array:
    """Ids as int32 [T, k]: every value is -1 or an expert, and the first that is not is named."""
    axes = (("num_tokens", num_tokens), ("top_k", config.top_k))
    ids = integer_array(function, argument, topk_idx, axes)
    bad = ids >= config.num_experts  # compared in the array's own type: 2**64 - 1 is not -1
    if ids.dtype.kind == "i":
        bad |= ids < -1
    if bad.any():
        token, slot = divmod(int(bad.argmax()), config.top_k)
        expected = f"-1 or in 0..{config.num_experts - 1}"
        raise _check.value_error(function, f"{argument}[{token}, {slot}]", expected, int(ids[token, slot]))
    return ids.astype(np.int32, copy=False)


def sequences(function: str, scope: str, sequence_ids: Any, num_tokens: int) -> Array | None:
    if (scope == "sequence") != (sequence_ids is not None):
        expected = "given with scope 'sequence' and only then"
        raise _check.value_error(function, "sequence_ids", expected, f"{_check.describe(sequence_ids)} with '{scope}'")
    if sequence_ids is None:
        return None
    return integer_array(function, "sequence_ids", sequence_ids, (("num_tokens", num_tokens),))


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
    counts = integer_array(function, "global_counts[0]", global_counts[0], (("num_experts", num_experts),))
    local = num_tokens if mask is None else int(mask.sum())
    return counts, _check.integer(function, "global_counts[1]", global_counts[1], local)
