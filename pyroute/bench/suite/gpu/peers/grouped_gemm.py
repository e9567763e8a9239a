"""grouped_gemm, the products under MegaBlocks and Megatron: bfloat16, sizes on the host (pip install grouped-gemm)."""

from __future__ import annotations

import torch
from grouped_gemm import backend, ops

from . import Calls, column, version_of

NAME = "grouped_gemm"


def version():
    return version_of("grouped-gemm", "nv-grouped-gemm")


def sizes_of(p):
    return torch.full((p.w.shape[0],), p.rows, dtype=torch.int64)


@column("gemm", "grouped_gemm bfloat16", kind="bfloat16")
def gemm(p):
    sizes = sizes_of(p)
    return Calls([lambda: ops.gmm(p.a, p.w, sizes, trans_b=True)])


@column("dgrad", "grouped_gemm bfloat16", kind="bfloat16")
def dgrad(p):
    sizes = sizes_of(p)
    return Calls([lambda: ops.gmm(p.grad, p.w, sizes, trans_b=False)])


@column("wgrad", "grouped_gemm bfloat16", kind="bfloat16")
def wgrad(p):
    sizes = sizes_of(p)
    return Calls([lambda: backend.gmm(p.grad, p.a, sizes, trans_a=True, trans_b=False)])
