"""Benchmarks: every result is checked once, then timed beside the machine's own limits.

    pytest benches                        all of them, on all threads
    pytest benches -k gating              one room
    pytest benches --threads 1 --record   on one thread; a line per case into benches/results/<machine>.jsonl
    pytest benches --benchmark-disable    every case once, on small shapes, untimed

docs/benchmarking.md says what the numbers mean.
"""

from __future__ import annotations

import numpy as np
import pytest

import pyroute
from pyroute.bench.limits import measure_limits
from pyroute.bench.suite import records, shapes

lines_key = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=0, help="threads of the cpu backend (default: all)")
    parser.addoption("--record", action="store_true", help="append the results to benches/results")


def pytest_configure(config):
    config.stash[lines_key] = []
    if threads := config.getoption("--threads"):
        pyroute.set_num_threads(threads)


@pytest.fixture(scope="session")
def small(pytestconfig) -> bool:
    """Whether cases only have to run."""
    return pytestconfig.getoption("benchmark_disable")


@pytest.fixture(scope="session")
def shape(small):
    """``shape(model, tokens)``; at most 64 tokens and 8 experts of 1024 x 512 where cases only have to run."""

    def make(model: str, tokens: int) -> shapes.Shape:
        s = shapes.shape(model, tokens)
        return shapes.small(s) if small else s

    return make


@pytest.fixture(scope="session")
def limits(small):
    return measure_limits(quick=small)


@pytest.fixture
def timed(benchmark, limits, request):
    """``timed(op, case, work, nbytes=, flops=)``: time ``work``, and note what it must move and compute at least.

    ``reads=True`` where hardly anything is written: the limit is then that of reading.
    """

    def run(op: str, case: str, work, *, nbytes: int, flops: int = 0, reads: bool = False) -> None:
        benchmark.group = op
        benchmark.name = f"{op} {case}"
        benchmark.extra_info.update(op=op, case=case, bytes=nbytes, flops=flops, threads=limits.threads)
        benchmark(work)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = np.sort(benchmark.stats.stats.data)
        p10, median, p90 = np.percentile(times, [10, 50, 90])
        share = limits.share(median, nbytes, flops, reads=reads)
        benchmark.extra_info["share_of_limit"] = share and round(share, 3)
        request.config.stash[lines_key].append(
            {
                "op": op,
                "case": case,
                "column": f"cpu-{limits.isa}" if limits.isa else "numpy",
                "version": pyroute.__version__,
                "median_s": float(median),
                "p10_s": float(p10),
                "p90_s": float(p90),
                "rounds": len(times),
                "bytes": nbytes,
                "flops": flops,
                "share_of_limit": share,
                "limits": limits.as_dict(),
            }
        )

    return run


def pytest_sessionfinish(session):
    lines = session.config.stash[lines_key]
    if not (lines and session.config.getoption("--record")):
        return
    path = records.append(lines)
    print(f"\n{len(lines)} lines added to {path.relative_to(records.ROOT)}")
