"""Gating on a GPU: outputs and workspaces beside the logits, then ``pyroute._cuda``. Nothing waits for the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _check, _cuda
from .._gating_contract import core_router, weight_dtype
from ..router_config import RouterConfig
from .arrays import Array, empty, place, pointer, workspace


def _type_of(logits: Array) -> str:
    return str(_check.DTYPE_NAMES[logits.dtype])


def topk_gating(
    z: Array, config: RouterConfig, bias: Array | None, ids: Array | None, mask: Array | None
) -> tuple[Array, Array, Array]:
    """Ids [T, k] int32, weights [T, k], counts [E] int32."""
    num_tokens, fields = z.shape[0], core_router(config)
    device, stream = place(z)
    idx = empty(z, (num_tokens, config.top_k), np.int32)
    weights = empty(z, idx.shape, weight_dtype(z))
    counts = empty(z, (config.num_experts,), np.int32)
    room = _cuda.topk_gating_workspace(device, fields, _type_of(z), num_tokens)
    scratch = workspace(z, room) if room else None
    _cuda.topk_gating(
        device, stream, fields, pointer(z), _type_of(z), num_tokens, pointer(bias), pointer(ids), pointer(mask),
        pointer(scratch), pointer(idx), pointer(weights), pointer(counts),
    )  # fmt: skip
    return idx, weights, counts


def int32_ids(ids: Array, num_experts: int) -> Array:
    """Ids of any integer type as int32; those that are no experts become -1."""
    if ids.dtype == np.int32:
        return ids
    out = empty(ids, ids.shape, np.int32)
    is_signed = ids.dtype.kind == "i"
    _cuda.copy_integers(
        *place(ids), ids.size, pointer(ids), ids.dtype.itemsize, is_signed, num_experts, pointer(out), 0
    )
    return out


def int64_loads(counts: Array) -> Array:
    if counts.dtype == np.int64:
        return counts
    out = empty(counts, counts.shape, np.int64)
    is_signed = counts.dtype.kind == "i"
    _cuda.copy_integers(
        *place(counts), counts.size, pointer(counts), counts.dtype.itemsize, is_signed, 0, 0, pointer(out)
    )
    return out


# --- losses -----------------------------------------------------------------------------------------------------------


class DeviceBalance(NamedTuple):
    """``_array.gating_losses.BalanceTerms`` on the device, of a static number of sequences: T with sequence ids."""

    fractions: Array
    weights: Array
    scales: Array
    sequence: Array


def count_real(beside: Array, mask: Array) -> Array:
    """int32 [1]: how many tokens are real."""
    tokens = empty(beside, (1,), np.int32)
    _cuda.count_assignments(*place(beside), mask.shape[0], 0, 1, 0, pointer(mask), 0, 0, 0, 0, 0, 0, pointer(tokens), 0)
    return tokens


def balance_terms(
    ids: Array, num_experts: int, dtype: Any, *, coef: float = 1.0, loss_scale: Array | None = None,
    token_mask: Array | None = None, sequence_ids: Array | None = None,
    global_counts: tuple[Array, int] | None = None,
) -> DeviceBalance:  # fmt: skip
    num_tokens, top_k = ids.shape
    device, stream = place(ids)
    rows = max(1, num_tokens) if sequence_ids is not None else 1
    sequence = empty(ids, (max(1, num_tokens),), np.int32)
    tokens = empty(ids, (rows,), np.int32)
    loads = empty(ids, (rows, num_experts), np.int32) if global_counts is None else None
    table = totals = None
    table_size = item_size = 0
    if sequence_ids is not None:
        table_size, item_size = 2 << num_tokens.bit_length(), sequence_ids.dtype.itemsize
        table, totals = empty(ids, (table_size,), np.int32), empty(ids, (1,), np.int32)
    _cuda.count_assignments(
        device, stream, num_tokens, top_k, num_experts, pointer(ids), pointer(token_mask), pointer(sequence_ids),
        item_size, pointer(table), table_size, pointer(totals), pointer(sequence), pointer(tokens), pointer(loads),
    )  # fmt: skip
    fractions, scales = empty(ids, (rows, num_experts), dtype), empty(ids, (rows,), dtype)
    weights = empty(ids, (rows,), np.float64)
    wide, total = (None, -1) if global_counts is None else (int64_loads(global_counts[0]), global_counts[1])
    _cuda.balance_terms(
        device, stream, _check.DTYPE_NAMES[np.dtype(dtype)], rows, num_experts, top_k, pointer(loads), pointer(wide),
        pointer(tokens), total, pointer(totals), coef, pointer(loss_scale), pointer(fractions), pointer(scales),
        pointer(weights),
    )  # fmt: skip
    return DeviceBalance(fractions, weights, scales, sequence)


def topk_gating_backward(
    grad: Array, z: Array, ids: Array, config: RouterConfig, mask: Array | None, balance: DeviceBalance | None,
    z_coef: float, loss_scale: Array | None,
) -> Array:  # fmt: skip
    num_tokens, fields = z.shape[0], core_router(config)
    device, stream = place(z)
    z_scale, device_z_scale = 2.0 * z_coef / max(1, num_tokens), None
    if z_coef and (mask is not None or loss_scale is not None):
        num_real, device_z_scale = None if mask is None else count_real(z, mask), empty(z, (1,), np.float64)
        given = 2.0 * z_coef, pointer(loss_scale), num_tokens, pointer(num_real)
        _cuda.share_among_tokens(device, stream, *given, pointer(device_z_scale))
    out = empty(z, z.shape, grad.dtype)
    room = _cuda.topk_gating_backward_workspace(device, fields, _type_of(z), num_tokens)
    scratch = workspace(z, room) if room else None
    fractions, _, scales, sequence = balance or (None, None, None, None)
    _cuda.topk_gating_backward(
        device, stream, fields, pointer(grad), pointer(z), _type_of(z), num_tokens, pointer(ids), pointer(mask),
        pointer(fractions), pointer(scales), pointer(sequence), 0 if fractions is None else fractions.shape[0],
        z_scale, pointer(device_z_scale), pointer(scratch), pointer(out),
    )  # fmt: skip
    return out


def _sum_tokens(terms: Array, balance: DeviceBalance | None, mask: Array | None) -> Array:
    """float64 []: the weighted sum, or without balance terms the mean over real tokens."""
    num_tokens = terms.shape[0]
    num_real = None if mask is None or balance is not None else count_real(terms, mask)
    chunk_sums = workspace(terms, 8 * (num_tokens // 64 + 1))
    total = empty(terms, (), np.float64)
    weights, sequence = (None, None) if balance is None else (balance.weights, balance.sequence)
    _cuda.sum_tokens(
        *place(terms), num_tokens, pointer(terms), pointer(weights), pointer(sequence), pointer(mask),
        pointer(num_real), pointer(chunk_sums), pointer(total),
    )  # fmt: skip
    return total


def balance_loss(z: Array, score: str, balance: DeviceBalance, mask: Array | None) -> Array:
    return _sum_tokens(_loss_terms(z, score, balance), balance, mask)


def z_loss(z: Array, mask: Array | None) -> Array:
    return _sum_tokens(_loss_terms(z, "softmax", None), None, mask)


def _loss_terms(z: Array, score: str, balance: DeviceBalance | None) -> Array:
    terms = empty(z, z.shape[:1], np.float64)
    fractions, sequence = (None, None) if balance is None else (balance.fractions, balance.sequence)
    _cuda.gating_loss_terms(
        *place(z), score, pointer(z), _type_of(z), *z.shape, pointer(fractions), pointer(sequence),
        0 if fractions is None else fractions.shape[0], pointer(terms),
    )  # fmt: skip
    return terms


def update_bias(bias: Array, counts: Array, rate: float) -> Array:
    loads, out = int64_loads(counts), empty(bias, bias.shape, bias.dtype)
    _cuda.update_bias(*place(bias), _type_of(bias), bias.shape[0], pointer(bias), pointer(loads), rate, pointer(out))
    return out


# --- expert choice ----------------------------------------------------------------------------------------------------


def expert_choice(z: Array, capacity: int, mask: Array | None) -> tuple[Array, Array]:
    """Token ids [E, C] int32 and weights [E, C]; -1 and 0 past the last real token."""
    num_tokens, num_experts = z.shape
    dtype = np.dtype(weight_dtype(z))
    idx, weights = empty(z, (num_experts, capacity), np.int32), empty(z, (num_experts, capacity), dtype)
    keys = [workspace(z, num_experts * num_tokens * dtype.itemsize) for _ in range(2)]
    positions = [workspace(z, num_experts * num_tokens * 4) for _ in range(2)]
    _cuda.expert_choice(
        *place(z), pointer(z), _type_of(z), num_tokens, num_experts, pointer(mask), capacity,
        *map(pointer, keys), *map(pointer, positions), pointer(idx), pointer(weights),
    )  # fmt: skip
    return idx, weights
