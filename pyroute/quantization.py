"""FP8 with block scales: quantize_fp8, dequantize_fp8 and the array that carries both codes and scales."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from . import _backend, _check
from ._array import quantization as _array
from ._device import arrays as _arrays
from ._device import grouped_gemm as _device_gemm
from ._device import quantization as _device

Array = Any
Fp8Format = Literal["e4m3", "e5m2"]
ScaleFormat = Literal["float32", "ue8m0"]

_FORMATS = tuple(_array.FORMATS)
INPUT_TYPES = ("float32", "bfloat16", "float16", "float64")
_EXACT_IN_FLOAT32 = ("bfloat16", "float8_e8m0fnu")  # scale types of checkpoints that widen without rounding


def _block(function: str, block: Any) -> tuple[int, int]:
    if type(block) is tuple and len(block) == 2:
        rows, cols = block
        if type(rows) is type(cols) is int and 0 < rows < 2**31 and 0 < cols < 2**31:
            return block
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise _check.type_error(function, "block", "a pair (rows, cols)", _check.describe(block))
    rows, cols = (_check.integer(function, "block", extent, 1, 2**31 - 1) for extent in block)
    return rows, cols


def _row_block_starts(expert_offsets: Array, block_rows: int) -> Array:
    xp = _backend.array_module(expert_offsets)
    starts = xp.zeros(expert_offsets.shape, xp.int64)
    starts[1:] = xp.cumsum(-(-xp.diff(expert_offsets) // block_rows))
    return starts


def _scales_shape(shape: tuple[int, ...], block: tuple[int, int], expert_offsets: Array | None) -> tuple[int, ...]:
    *lead, rows, cols = shape
    row_blocks = -(-rows // block[0])
    if expert_offsets is not None and _check.has_values(expert_offsets):
        row_blocks = int(_row_block_starts(expert_offsets, block[0])[-1])
    elif expert_offsets is not None:  # as many as there can be
        row_blocks = (rows + (expert_offsets.shape[0] - 1) * (block[0] - 1)) // block[0]
    return (*lead, row_blocks, -(-cols // block[1]))


def _segments(expert_offsets: Array | None, block_rows: int) -> tuple[Array, Array] | None:
    return None if expert_offsets is None else (expert_offsets, _row_block_starts(expert_offsets, block_rows))


def _within(block: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """The same blocks with extents that the shape bounds."""
    (block_rows, block_cols), (rows, cols) = block, shape[-2:]
    if block_rows <= rows and block_cols <= cols:
        return block
    return min(block_rows, max(rows, 1)), min(block_cols, max(cols, 1))


def _matrices(x: Array) -> Array:
    """A stack [..., rows, cols] as [num_matrices, rows, cols]."""
    return x[None] if x.ndim == 2 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


@dataclasses.dataclass(frozen=True, eq=False)
class Fp8Array:
    """FP8 codes and the scale of each block; the value of an element is ``code * scale``.

    Checkpoints in DeepSeek-V3's layout are taken as they are: ``Fp8Array(weight, weight_scale_inv, (128, 128))``.

    Parameters
    ----------
    codes : uint8 or ml_dtypes float8 [..., rows, cols]
        At least two axes. On NumPy ``.codes`` is a float8 view (same memory), on CuPy, which has no such type, uint8.
    scales : float32 [..., ceil(rows / block[0]), ceil(cols / block[1])]
        One per block, the last ones of an axis possibly partial; bfloat16 and float8_e8m0fnu are widened.
    block : (int, int)
        Rows and columns of a block in the last two axes: (1, 128) for activations, (128, 128) for weights.
    format : {"e4m3", "e5m2"}
    expert_offsets : integer [num_experts + 1], optional
        For two axes: blocks restart at each of these rows, as ``quantize_fp8(..., expert_offsets=)`` writes them. The
        scales of expert e are then rows ``row_block_starts[e]`` to ``row_block_starts[e + 1]`` of ``scales``; rows from
        ``expert_offsets[-1]`` on have no scale and are zero. On a GPU, where nothing waits for the offsets, ``scales``
        has as many rows as there can be, ``(rows + num_experts * (block[0] - 1)) // block[0]``; those behind are 1.

    Attributes
    ----------
    codes_transposed : uint8 [..., cols, rows up to a multiple of 128] or None
        Set by :meth:`with_transposed_codes`.

    Raises
    ------
    TypeError, ValueError
        In one sentence, when codes, scales and block do not fit together: a truncated scale array never loads.

    Examples
    --------
    >>> Fp8Array(np.zeros((3, 200), np.uint8), np.ones((3, 2), np.float32)).shape
    (3, 200)
    """

    codes: Array
    scales: Array
    block: tuple[int, int] = (1, 128)
    format: Fp8Format = "e4m3"
    expert_offsets: Array | None = None
    codes_transposed: Array | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check.one_of("Fp8Array", "format", self.format, _FORMATS)
        object.__setattr__(self, "block", _block("Fp8Array", self.block))
        float8 = _backend.FLOAT8[self.format]
        codes = _backend.as_array("Fp8Array", "codes", self.codes, ("uint8", _check.DTYPE_NAMES[float8]))
        if codes.ndim < 2:
            raise _check.value_error("Fp8Array", "codes", "of at least two axes", list(codes.shape))
        object.__setattr__(self, "codes", codes if _check.is_cupy(codes) else codes.view(float8))

        on_device = isinstance(self.scales, _arrays.DeviceArray)  # which does no arithmetic
        types = ("float32",) if on_device else ("float32", *_EXACT_IN_FLOAT32)
        scales = _backend.as_array("Fp8Array", "scales", self.scales, types)
        object.__setattr__(self, "scales", scales if on_device else scales.astype("float32", copy=False))

        if self.expert_offsets is not None:
            if codes.ndim != 2:
                raise _check.value_error("Fp8Array", "codes", "of two axes with expert_offsets", list(codes.shape))
            offsets = _backend.as_array("Fp8Array", "expert_offsets", self.expert_offsets)
            object.__setattr__(self, "expert_offsets", _check.expert_offsets("Fp8Array", offsets, codes.shape[0]))
        _backend.check_together("Fp8Array", codes, scales, self.expert_offsets)
        expected = _scales_shape(codes.shape, self.block, self.expert_offsets)
        if scales.shape != expected:
            where = f"of shape {list(expected)} for codes {list(codes.shape)} in blocks of {self.block}"
            raise _check.value_error("Fp8Array", "scales", where, list(scales.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        shape: tuple[int, ...] = self.codes.shape
        return shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, transposed ones too, and scales."""
        transposed = 0 if self.codes_transposed is None else self.codes_transposed.nbytes
        return int(self.codes.nbytes + transposed + self.scales.nbytes)

    @property
    def row_block_starts(self) -> Array | None:
        """First row of ``scales`` of each expert, int64 [num_experts + 1]; None without expert_offsets."""
        self._needs_library("row_block_starts")
        return None if self.expert_offsets is None else _row_block_starts(self.expert_offsets, self.block[0])

    def _needs_library(self, function: str) -> None:
        if isinstance(self.scales, _arrays.DeviceArray):
            raise _check.type_error(function, "scales", "a NumPy or CuPy array", _check.describe(self.scales))

    def __getitem__(self, index: int | slice) -> Fp8Array:
        """One matrix, or a run of matrices, of a stack [..., rows, cols]; shares memory."""
        if self.ndim < 3:
            expected = "of three axes or more to be indexed"
            raise _check.type_error("Fp8Array", "codes", expected, f"shape {list(self.shape)}")
        if isinstance(index, bool) or not isinstance(index, (int, np.integer, slice)):
            raise _check.type_error("Fp8Array", "index", "an integer or a slice", _check.describe(index))
        index = index if isinstance(index, slice) else int(index)
        return Fp8Array(self.codes[index], self.scales[index], self.block, self.format)

    def dequantize(self, dtype: Any = "float32") -> Array:
        """:func:`dequantize_fp8` of this array."""
        return dequantize_fp8(self, dtype)

    def with_transposed_codes(self) -> Fp8Array:
        """The same array, for weights [E, N, K] that more than one dgrad will read.

        Hopper's FP8 products need both operands along the contraction, so ``grouped_gemm_dgrad`` and ``moe_backward``
        transpose the codes of such weights in every call. Given this array they read ``codes_transposed``, which is
        made here, ``E * K * N`` bytes (N up to a multiple of 128), and give the same bytes. It does not follow later
        changes of the codes: an array whose codes have been written to is to be made again. ``self`` where no kernel
        reads transposed codes: on other cards, on the CPU, and for other types, blocks and sizes.
        """
        if _backend.choose("with_transposed_codes", None, self.codes, self.scales) != "cuda":
            return self
        return beside_transposed(self, _device_gemm.transposed_codes(self))

    def scales_column_major(self) -> Array:
        """The scales in the layout that Hopper's copy engine (TMA) reads, as DeepGEMM expects them.

        Same shape and values; in memory the row index runs fastest, and each column starts at a multiple of 16 bytes
        (four floats), the floats between being zero.
        """
        self._needs_library("scales_column_major")
        xp = _backend.array_module(self.scales)
        *lead, rows, cols = self.scales.shape
        match _backend.choose("scales_column_major", None, self.scales):
            case "cuda":
                memory = _device.transposed(self.scales, -(-rows // 4) * 4)
            case _:
                memory = xp.zeros((*lead, cols, -(-rows // 4) * 4), xp.float32)
                memory[..., :rows] = xp.swapaxes(self.scales, -1, -2)
        return xp.swapaxes(memory[..., :rows], -1, -2)


def unchecked_fp8(
    codes: Array, scales: Array, block: tuple[int, int], format: Fp8Format, expert_offsets: Array | None
) -> Fp8Array:
    """An Fp8Array of arrays that were made here a moment ago: checking them costs as much as a row of codes."""
    q = object.__new__(Fp8Array)
    fields = {"codes": codes, "scales": scales, "block": block, "format": format, "expert_offsets": expert_offsets}
    object.__setattr__(q, "__dict__", fields)
    return q


def beside_transposed(q: Fp8Array, codes_transposed: Array | None) -> Fp8Array:
    """``q`` with what :meth:`Fp8Array.with_transposed_codes` made of the same codes."""
    if codes_transposed is None:
        return q
    both = unchecked_fp8(q.codes, q.scales, q.block, q.format, None)
    object.__setattr__(both, "codes_transposed", codes_transposed)
    return both


def quantize_fp8(
    x: Any,
    *,
    block: tuple[int, int] = (1, 128),
    format: Fp8Format = "e4m3",
    scale_format: ScaleFormat = "float32",
    expert_offsets: Any = None,
    backend: str | None = None,
) -> Fp8Array:
    """Quantise to FP8 with one scale per block.

    Per block: ``amax`` is the largest finite magnitude, ``scale = amax / 448`` (57344 for e5m2) in one float32 division
    and ``code = cast(x * (1 / scale))``. The cast rounds to nearest even, saturates finite values and turns NaN and
    infinities into the one NaN code (0x7f, 0x7e for e5m2), so that an overflow stays visible. A block whose amax is
    below ``448 * 2**-126``, an all-zero one included, has scale 1.0. Codes and scales are the same bytes on every
    backend.

    Parameters
    ----------
    x : float32, bfloat16, float16 or float64 [..., rows, cols]
        At least two axes. float64 is rounded to float32 first.
    block : (int, int)
        Rows and columns of a block, any positive numbers; the last block of an axis may be partial. (1, 128): along the
        contraction, for activations. (128, 128): weights. (128, 1): along tokens, for the operands of wgrad.
    format : {"e4m3", "e5m2"}
        float8_e4m3fn or float8_e5m2.
    scale_format : {"float32", "ue8m0"}
        ue8m0 rounds each scale up to a power of two.
    expert_offsets : integer [num_experts + 1], optional
        Row blocks restart at each of these rows, so that no block mixes two experts (x must have two axes). Starts at
        0, does not decrease, ends at or below rows. Rows from the last offset on are not read and get codes 0.

    Returns
    -------
    Fp8Array
        With scales [..., ceil(rows / block[0]), ceil(cols / block[1])]; with expert_offsets the row blocks of expert 0,
        then those of expert 1, and so on (see ``Fp8Array.row_block_starts``).

    Notes
    -----
    Reads x once from memory and writes a byte per element. Scheme: DeepSeek-V3 technical report, section 3.3.2.
    """
    x = _backend.as_array("quantize_fp8", "x", x, INPUT_TYPES)
    if x.ndim < 2:
        raise _check.value_error("quantize_fp8", "x", "of at least two axes [..., rows, cols]", list(x.shape))
    block = _block("quantize_fp8", block)
    _check.one_of("quantize_fp8", "format", format, _FORMATS)
    _check.one_of("quantize_fp8", "scale_format", scale_format, ("float32", "ue8m0"))
    if expert_offsets is not None:
        if x.ndim != 2:
            raise _check.value_error("quantize_fp8", "x", "of two axes with expert_offsets", list(x.shape))
        expert_offsets = _backend.as_array("quantize_fp8", "expert_offsets", expert_offsets)
        expert_offsets = _check.expert_offsets("quantize_fp8", expert_offsets, x.shape[0])
    power_of_two = scale_format == "ue8m0"
    cut = _within(block, x.shape)

    match _backend.choose("quantize_fp8", backend, x, expert_offsets):
        case "cpu":
            codes = _backend.empty(x.shape, _backend.FLOAT8[format])
            scales = _backend.empty(_scales_shape(x.shape, block, expert_offsets), _check.DTYPES["float32"])
            _backend.core.quantize_fp8(
                _matrices(x), cut, format, power_of_two, expert_offsets, _matrices(codes), _matrices(scales)
            )
        case "cuda":
            shape = _scales_shape(x.shape, block, expert_offsets)
            codes, scales = _device.quantize(x, cut, format, power_of_two, expert_offsets, shape)
        case _:
            segments = _segments(expert_offsets, cut[0])
            codes, scales = _array.quantize(_backend.array_module(x), x, cut, format, power_of_two, segments)
            codes = codes if _check.is_cupy(codes) else codes.view(_backend.FLOAT8[format])
    return unchecked_fp8(codes, scales, block, format, expert_offsets)


def quantize_segments(
    rows: Array, block: tuple[int, int], scale_format: ScaleFormat, expert_offsets: Array
) -> Fp8Array:
    """``rows`` [R, cols] of a layer on a GPU in e4m3; those past the last segment are neither read nor written.

    Blocks of several rows restart at the segments.
    """
    shape, cut = _scales_shape(rows.shape, block, expert_offsets), _within(block, rows.shape)
    codes, scales = _device.quantize(rows, cut, "e4m3", scale_format == "ue8m0", expert_offsets, shape, True)
    return unchecked_fp8(codes, scales, block, "e4m3", expert_offsets if block[0] > 1 else None)


def dequantize_fp8(q: Fp8Array, dtype: Any = "float32", *, backend: str | None = None) -> Array:
    """The values of an FP8 array: ``code * scale`` in float32, rounded once to ``dtype``.

    Parameters
    ----------
    q : Fp8Array
    dtype : {"float32", "bfloat16", "float16", "float64"} or the dtype itself

    Returns
    -------
    array of q.shape
        NaN codes give the canonical quiet NaN. Rows past the last expert offset are zero.
    """
    if not isinstance(q, Fp8Array):
        raise _check.type_error("dequantize_fp8", "q", "an Fp8Array", _check.describe(q))
    target = _backend.float_dtype("dequantize_fp8", "dtype", dtype, INPUT_TYPES)
    codes, cut = q.codes.view(np.uint8), _within(q.block, q.shape)
    match _backend.choose("dequantize_fp8", backend, codes, q.scales, q.expert_offsets):
        case "cpu":
            out = _backend.empty(q.shape, target)
            _backend.core.dequantize_fp8(
                _matrices(codes), _matrices(q.scales), cut, q.format, q.expert_offsets, _matrices(out)
            )
        case "cuda":
            out = _device.dequantize(codes, q.scales, cut, q.format, q.expert_offsets, target)
        case _:
            segments, xp = _segments(q.expert_offsets, cut[0]), _backend.array_module(codes)
            out = _array.dequantize(xp, codes, q.scales, cut, q.format, segments, target)
    return out
