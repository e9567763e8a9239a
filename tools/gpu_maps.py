"""From where every kernel of Hopper's grouped GEMM reads every element and every scale of its operands.

The elements of one operand are numbered; the other one picks a single one for each element of the result, which so
becomes a map of what was read (gpu_patterns.py). The left operand is the rows or gradients, the right one the weights,
or in wgrad the rows. All extents but the rows are ``size``, so that picking is an identity.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import emulated
import gpu_patterns
import ml_dtypes
import numpy as np
from gpu_cases import Case
from gpu_patterns import Axes

import pyroute
from pyroute import Fp8Array, _backend

TYPES = {"fp8": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bfloat16": ml_dtypes.bfloat16}
FORMATS = {"fp8": "e4m3", "e5m2": "e5m2"}
EXPERTS, BLOCK = 2, 128


class Variant(NamedTuple):
    """One kernel. ``asked``: by its name in PYROUTE_GROUPED_GEMM."""

    operation: str  # forward, dgrad, wgrad
    kind: str
    counts: tuple[int, int]
    size: int
    out_dtype: str = "float32"
    asked: str = ""

    def __str__(self) -> str:
        rows = " + ".join(map(str, self.counts))
        return f"{self.asked or self.operation} {self.kind} to {self.out_dtype}, {rows} rows, {self.size} wide"

    @property
    def starts(self) -> np.ndarray:
        return np.array([0, self.counts[0], sum(self.counts)])

    @property
    def expert(self) -> np.ndarray:  # of every row
        return np.repeat(np.arange(EXPERTS), self.counts)

    @property
    def local(self) -> np.ndarray:  # rows counted from their expert's first
        return np.arange(sum(self.counts)) - self.starts[self.expert]


def cases() -> list[Case]:
    found = []
    for v in variants():
        for which in ("left", "right"):
            found.append(Case(f"map of {v.operation} {v.kind}: {which} of {v}", functools.partial(elements, v, which)))
            if v.kind != "bfloat16":
                run = functools.partial(scales, v, which)
                found.append(Case(f"map of {v.operation} {v.kind}: {which} scales of {v}", run))
    return found


def variants() -> Iterator[Variant]:
    """Every kernel of csrc/cuda/sm90/arguments.h; on the emulated GPU those that differ in how they read."""
    if not emulated.REAL:
        yield Variant("forward", "fp8", (32, 32), 128)
        yield Variant("dgrad", "bfloat16", (100, 40), 128)
        yield Variant("wgrad", "bfloat16", (40, 60), 128)
        yield Variant("wgrad", "fp8", (128, 30), 128)
        return
    outs, few, many = ("float32", "bfloat16"), (64, 64), (200, 129)
    for kind in ("fp8", "bfloat16"):
        yield from (Variant("forward", kind, counts, 256, out) for counts in (few, many) for out in outs)
    for kernel in ("fp8_128_overlap", "fp8_128_pair", "fp8_192", "fp8_192_pair"):
        yield Variant("forward", "fp8", many, 256, "bfloat16", f"{kernel}_product")
    for kind in TYPES:
        yield from (Variant("dgrad", kind, counts, 256, out) for counts in (few, many) for out in outs)
        yield Variant("wgrad", kind, many, 256)


# --- running ----------------------------------------------------------------------------------------------------------


def result(v: Variant, left: np.ndarray, right: np.ndarray, given: dict[str, np.ndarray]) -> np.ndarray:
    """The product of the operands; ``given``: scales of "left" or "right" other than 1."""
    at = emulated.to_device(v.starts.astype(np.int64))
    rows = (1, BLOCK) if v.operation != "wgrad" else (BLOCK, 1)
    a = operand(v, left, v.kind, rows, given.get("left"), at)
    kind = "fp8" if v.kind == "e5m2" else v.kind
    b = operand(v, right, kind, (BLOCK, BLOCK) if v.operation != "wgrad" else rows, given.get("right"), at)
    with asked_for(v.asked):
        if v.operation == "wgrad":
            out = pyroute.grouped_gemm_wgrad(a, b, at)
        else:
            multiply = pyroute.grouped_gemm if v.operation == "forward" else pyroute.grouped_gemm_dgrad
            out = multiply(a, b, at, out_dtype=v.out_dtype)
    return np.asarray(emulated.to_host(out)).astype(np.float32)


def operand(v: Variant, x: np.ndarray, kind: str, block: tuple[int, int], scale: np.ndarray | None, at: Any) -> Any:
    codes = emulated.to_device(x.astype(TYPES[kind]))
    if kind == "bfloat16":
        return codes
    if scale is None:
        scale = np.ones(scale_shape(v, x.shape, block), np.float32)
    return Fp8Array(
        codes, emulated.to_device(scale), block, FORMATS[kind], expert_offsets=at if block == (BLOCK, 1) else None
    )


def scale_shape(v: Variant, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    if block == (BLOCK, 1):
        return (shape[0] + EXPERTS * (BLOCK - 1)) // BLOCK, shape[1]
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


@contextlib.contextmanager
def asked_for(kernel: str) -> Iterator[None]:
    if kernel:
        os.environ["PYROUTE_GROUPED_GEMM"] = kernel
    try:
        yield
    finally:
        os.environ.pop("PYROUTE_GROUPED_GEMM", None)


def verdict(results: list[np.ndarray], want: np.ndarray, axes: Axes) -> str | None:
    wrong = gpu_patterns.misread(gpu_patterns.numbers_from(results), want, axes)
    return wrong and f"{_backend.cuda.last_kernel() or 'unknown kernel'}: {wrong}"


# --- elements ---------------------------------------------------------------------------------------------------------


def elements(v: Variant, which: str) -> str | None:
    rows = sum(v.counts), v.size
    weights = (EXPERTS, v.size, v.size)
    shape = rows if which == "left" or v.operation == "wgrad" else weights
    own = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
    chunk = 16 // np.dtype(TYPES[v.kind]).itemsize
    axes = Axes(("row", "column") if len(shape) == 2 else ("expert", "N", "K"), shape, chunk)
    for pick, want in picks(v, which, own):
        made = [
            result(v, *((digit, pick) if which == "left" else (pick, digit)), {})
            for digit in gpu_patterns.digits_of(shape)
        ]
        if wrong := verdict(made, want, axes):
            return wrong
    return None


def picks(v: Variant, which: str, own: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The other operand, and the numbers that it picks."""
    rows, square = np.arange(sum(v.counts)), np.eye(v.size, dtype=np.float32)
    if v.operation == "wgrad":
        pick = np.zeros((len(rows), v.size), np.float32)
        pick[rows, v.local] = 1
        want = np.zeros((EXPERTS, v.size, v.size), np.int64)
        want[v.expert, v.local] = own[rows]
        yield pick, want if which == "right" else want.transpose(0, 2, 1)
    elif which == "left":
        yield np.repeat(square[None], EXPERTS, 0), own
    else:
        turned = own if v.operation == "dgrad" else own.transpose(0, 2, 1)  # the contraction first
        for shift in range(0, v.size, min(v.counts)):
            inside = v.local + shift < v.size
            pick = np.zeros((len(rows), v.size), np.float32)
            pick[rows[inside], v.local[inside] + shift] = 1
            want = np.zeros((len(rows), v.size), np.int64)
            want[inside] = turned[v.expert[inside], v.local[inside] + shift]
            yield pick, want


# --- scales -----------------------------------------------------------------------------------------------------------


def scales(v: Variant, which: str) -> str | None:
    """One element of every block of the contraction at a time is 1 in the left operand, all are in the right one."""
    rows = sum(v.counts), v.size
    right = rows if v.operation == "wgrad" else (EXPERTS, v.size, v.size)
    block = (BLOCK, 1) if v.operation == "wgrad" else (1, BLOCK) if which == "left" else (BLOCK, BLOCK)
    shape = scale_shape(v, rows if which == "left" else right, block)
    own = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
    names = {2: ("row of scales", "column of scales"), 3: ("expert", "block of N", "block of K")}[len(shape)]
    for c in range(-(-max(v.counts) // BLOCK) if v.operation == "wgrad" else v.size // BLOCK):
        pick = np.zeros(rows, np.float32)
        if v.operation == "wgrad":
            pick[v.local == c * BLOCK] = 1
        else:
            pick[:, c * BLOCK] = 1
        made = [result(v, pick, np.ones(right, np.float32), {which: digit}) for digit in gpu_patterns.digits_of(shape)]
        if wrong := verdict(made, scales_due(v, which, own, c), Axes(names, shape, 4)):
            return wrong
    return None


def scales_due(v: Variant, which: str, own: np.ndarray, c: int) -> np.ndarray:
    """The numbers of the scales of block c of the contraction, where they belong in the result."""
    if v.operation == "wgrad":
        blocks = -(-np.array(v.counts) // BLOCK)
        first = np.array([0, blocks[0]])
        want = np.zeros((EXPERTS, v.size, v.size), np.int64)
        for e in np.flatnonzero(blocks > c):
            want[e] = own[first[e] + c][:, None] if which == "left" else own[first[e] + c]
        return want
    if which == "left":
        return np.repeat(own[:, c, None], v.size, 1)
    across = np.arange(v.size) // BLOCK
    of = own[:, across, c] if v.operation == "forward" else own[:, c][:, across]
    return of[v.expert]
