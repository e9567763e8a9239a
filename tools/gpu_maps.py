"""From where every kernel of Hopper's grouped GEMM reads every element and every scale of its operands.

The elements of one operand are numbered; the other one picks a single one for each element of the result, which so
becomes a map of what was read (gpu_patterns.py). The left operand is the rows or gradients, the right one the weights,
or in wgrad the rows. All extents but the rows are ``size``, so that picking is an identity.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
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

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bfloat16": ml_dtypes.bfloat16}
PAIRS = {  # of the left operand and the right one, as kernels are named
    "fp8": ("e4m3", "e4m3"),
    "e5m2_e4m3": ("e5m2", "e4m3"),
    "e4m3_e5m2": ("e4m3", "e5m2"),
    "e5m2_e5m2": ("e5m2", "e5m2"),
    "bfloat16": ("bfloat16", "bfloat16"),
}
SHAPES = ("fp8_128_overlap", "fp8_128_pair", "fp8_192", "fp8_192_pair")  # only where they are asked for
EXPERTS, BLOCK = 2, 128


class Variant(NamedTuple):
    """One kernel. ``asked``: by its shape, in PYROUTE_GROUPED_GEMM; ``room``: for rows of each expert, if masked."""

    operation: str  # forward, masked, dgrad, wgrad
    kind: str
    counts: tuple[int, int]
    size: int
    out_dtype: str = "float32"
    asked: str = ""
    room: int = 0

    def __str__(self) -> str:
        rows = " + ".join(map(str, self.counts)) + (f" in room for {self.room}" if self.room else "")
        return f"{self.asked or self.operation} {self.kind} to {self.out_dtype}, {rows} rows, {self.size} wide"

    @property
    def segments(self) -> tuple[int, int]:  # rows from one expert's first to the next one's
        return (self.room, self.room) if self.room else self.counts

    @property
    def starts(self) -> np.ndarray:
        return np.array([0, self.segments[0], sum(self.segments)])

    @property
    def expert(self) -> np.ndarray:  # of every row
        return np.repeat(np.arange(EXPERTS), self.segments)

    @property
    def local(self) -> np.ndarray:  # rows counted from their expert's first
        return np.arange(sum(self.segments)) - self.starts[self.expert]

    @property
    def used(self) -> np.ndarray:  # whether a row is one of its expert's
        return self.local < np.array(self.counts)[self.expert]


def cases() -> list[Case]:
    found = []
    for v in variants(emulated.REAL):
        maps = [("", elements), (" scales", scales)]
        if v.kind == "bfloat16":
            maps = maps[:1]
        elif v.size > 2 * BLOCK:  # deep: for scales, which come four blocks of depth at a time
            maps = maps[1:]
        for (what, run), which in itertools.product(maps, ("left", "right")):
            found.append(Case(f"map of {v.operation} {v.kind}: {which}{what} of {v}", functools.partial(run, v, which)))
    return found


def variants(real: bool) -> Iterator[Variant]:
    """Every kernel of csrc/cuda/sm90/arguments.h; on the emulated GPU those that differ in how they read."""
    if not real:
        yield Variant("forward", "fp8", (32, 32), 128)
        yield Variant("masked", "e4m3_e5m2", (40, 30), 128, room=70)
        yield Variant("dgrad", "bfloat16", (100, 40), 128)
        yield Variant("wgrad", "bfloat16", (40, 60), 128)
        yield Variant("wgrad", "fp8", (128, 30), 128)
        return
    outs, few, many, deep = ("float32", "bfloat16"), (64, 64), (200, 129), 5 * BLOCK
    for kind in PAIRS:  # rows of e4m3 and e5m2 have one tile, whatever their number
        yield from (Variant("forward", kind, counts, 256, out) for counts in (few, many) for out in outs)
        # of 128 rows: one with 60, a whole one, one with 62
        yield from (Variant("masked", kind, (60, 190), 256, out, room=200) for out in outs)
        yield from (Variant("dgrad", kind, counts, 256, out) for counts in (few, many) for out in outs)
        yield Variant("wgrad", kind, many, 256)
    for shape, size in itertools.product(SHAPES, (256, deep)):
        yield Variant("forward", "fp8", many, size, "bfloat16", shape)
    for counts, out in itertools.product((few, many), outs):
        yield Variant("forward", "fp8", counts, deep, out)
    yield Variant("dgrad", "fp8", many, deep, "bfloat16")


# --- running ----------------------------------------------------------------------------------------------------------


def result(v: Variant, left: np.ndarray, right: np.ndarray, given: dict[str, np.ndarray]) -> np.ndarray:
    """The product of the operands; ``given``: scales of "left" or "right" other than 1."""
    at = emulated.to_device(v.starts.astype(np.int64))
    rows = (1, BLOCK) if v.operation != "wgrad" else (BLOCK, 1)
    of_left, of_right = PAIRS[v.kind]
    a = operand(v, left, of_left, rows, given.get("left"), at)
    b = operand(v, right, of_right, (BLOCK, BLOCK) if v.operation != "wgrad" else rows, given.get("right"), at)
    with asked_for(v.asked):
        if v.operation == "wgrad":
            out = pyroute.grouped_gemm_wgrad(a, b, at)
        elif v.operation == "masked":
            out = emulated.to_device(np.zeros((EXPERTS, v.room, v.size), TYPES.get(v.out_dtype, np.float32)))
            counts = emulated.to_device(np.array(v.counts, np.int32))
            out = pyroute.grouped_gemm(a, b, tokens_per_expert=counts, out=out)
        else:
            multiply = pyroute.grouped_gemm if v.operation == "forward" else pyroute.grouped_gemm_dgrad
            out = multiply(a, b, at, out_dtype=v.out_dtype)
    host = np.asarray(emulated.to_host(out)).astype(np.float32)
    return host.reshape(-1, v.size) if v.operation == "masked" else host


def operand(v: Variant, x: np.ndarray, kind: str, block: tuple[int, int], scale: np.ndarray | None, at: Any) -> Any:
    if v.operation == "masked" and x.ndim == 2:
        x = x.reshape(EXPERTS, v.room, -1)
    codes = emulated.to_device(x.astype(TYPES[kind]))
    if kind == "bfloat16":
        return codes
    shape = scale_shape(v, x.shape, block)
    scale = np.ones(shape, np.float32) if scale is None else scale.reshape(shape)
    offsets = at if block == (BLOCK, 1) else None
    return Fp8Array(codes, emulated.to_device(scale), block, kind, expert_offsets=offsets)


def scale_shape(v: Variant, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    if block == (BLOCK, 1):
        return (shape[0] + EXPERTS * (BLOCK - 1)) // BLOCK, shape[1]
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


@contextlib.contextmanager
def asked_for(kernel: str) -> Iterator[None]:
    """The kernel of SHAPES instead of the one that the launcher would choose."""
    if kernel:
        os.environ["PYROUTE_GROUPED_GEMM"] = f"{kernel}_product"
    try:
        yield
    finally:
        os.environ.pop("PYROUTE_GROUPED_GEMM", None)


def verdict(results: list[np.ndarray], want: np.ndarray, axes: Axes) -> str | None:
    wrong = gpu_patterns.misread(gpu_patterns.numbers_from(results), want, axes)
    return wrong and f"{_backend.cuda.last_kernel() or 'unknown kernel'}: {wrong}"


# --- elements ---------------------------------------------------------------------------------------------------------


def elements(v: Variant, which: str) -> str | None:
    rows = sum(v.segments), v.size
    weights = (EXPERTS, v.size, v.size)
    shape = rows if which == "left" or v.operation == "wgrad" else weights
    own = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
    chunk = 16 // np.dtype(TYPES[PAIRS[v.kind][0]]).itemsize
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
    rows, square = np.arange(sum(v.segments)), np.eye(v.size, dtype=np.float32)
    if v.operation == "wgrad":
        pick = np.zeros((len(rows), v.size), np.float32)
        pick[rows, v.local] = 1
        want = np.zeros((EXPERTS, v.size, v.size), np.int64)
        want[v.expert, v.local] = own[rows]
        yield pick, want if which == "right" else want.transpose(0, 2, 1)
    elif which == "left":
        yield np.repeat(square[None], EXPERTS, 0), np.where(v.used[:, None], own, 0)
    else:
        turned = own if v.operation == "dgrad" else own.transpose(0, 2, 1)  # the contraction first
        for shift in range(0, v.size, min(v.counts)):
            inside = v.local + shift < v.size
            pick = np.zeros((len(rows), v.size), np.float32)
            pick[rows[inside], v.local[inside] + shift] = 1
            want = np.zeros((len(rows), v.size), np.int64)
            due = inside & v.used
            want[due] = turned[v.expert[due], v.local[due] + shift]
            yield pick, want


# --- scales -----------------------------------------------------------------------------------------------------------


def scales(v: Variant, which: str) -> str | None:
    """One element of every block of the contraction at a time is 1 in the left operand, all are in the right one."""
    rows = sum(v.segments), v.size
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
        return np.where(v.used[:, None], np.repeat(own[:, c, None], v.size, 1), 0)
    across = np.arange(v.size) // BLOCK
    of = own[:, c][:, across] if v.operation == "dgrad" else own[:, across, c]
    return np.where(v.used[:, None], of[v.expert], 0)
