"""The quantization room for tensors: FP8 codes with block scales, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import quantization as core
from .._check import type_error
from ..quantization import Fp8Array, ScaleFormat
from ._library import define, goes_direct
from ._tensors import NUMPY_DTYPES, array, check_tensors, describe, float32_array, tensor

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_FORMATS = {torch.uint8: "e4m3", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


class Fp8Tensor(NamedTuple):
    """:class:`pyroute.Fp8Array` as tensors: an element's value is its code times its block's scale.

    ``Fp8Tensor(weight, weight_scale_inv, (128, 128))`` takes a DeepSeek-V3 weight as it is on disk.

    Attributes
    ----------
    codes : float8_e4m3fn or float8_e5m2 [..., rows, cols]
        uint8 is read as e4m3.
    scales : float32, bfloat16 or float8_e8m0fnu [..., ceil(rows / block[0]), ceil(cols / block[1])]
    block : (int, int)
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int] = (1, 128)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """:func:`dequantize_fp8` of this tensor."""
        return dequantize_fp8(self, dtype)


def quantize_fp8(
    x: Tensor, *, block: tuple[int, int] = (1, 128), format: core.Fp8Format = "e4m3",
    scale_format: ScaleFormat = "float32",
) -> Fp8Tensor:  # fmt: skip
    """:func:`pyroute.quantize_fp8` on a tensor: the same codes and scales; it has no gradient."""
    if goes_direct(x):
        codes, scales = _quantize_kernel(x, block, format, scale_format)
    else:
        check_tensors("quantize_fp8", "x", x=x)
        codes, scales = _quantize_fp8(x, block, format, scale_format)
    return Fp8Tensor(codes, scales, (block[0], block[1]))


def dequantize_fp8(q: Fp8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`pyroute.dequantize_fp8`: ``code * scale`` in float32, rounded once to ``dtype``; it has no gradient."""
    if not isinstance(q, Fp8Tensor):
        raise type_error("dequantize_fp8", "q", "an Fp8Tensor", describe(q))
    if goes_direct(q.codes, q.scales):
        return _dequantize_kernel(q.codes, q.scales, q.block, dtype)
    check_tensors("dequantize_fp8", "codes", codes=q.codes, scales=q.scales)
    return _dequantize_fp8(q.codes, q.scales, q.block, dtype)


def fp8_array(function: str, argument: str, codes: Tensor, scales: Tensor, block: Any) -> Fp8Array:
    """The core's view of codes and scales."""
    format = _FORMATS.get(codes.dtype)
    if format is None:
        raise type_error(function, argument, "float8_e4m3fn, float8_e5m2 or uint8 beside scales", describe(codes))
    data = array(function, argument, codes)
    wide = float32_array(function, f"{argument}'s scales", scales)
    return Fp8Array(data, wide, tuple(block), format)  # type: ignore[arg-type]


def _quantize_kernel(x: Tensor, block: Any, format: Any, scale_format: Any) -> tuple[Tensor, Tensor]:
    q = core.quantize_fp8(array("quantize_fp8", "x", x), block=tuple(block), format=format, scale_format=scale_format)
    return tensor(q.codes), tensor(q.scales)


def _quantize_fake(x: Tensor, block: Any, format: str, scale_format: str) -> tuple[Tensor, Tensor]:
    *lead, rows, cols = x.shape
    scales = x.new_empty((*lead, -(-rows // block[0]), -(-cols // block[1])), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=_FLOAT8[format]), scales


def _dequantize_kernel(codes: Tensor, scales: Tensor, block: Any, dtype: torch.dtype) -> Tensor:
    if dtype not in NUMPY_DTYPES:
        raise type_error("dequantize_fp8", "dtype", "float32, bfloat16, float16 or float64", str(dtype))
    q = fp8_array("dequantize_fp8", "codes", codes, scales, block)
    return tensor(core.dequantize_fp8(q, NUMPY_DTYPES[dtype]))


def _dequantize_fake(codes: Tensor, scales: Tensor, block: Any, dtype: torch.dtype) -> Tensor:
    check_tensors("dequantize_fp8", "codes", codes=codes, scales=scales)
    return codes.new_empty(codes.shape, dtype=dtype)


_quantize_fp8 = define(
    "quantize_fp8(Tensor x, int[2] block, str format, str scale_format) -> (Tensor codes, Tensor scales)",
    _quantize_kernel,
    _quantize_fake,
)
_dequantize_fp8 = define(
    "dequantize_fp8(Tensor codes, Tensor scales, int[2] block, ScalarType dtype) -> Tensor",
    _dequantize_kernel,
    _dequantize_fake,
)
