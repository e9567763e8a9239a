"""Times of work on a GPU: each column's calls are captured into a graph, and its replays are timed between two events.

A graph leaves out what the host does to launch, which is longer than a small kernel. Its calls walk over several sets
of inputs that together are larger than the second-level cache, so that none is found there. Columns take turns, and a
sample is the mean over one replay.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import pyroute

from ..harness import Cell
from ..peers import reason

SAMPLE_SECONDS = 4e-4  # events tick in half microseconds
MOST_CALLS = 64
# Largest error of a result by what the numbers pass through. Weights and rows are bfloat16 here, so FP8 columns round
# both, which costs 0.05 in a product and 0.13 in a layer's gradients.
TOLERANCES = {"exact": 0.0, "float32": 1e-3, "bfloat16": 2e-2, "fp8": 8e-2, "fp8 layer": 0.2}


class Clock:
    """CUDA events on the current stream; without a GPU the host's clock, to see that everything runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.real = device, device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.real else 1

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        if not self.real:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Column:
    """One way to do a problem's work: a call for each set of inputs. ``first`` makes the result that is checked, after
    ``read`` has brought it into the problem's form."""

    def __init__(self, name: str, calls: Sequence[Callable[[], Any]], *, peer: str = "pyroute",
                 version: str = pyroute.__version__, kind: str = "bfloat16", graph: bool = True,
                 first: Callable[[], Any] | None = None, read: Callable[[Any], Any] | None = None
                 ) -> None:  # fmt: skip
        self.name, self.calls, self.peer, self.version, self.graph = name, list(calls), peer, version, graph
        self.first, self.adds = first or self.calls[0], first is not None
        self.kind, self.read = kind, read or (lambda got: got)


class DeviceLostError(Exception):
    """A column broke the device for everybody: nothing more can be measured by this process."""


def measure(columns: Sequence[Column], clock: Clock, rounds: int, check: Callable[[str, Any], float]) -> list[Cell]:
    """A cell for every column; one that fails or computes something else says so and has no times."""
    ready: list[tuple[Cell, Callable[[], object], int]] = []
    cells = []
    for column in columns:
        cell = Cell(column.peer, column.version, column.name, column.kind, tolerance=TOLERANCES[column.kind])
        cells.append(cell)
        try:
            cell.error = check(column.name, column.read(column.first()))
            if _right(cell):
                made = _repeated(column, cell, clock, check)
                ready += [(cell, *made)] if made else []
        except Exception as error:  # a peer may fail in any way; the table says how
            _failed(cell, error, clock)
    for turn in range(rounds):
        for cell, work, calls in ready[turn % max(len(ready), 1) :] + ready[: turn % max(len(ready), 1)]:
            if cell.status == "ok":
                try:
                    cell.samples.append(clock.seconds(work) / calls)
                except Exception as error:
                    _failed(cell, error, clock)
    return cells


def _right(cell: Cell, when: str = "") -> bool:
    assert cell.error is not None
    if not cell.error <= cell.tolerance:
        cell.status, cell.note = "wrong answer", f"error {cell.error:.1e} over {cell.tolerance:.0e}{when}"
    return cell.status == "ok"


def _failed(cell: Cell, error: Exception, clock: Clock) -> None:
    cell.status, cell.note = "failed", reason(error)
    try:
        clock.wait()
    except Exception as lost:
        raise DeviceLostError(f"{cell.name}: {reason(lost)}") from error


def _repeated(
    column: Column, cell: Cell, clock: Clock, check: Callable[[str, Any], float]
) -> tuple[Callable[[], object], int] | None:
    """Work long enough to be timed, and how many calls it makes; None where a replay computes something else."""

    def once() -> Any:
        first = column.calls[0]()
        for call in column.calls[1:]:
            call()
        return first

    once()  # compiles, loads and fills PyTorch's cache of memory
    clock.wait()
    seconds = max(clock.seconds(once), 1e-6)
    passes = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / seconds)))

    def loop() -> Any:
        first = once()
        for _ in range(passes - 1):
            once()
        return first

    num_calls = passes * len(column.calls)
    if not (clock.real and column.graph):
        cell.note = "launched call by call"
        return loop, num_calls
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = loop()
    except Exception as error:  # work that waits for the host cannot be captured
        torch.cuda.synchronize(clock.device)
        cell.note = f"launched call by call: {reason(error)}"
        return loop, num_calls
    poisoned = not column.adds and _poison(result)
    graph.replay()
    clock.wait()
    if poisoned:  # work that went past the graph, to a stream of its own, would cost nothing in it
        cell.error = check(column.name, column.read(result))
        if not _right(cell, " when replayed from a graph"):
            return None
    return graph.replay, num_calls


def _poison(result: Any) -> bool:
    """Overwrite the tensors among the results; whether there was one."""
    if isinstance(result, torch.Tensor):
        values = result.detach()
        if values.dtype.itemsize == 1:  # float8 among them, which fill_ does not know
            values.view(torch.uint8).fill_(255)
        else:
            values.fill_(float("nan") if values.is_floating_point() else -1)
        return True
    return isinstance(result, (tuple, list)) and sum(_poison(part) for part in result) > 0


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """What this card reaches, measured now: a copy, counting bytes read and written, and products on random data."""
    num_bytes, size = (2**24, 1024) if quick else (2**31, 8192)
    rates = {"copy_gbs": 2 * num_bytes / _copy_seconds(clock, num_bytes) / 1e9}
    if not clock.real:
        return rates | {"bf16_tflops": 1.0}
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    rates["bf16_tflops"] = 2 * size**3 / _best(clock, lambda: a @ b) / 1e12
    try:
        one = torch.ones((), device=clock.device)
        a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
        multiply = lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
        rates["fp8_tflops"] = 2 * size**3 / _best(clock, multiply) / 1e12
    except Exception as error:  # a card without FP8 products
        print(f"no FP8 product to compare with: {reason(error)}", file=sys.stderr)
    return rates


def _copy_seconds(clock: Clock, num_bytes: int) -> float:
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=clock.device)
    to = torch.empty_like(source)
    return _best(clock, lambda: to.copy_(source))


def _best(clock: Clock, work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    return min(clock.seconds(work) for _ in range(10))
