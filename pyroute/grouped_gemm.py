"""Grouped GEMM: the rows of each expert's segment times that expert's matrix, forward and backward."""

from __future__ import annotations

from typing import Any

from . import _backend, _check
from ._array import grouped_gemm as _array
from ._device import grouped_gemm as _device
from .quantization import Fp8Array

Array = Any
Operand = Any  # an array or an Fp8Array

OPERAND_TYPES = ("float32", "bfloat16")


def grouped_gemm(
    a: Operand,
    b: Operand,
    expert_offsets: Any = None,
    *,
    tokens_per_expert: Any = None,
    out_dtype: Any = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """``out[r] = b[e] @ a[r]`` for every row r of expert e's segment.

    Parameters
    ----------
    a : float32, bfloat16 or Fp8Array [R, K], or [E, M, K]
        Rows sorted by expert, as ``permute`` writes them; or, with ``tokens_per_expert``, room for M rows an expert.
    b : float32, bfloat16 or Fp8Array [E, N, K]
        One weight matrix per expert, output features first. Any mix of types with ``a``.
    expert_offsets : integer [E + 1]
        Expert e owns rows ``expert_offsets[e]`` to ``expert_offsets[e + 1]``: from 0, not decreasing, to at most R.
    tokens_per_expert : integer [E], 0 to M
        In place of ``expert_offsets``, the masked layout: expert e owns the first ``tokens_per_expert[e]`` rows of
        ``a[e]``. What lies behind them takes no part in any result, and the rows of ``out`` behind them are not
        written: in a fresh array they hold anything. A graph of a decoding step keeps its shapes this way, and work is
        done for the rows that exist.
    out_dtype : {"float32", "bfloat16"}, optional
        By default that of ``out``, else float32 if ``a`` or ``b`` is float32, else bfloat16.
    out : array [R, N], or [E, M, N], optional
        C-contiguous; every row is written, in the masked layout every row that exists. Must not overlap an input.
    backend : str, optional

    Returns
    -------
    array [R, N], or [E, M, N]
        Rows past the last offset are zero. A zero row of ``a``, such as padding, gives a zero row where the weights are
        finite. NaN results are the canonical quiet NaN.

    Notes
    -----
    Each element is within ``c * 2**-24 * (abs(a) @ abs(b).T)``, plus half an ULP of the output type, of the exact
    product of the dequantised operands: c is 4 for products of similar size and ``23 + K / 128`` for any data. Its bits
    depend on its row, its column and K alone: not on the other rows, the segment's length, the number of threads or, on
    the cpu backend, the instruction set (docs/numerics.md has the order of the sum). An FP8 operand whose blocks are a
    multiple of 128 wide along K keeps its scales out of the inner sum; any other block shape is legal and multiplied in
    first.

    Cost: 2 R N K floating-point operations; for a few rows per expert, one read of the weights of the experts that have
    rows.

    Examples
    --------
    >>> a, b = np.ones((3, 4), np.float32), np.ones((2, 5, 4), np.float32)
    >>> grouped_gemm(a, b, np.array([0, 1, 3])).shape
    (3, 5)
    """
    name = "grouped_gemm"
    given = (a, b, expert_offsets)
    if tokens_per_expert is not None:
        if expert_offsets is not None:
            got = _check.describe(tokens_per_expert)
            raise _check.value_error(name, "tokens_per_expert", "None together with expert_offsets", got)
        return _masked(a, b, tokens_per_expert, out_dtype, out, backend)
    a = _operand(name, "a", a, (("R", None), ("K", None)))
    b = _operand(name, "b", b, (("E", None), ("N", None), ("K", a.shape[1])))
    offsets = _offsets(name, expert_offsets, a.shape[0], b.shape[0])
    chosen = _backend.choose(name, backend, *_memory(a), *_memory(b), offsets, out)
    _check_segments(name, "a", a, offsets)
    out = _output(name, a, b, given, out_dtype, out, (("R", a.shape[0]), ("N", b.shape[1])))
    match chosen:
        case "cpu":
            _backend.core.grouped_gemm(_native(a), _native(b), offsets, out, _check.DTYPE_NAMES[out.dtype], False)
        case "cuda":
            _device.grouped_gemm(a, b, offsets, out, False)
        case _:
            _array.grouped_gemm(_backend.array_module(out), a, b, offsets, out)
    return out


def _masked(a: Operand, b: Operand, tokens: Any, out_dtype: Any, out: Array | None, backend: str | None) -> Array:
    name = "grouped_gemm"
    given = (a, b, tokens)
    a = _operand(name, "a", a, (("E", None), ("M", None), ("K", None)))
    experts, room, k = a.shape
    b = _operand(name, "b", b, (("E", experts), ("N", None), ("K", k)))
    tokens = _check.tokens_per_expert(
        name, _backend.as_array(name, "tokens_per_expert", tokens, _check.INTEGERS, (("E", experts),)), room
    )
    chosen = _backend.choose(name, backend, *_memory(a), *_memory(b), tokens, out)
    out = _output(name, a, b, given, out_dtype, out, (("E", experts), ("M", room), ("N", b.shape[1])))
    match chosen:
        case "cpu":
            _backend.core.grouped_gemm_masked(_native(a), _native(b), tokens, out, _check.DTYPE_NAMES[out.dtype])
        case "cuda":
            _device.grouped_gemm_masked(a, b, tokens, out)
        case _:
            _array.grouped_gemm_masked(_backend.array_module(out), a, b, tokens, out)
    return out


def grouped_gemm_dgrad(
    grad_out: Operand,
    b: Operand,
    expert_offsets: Any,
    *,
    out_dtype: Any = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Gradient of ``grouped_gemm`` with respect to ``a``: ``out[r] = grad_out[r] @ b[e]``.

    Parameters
    ----------
    grad_out : float32, bfloat16 or Fp8Array [R, N]
    b : float32, bfloat16 or Fp8Array [E, N, K]
        As in the forward call.
    expert_offsets, out_dtype, out, backend
        As in :func:`grouped_gemm`; ``out`` is [R, K].

    Returns
    -------
    array [R, K]
        Rows past the last offset are zero; zero rows of ``grad_out`` give zero rows.

    Notes
    -----
    The bound and the independence of the batch are those of :func:`grouped_gemm`, the contraction running along N.
    """
    name = "grouped_gemm_dgrad"
    given = (grad_out, b, expert_offsets)
    grad_out = _operand(name, "grad_out", grad_out, (("R", None), ("N", None)))
    b = _operand(name, "b", b, (("E", None), ("N", grad_out.shape[1]), ("K", None)))
    offsets = _offsets(name, expert_offsets, grad_out.shape[0], b.shape[0])
    chosen = _backend.choose(name, backend, *_memory(grad_out), *_memory(b), offsets, out)
    _check_segments(name, "grad_out", grad_out, offsets)
    out = _output(name, grad_out, b, given, out_dtype, out, (("R", grad_out.shape[0]), ("K", b.shape[2])))
    match chosen:
        case "cpu":
            _backend.core.grouped_gemm(_native(grad_out), _native(b), offsets, out, _check.DTYPE_NAMES[out.dtype], True)
        case "cuda":
            _device.grouped_gemm(grad_out, b, offsets, out, True)
        case _:
            _array.grouped_gemm_dgrad(_backend.array_module(out), grad_out, b, offsets, out)
    return out


def grouped_gemm_wgrad(
    grad_out: Operand,
    a: Operand,
    expert_offsets: Any,
    *,
    accumulate_into: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Gradient of ``grouped_gemm`` with respect to ``b``: ``out[e] = grad_out[segment e].T @ a[segment e]``.

    Parameters
    ----------
    grad_out : float32, bfloat16 or Fp8Array [R, N]
    a : float32, bfloat16 or Fp8Array [R, K]
        As in the forward call. FP8 operands quantised with ``block=(128, 1)`` and the same ``expert_offsets`` keep
        their scales out of the inner sum; any other block shape is legal and multiplied in first.
    expert_offsets : integer [E + 1]
        As in :func:`grouped_gemm`. Rows past the last offset are not read.
    accumulate_into : float32 [E, N, K], optional
        Added to in place and returned: ``new = old + gradient``, one rounding per element. Experts without rows keep
        their bytes.
    out : float32 [E, N, K], optional
        Overwritten and returned; not together with ``accumulate_into``.
    backend : str, optional

    Returns
    -------
    float32 [E, N, K]
        Exactly zero for experts without rows.

    Notes
    -----
    The contraction runs over the rows of a segment, in blocks of 128 that start anew in each segment, so an expert's
    gradient depends on the rows of its own segment and their order alone. Error as in :func:`grouped_gemm`.
    """
    name = "grouped_gemm_wgrad"
    given = (grad_out, a, expert_offsets)
    grad_out = _operand(name, "grad_out", grad_out, (("R", None), ("N", None)))
    a = _operand(name, "a", a, (("R", grad_out.shape[0]), ("K", None)))
    offsets = _offsets(name, expert_offsets, a.shape[0], None)
    if accumulate_into is not None and out is not None:
        raise _check.value_error(name, "out", "None together with accumulate_into", _check.describe(out))
    accumulate = accumulate_into is not None
    argument, out = ("accumulate_into", accumulate_into) if accumulate else ("out", out)
    chosen = _backend.choose(name, backend, *_memory(grad_out), *_memory(a), offsets, out)
    _check_segments(name, "grad_out", grad_out, offsets)
    _check_segments(name, "a", a, offsets)
    axes = (("E", offsets.shape[0] - 1), ("N", grad_out.shape[1]), ("K", a.shape[1]))
    if out is None:
        out = _backend.empty_beside(offsets, tuple(extent for _, extent in axes), "float32")
    else:
        memory = (*given, *_memory(grad_out), *_memory(a))
        _check.output(name, argument, out, _check.DTYPES["float32"], axes, *memory)
    match chosen:
        case "cpu":
            _backend.core.grouped_gemm_wgrad(_native(grad_out), _native(a), offsets, out, accumulate)
        case "cuda":
            _device.grouped_gemm_wgrad(grad_out, a, offsets, out, accumulate)
        case _:
            _array.grouped_gemm_wgrad(_backend.array_module(out), grad_out, a, offsets, out, accumulate)
    return out


def _operand(function: str, argument: str, x: Any, axes: tuple[_check.Axis, ...]) -> Operand:
    """An array or Fp8Array with these axes."""
    if isinstance(x, Fp8Array):
        _check.shape(function, argument, x, axes)
        return x
    return _backend.as_array(function, argument, x, OPERAND_TYPES, axes)


def _memory(x: Operand) -> tuple[Array, ...]:
    return (x.codes, x.scales, x.expert_offsets) if isinstance(x, Fp8Array) else (x,)


def _native(x: Operand) -> tuple[Any, ...]:
    """What csrc/bindings/grouped_gemm.cpp takes apart: memory, type, scales, their block, whether blocks restart."""
    if isinstance(x, Fp8Array):
        return (x.codes, x.format, x.scales, *x.block, x.expert_offsets is not None)
    return (x, _check.DTYPE_NAMES[x.dtype], None, 1, 1, False)


def _offsets(function: str, expert_offsets: Any, num_rows: int, num_experts: int | None) -> Array:
    axes = (("num_experts + 1", None if num_experts is None else num_experts + 1),)
    offsets = _backend.as_array(function, "expert_offsets", expert_offsets, _check.INTEGERS, axes)
    return _check.expert_offsets(function, offsets, num_rows, num_experts)


def _check_segments(function: str, argument: str, x: Operand, offsets: Array) -> None:
    """Scale blocks that restart must restart where the segments of this call do."""
    if not isinstance(x, Fp8Array) or x.expert_offsets is None:
        return
    same = x.expert_offsets.shape == offsets.shape
    if same and (mine := _check.values(x.expert_offsets)) is not None:
        theirs = _check.values(offsets)
        same = theirs is None or bool((mine == theirs).all())
    if not same:
        raise _check.value_error(
            function, argument, "quantised with the expert_offsets of this call", "an Fp8Array with other offsets"
        )


def _output(
    function: str,
    a: Operand,
    b: Operand,
    given: tuple[Any, ...],
    out_dtype: Any,
    out: Array | None,
    axes: tuple[tuple[str, int], ...],
) -> Array:
    float32 = _check.DTYPES["float32"]
    dtype = None if out is None else getattr(out, "dtype", None)
    if out_dtype is not None:
        dtype = _backend.float_dtype(function, "out_dtype", out_dtype, OPERAND_TYPES)
    elif dtype is None or dtype not in (float32, _backend.BFLOAT16):
        wide = (not isinstance(a, Fp8Array) and a.dtype == float32) or (
            not isinstance(b, Fp8Array) and b.dtype == float32
        )
        dtype = float32 if wide else _backend.BFLOAT16
    if out is not None:
        _check.output(function, "out", out, dtype, axes, *given, *_memory(a), *_memory(b))
        return out
    return _backend.empty_beside(_memory(a)[0], tuple(extent for _, extent in axes), dtype)
