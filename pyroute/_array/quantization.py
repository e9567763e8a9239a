"""FP8 with block scales, as array code: one cast per format, one scale per block.

The cast is written here rather than left to a library because libraries disagree where it matters: at overflow one
saturates, another gives NaN. csrc/cpu/fp8.h is the same program over lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any


class Format(NamedTuple):
    """An FP8 format: the exponent has a bias and the mantissa some bits; one code stands for all that is not finite."""

    mantissa_bits: int
    exponent_bias: int
    max_code: int
    nan_code: int
    max_value: float


FORMATS = {
    "e4m3": Format(3, 7, 0x7E, 0x7F, 448.0),
    "e5m2": Format(2, 15, 0x7B, 0x7E, 57344.0),
}


def cast(xp: Any, x: Array, format: str) -> Array:
    """Codes (uint8) of float32 ``x``: nearest even, finite values saturate, NaN and infinities become the NaN code."""
    f = FORMATS[format]
    smallest_normal = (128 - f.exponent_bias) << 23
    bits = x.view(xp.uint32)
    magnitude = bits & 0x7FFFFFFF
    capped = xp.minimum(magnitude, int(np.float32(f.max_value).view(np.uint32)))
    # One float32 addition rounds: with 2**(23 - mantissa_bits) units above x's exponent added, the sum keeps
    # mantissa_bits of x and its low bits count the steps. Below the smallest normal exponent the steps stay that one's.
    exponent = xp.maximum(capped & 0x7F800000, smallest_normal)
    magic = exponent + ((23 - f.mantissa_bits) << 23)
    steps = (capped.view(xp.float32) + magic.view(xp.float32)).view(xp.uint32) - magic
    code = steps + ((exponent - smallest_normal) >> (23 - f.mantissa_bits)) | ((bits >> 24) & 0x80)
    return xp.where(magnitude >= 0x7F800000, f.nan_code, code).astype(xp.uint8)


def code_values(format: str) -> Array:
    """The float32 value of each of the 256 codes; every NaN is the canonical one."""
    f = FORMATS[format]
    code = np.arange(256)
    magnitude = code & 0x7F
    exponent = magnitude >> f.mantissa_bits
    mantissa = magnitude & ((1 << f.mantissa_bits) - 1)
    hidden = np.where(exponent > 0, 1 << f.mantissa_bits, 0)
    value = np.ldexp(hidden + mantissa, np.maximum(exponent, 1) - f.exponent_bias - f.mantissa_bits)
    value = np.where(code & 0x80, -value, value)
    value[magnitude > f.max_code] = np.nan
    if format == "e5m2":  # the IEEE-like one of the two: 0x7c is infinity
        value[0x7C], value[0xFC] = np.inf, -np.inf
    return value.astype(np.float32)


def block_scales(xp: Any, amax: Array, format: str, power_of_two: bool) -> Array:
    """``amax / max_value``, or 1.0 where that would be subnormal; ``power_of_two`` rounds up to the next one."""
    max_value = np.float32(FORMATS[format].max_value)
    scales = xp.where(amax < max_value * np.float32(2.0**-126), np.float32(1), amax / max_value)
    if power_of_two:
        scales = ((scales.view(xp.uint32) + 0x7FFFFF) & 0x7F800000).view(xp.float32)
    return scales


def block_of_row(xp: Any, num_rows: int, block_rows: int, segments: tuple[Array, Array] | None) -> tuple[Array, Array]:
    """Each row's block and its place in the block; ``segments`` are (expert_offsets, row_block_starts)."""
    row = xp.arange(num_rows)
    if segments is None:
        return row // block_rows, row % block_rows
    offsets, block_starts = segments
    expert = xp.searchsorted(offsets[1:], row, side="right")
    row = row - offsets[expert]
    return block_starts[expert] + row // block_rows, row % block_rows


def quantize(
    xp: Any,
    x: Array,
    block: tuple[int, int],
    format: str,
    power_of_two: bool,
    segments: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """Codes (uint8, the shape of x) and scales of ``x`` [..., rows, cols]; rows past the last segment get codes 0."""
    with np.errstate(all="ignore"):
        *lead, rows, cols = x.shape
        used = rows if segments is None else int(segments[0][-1])
        row_blocks = -(-rows // block[0]) if segments is None else int(segments[1][-1])
        col_blocks = -(-cols // block[1])
        row_block, row_in_block = block_of_row(xp, used, block[0], segments)
        x = x[..., :used, :].astype(xp.float32)

        padded = xp.zeros((*lead, row_blocks * block[0], col_blocks * block[1]), xp.float32)
        padded[..., row_block * block[0] + row_in_block, :cols] = xp.where(xp.isfinite(x), xp.abs(x), np.float32(0))
        amax = padded.reshape(*lead, row_blocks, block[0], col_blocks, block[1]).max(axis=(-3, -1))

        scales = block_scales(xp, amax, format, power_of_two)
        codes = xp.zeros((*lead, rows, cols), xp.uint8)
        inverse = per_element(xp, np.float32(1) / scales, row_block, block[1], cols)
        codes[..., :used, :] = cast(xp, x * inverse, format)
    return codes, scales


def per_element(xp: Any, block_values: Array, row_block: Array, block_cols: int, cols: int) -> Array:
    """Block values spread over the elements of their blocks."""
    return xp.take(xp.take(block_values, row_block, axis=-2), xp.arange(cols) // block_cols, axis=-1)


def dequantize(
    xp: Any,
    codes: Array,
    scales: Array,
    block: tuple[int, int],
    format: str,
    segments: tuple[Array, Array] | None,
    dtype: Any,
) -> Array:
    """``code * scale`` in float32, rounded once to ``dtype``; rows past the last segment are zero."""
    with np.errstate(all="ignore"):
        *lead, rows, cols = codes.shape
        used = rows if segments is None else int(segments[0][-1])
        row_block, _ = block_of_row(xp, used, block[0], segments)
        values = xp.asarray(code_values(format))[codes[..., :used, :]]
        values = values * per_element(xp, scales, row_block, block[1], cols)
        values = xp.where(xp.isnan(values), np.float32(np.nan), values)
        result = xp.zeros((*lead, rows, cols), dtype)
        result[..., :used, :] = values.astype(dtype)
    return result
