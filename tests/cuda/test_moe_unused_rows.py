"""Rows of a layer past its last segment: nothing reads them, and nothing writes them.

On a GPU a plan has as many rows as any ids can need. What lies behind the last segment is memory as it was allocated:
poison here, of two kinds, one of which is NaN in every type.
"""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import memory, to_device, to_host
from moe_problems import KINDS, WEIGHT_ON, Problem

import pyroute

from .test_moe import forward, same

pytestmark = pytest.mark.skipif(emulated.REAL, reason="looks into the emulated GPU's memory")
POISONS = (0x7F, 0xFF)  # large numbers, NaN as e4m3; NaN of every type


def mostly_elsewhere(kind, weight_on="output", *, bias, sizes):
    """A layer of which one token in eight is routed, as on a rank that was sent slots for other ranks too."""
    problem = Problem(kind, "swiglu", weight_on, bias, sizes=sizes, seed=3)
    problem.topk_idx[sizes[0] // 8 :] = -1
    return problem


def step(problem, alignment, poison, monkeypatch):
    """(y, gradients), the plan, and the memory that was allocated on the way."""
    memory.check()
    monkeypatch.setattr(emulated, "POISON", poison)
    y, saved = forward(problem, alignment=alignment)
    gradients = pyroute.moe_backward(to_device(problem.grad_y), saved)
    regions = list(memory.regions)
    memory.check()
    return [to_host(part) for part in (y, *gradients) if part is not None], saved.plan, regions


def rows_written_behind(regions, plan, widths, poison):
    """Widths in bytes of the row buffers, and of those with a byte written behind the last segment."""
    end, seen, written = int(to_host(plan.expert_offsets)[-1]), set(), set()
    for region in regions:
        width = region.num_bytes // plan.num_rows
        if region.num_bytes == width * plan.num_rows and width in widths:
            seen.add(width)
            rest = region.room[region.start + end * width : region.start + region.num_bytes]
            assert rest.size
            if (rest != poison).any():
                written.add(width)
    return seen, written


def widths_of(kind, sizes):
    *_, hidden, inner = sizes
    item = 4 if kind in ("float32", "mixed", "fp8_weights") else 2
    rows = {hidden * item, 2 * inner * item, inner * item}
    codes = {hidden, inner, *(4 * -(-width // 128) for width in (hidden, inner))} if kind in KINDS[4:] else set()
    return rows | codes | ({2 * inner} if kind == "fp8_training" else set())


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cpus_bytes_whatever_lies_there(kind, weight_on, monkeypatch):
    bias = weight_on != "pre_down"
    problem = mostly_elsewhere(kind, weight_on, bias=bias, sizes=(40, 3, 5, 21, 13))
    alignment = 4 if bias else 1
    for poison in POISONS:
        got, *_ = step(problem, alignment, poison, monkeypatch)
        want = [problem.forward("cpu"), *problem.gradients("cpu")]
        for a, b in zip(got, [part for part in want if part is not None], strict=True):
            same(a, b)


@pytest.mark.parametrize(
    ("kernels", "weight_on"),
    [("hopper", "output"), ("hopper", "input"), ("portable", "output"), ("general", "pre_down")],
)
@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "fp8_training"])
def test_no_kernel_touches_them(kind, kernels, weight_on, monkeypatch):
    """Sizes for tensor cores: every buffer of rows is as it was allocated behind the last segment."""
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", kernels)
    sizes = (70, 3, 3, 272, 144)
    problem = mostly_elsewhere(kind, weight_on, bias=True, sizes=sizes)
    results = []
    for poison in POISONS:
        got, plan, regions = step(problem, 16, poison, monkeypatch)
        widths = widths_of(kind, sizes)
        seen, written = rows_written_behind(regions, plan, widths, poison)
        assert seen == widths, f"buffers of {widths - seen} bytes a row are missing"
        assert not written
        results.append(got)
    for a, b in zip(*results, strict=True):
        same(a, b)
        assert np.isfinite(a.astype(np.float32)).all()
