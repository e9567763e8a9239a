"""Moves along a RoutePlan: permute takes tokens to their rows, unpermute brings rows back; both with backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _backend, _check
from ._array import permutation as _array
from ._device import permutation as _device
from .quantization import Fp8Array, ScaleFormat, quantize_fp8, unchecked_fp8
from .route_plan import RoutePlan

Array = Any

FLOATS = ("float32", "bfloat16", "float16", "float64")


def permute(x: Any, plan: RoutePlan, *, out: Any = None, backend: str | None = None) -> Any:
    """Copy each token to its rows: row r of the result is ``x[plan.row_to_token[r]]``, padding rows are zero.

    Parameters
    ----------
    x : [num_tokens, hidden], items of 1, 2, 4 or 8 bytes; or an Fp8Array of that shape with one-row blocks
        The bytes move as they are. For an Fp8Array the scales move with the codes; padding rows get codes 0, scale 1.0.
    plan : RoutePlan
    out : array [num_rows, hidden] of x's dtype, optional
        Every byte of it is written. Not for an Fp8Array.

    Returns
    -------
    [num_rows, hidden] like x

    Notes
    -----
    Reads ``num_tokens * hidden`` items and writes ``num_rows * hidden``.
    """
    _plan("permute", plan)
    if isinstance(x, Fp8Array):
        return _permute_fp8(x, plan, out, backend)
    given, x = x, _moved("permute", "x", x, "num_tokens", plan.num_tokens)
    return _permute("permute", x, plan, out, backend, given)


def _permute(function: str, x: Array, plan: RoutePlan, out: Any, backend: str | None, given: Any = None) -> Array:
    shape = (("num_rows", plan.num_rows), ("hidden", x.shape[1]))
    if out is not None:
        _check.output(function, "out", out, x.dtype, shape, x, given, plan.row_to_token, plan.token_to_row)
    match _backend.choose(function, backend, x, plan.row_to_token, out):
        case "cpu":
            if out is None:
                out = _backend.empty((plan.num_rows, x.shape[1]), x.dtype)
            _backend.core.permute(x, plan.row_to_token, plan.token_to_row, out)
            return out
        case "cuda":
            return _device.permute(x, plan, out)
        case _:
            return _deliver(_array.permute(_backend.array_module(x), x, plan.row_to_token), out)


def _permute_fp8(x: Fp8Array, plan: RoutePlan, out: Any, backend: str | None) -> Fp8Array:
    if out is not None:
        raise _check.type_error("permute", "out", "None for an Fp8Array", _check.describe(out))
    if x.ndim != 2 or x.block[0] != 1 or x.expert_offsets is not None:
        expected = "of two axes with blocks of one row, if it is an Fp8Array"
        raise _check.value_error("permute", "x", expected, f"shape {list(x.shape)} with blocks {x.block}")
    _check.shape("permute", "x", x, (("num_tokens", plan.num_tokens), ("hidden", None)))
    codes = _permute("permute", x.codes.view(np.uint8), plan, None, backend)
    if _backend.choose("permute", backend, x.scales, plan.row_to_token) == "cuda":
        scales = _device.permute(x.scales, plan, None, padding=_device.ONE)
    else:
        scales = _permute("permute", x.scales, plan, None, backend)
        scales[plan.row_to_token < 0] = 1.0
    return unchecked_fp8(codes.view(x.codes.dtype), scales, x.block, x.format, None)


def permute_quantize(
    x: Any, plan: RoutePlan, *, scale_format: ScaleFormat = "float32", backend: str | None = None
) -> Fp8Array:
    """Permute and quantise to e4m3 with 1x128 blocks in one pass: the bytes of ``quantize_fp8(permute(x, plan))``.

    Parameters
    ----------
    x : float32, bfloat16, float16 or float64 [num_tokens, hidden]
    plan : RoutePlan
    scale_format : {"float32", "ue8m0"}

    Returns
    -------
    Fp8Array [num_rows, hidden]
        Padding rows have codes 0 and scale 1.0.
    """
    _plan("permute_quantize", plan)
    axes = (("num_tokens", plan.num_tokens), ("hidden", None))
    x = _backend.as_array("permute_quantize", "x", x, FLOATS, axes)
    _check.one_of("permute_quantize", "scale_format", scale_format, ("float32", "ue8m0"))
    match _backend.choose("permute_quantize", backend, x, plan.row_to_token):
        case "cpu":
            codes = _backend.empty((plan.num_rows, x.shape[1]), _backend.FLOAT8["e4m3"])
            scales = _backend.empty((plan.num_rows, -(-x.shape[1] // 128)), np.float32)
            _backend.core.permute_quantize(
                x, plan.row_to_token, plan.token_to_row, 128, scale_format == "ue8m0", codes, scales
            )
            return unchecked_fp8(codes, scales, (1, 128), "e4m3", None)
        case "cuda":
            codes, scales = _device.permute_quantize(x, plan, scale_format == "ue8m0")
            return unchecked_fp8(codes, scales, (1, 128), "e4m3", None)
        case chosen:
            # a row's codes do not depend on the other rows, so quantising before moving gives the same bytes
            return _permute_fp8(quantize_fp8(x, scale_format=scale_format, backend=chosen), plan, None, chosen)


def unpermute(
    rows: Any, plan: RoutePlan, topk_weights: Any = None, *, out: Any = None, backend: str | None = None
) -> Array:
    """Bring each token's rows back: ``sum_j topk_weights[t, j] * rows[plan.token_to_row[t, j]]``.

    Products and the sum, from +0 in slot order, run in float32 (float64 for float64 rows) without fused multiply-add
    and are rounded once: the same bytes on every backend, and no dependence on other tokens. Slots that are not routed
    add nothing, rows that no slot points to are never read, and a token without routed slots is zero. NaN results are
    the canonical quiet NaN.

    Parameters
    ----------
    rows : float32, bfloat16, float16 or float64 [num_rows, hidden]
        With ``plan.top_k == 1`` and no weights any dtype of 1, 2, 4 or 8 bytes, since nothing is summed.
    plan : RoutePlan
    topk_weights : float32 [num_tokens, top_k], optional
        float64 too for float64 rows. Without weights a token with one routed slot gets that row's bytes; several rows
        are summed as if all weights were 1.
    out : array [num_tokens, hidden] of rows' dtype, optional

    Returns
    -------
    [num_tokens, hidden] of rows' dtype
    """
    return _unpermute("unpermute", "rows", rows, plan, topk_weights, out, backend)


def permute_backward(grad_rows: Any, plan: RoutePlan, *, backend: str | None = None) -> Array:
    """Gradient of :func:`permute`: each token's sum over its rows of ``grad_rows``, padding rows never read.

    Parameters
    ----------
    grad_rows : float32, bfloat16, float16 or float64 [num_rows, hidden]

    Returns
    -------
    grad_x [num_tokens, hidden] of grad_rows' dtype
        Summed as :func:`unpermute` does without weights.
    """
    return _unpermute("permute_backward", "grad_rows", grad_rows, plan, None, None, backend)


def _unpermute(
    function: str, name: str, rows: Any, plan: RoutePlan, topk_weights: Any, out: Any, backend: str | None
) -> Array:
    _plan(function, plan)
    given = (rows, topk_weights)
    rows = _moved(function, name, rows, "num_rows", plan.num_rows)
    if topk_weights is not None or plan.top_k > 1:
        _check.dtype(function, name, rows, FLOATS)
    if topk_weights is not None:
        topk_weights = _weights(function, topk_weights, plan, rows)
    if out is not None:
        shape = (("num_tokens", plan.num_tokens), ("hidden", rows.shape[1]))
        inputs = (*given, rows, topk_weights, plan.row_to_token, plan.token_to_row)
        _check.output(function, "out", out, rows.dtype, shape, *inputs)
    match _backend.choose(function, backend, rows, plan.token_to_row, topk_weights, out):
        case "cpu":
            if out is None:
                out = _backend.empty((plan.num_tokens, rows.shape[1]), rows.dtype)
            if topk_weights is None and plan.top_k == 1:  # a move of any type: tokens are the rows of the mirrored maps
                _backend.core.permute(rows, plan.token_to_row.reshape(-1), plan.row_to_token.reshape(-1, 1), out)
            else:
                _backend.core.unpermute(rows, plan.row_to_token, plan.token_to_row, topk_weights, out)
            return out
        case "cuda" if topk_weights is None and plan.top_k == 1:
            return _device.move_back(rows, plan, out)
        case "cuda":
            return _device.unpermute(rows, plan, topk_weights, out)
        case _:
            xp = _backend.array_module(rows)
            return _deliver(_array.unpermute(xp, rows, plan.token_to_row, topk_weights), out)


def unpermute_backward(
    grad_y: Any, rows: Any, plan: RoutePlan, topk_weights: Any, *, backend: str | None = None
) -> tuple[Array, Array]:
    """Gradients of the weighted :func:`unpermute` with respect to its rows and weights.

    Parameters
    ----------
    grad_y : [num_tokens, hidden] of rows' dtype
    rows : float32, bfloat16, float16 or float64 [num_rows, hidden]
        The forward's input.
    plan : RoutePlan
    topk_weights : float32 [num_tokens, top_k]
        float64 too for float64 rows.

    Returns
    -------
    grad_rows : [num_rows, hidden] of rows' dtype
        ``topk_weights[t, j] * grad_y[t]`` rounded once; padding rows are zero.
    grad_topk_weights : float32 (float64 for float64 rows) [num_tokens, top_k]
        ``<grad_y[t], rows[token_to_row[t, j]]>``: 32 partial sums (lane l takes columns l, l + 32, ... in order), then
        the tree 16, 8, 4, 2, 1. Exactly 0 where a slot is not routed.

    Notes
    -----
    Without weights in the forward, the gradient of the rows is ``permute(grad_y, plan)``.
    """
    _plan("unpermute_backward", plan)
    axes = (("num_rows", plan.num_rows), ("hidden", None))
    rows = _backend.as_array("unpermute_backward", "rows", rows, FLOATS, axes)
    axes = (("num_tokens", plan.num_tokens), ("hidden", rows.shape[1]))
    grad_y = _backend.as_array("unpermute_backward", "grad_y", grad_y, (_check.DTYPE_NAMES[rows.dtype],), axes)
    topk_weights = _weights("unpermute_backward", topk_weights, plan, rows)
    match _backend.choose("unpermute_backward", backend, grad_y, rows, plan.token_to_row, topk_weights):
        case "cpu":
            grad_rows, grad_weights = (
                _backend.empty(rows.shape, rows.dtype),
                _backend.empty(topk_weights.shape, topk_weights.dtype),
            )
            _backend.core.unpermute_backward(
                grad_y, rows, plan.row_to_token, plan.token_to_row, topk_weights, grad_rows, grad_weights
            )
            return grad_rows, grad_weights
        case "cuda":
            return _device.unpermute_backward(grad_y, rows, plan, topk_weights)
        case _:
            xp = _backend.array_module(rows)
            return _array.unpermute_backward(xp, grad_y, rows, plan.token_to_row, topk_weights)


def _plan(function: str, plan: Any) -> None:
    if not isinstance(plan, RoutePlan):
        raise _check.type_error(function, "plan", "a RoutePlan", _check.describe(plan))


def _moved(function: str, name: str, x: Any, axis: str, extent: int) -> Array:
    x = _backend.as_array(function, name, x, axes=((axis, extent), ("hidden", None)))
    if x.dtype.hasobject or x.dtype.itemsize not in (1, 2, 4, 8):
        raise _check.type_error(function, name, "of a dtype with items of 1, 2, 4 or 8 bytes", str(x.dtype))
    return x


def _weights(function: str, topk_weights: Any, plan: RoutePlan, rows: Array) -> Array:
    axes = (("num_tokens", plan.num_tokens), ("top_k", plan.top_k))
    if _check.DTYPE_NAMES[rows.dtype] != "float64":
        return _backend.as_array(function, "topk_weights", topk_weights, ("float32",), axes)
    kinds = ("float64",) if _check.is_device_array(topk_weights) else ("float32", "float64")
    topk_weights = _backend.as_array(function, "topk_weights", topk_weights, kinds, axes)
    if kinds == ("float64",):
        return topk_weights
    return topk_weights.astype("float64", copy=False)  # float32 widens to float64 exactly


def _deliver(result: Array, out: Any) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
