"""TransformerEngine's permutation by dense maps: its names, signatures and row_id_map, over pyroute's moves.

A ``row_id_map`` of map_type "mask" is int32 [num_tokens, 2 * num_experts + 1]: a token's n rows from last to first,
from column num_experts on the experts of those rows, n in the last column; other entries are -1 here and not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _check
from ..pytorch import RoutePlan, permute, plan_routes, unpermute
from ..pytorch._library import define
from ..pytorch._tensors import array
from ..route_plan import plan_routes as core_plan_routes


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int | None = None, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """Copy every token to the rows of its experts: by expert, then token.

    Parameters
    ----------
    inp : [num_tokens, hidden]
    routing_map : bool or integer [num_tokens, num_experts]; "index": integer [num_tokens, topk], -1 is not routed
        A token may have any number of experts.
    num_out_tokens : int, optional
        Rows of the result; None, -1 and for "index" 0 are all that the map asks for. Rows too many are zero. Too few
        are an error; for "index" the rows past them are dropped.
    max_token_num : int
        A hint for TransformerEngine's workspace, not used.
    map_type : {"mask", "index"}

    Returns
    -------
    rows : [num_out_tokens, hidden]
    row_id_map : int32
        For :func:`moe_unpermute`. "index": [topk * num_tokens], slot-major, -1 where not routed.
    """
    _check.one_of("moe_permute", "map_type", map_type, ("mask", "index"))
    if map_type == "index":
        return _permute_by_index(inp, routing_map, num_out_tokens)
    row_id_map = _map_of("moe_permute", inp, routing_map)
    num_rows = _num_rows("moe_permute", row_id_map, num_out_tokens)
    return permute(inp, _routes(row_id_map, num_rows).plan), row_id_map


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`moe_permute` by a mask, with the probability of each row.

    Parameters
    ----------
    probs : floating [num_tokens, num_experts]
        Where one is exactly 0 the row is zero and gets no gradient: the map was padded there.

    Returns
    -------
    rows, permuted_probs [num_out_tokens], row_id_map
    """
    row_id_map = _map_of("moe_permute_with_probs", inp, routing_map)
    num_rows = _num_rows("moe_permute_with_probs", row_id_map, num_out_tokens)
    return *_permute_with_probs(inp, probs, row_id_map, num_rows, None), row_id_map


def moe_permute_and_pad_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, tokens_per_expert: Tensor, align_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """:func:`moe_permute_with_probs` with each expert's rows padded by zero rows to a multiple of ``align_size``.

    Parameters
    ----------
    tokens_per_expert : integer [num_experts]
        Of ``routing_map``.
    align_size : int
        At least 1.

    Returns
    -------
    rows, permuted_probs, row_id_map
        The map counts rows without padding.
    pad_offsets : int64 [num_experts] or None
        Padding rows before each expert; None where nothing is padded. For :func:`moe_unpermute`.
    padded_tokens_per_expert : int64 [num_experts]
    """
    function = "moe_permute_and_pad_with_probs"
    if tokens_per_expert is None:
        raise _check.type_error(function, "tokens_per_expert", "a tensor", "None")
    align_size = _check.integer(function, "align_size", align_size, 1)
    counts = tokens_per_expert.to(inp.device).long()
    padded = (counts + align_size - 1) // align_size * align_size
    pad_offsets = None
    if not torch.equal(counts, padded):
        padding = padded - counts
        pad_offsets = padding.cumsum(0) - padding
    row_id_map = _map_of(function, inp, routing_map)
    if not torch.equal(_counts(row_id_map), counts):
        raise _check.value_error(function, "tokens_per_expert", "the column sums of routing_map", "others")
    moved = _permute_with_probs(inp, probs, row_id_map, int(padded.sum()), pad_offsets)
    return *moved, row_id_map, pad_offsets, padded


def moe_unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None = None, restore_shape: Any = None,
    map_type: str = "mask", probs: Tensor | None = None, pad_offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Bring rows back to their tokens, weighted and summed in float32 (float64 in float64).

    Parameters
    ----------
    inp : [num_rows, hidden]
    row_id_map : int32
        Of :func:`moe_permute` with the same ``map_type``.
    merging_probs : floating [num_tokens, num_experts]; "index": [num_tokens, topk]; optional
        Without them the rows are summed.
    restore_shape : (num_tokens, hidden), optional
        By default inp's; not used for "index".
    probs : the older name of merging_probs
    pad_offsets : integer [num_experts], optional
        Of :func:`moe_permute_and_pad_with_probs`.

    Returns
    -------
    [num_tokens, hidden] of inp's dtype
    """
    _check.one_of("moe_unpermute", "map_type", map_type, ("mask", "index"))
    if probs is not None:
        if merging_probs is not None:
            raise _check.value_error("moe_unpermute", "probs", "None with merging_probs given", "both")
        merging_probs = probs
    wide = torch.float64 if inp.dtype == torch.float64 else torch.float32
    if map_type == "index":
        shape = (row_id_map.shape[0], 1) if merging_probs is None else tuple(merging_probs.shape)
        rows = row_id_map.reshape(shape[1], shape[0]).t()
        weights = None if merging_probs is None else merging_probs.to(wide)
        return unpermute(inp, _plan(rows, inp.shape[0]), weights)
    num_tokens = inp.shape[0] if restore_shape is None else int(restore_shape[0])
    if row_id_map.dim() != 2 or row_id_map.shape[0] != num_tokens or row_id_map.shape[1] % 2 == 0:
        expected = f"[{num_tokens}, 2 * num_experts + 1] for restore_shape"
        raise _check.value_error("moe_unpermute", "row_id_map", expected, list(row_id_map.shape))
    routes = _routes(row_id_map, inp.shape[0], pad_offsets)
    weights = None if merging_probs is None else merging_probs.gather(1, routes.experts).to(wide)
    return unpermute(inp, routes.plan, weights)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Cut ``inp`` along its rows into chunks of ``split_sizes`` and lay them out in the order of ``sorted_index``.

    Parameters
    ----------
    inp : [num_rows, hidden]
    split_sizes : integer [num_chunks]
        Rows past their sum stay where they are.
    sorted_index : integer [num_chunks]
        A permutation of the chunks.

    Returns
    -------
    of inp's shape and dtype
    """
    return permute(inp, _chunk_plan("moe_sort_chunks_by_index", inp, split_sizes, sorted_index))


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`moe_sort_chunks_by_index` of ``inp`` and of ``probs`` [num_rows]."""
    plan = _chunk_plan("moe_sort_chunks_by_index_with_probs", inp, split_sizes, sorted_index)
    return permute(inp, plan), probs.index_select(0, plan.row_to_token)


# --- from maps to plans -----------------------------------------------------------------------------------------------


class _Routes(NamedTuple):
    plan: RoutePlan
    experts: Tensor  # int64 [T, slots], 0 where not routed
    places: Tensor  # int64 [T * slots], the row of a slot; num_rows, past the last, where not routed


def _map_of(function: str, inp: Tensor, routing_map: Tensor) -> Tensor:
    if inp.dim() != 2 or routing_map.dim() != 2 or inp.shape[0] != routing_map.shape[0]:
        expected = "[num_tokens, num_experts] for inp [num_tokens, hidden]"
        got = f"{list(routing_map.shape)} for {list(inp.shape)}"
        raise _check.value_error(function, "routing_map", expected, got)
    return _te_row_id_map(routing_map)


def _num_rows(function: str, row_id_map: Tensor, given: int | None) -> int:
    if torch.compiler.is_compiling() and given is not None:
        return given
    needed = int(row_id_map[:, -1].sum())
    if given is None or given < 0:
        return needed
    if given < needed:
        raise _check.value_error(function, "num_out_tokens", f"at least the {needed} rows of routing_map", given)
    return given


def _routes(row_id_map: Tensor, num_rows: int, pad_offsets: Tensor | None = None) -> _Routes:
    num_experts = row_id_map.shape[1] // 2
    counts = row_id_map[:, -1:]
    # as many slots as the busiest token has experts; a compiler needs a number that does not depend on the data
    slots = num_experts if torch.compiler.is_compiling() or not counts.numel() else max(int(counts.max()), 1)
    routed = torch.arange(slots, device=counts.device) < counts
    experts = row_id_map[:, num_experts : num_experts + slots].where(routed, 0).long()
    rows = row_id_map[:, :slots]
    if pad_offsets is not None:
        rows = rows + pad_offsets[experts]
    rows = rows.where(routed, -1).int()
    places = rows.where(routed, num_rows).long().flatten()
    return _Routes(_plan(rows, num_rows), experts, places)


def _plan(rows: Tensor, num_rows: int) -> RoutePlan:
    """The plan whose ``token_to_row`` this is. Moves read the two row maps and nothing else of a plan."""
    num_tokens, slots = rows.shape
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=rows.device)[:, None].expand(num_tokens, slots)
    places = rows.where(rows >= 0, num_rows).long().flatten()  # slots that are not routed: a place that is cut off
    row_to_token = tokens.new_full((num_rows + 1,), -1).scatter(0, places, tokens.flatten())[:num_rows]
    none = tokens.new_empty(0)
    return RoutePlan(none, none, row_to_token, rows.contiguous())


def _permute_with_probs(
    inp: Tensor, probs: Tensor, row_id_map: Tensor, num_rows: int, pad_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    routes = _routes(row_id_map, num_rows, pad_offsets)
    weights = probs.gather(1, routes.experts)
    permuted = weights.new_zeros(num_rows + 1).scatter(0, routes.places, weights.flatten())[:num_rows]
    moved = routes.plan.token_to_row.where(weights.detach() != 0, -1)
    return permute(inp, _plan(moved, num_rows)), permuted


def _permute_by_index(inp: Tensor, topk_idx: Tensor, num_out_tokens: int | None) -> tuple[Tensor, Tensor]:
    num_experts = max(int(topk_idx.max()) + 1, 1) if topk_idx.numel() else 1
    rows = plan_routes(topk_idx, num_experts).token_to_row
    num_rows = num_out_tokens if num_out_tokens is not None and num_out_tokens > 0 else rows.numel()
    rows = rows.where(rows < num_rows, -1)
    return permute(inp, _plan(rows, num_rows)), rows.t().reshape(-1)


def _counts(row_id_map: Tensor) -> Tensor:
    num_experts = row_id_map.shape[1] // 2
    experts = row_id_map[:, num_experts:-1]
    return torch.bincount(experts[experts >= 0], minlength=num_experts)


def _chunk_plan(function: str, inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> RoutePlan:
    sizes, order = split_sizes.to(inp.device).long(), sorted_index.to(inp.device).long()
    if sizes.shape != order.shape or sizes.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order))):
        raise _check.value_error(function, "sorted_index", "a permutation of the chunks", order.tolist())
    num_rows = inp.shape[0]
    rest = num_rows - int(sizes.sum())
    if rest < 0 or bool((sizes < 0).any()):
        raise _check.value_error(function, "split_sizes", f"sizes of at most {num_rows} rows", sizes.tolist())
    sizes = torch.cat([sizes, sizes.new_tensor([rest])])
    order = torch.cat([order, order.new_tensor([len(order)])])
    first = sizes.cumsum(0) - sizes  # of each chunk, in inp and in the result
    laid = sizes[order].cumsum(0) - sizes[order]
    source = (first[order] - laid).repeat_interleave(sizes[order], output_size=num_rows) + torch.arange(num_rows)
    row_to_token = source.int()
    token_to_row = torch.empty_like(row_to_token)
    token_to_row[source] = torch.arange(num_rows, dtype=torch.int32)
    return RoutePlan(row_to_token.new_empty(0), row_to_token.new_empty(0), row_to_token, token_to_row[:, None])


def _row_id_map_kernel(routing_map: Tensor) -> Tensor:
    mask = array("moe_permute", "routing_map", routing_map)
    num_tokens, num_experts = mask.shape
    token, expert = np.divmod(np.flatnonzero(mask), max(num_experts, 1))  # nonzero of two axes takes four times as long
    counts = np.bincount(token, minlength=num_tokens)
    slot = counts.cumsum()[token] - 1 - np.arange(token.size)  # the last expert of a token is its first slot
    slots = max(int(counts.max(initial=0)), 1)
    ids = np.full((num_tokens, slots), -1, np.int32)
    ids[token, slot] = expert
    result = np.full((num_tokens, 2 * num_experts + 1), -1, np.int32)
    result[:, :slots] = core_plan_routes(ids, num_experts).token_to_row
    result[:, num_experts : num_experts + slots] = ids
    result[:, -1] = counts
    return torch.from_numpy(result)


_te_row_id_map = define(
    "te_row_id_map(Tensor routing_map) -> Tensor",
    _row_id_map_kernel,
    lambda routing_map: routing_map.new_empty((routing_map.shape[0], 2 * routing_map.shape[1] + 1), dtype=torch.int32),
)
