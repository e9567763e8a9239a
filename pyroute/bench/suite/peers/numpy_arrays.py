"""NumPy and its BLAS: pyroute's own array code, which runs where nothing was compiled."""

from __future__ import annotations

import functools
import types

import numpy as np

import pyroute

from . import column
from .ours import BUILDERS, set_threads

NAME = "numpy"
__all__ = ["NAME", "set_threads", "version"]
FUNCTIONS = (
    "topk_gating", "topk_gating_backward", "plan_routes", "permute", "permute_quantize", "unpermute",
    "unpermute_backward", "quantize_fp8", "dequantize_fp8", "grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad",
    "moe_forward",
)  # fmt: skip
OPS = types.SimpleNamespace(
    **{name: functools.partial(getattr(pyroute, name), backend="numpy") for name in FUNCTIONS},
    moe_backward=pyroute.moe_backward,  # goes where forward went
)


def version() -> str:
    return np.__version__


def _register(op: str, name: str, kind: str, build) -> None:
    # products in the contract's order take half a second for one token, minutes for a training step
    products = op in ("gemm", "dgrad", "wgrad", "layer", "training")

    @column(op, name.replace("pyroute", "numpy"), kind=kind, on_request=products)
    def built(problem):
        return build(problem, name, OPS)


for _one in BUILDERS:
    for _name in _one.names:
        _register(_one.op, _name, _one.kind, _one.build)
