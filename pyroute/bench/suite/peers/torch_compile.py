"""torch.compile (inductor's C++ backend) on the eager formulas."""

from __future__ import annotations

import torch

from . import Work, column
from .torch_eager import gate_work, quantize_e4m3, read_codes, set_threads, tensor, unpermute_work, version

NAME = "torch.compile"
__all__ = ["NAME", "set_threads", "version"]


def compiled(function):
    return torch.compile(function, dynamic=False)


@column("gate", "torch.compile")
def gate(p):
    return gate_work(p, compiled)


@column("unpermute", "torch.compile", kind="bfloat16")
def unpermute(p):
    return unpermute_work(p, compiled)


@column("quantize", "torch.compile", kind="codes")
def quantize(p):
    x, f = tensor(p.x), compiled(quantize_e4m3)
    return Work(lambda: f(x), read_codes)
