"""Plans on a GPU: the maps of plan_routes, and other libraries' layouts of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend
from . import arrays

Array = Any


def most_rows(num_slots: int, num_experts: int, alignment: int) -> int:
    """Rows of a plan on a GPU, whatever the ids: each expert that can have tokens with the most padding."""
    return (num_slots + min(num_slots, num_experts) * (alignment - 1)) // alignment * alignment


def plan_routes(ids: Array, num_experts: int, alignment: int) -> tuple[Array, Array, Array, Array]:
    """(tokens_per_expert, expert_offsets, row_to_token, token_to_row); ids that are not experts are not routed."""
    num_tokens, top_k = ids.shape
    num_rows = most_rows(ids.size, num_experts, alignment)
    if num_rows > np.iinfo(np.int32).max:
        raise OverflowError(f"up to {num_rows} rows")
    parts = (
        arrays.empty(ids, (num_experts,), np.int32),
        arrays.empty(ids, (num_experts + 1,), np.int64),
        arrays.empty(ids, (num_rows,), np.int32),
        arrays.empty(ids, (num_tokens, top_k), np.int32),
    )
    cuda = _backend.cuda
    workspace = arrays.workspace(ids, cuda.plan_routes_workspace(ids.size, num_experts))
    cuda.plan_routes(
        *arrays.place(ids), arrays.pointer(ids), ids.dtype.itemsize, ids.dtype.kind == "i", num_tokens, top_k,
        num_experts, alignment, num_rows, *map(arrays.pointer, parts), arrays.pointer(workspace),
    )  # fmt: skip
    return parts


def maps(plan: Any) -> tuple[int, int, int, int, int]:
    """A plan as the launchers take it."""
    row_to_token, token_to_row = arrays.pointer(plan.row_to_token), arrays.pointer(plan.token_to_row)
    return plan.num_tokens, plan.top_k, plan.num_rows, row_to_token, token_to_row


def torch_offsets(plan: Any) -> Array:
    """int32 [num_experts]: the end of each segment."""
    return _layout("ends", plan, (plan.num_experts,), np.int32)


def row_experts(plan: Any) -> Array:
    """int32 [num_rows]: each row's expert, -1 on padding."""
    return _layout("row_experts", plan, (plan.num_rows,), np.int32)


def dense_map(plan: Any) -> Array:
    """bool [num_tokens, num_experts]: whether a token has a row of an expert."""
    return _layout("dense_map", plan, (plan.num_tokens, plan.num_experts), np.bool_)


def rows_by_slot(plan: Any) -> Array:
    """int32 [top_k * num_tokens]: the row of each slot, slot-major."""
    return _layout("rows_by_slot", plan, (plan.top_k * plan.num_tokens,), np.int32)


def _layout(name: str, plan: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    out = arrays.empty(plan.row_to_token, shape, dtype)
    offsets = arrays.pointer(plan.expert_offsets)
    place = arrays.place(plan.row_to_token)
    _backend.cuda.write_layout(*place, name, maps(plan), plan.num_experts, offsets, arrays.pointer(out))
    return out
