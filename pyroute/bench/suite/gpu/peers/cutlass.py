"""CUTLASS's Python interface: GroupedGemm in bfloat16, compiled on first use (pip install nvidia-cutlass; 4.2).

It has kernels of Ampere only, on Hopper too. Its arguments, built on the host, are made once.
"""

from __future__ import annotations

import cutlass_cppgen
import torch

from . import Calls, column, stream_of, version_of

NAME = "CUTLASS"


def version():
    return version_of("nvidia-cutlass")


@column("gemm", "CUTLASS GroupedGemm bfloat16", kind="bfloat16")
def gemm(p):
    data, order = cutlass_cppgen.DataType, cutlass_cppgen.LayoutType
    experts, n, _ = p.w.shape
    plan = cutlass_cppgen.op.GroupedGemm(
        element=data.bf16, layout_A=order.RowMajor, layout_B=order.ColumnMajor, layout_C=order.RowMajor,
        element_accumulator=data.f32,
    )  # fmt: skip
    out = torch.zeros(p.a.shape[0], n, dtype=p.a.dtype, device=p.a.device)
    a, to, w = list(p.a.split(p.rows)), list(out.split(p.rows)), [p.w[e].t() for e in range(experts)]
    arguments = plan.run(a, w, to, to, sync=False, stream=driver_stream(p.a))

    def run():
        plan.operation.run(arguments)
        return out

    return Calls([run], graph=False)  # the stream is among the arguments


def driver_stream(t):
    from cuda import cuda

    return cuda.CUstream(stream_of(t))
