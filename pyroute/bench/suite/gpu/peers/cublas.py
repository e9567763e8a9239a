"""cuBLAS in bfloat16: one strided batch through torch, and cublasGemmGroupedBatchedEx through nvmath-python (1.0)."""

from __future__ import annotations

import torch

from . import Calls, column, stream_of, version_of

NAME = "cuBLAS"


def version():
    return version_of("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12") or str(torch.version.cuda or "")


def batch(p, x):
    return x.view(p.w.shape[0], p.rows, x.shape[-1])


@column("gemm", "cuBLAS batched bfloat16", kind="bfloat16")
def gemm(p):
    """All experts have as many rows here, so that a batch can do it."""
    a, w = batch(p, p.a), p.w.transpose(1, 2)
    return Calls([lambda: torch.bmm(a, w)])


@column("dgrad", "cuBLAS batched bfloat16", kind="bfloat16")
def dgrad(p):
    grad = batch(p, p.grad)
    return Calls([lambda: torch.bmm(grad, p.w)], read=lambda got: got.flatten(0, 1))


@column("wgrad", "cuBLAS batched bfloat16", kind="bfloat16")
def wgrad(p):
    grad, a = batch(p, p.grad).transpose(1, 2), batch(p, p.a)
    return Calls([lambda: torch.bmm(grad, a)])


@column("gemm", "cuBLAS grouped bfloat16", kind="bfloat16")
def gemm_grouped(p):
    """A group for every expert. cuBLAS counts by columns: out^T [n, rows] = w [n, k] a^T [k, rows]."""
    from nvmath import CudaDataType
    from nvmath.bindings import cublas

    experts, n, k = p.w.shape
    out = torch.empty(p.a.shape[0], n, dtype=torch.bfloat16, device=p.a.device)

    def addresses(t, step):
        first = t.data_ptr()
        return torch.tensor([first + 2 * step * e for e in range(experts)], dtype=torch.int64, device=t.device)

    w_at, a_at, out_at = addresses(p.w, n * k), addresses(p.a, p.rows * k), addresses(out, p.rows * n)
    one, zero = torch.ones(experts), torch.zeros(experts)  # on the host, a number for each group
    handle, every, half = cublas.create(), [1] * experts, int(CudaDataType.CUDA_R_16BF)
    transposed, plain = ([int(op)] * experts for op in (cublas.Operation.T, cublas.Operation.N))
    m, rows, inner = [n] * experts, [p.rows] * experts, [k] * experts

    def run():
        cublas.set_stream(handle, stream_of(out))
        cublas.gemm_grouped_batched_ex(
            handle, transposed, plain, m, rows, inner, one.data_ptr(), w_at.data_ptr(), half, inner, a_at.data_ptr(),
            half, inner, zero.data_ptr(), out_at.data_ptr(), half, m, experts, every,
            int(cublas.ComputeType.COMPUTE_32F),
        )  # fmt: skip
        return out

    return Calls([run])
