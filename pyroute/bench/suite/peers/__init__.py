"""Other implementations of the same work, one small file each, behind one interface; none of them is required.

A peer is a module of this package with

    NAME                        as the tables call it
    version() -> str
    set_threads(n)              optional: called before each of its samples

and functions under :func:`column`, each of which turns a problem into a :class:`Work`. A peer that cannot be imported,
raises, or computes something else is reported with its reason by :mod:`harness`; it is never left out in silence.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# In the order of the tables. pyroute is measured through the same interface as everybody else.
MODULES = (
    "ours",
    "machine",
    "numpy_arrays",
    "torch_eager",
    "torch_compile",
    "torch_gemm",
    "numba_loops",
    "jax_xla",
    "ggml_ops",
    "transformers_experts",
    "vllm_cpu",
    "zentorch_moe",
    "onnxruntime_moe",
    "kt_kernel_moe",
)


class Work(NamedTuple):
    """One column's work on one problem, ready to run; its inputs are already in the peer's own form."""

    run: Callable[[], Any]  # timed
    read: Callable[[Any], Any] = lambda value: value  # what run returned, as the problem's NumPy result; not timed
    before: Callable[[], object] | None = None  # before each sample, not timed


Build = Callable[[Any], "Work | None"]


class Column(NamedTuple):
    """A way to do one operation: ``build(problem)`` makes its Work, or returns None where the column does not apply."""

    op: str
    name: str
    build: Build
    kind: str  # what the numbers pass through, for the tolerance: problems.TOLERANCES; "limit": it has none
    module: str
    alone: bool = False  # in a process of its own: its threads go on spinning after a call
    on_request: bool = False  # only if --columns names it: its samples would be most of a run


def column(
    op: str, name: str, *, kind: str = "float32", alone: bool = False, on_request: bool = False
) -> Callable[[Build], Build]:
    """Register a function ``problem -> Work`` as a column of the op's tables."""

    def register(build: Build) -> Build:
        module = build.__module__
        _columns.setdefault(module, []).append(Column(op, name, build, kind, module, alone, on_request))
        return build

    return register


_columns: dict[str, list[Column]] = {}


class Peer(NamedTuple):
    """A loaded module, or the reason why there is none."""

    name: str
    version: str
    columns: tuple[Column, ...]
    set_threads: Callable[[int], object]
    problem: str = ""


def load(names: tuple[str, ...] = MODULES) -> Iterator[Peer]:
    for name in names:
        yield load_one(name)


def load_one(name: str, package: str = __name__) -> Peer:
    module_name = f"{package}.{name}" if package else name
    try:
        module = importlib.import_module(module_name)
        return Peer(
            module.NAME,
            module.version(),
            tuple(_columns.get(module_name, ())),
            getattr(module, "set_threads", lambda n: None),
        )
    except Exception as error:  # a peer may fail in any way; the table says how
        return Peer(name, "", (), lambda n: None, reason(error))


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def package_version(distribution: str) -> str:
    return importlib.metadata.version(distribution)
