"""The machine's own rates as columns, so that a share of bandwidth is one of medians of the same rounds too: as many
bytes as the problem must move at least, copied or only read by the probes of pyroute.bench.limits."""

from __future__ import annotations

import numpy as np

import pyroute
from pyroute import _backend

from . import Work, column
from .ours import set_threads

NAME = "machine"
__all__ = ["NAME", "set_threads", "version"]


def version() -> str:
    return pyroute.__version__


@column("permute", "machine copy", kind="limit")
@column("unpermute", "machine copy", kind="limit")
@column("quantize", "machine copy", kind="limit")
@column("permute quantize", "machine copy", kind="limit")
@column("unpermute backward", "machine copy", kind="limit")
@column("dequantize", "machine copy", kind="limit")
def copy(p):
    source, destination = np.ones(p.nbytes // 2, np.uint8), np.zeros(p.nbytes // 2, np.uint8)
    return Work(lambda: _backend.core.probe_copy(destination, source, pyroute.get_num_threads()))


@column("gemm", "machine read", kind="limit")
@column("layer", "machine read", kind="limit")
def read(p):
    if not p.reads:
        return None
    source = np.ones(p.nbytes, np.uint8)
    return Work(lambda: _backend.core.probe_read(source, pyroute.get_num_threads()))
