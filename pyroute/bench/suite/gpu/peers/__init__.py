"""Other GPU implementations of the same work, one small file each, behind the interface of the CPU's peers.

A peer is a module of this package with

    NAME                        as the tables call it
    version() -> str

and functions under :func:`column`, each of which turns a problem of problems.py into :class:`Calls`, or returns None
where the column does not apply. A peer that cannot be imported, raises or computes something else is shown with its
reason. Signatures are those of the versions that the files name; benches measure whatever is installed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ...peers import Peer, column, load_one, package_version
from ..clock import Column

__all__ = ["ALWAYS", "MODULES", "Calls", "column", "columns", "load", "stream_of", "version_of"]

ALWAYS = ("torch_ops", "deep_gemm")  # the bars are held against these
MODULES = (
    *ALWAYS,
    "cublas",
    "transformer_engine",
    "vllm",
    "sglang",
    "sonicmoe",
    "scattermoe",
    "megablocks",
    "grouped_gemm",
    "cutlass",
)


class Calls(NamedTuple):
    """One column's work on one problem, ready to be launched on the current stream."""

    calls: Sequence[Callable[[], Any]]  # one for each set of inputs
    read: Callable[[Any], Any] | None = None  # what the first call returned, in the problem's own form; not timed
    graph: bool = True  # whether a CUDA graph can capture it
    first: Callable[[], Any] | None = None  # makes the result that is checked, where that is not the first call


def load(names: Sequence[str] = MODULES) -> Iterator[Peer]:
    for name in names:
        yield load_one(name, package=__name__)


def columns(op: str, problem: Any, everyone: Sequence[Peer]) -> list[Column]:
    """What the peers have for an operation; a column that cannot be built is one that fails with its reason."""
    made = []
    for peer in everyone:
        for one in peer.columns:
            if one.op != op:
                continue
            try:
                calls: Any = one.build(problem)
            except Exception as error:  # a peer may fail in any way; the table says how
                calls = Calls([_raising(error)])
            if calls is not None:
                made.append(
                    Column(one.name, calls.calls, peer=peer.name, version=peer.version, graph=calls.graph,
                           kind=one.kind,
                           first=calls.first, read=calls.read)
                )  # fmt: skip
    return made


def _raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def version_of(*distributions: str) -> str:
    """Of the first that is installed; "" for a source tree without metadata."""
    for name in distributions:
        try:
            return package_version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def stream_of(t: torch.Tensor) -> int:
    """The current stream's handle; 0 for tensors on the CPU, where only tests come."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
