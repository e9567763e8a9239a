"""The permutation room for tensors: plans of static shape, moves along them, and the gradients of the moves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import permutation as core
from .. import route_plan as core_plan
from .._check import integer, map_on_gpu, shape, type_error
from ..quantization import ScaleFormat
from ..route_plan import MAX_ROWS, unchecked_plan
from ._library import define, goes_direct
from ._tensors import array, check_tensors, describe, ids_array, on_host, tensor
from .quantization import Fp8Tensor


class RoutePlan(NamedTuple):
    """The maps of :class:`pyroute.RoutePlan` as tensors, with a number of rows that does not depend on the ids.

    R is ``T * k + min(E, T * k) * (alignment - 1)`` rounded down to a multiple of ``alignment``, the most rows that ids
    of this shape can need; with alignment 1 and every slot routed it is what they need. Rows past
    ``expert_offsets[-1]`` are padding.

    Attributes
    ----------
    tokens_per_expert : int32 [num_experts]
    expert_offsets : int64 [num_experts + 1]
    row_to_token : int32 [num_rows], -1 on padding
    token_to_row : int32 [num_tokens, top_k], -1 where not routed
    """

    tokens_per_expert: Tensor
    expert_offsets: Tensor
    row_to_token: Tensor
    token_to_row: Tensor


def plan_routes(topk_idx: Tensor, num_experts: int, *, alignment: int = 1) -> RoutePlan:
    """:func:`pyroute.plan_routes` on tensors; see :class:`RoutePlan` for the number of rows."""
    integer("plan_routes", "num_experts", num_experts, 1, MAX_ROWS)
    integer("plan_routes", "alignment", alignment, 1, MAX_ROWS)
    if goes_direct(topk_idx):
        return RoutePlan(*_plan_kernel(topk_idx, num_experts, alignment))
    check_tensors("plan_routes", "topk_idx", topk_idx=topk_idx)
    return RoutePlan(*_plan_routes(topk_idx, num_experts, alignment))


def permute(x: Tensor, plan: RoutePlan) -> Tensor:
    """:func:`pyroute.permute`: [num_tokens, hidden] to [num_rows, hidden]; padding rows are zero."""
    maps = _maps("permute", plan)
    if goes_direct(x, *maps):
        return _permute_kernel(x, *maps)
    check_tensors("permute", "x", x=x, row_to_token=maps[0], token_to_row=maps[1])
    return _permute(x, *maps)


def unpermute(rows: Tensor, plan: RoutePlan, topk_weights: Tensor | None = None) -> Tensor:
    """:func:`pyroute.unpermute`: the weighted sum of each token's rows; without weights their sum."""
    maps = _maps("unpermute", plan)
    if goes_direct(rows, topk_weights, *maps):
        return _unpermute_kernel(rows, *maps, topk_weights)
    check_tensors("unpermute", "rows", rows=rows, row_to_token=maps[0], token_to_row=maps[1], topk_weights=topk_weights)
    return _unpermute(rows, *maps, topk_weights)


def permute_quantize(x: Tensor, plan: RoutePlan, *, scale_format: ScaleFormat = "float32") -> Fp8Tensor:
    """:func:`pyroute.permute_quantize`: the codes and 1x128 scales of ``permute(x, plan)``; it has no gradient."""
    maps = _maps("permute_quantize", plan)
    if goes_direct(x, *maps):
        return Fp8Tensor(*_permute_quantize_kernel(x, *maps, scale_format))
    check_tensors("permute_quantize", "x", x=x, row_to_token=maps[0], token_to_row=maps[1])
    return Fp8Tensor(*_permute_quantize(x, *maps, scale_format))


def _maps(function: str, plan: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(plan, RoutePlan):
        raise type_error(function, "plan", "a RoutePlan of tensors", describe(plan))
    return plan.row_to_token, plan.token_to_row


def _core_plan(function: str, row_to_token: Tensor, token_to_row: Tensor) -> Any:
    """What the moves read of a plan: its row maps, which the extension checks against each other as it goes."""
    tokens = array(function, "plan.row_to_token", row_to_token)
    rows = array(function, "plan.token_to_row", token_to_row)
    shape(function, "plan.row_to_token", tokens, (("num_rows", None),))
    shape(function, "plan.token_to_row", rows, (("num_tokens", None), ("top_k", None)))
    map_on_gpu(function, "plan.row_to_token", tokens, rows.shape[0])
    map_on_gpu(function, "plan.token_to_row", rows, tokens.shape[0])
    return unchecked_plan(None, None, tokens, rows, 1)


def most_rows(num_tokens: Any, top_k: Any, num_experts: int, alignment: int) -> Any:
    """The static number of rows, that of a plan on a GPU; sizes may be symbols."""
    slots = num_tokens * top_k
    return (slots + torch.sym_min(slots, num_experts) * (alignment - 1)) // alignment * alignment


# --- plan_routes ------------------------------------------------------------------------------------------------------


def _plan_kernel(topk_idx: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, ...]:
    plan = core_plan.plan_routes(ids_array("plan_routes", "topk_idx", topk_idx), num_experts, alignment=alignment)
    rows = plan.row_to_token
    num_rows = most_rows(plan.num_tokens, plan.top_k, num_experts, alignment)
    if num_rows > plan.num_rows:  # never on a GPU
        rows = np.concatenate([rows, np.full(num_rows - plan.num_rows, -1, np.int32)])
    return tuple(tensor(m) for m in (plan.tokens_per_expert, plan.expert_offsets, rows, plan.token_to_row))


def _plan_fake(topk_idx: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, ...]:
    num_rows = most_rows(topk_idx.shape[0], topk_idx.shape[1], num_experts, alignment)
    counts = topk_idx.new_empty(num_experts, dtype=torch.int32)
    return (
        counts,
        counts.new_empty(num_experts + 1, dtype=torch.int64),
        counts.new_empty(num_rows),
        counts.new_empty(topk_idx.shape),
    )


_plan_routes = define(
    "plan_routes(Tensor topk_idx, int num_experts, int alignment) "
    "-> (Tensor tokens_per_expert, Tensor expert_offsets, Tensor row_to_token, Tensor token_to_row)",
    _plan_kernel,
    _plan_fake,
)


# --- permute and unpermute, each the other's gradient -----------------------------------------------------------------


def _permute_kernel(x: Tensor, row_to_token: Tensor, token_to_row: Tensor) -> Tensor:
    return tensor(core.permute(array("permute", "x", x), _core_plan("permute", row_to_token, token_to_row)))


def _permute_fake(x: Tensor, row_to_token: Tensor, token_to_row: Tensor) -> Tensor:
    check_tensors("permute", "x", x=x, row_to_token=row_to_token, token_to_row=token_to_row)
    return x.new_empty((row_to_token.shape[0], x.shape[1]))


def _permute_save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpermute(grad, *ctx.saved_tensors, None), None, None


def _unpermute_kernel(rows: Tensor, row_to_token: Tensor, token_to_row: Tensor, topk_weights: Tensor | None) -> Tensor:
    plan = _core_plan("unpermute", row_to_token, token_to_row)
    weights = None if topk_weights is None else _weights("unpermute", rows, topk_weights)
    return tensor(core.unpermute(array("unpermute", "rows", rows), plan, weights))


def _weights(function: str, rows: Tensor, topk_weights: Tensor) -> Any:
    """float32 weights of float64 rows widen, on a GPU before the kernels see them."""
    if not on_host(rows) and rows.dtype == torch.float64 and topk_weights.dtype == torch.float32:
        topk_weights = topk_weights.double()
    return array(function, "topk_weights", topk_weights)


def _unpermute_fake(rows: Tensor, row_to_token: Tensor, token_to_row: Tensor, topk_weights: Tensor | None) -> Tensor:
    maps = {"row_to_token": row_to_token, "token_to_row": token_to_row}
    check_tensors("unpermute", "rows", rows=rows, **maps, topk_weights=topk_weights)
    return rows.new_empty((token_to_row.shape[0], rows.shape[1]))


def _unpermute_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, *maps, weights = inputs
    ctx.save_for_backward(None if weights is None else rows, *maps, weights)


def _unpermute_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, *maps, weights = ctx.saved_tensors
    if weights is None:
        return _permute(grad, *maps), None, None, None
    grad_rows, grad_weights = _unpermute_backward(grad, rows, *maps, weights)
    return grad_rows, None, None, grad_weights.to(weights.dtype)


def unpermute_backward_kernel(
    grad_y: Tensor, rows: Tensor, row_to_token: Tensor, token_to_row: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    function = "unpermute_backward"
    plan = _core_plan(function, row_to_token, token_to_row)
    given = array(function, "grad_y", grad_y), array(function, "rows", rows)
    grad_rows, grad_weights = core.unpermute_backward(*given, plan, _weights(function, rows, topk_weights))
    return tensor(grad_rows), tensor(grad_weights)


def _unpermute_backward_fake(
    grad_y: Tensor, rows: Tensor, row_to_token: Tensor, token_to_row: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape, dtype=wide)


_permute = define(
    "permute(Tensor x, Tensor row_to_token, Tensor token_to_row) -> Tensor",
    _permute_kernel,
    _permute_fake,
    backward=_permute_grad,
    save=_permute_save,
)
_unpermute_backward = define(
    "unpermute_backward(Tensor grad_y, Tensor rows, Tensor row_to_token, Tensor token_to_row, Tensor topk_weights) "
    "-> (Tensor grad_rows, Tensor grad_topk_weights)",
    unpermute_backward_kernel,
    _unpermute_backward_fake,
)
_unpermute = define(
    "unpermute(Tensor rows, Tensor row_to_token, Tensor token_to_row, Tensor? topk_weights) -> Tensor",
    _unpermute_kernel,
    _unpermute_fake,
    backward=_unpermute_grad,
    save=_unpermute_save,
)


# --- permute_quantize -------------------------------------------------------------------------------------------------


def _permute_quantize_kernel(
    x: Tensor, row_to_token: Tensor, token_to_row: Tensor, scale_format: Any
) -> tuple[Tensor, Tensor]:
    function = "permute_quantize"
    plan = _core_plan(function, row_to_token, token_to_row)
    q = core.permute_quantize(array(function, "x", x), plan, scale_format=scale_format)
    return tensor(q.codes), tensor(q.scales)


def _permute_quantize_fake(
    x: Tensor, row_to_token: Tensor, token_to_row: Tensor, scale_format: str
) -> tuple[Tensor, Tensor]:
    check_tensors("permute_quantize", "x", x=x, row_to_token=row_to_token, token_to_row=token_to_row)
    codes = x.new_empty((row_to_token.shape[0], x.shape[1]), dtype=torch.float8_e4m3fn)
    return codes, x.new_empty((row_to_token.shape[0], -(-x.shape[1] // 128)), dtype=torch.float32)


_permute_quantize = define(
    "permute_quantize(Tensor x, Tensor row_to_token, Tensor token_to_row, str scale_format) "
    "-> (Tensor codes, Tensor scales)",
    _permute_quantize_kernel,
    _permute_quantize_fake,
)
