"""Several columns on one problem, interleaved: each is checked once, then sampled in rounds, so that a slow moment of
the machine falls on all of them alike.

A sample is one call, or as many calls as fill ``SAMPLE_SECONDS``; before it the process sleeps a little, so that the
thread pools of the others stop spinning, and then the column wakes its own. docs/benchmarking.md holds the rules.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable

import numpy as np

from pyroute import _backend

from .peers import Column, Peer, Work, reason
from .problems import TOLERANCES, Problem

PAUSE_SECONDS = 0.06
WAKE_SECONDS = 0.01  # untimed calls after the pause: until a thread has woken a call may take a tick of the scheduler
SAMPLE_SECONDS = 0.02  # several such ticks of 4 ms
COLD_CALLS = 5  # of a sample with cold caches at most
COLUMN_SECONDS = 6.0  # a column that has used this up is sampled no more; with FEW samples, half of it is enough
FEW = 3


def no_threads(n: int) -> None:
    """Of what has no switch for them."""


@dataclasses.dataclass
class Cell:
    """A column's outcome: samples, or why there are none."""

    peer: str
    version: str
    name: str
    kind: str
    status: str = "ok"  # "missing", "failed", "wrong answer": with a note; their times are not reported
    note: str = ""
    error: float | None = None
    tolerance: float = 0.0
    samples: list[float] = dataclasses.field(default_factory=list)
    work: Work | None = None
    set_threads: Callable[[int], object] = no_threads
    calls: int = 1
    wake: bool = True  # before a sample
    spent: float = 0.0
    alone: bool = False

    @property
    def timed(self) -> bool:
        return self.status == "ok" and bool(self.samples)

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.samples, q))

    @property
    def median(self) -> float:
        return self.percentile(50)


def prepare(problem: Problem, peer: Peer, column: Column, threads: int) -> Cell | None:
    """Build the column, check its result, warm it up; None where it has nothing to say about this problem."""
    cell = Cell(peer.name, peer.version, column.name, column.kind, tolerance=TOLERANCES[column.kind])
    cell.set_threads = peer.set_threads
    try:
        peer.set_threads(threads)
        work = column.build(problem)
        if work is None:
            return None
        if work.before:
            work.before()
        result = work.run()
        cell.error = None if column.kind == "limit" else problem.error(work.read(result))
        if cell.error is not None and not cell.error <= cell.tolerance:
            cell.status, cell.note = "wrong answer", f"error {cell.error:.1e} over {cell.tolerance:.0e}"
            return cell
        cell.work = work
        gauge(cell)
    except Exception as error:  # a peer may fail in any way; the table says how
        cell.status, cell.note = "failed", reason(error)
    return cell


def sample(
    cells: Iterable[Cell],
    threads: int,
    rounds: int,
    *,
    cold: bool = False,
    pause: float | None = None,
) -> None:
    """Rounds over all cells that are ready; the order is turned by one each time. Interrupted: what is there stays."""
    ready = [cell for cell in cells if cell.work is not None]
    for i in range(rounds):
        for cell in ready[i % max(1, len(ready)) :] + ready[: i % max(1, len(ready))]:
            enough = COLUMN_SECONDS / (2 if len(cell.samples) >= FEW else 1)
            if cell.work is None or (i and cell.spent > enough):  # it failed, or has had its time
                continue
            _sample(cell, threads, cold, PAUSE_SECONDS if pause is None else pause)


def _sample(cell: Cell, threads: int, cold: bool, pause: float) -> None:
    assert cell.work is not None
    cell.set_threads(threads)
    if cell.work.before:
        cell.work.before()
    calls = min(cell.calls, COLD_CALLS) if cold else cell.calls
    time.sleep(pause)
    try:
        if cell.wake:
            _wake(cell.work)
        seconds = _time_cold(cell.work, calls) if cold else _time(cell.work, calls)
    except Exception as error:
        cell.status, cell.note, cell.work = "failed", reason(error), None
        return
    cell.samples.append(seconds)
    cell.spent += seconds * calls


def gauge(cell: Cell) -> None:
    """How many calls make a sample; calls of 0.2 s do not notice that threads have to wake."""
    assert cell.work is not None
    seconds = _time(cell.work, 1)
    if seconds < SAMPLE_SECONDS:
        seconds = _time(cell.work, 3)
    cell.calls, cell.wake = max(1, int(SAMPLE_SECONDS / max(seconds, 1e-7))), seconds < 0.2


def _wake(work: Work) -> None:
    """Calls that are not timed."""
    end = time.perf_counter() + WAKE_SECONDS
    while True:
        work.run()
        if time.perf_counter() >= end:
            return


def _time(work: Work, calls: int) -> float:
    """Seconds per call."""
    run = work.run
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _time_cold(work: Work, calls: int) -> float:
    """The same with emptied caches before every call."""
    seconds = 0.0
    for _ in range(calls):
        _evict()
        seconds += _time(work, 1)
    return seconds / calls


@functools.cache
def _evictor() -> np.ndarray:
    return np.zeros(1 << 27, np.uint8)


def _evict() -> None:
    """Read more than any last cache holds; on one thread, so that nobody's others are awake for what follows: read by
    pyroute's threads, they alone were, and ggml took nine times pyroute's time for a token."""
    if _backend.HAS_CORE:
        _backend.core.probe_read(_evictor(), 1)
    else:
        _evictor().max()
