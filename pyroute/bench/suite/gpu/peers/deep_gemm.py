"""DeepGEMM: FP8 products with 1x128 and 128x128 scales (pip install sgl-deep-gemm; signatures of 2.1)."""

from __future__ import annotations

import deep_gemm
import torch

from . import Calls, column, version_of

NAME = "DeepGEMM"
LEAST_ROWS = 128  # of an expert's part of the masked layout


def version():
    return version_of("sgl-deep-gemm", "deep-gemm", "deep_gemm")


@column("gemm", "DeepGEMM", kind="fp8")
def gemm(p):
    """The contiguous layout takes segments in multiples of 128 rows; fewer rows go through the masked one."""
    return contiguous(p) if p.rows % 128 == 0 else masked(p)


def contiguous(p):
    experts, n, _ = p.w.shape
    a, w = p.a_codes, p.w_codes
    out = torch.empty(p.a.shape[0], n, dtype=torch.bfloat16, device=p.a.device)
    expert = torch.arange(experts, device=p.a.device, dtype=torch.int32).repeat_interleave(p.rows)

    def run():
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, w, out, expert, disable_ue8m0_cast=True)
        return out

    return Calls([run])


def masked(p):
    (experts, n, k), (a, scales_a), w = p.w.shape, p.a_codes, p.w_codes
    codes = torch.zeros(experts, LEAST_ROWS, k, dtype=torch.float8_e4m3fn, device=p.a.device)
    scales = torch.ones(experts, LEAST_ROWS, scales_a.shape[1], device=p.a.device)
    codes.view(torch.uint8)[:, : p.rows] = a.view(torch.uint8).view(experts, p.rows, k)
    scales[:, : p.rows] = scales_a.view(experts, p.rows, -1)
    out = torch.empty(experts, LEAST_ROWS, n, dtype=torch.bfloat16, device=p.a.device)
    counts = torch.full((experts,), p.rows, dtype=torch.int32, device=p.a.device)

    def run():
        deep_gemm.m_grouped_fp8_gemm_nt_masked((codes, scales), w, out, counts, p.rows, disable_ue8m0_cast=True)
        return out

    return Calls([run], read=lambda got: got[:, : p.rows])


@column("wgrad", "DeepGEMM", kind="fp8")
def wgrad(p):
    """Both operands with the tokens of an expert contiguous, float32 sums added to what is there."""
    experts, n, k = p.w.shape
    sizes = [p.rows] * experts
    counts = torch.tensor(sizes, dtype=torch.int32, device=p.grad.device)
    left, right = (by_channel(x, p.rows) for x in (p.grad, p.a))
    out = torch.zeros(experts, n, k, device=p.grad.device)

    def run():
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(left, right, out, sizes, counts, out)
        return out

    def first():
        out.zero_()
        return run()

    return Calls([run], first=first)


def by_channel(x, rows: int):
    """Codes of each expert as [channels, rows], one after the other; scales of 128 tokens, [channels, tokens / 128]."""
    blocks = x.float().view(-1, 128, x.shape[1])
    scales = blocks.abs().amax(dim=1).clamp(1e-4) / 448
    codes = (blocks / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8).view(-1, rows, x.shape[1])
    return codes.transpose(1, 2).contiguous().view(-1).view(torch.float8_e4m3fn), scales.t()
