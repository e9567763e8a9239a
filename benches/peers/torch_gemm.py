"""Matrix products of torch: MKL's float32 through bmm, grouped_mm and a loop; bfloat16; FP8 by dequantising."""

from __future__ import annotations

import numpy as np
import torch

from peers import Work, column
from peers.torch_eager import array, set_threads, tensor, version

NAME = "torch"
__all__ = ["NAME", "set_threads", "version"]


def equal_rows(p) -> bool:
    return bool((p.counts == p.counts[0]).all())


def segments(p) -> list[tuple[int, slice]]:
    return [(e, slice(int(a), int(b))) for e, (a, b) in enumerate(zip(p.offsets, p.offsets[1:], strict=False)) if b > a]


def _bmm(p, left, right, out_shape, read=array):
    """torch.bmm into memory that has been touched."""
    out = torch.zeros(out_shape)
    return Work(lambda: torch.bmm(left, right, out=out), read)


@column("gemm", "torch bmm float32")
def bmm(p):
    if not equal_rows(p):
        return None
    experts, outer, inner = p.sizes
    a, w = tensor(p.a).view(experts, -1, inner), tensor(p.w32)
    return _bmm(p, a, w.transpose(1, 2), (experts, a.shape[1], outer), lambda y: array(y).reshape(-1, outer))


@column("dgrad", "torch bmm float32")
def bmm_dgrad(p):
    if not equal_rows(p):
        return None
    experts, outer, inner = p.sizes
    grad, w = tensor(p.grad).view(experts, -1, outer), tensor(p.w32)
    return _bmm(p, grad, w, (experts, grad.shape[1], inner), lambda y: array(y).reshape(-1, inner))


@column("wgrad", "torch bmm float32")
def bmm_wgrad(p):
    if not equal_rows(p):
        return None
    experts, outer, inner = p.sizes
    grad, a = tensor(p.grad).view(experts, -1, outer), tensor(p.a).view(experts, -1, inner)
    return _bmm(p, grad.transpose(1, 2), a, (experts, outer, inner))


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
