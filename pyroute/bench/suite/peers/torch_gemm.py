"""Matrix products of torch: MKL's float32 through bmm, grouped_mm and a loop; bfloat16; FP8 by dequantising."""

from __future__ import annotations

import numpy as np
import torch

from . import Work, column
from .torch_eager import array, set_threads, tensor, version

NAME = "torch"
__all__ = ["NAME", "set_threads", "version"]


def equal_rows(p) -> bool:
    return bool((p.counts == p.counts[0]).all())


def segments(p) -> list[tuple[int, slice]]:
    return [(e, slice(int(a), int(b))) for e, (a, b) in enumerate(zip(p.offsets, p.offsets[1:], strict=False)) if b > a]


@column("gemm", "torch bmm float32")
@column("dgrad", "torch bmm float32")
@column("wgrad", "torch bmm float32")
def bmm(p):
    """Into memory that has been touched."""
    if not equal_rows(p):
        return None

    def batch(x):
        return tensor(x).view(p.sizes[0], -1, x.shape[-1])

    if p.op == "gemm":
        left, right = batch(p.a), tensor(p.w32).transpose(1, 2)
    elif p.op == "dgrad":
        left, right = batch(p.grad), tensor(p.w32)
    else:
        left, right = batch(p.grad).transpose(1, 2), batch(p.a)
    out = torch.zeros(*left.shape[:2], right.shape[2])
    shape = out.shape if p.op == "wgrad" else (-1, out.shape[2])
    return Work(lambda: torch.bmm(left, right, out=out), lambda y: array(y).reshape(shape))


def _loop(p, a, weight, out_type=torch.float32):
    """Each expert's rows through its weight, into memory that has been touched."""
    out, parts = torch.zeros(a.shape[0], p.sizes[1], dtype=out_type), segments(p)

    def run():
        for e, rows in parts:
            torch.mm(a[rows], weight(e).t(), out=out[rows])
        return out

    return Work(run, array)


@column("gemm", "torch loop float32")
def loop(p):
    w = tensor(p.w32)
    return _loop(p, tensor(p.a), lambda e: w[e])


@column("gemm", "torch loop bfloat16", kind="bfloat16")
def loop_bfloat16(p):
    w = tensor(p.w16)
    return _loop(p, tensor(p.a16), lambda e: w[e], torch.bfloat16)


@column("gemm", "torch bfloat16 up-cast, loop", kind="bfloat16")
def loop_up_cast(p):
    w = tensor(p.w16)
    return _loop(p, tensor(p.a), lambda e: w[e].float())


def _grouped_mm(p, a, w):
    offsets = torch.from_numpy(p.offsets[1:].astype(np.int32))
    w = w.transpose(1, 2)
    return Work(lambda: torch.nn.functional.grouped_mm(a, w, offs=offsets), array)


@column("gemm", "torch grouped_mm float32")
def grouped_mm(p):
    return _grouped_mm(p, tensor(p.a), tensor(p.w32))


@column("gemm", "torch grouped_mm bfloat16", kind="bfloat16")
def grouped_mm_bfloat16(p):
    return _grouped_mm(p, tensor(p.a16), tensor(p.w16))


@column("gemm", "torch FP8 dequantised, loop", kind="fp8")
def loop_fp8(p):
    """Each used expert's weights are dequantised, 128 x 128 blocks, then multiplied: what a user can write."""
    codes = torch.from_numpy(p.w8.codes.view(np.uint8)).view(torch.float8_e4m3fn)
    scales, (_, outer, inner) = tensor(p.w8.scales), p.sizes
    if outer % 128 or inner % 128:
        return None

    def weight(e):
        blocks = codes[e].float().view(outer // 128, 128, inner // 128, 128)
        return (blocks * scales[e][:, None, :, None]).view(outer, inner)

    return _loop(p, tensor(p.a), weight)
