"""FP8 by its definition: a table of every value, the nearest of two neighbours, loops over blocks."""

from __future__ import annotations

import math

import numpy as np

FORMATS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}  # exponent bits, mantissa bits, exponent bias
NAN_CODE = {"e4m3": 0x7F, "e5m2": 0x7E}
MAX_CODE = {"e4m3": 0x7E, "e5m2": 0x7B}


def code_value(code: int, format: str) -> float:
    _, mantissa_bits, bias = FORMATS[format]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code & 0x7F) >> mantissa_bits
    fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    if format == "e4m3" and code & 0x7F == 0x7F:
        return math.nan
    if format == "e5m2" and exponent == 31:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


def finite_values(format: str) -> np.ndarray:
    """The non-negative finite values, rising; the index is the code."""
    return np.array([code_value(code, format) for code in range(MAX_CODE[format] + 1)])


def cast(x: np.ndarray, format: str) -> np.ndarray:
    """Codes of float32 values: the nearer neighbour, the even code between two equally near ones."""
    values = finite_values(format)
    flat = x.astype(np.float64).ravel()
    finite = np.isfinite(flat)
    magnitude = np.where(finite, np.abs(flat), 0)
    low = np.searchsorted(values, magnitude, side="right") - 1
    high = np.minimum(low + 1, MAX_CODE[format])
    to_low, to_high = magnitude - values[low], np.abs(values[high] - magnitude)
    up = (to_high < to_low) | ((to_high == to_low) & (low % 2 == 1))
    code = np.where(up, high, low) + np.where(np.signbit(flat), 0x80, 0)
    return np.where(finite, code, NAN_CODE[format]).astype(np.uint8).reshape(x.shape)


def block_scale(values: np.ndarray, format: str, scale_format: str) -> np.float32:
    amax = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    largest = code_value(MAX_CODE[format], format)
    if amax < largest * 2.0**-126:
        return np.float32(1.0)
    scale = np.float32(amax / largest)  # amax has 24 bits: rounding the float64 quotient again does not change it
    if scale_format == "ue8m0":
        mantissa, exponent = math.frexp(float(scale))
        scale = np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))
    return scale


def row_blocks(num_rows: int, block_rows: int, expert_offsets) -> list[tuple[int, int]]:
    """(first row, end row) of each block of rows, in the order of the scales."""
    ends = [num_rows] if expert_offsets is None else [int(end) for end in expert_offsets[1:]]
    blocks, start = [], 0
    for end in ends:
        blocks += [(row, min(row + block_rows, end)) for row in range(start, end, block_rows)]
        start = end
    return blocks


def quantize(x, block, format, scale_format="float32", expert_offsets=None):
    """(codes, scales); rows in no block have codes 0."""
    blocks = row_blocks(x.shape[-2], block[0], expert_offsets)
    scales = np.zeros((*x.shape[:-2], len(blocks), -(-x.shape[-1] // block[1])), np.float32)
    scaled = np.zeros(x.shape, np.float32)
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        for index in np.ndindex(scales.shape):
            start, end = blocks[index[-2]]
            part = (*index[:-2], slice(start, end), slice(index[-1] * block[1], (index[-1] + 1) * block[1]))
            scales[index] = block_scale(x[part], format, scale_format)
            scaled[part] = x[part] * (np.float32(1) / scales[index])
    return cast(scaled, format), scales


def dequantize(codes, scales, block, format, expert_offsets=None):
    """float32 values: the product in float64, where it is exact, rounded once."""
    table = np.array([code_value(code, format) for code in range(256)])
    blocks = row_blocks(codes.shape[-2], block[0], expert_offsets)
    result = np.zeros(codes.shape, np.float32)
    with np.errstate(all="ignore"):
        for index in np.ndindex(scales.shape):
            start, end = blocks[index[-2]]
            part = (*index[:-2], slice(start, end), slice(index[-1] * block[1], (index[-1] + 1) * block[1]))
            result[part] = (table[codes[part]] * np.float64(scales[index])).astype(np.float32)
    return result
