"""Rows as bytes on the wire: as they are, or as e4m3 codes followed by the scales of their 1 x 128 blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..quantization import ScaleFormat
from ._tensors import reinterpret
from .permutation import RoutePlan, permute, permute_quantize
from .quantization import Fp8Tensor, quantize_fp8

Payload = Literal["fp8", "fp8_ue8m0"]

SCALE_FORMATS: dict[Payload | None, ScaleFormat] = {"fp8": "float32", "fp8_ue8m0": "ue8m0"}


def pack(x: Tensor, plan: RoutePlan | None, payload: Payload | None) -> Tensor:
    """``x``, or its rows by ``plan``: as they are, or uint8 [num_rows, hidden + bytes of scales]."""
    if payload is None:
        return x if plan is None else permute(x, plan)
    how = SCALE_FORMATS[payload]
    codes, scales, _ = (
        quantize_fp8(x, scale_format=how) if plan is None else permute_quantize(x, plan, scale_format=how)
    )
    # a power of two is its exponent's byte
    exponents = payload == "fp8_ue8m0"
    as_bytes = (scales.view(torch.int32) >> 23).to(torch.uint8) if exponents else reinterpret(scales, torch.uint8)
    return torch.cat([reinterpret(codes, torch.uint8), as_bytes], dim=1)


def unpack(received: Tensor, hidden: int, payload: Payload) -> Fp8Tensor:
    """Codes and scales of the rows that :func:`pack` wrote."""
    codes = received[:, :hidden].contiguous().view(torch.float8_e4m3fn)
    as_bytes = received[:, hidden:].clone(memory_format=torch.contiguous_format)  # one row is contiguous as it is
    if payload == "fp8_ue8m0":
        return Fp8Tensor(codes, (as_bytes.to(torch.int32) << 23).view(torch.float32))
    return Fp8Tensor(codes, reinterpret(as_bytes, torch.float32))
