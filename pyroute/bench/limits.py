"""What this machine can do at best, measured: the yardstick beside every time that pyroute prints.

Four limits, each the best of several short runs (no run can beat the hardware, and a busy neighbour only slows one):

- ``fma_gflops``: multiply-adds on registers only, a multiply-add counted as two operations;
- ``read_gbs``: every byte of a buffer far larger than the last cache, read once;
- ``write_gbs``: every byte of such a buffer written once with streaming stores, nothing read;
- ``copy_gbs``: one such buffer copied to another with streaming stores, bytes read plus bytes written.

A time's share of a limit says how much is left to win. docs/benchmarking.md holds the method.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _backend
from .machine import available_memory, last_level_cache

MIB = 1 << 20
_RUNS = 7
_RUN_SECONDS = 0.015  # several scheduler ticks of 4 ms: shorter runs measure the neighbours


@dataclasses.dataclass(frozen=True)
class Limits:
    """The measured limits of this machine; None where nothing could measure it (no compiled backend)."""

    threads: int
    isa: str  # the instruction set of the probes; "" without the compiled backend
    fma_gflops: float | None
    fma_gflops_one_thread: float | None
    read_gbs: float | None
    read_gbs_one_thread: float | None
    write_gbs: float | None
    write_gbs_one_thread: float | None
    copy_gbs: float
    copy_gbs_one_thread: float | None
    buffer_bytes: int
    steadiness: float  # the lowest ratio of a median run to the best one: near 1 on a quiet machine

    def share(self, seconds: float, nbytes: float, flops: float = 0, *, reads: bool = False) -> float | None:
        """The shortest time that the hardware allows over this time; ``reads`` where hardly anything is written."""
        memory = self.read_gbs if reads else self.copy_gbs
        if memory is None or self.fma_gflops is None:
            return None
        return max(nbytes / memory, flops / self.fma_gflops) / 1e9 / seconds

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure_limits(*, quick: bool = False) -> Limits:
    """The limits for the instruction set and the threads in use; takes about two seconds, half in quick mode."""
    nbytes = _buffer_bytes(quick)
    source, destination = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    if not _backend.HAS_CORE:
        return _numpy_limits(source, destination)
    core = _backend.core
    threads = core.num_threads()
    # First touch by the copying threads: fresh pages would be read from the one zero page, that is from the cache.
    core.probe_copy(destination, source, threads)
    core.probe_copy(source, destination, threads)
    rounds = _rounds_for(_RUN_SECONDS)
    medians: list[float] = []

    def best(work: Callable[[int], float]) -> tuple[float, float]:
        """With all threads and with one; a limit of one thread is one of several."""
        found = []
        for n in (threads, 1):
            rates = _rates(functools.partial(work, n))
            medians.append(statistics.median(rates) / max(rates))
            found.append(max(rates))
        return max(found), found[1]

    fma_all, fma_one = best(lambda n: core.probe_fma(rounds, n))
    read_all, read_one = best(lambda n: core.probe_read(source, n))
    write_all, write_one = best(lambda n: core.probe_write(destination, n))
    copy_all, copy_one = best(lambda n: core.probe_copy(destination, source, n))
    return Limits(
        threads=threads,
        isa=core.isa(),
        fma_gflops=fma_all,
        fma_gflops_one_thread=fma_one,
        read_gbs=read_all,
        read_gbs_one_thread=read_one,
        write_gbs=write_all,
        write_gbs_one_thread=write_one,
        copy_gbs=copy_all,
        copy_gbs_one_thread=copy_one,
        buffer_bytes=nbytes,
        steadiness=min(medians),
    )


def _numpy_limits(source: np.ndarray[Any, Any], destination: np.ndarray[Any, Any]) -> Limits:
    source[:] = 1
    destination[:] = 0

    def copy() -> float:
        np.copyto(destination, source)
        return 2.0 * source.nbytes

    rates = _rates(copy)
    return Limits(
        threads=1,
        isa="",
        fma_gflops=None,
        fma_gflops_one_thread=None,
        read_gbs=None,
        read_gbs_one_thread=None,
        write_gbs=None,
        write_gbs_one_thread=None,
        copy_gbs=max(rates),
        copy_gbs_one_thread=max(rates),
        buffer_bytes=source.nbytes,
        steadiness=statistics.median(rates) / max(rates),
    )


def _rates(work: Callable[[], float]) -> list[float]:
    """Units of 1e9 per second, one for each run; ``work`` returns what it did."""
    rates = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start) / 1e9)
    return rates


def _rounds_for(seconds: float) -> int:
    """Rounds of the multiply-add probe that take about this long on one thread."""
    rounds = 1000
    while True:
        start = time.perf_counter()
        _backend.core.probe_fma(rounds, 1)
        elapsed = time.perf_counter() - start
        if elapsed > seconds / 8:
            return max(1, int(rounds * seconds / elapsed))
        rounds *= 4


def _buffer_bytes(quick: bool) -> int:
    """256 MiB, or four times the last cache where that is more; an eighth of the free memory at most."""
    cache = last_level_cache()
    wanted = max(64 * MIB, 2 * cache) if quick else max(256 * MIB, 4 * cache)
    page = os.sysconf("SC_PAGESIZE")
    return max(MIB, min(wanted, available_memory() // 8)) // page * page
