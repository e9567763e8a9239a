"""The grouped GEMM room for tensors: every expert's rows times its matrix, with both gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import type_error, value_error
from ..grouped_gemm import grouped_gemm as core_gemm
from ..grouped_gemm import grouped_gemm_dgrad as core_dgrad
from ..grouped_gemm import grouped_gemm_wgrad as core_wgrad
from ._library import define, goes_direct
from ._tensors import NUMPY_DTYPES, array, check_tensors, int32_array, tensor
from .quantization import Fp8Tensor, fp8_array

Operand = Any  # a Tensor or an Fp8Tensor


def grouped_gemm(
    a: Operand, b: Operand, expert_offsets: Tensor | None = None, *, tokens_per_expert: Tensor | None = None,
    out_dtype: torch.dtype | None = None, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`pyroute.grouped_gemm`: ``out[r] = b[e] @ a[r]`` for every row r of expert e's segment.

    Parameters
    ----------
    a : float32, bfloat16 or Fp8Tensor [R, K], or [E, M, K] with tokens_per_expert
    b : float32, bfloat16 or Fp8Tensor [E, N, K]
    expert_offsets : int32 or int64 [E + 1]
    tokens_per_expert : integer [E], optional
        In place of ``expert_offsets``: expert e owns the first ``tokens_per_expert[e]`` rows of ``a[e]``, and no more
        of the result [E, M, N] is written. For decoding in a CUDA graph; it has no gradient.
    out_dtype : float32 or bfloat16, optional
        By default float32 if ``a`` or ``b`` is float32, else bfloat16.
    transposed : bool
        ``b`` is [E, K, N], as gpt-oss and Llama 4 keep it, and ``out[r] = a[r] @ b[e]``; no copy of it is made.

    Returns
    -------
    [R, N], or [E, M, N]
        Rows past the last offset are zero. Gradients of every order reach the operands that are not FP8: those of ``b``
        are summed in float32 and rounded once to its type. Under autocast float32 operands are cast as in
        ``torch.nn.functional``.
    """
    a, a_scales, a_block = _parts(a)
    b, b_scales, b_block = _parts(b)
    if tokens_per_expert is not None:
        if transposed or expert_offsets is not None:
            other = "transposed=True" if transposed else "expert_offsets"
            raise value_error("grouped_gemm", "tokens_per_expert", f"None together with {other}", "a tensor")
        masked = (a, a_scales, a_block, b, b_scales, b_block, tokens_per_expert, out_dtype)
        if goes_direct(a, a_scales, b, b_scales, tokens_per_expert):
            return _masked_kernel(*masked)
        check_tensors(
            "grouped_gemm", "a", a=a, a_scales=a_scales, b=b, b_scales=b_scales, tokens_per_expert=tokens_per_expert
        )
        return _grouped_gemm_masked(*masked)
    if expert_offsets is None:
        raise type_error("grouped_gemm", "expert_offsets", "a tensor", "None")
    if transposed:
        return _times_transposed(a, a_scales, b, b_scales, b_block, expert_offsets, out_dtype)
    given = (a, a_scales, a_block, b, b_scales, b_block, expert_offsets, out_dtype)
    if goes_direct(a, a_scales, b, b_scales, expert_offsets):
        return _gemm_kernel(*given)
    check_tensors("grouped_gemm", "a", a=a, a_scales=a_scales, b=b, b_scales=b_scales, expert_offsets=expert_offsets)
    return _grouped_gemm(*given)


def _times_transposed(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, b_block: Any, expert_offsets: Tensor,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The product that is the gradient with respect to ``a`` for a ``b`` that is not transposed."""
    if a_scales is not None:
        raise type_error("grouped_gemm", "a", "float32 or bfloat16 with transposed=True", "an Fp8Tensor")
    check_tensors("grouped_gemm", "a", a=a, b=b, b_scales=b_scales, expert_offsets=expert_offsets)
    device = a.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        a, b = (autocast_float(torch.get_autocast_dtype(device), x) for x in (a, b))
    given = (a, b, b_scales, b_block, expert_offsets, out_dtype or _default_dtype(a, None, b, b_scales))
    return _dgrad_kernel(*given) if goes_direct(a, b, b_scales, expert_offsets) else _grouped_gemm_dgrad(*given)


def _default_dtype(a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None) -> torch.dtype:
    wide = any(x.dtype == torch.float32 for x, scales in ((a, a_scales), (b, b_scales)) if scales is None)
    return torch.float32 if wide else torch.bfloat16


def _parts(x: Any) -> tuple[Any, Tensor | None, tuple[int, int]]:
    return x if isinstance(x, Fp8Tensor) else (x, None, (1, 128))


def _operand(function: str, argument: str, x: Tensor, scales: Tensor | None, block: Any) -> Any:
    if scales is None:
        return array(function, argument, x)
    return fp8_array(function, argument, x, scales, block)


def autocast_float(dtype: torch.dtype, x: Any) -> Any:
    """float32 becomes the autocast type where the core has it; float16 becomes float32, which holds it."""
    if x is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return x
    return x.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def _autocast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    a, a_scales, a_block, b, b_scales, b_block, *rest = args
    return (autocast_float(dtype, a), a_scales, a_block, autocast_float(dtype, b), b_scales, b_block, *rest)


# --- forward ----------------------------------------------------------------------------------------------------------


def _gemm_kernel(
    a: Tensor, a_scales: Tensor | None, a_block: Any, b: Tensor, b_scales: Tensor | None, b_block: Any,
    expert_offsets: Tensor, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    function = "grouped_gemm"
    left, right = _operand(function, "a", a, a_scales, a_block), _operand(function, "b", b, b_scales, b_block)
    offsets = array(function, "expert_offsets", expert_offsets)
    return tensor(core_gemm(left, right, offsets, out_dtype=_numpy_dtype(function, out_dtype)))


def _numpy_dtype(function: str, dtype: torch.dtype | None) -> Any:
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
        raise type_error(function, "out_dtype", "torch.float32 or torch.bfloat16", str(dtype))
    return None if dtype is None else NUMPY_DTYPES[dtype]


def _gemm_fake(
    a: Tensor, a_scales: Tensor | None, a_block: Any, b: Tensor, b_scales: Tensor | None, b_block: Any,
    expert_offsets: Tensor, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    check_tensors("grouped_gemm", "a", a=a, a_scales=a_scales, b=b, b_scales=b_scales, expert_offsets=expert_offsets)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or _default_dtype(a, a_scales, b, b_scales))


def _gemm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, a_scales, ctx.a_block, b, b_scales, ctx.b_block, expert_offsets, _ = inputs
    ctx.save_for_backward(a, a_scales, b, b_scales, expert_offsets)


def _gemm_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, a_scales, b, b_scales, offsets = ctx.saved_tensors
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = _grouped_gemm_dgrad(grad, b, b_scales, ctx.b_block, offsets, a.dtype)
    if ctx.needs_input_grad[3]:
        grad_b = _grouped_gemm_wgrad(grad, a, a_scales, ctx.a_block, offsets).to(b.dtype)
    return grad_a, None, None, grad_b, None, None, None, None


def _masked_kernel(
    a: Tensor, a_scales: Tensor | None, a_block: Any, b: Tensor, b_scales: Tensor | None, b_block: Any,
    tokens_per_expert: Tensor, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    function = "grouped_gemm"
    left, right = _operand(function, "a", a, a_scales, a_block), _operand(function, "b", b, b_scales, b_block)
    counts = int32_array(function, "tokens_per_expert", tokens_per_expert)
    return tensor(core_gemm(left, right, tokens_per_expert=counts, out_dtype=_numpy_dtype(function, out_dtype)))


def _masked_fake(
    a: Tensor, a_scales: Tensor | None, a_block: Any, b: Tensor, b_scales: Tensor | None, b_block: Any,
    tokens_per_expert: Tensor, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    check_tensors(
        "grouped_gemm", "a", a=a, a_scales=a_scales, b=b, b_scales=b_scales, tokens_per_expert=tokens_per_expert
    )
    shape = (*a.shape[:2], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype or _default_dtype(a, a_scales, b, b_scales))


# --- gradients --------------------------------------------------------------------------------------------------------


def _dgrad_kernel(
    grad: Tensor, b: Tensor, b_scales: Tensor | None, b_block: Any, expert_offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    function = "grouped_gemm_dgrad"
    right, offsets = _operand(function, "b", b, b_scales, b_block), array(function, "expert_offsets", expert_offsets)
    dtype = _numpy_dtype(function, out_dtype)
    return tensor(core_dgrad(array(function, "grad_out", grad), right, offsets, out_dtype=dtype))


def _dgrad_fake(
    grad: Tensor, b: Tensor, b_scales: Tensor | None, b_block: Any, expert_offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((grad.shape[0], b.shape[2]), dtype=out_dtype)


def _dgrad_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, b, b_scales, ctx.b_block, expert_offsets, _ = inputs
    ctx.save_for_backward(grad, b, b_scales, expert_offsets)


def _dgrad_grad(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad, b, b_scales, offsets = ctx.saved_tensors
    of_grad = of_b = None
    if ctx.needs_input_grad[0]:
        of_grad = _grouped_gemm(upstream, None, (1, 128), b, b_scales, ctx.b_block, offsets, grad.dtype)
    if ctx.needs_input_grad[1]:
        of_b = _grouped_gemm_wgrad(grad, upstream, None, (1, 128), offsets).to(b.dtype)
    return of_grad, of_b, None, None, None, None


def _wgrad_kernel(grad: Tensor, a: Tensor, a_scales: Tensor | None, a_block: Any, expert_offsets: Tensor) -> Tensor:
    function = "grouped_gemm_wgrad"
    left, offsets = _operand(function, "a", a, a_scales, a_block), array(function, "expert_offsets", expert_offsets)
    return tensor(core_wgrad(array(function, "grad_out", grad), left, offsets))


def _wgrad_fake(grad: Tensor, a: Tensor, a_scales: Tensor | None, a_block: Any, expert_offsets: Tensor) -> Tensor:
    return grad.new_empty((expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1]), dtype=torch.float32)


def _wgrad_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, a, a_scales, ctx.a_block, expert_offsets = inputs
    ctx.save_for_backward(grad, a, a_scales, expert_offsets)


def _wgrad_grad(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grad, a, a_scales, offsets = ctx.saved_tensors
    of_grad = of_a = None
    if ctx.needs_input_grad[0]:
        of_grad = _grouped_gemm(a, a_scales, ctx.a_block, upstream, None, (1, 128), offsets, grad.dtype)
    if ctx.needs_input_grad[1]:
        of_a = _grouped_gemm_dgrad(grad, upstream, None, (1, 128), offsets, a.dtype)
    return of_grad, of_a, None, None, None


_grouped_gemm_dgrad = define(
    "grouped_gemm_dgrad(Tensor grad_out, Tensor b, Tensor? b_scales, int[2] b_block, Tensor expert_offsets, "
    "ScalarType out_dtype) -> Tensor",
    _dgrad_kernel,
    _dgrad_fake,
    backward=_dgrad_grad,
    save=_dgrad_save,
)
_grouped_gemm_wgrad = define(
    "grouped_gemm_wgrad(Tensor grad_out, Tensor a, Tensor? a_scales, int[2] a_block, Tensor expert_offsets) -> Tensor",
    _wgrad_kernel,
    _wgrad_fake,
    backward=_wgrad_grad,
    save=_wgrad_save,
)
_grouped_gemm = define(
    "grouped_gemm(Tensor a, Tensor? a_scales, int[2] a_block, Tensor b, Tensor? b_scales, int[2] b_block, "
    "Tensor expert_offsets, ScalarType? out_dtype) -> Tensor",
    _gemm_kernel,
    _gemm_fake,
    backward=_gemm_grad,
    save=_gemm_save,
    autocast=_autocast,
)
_grouped_gemm_masked = define(
    "grouped_gemm_masked(Tensor a, Tensor? a_scales, int[2] a_block, Tensor b, Tensor? b_scales, int[2] b_block, "
    "Tensor tokens_per_expert, ScalarType? out_dtype) -> Tensor",
    _masked_kernel,
    _masked_fake,
    autocast=_autocast,
)
