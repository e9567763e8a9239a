"""pytest-benchmark over the cases of ``pyroute bench --model``: every column's result is checked once, then timed.

    pytest benches                                           every model evenly loaded, the first one in every load
    pytest benches -k "gating and kimi-k2"                   some of them
    pytest benches --model mixtral --load zipf:1.5           one model, one load
    pytest benches --threads 1                               on one thread
    pytest benches --benchmark-disable                       once each, on small shapes, untimed

A module names its rows of the table in ROWS. Columns are pyroute's: each format on the two best instruction sets and on
the NumPy backend. ``pyroute bench`` measures them beside peers and keeps records; docs/benchmarking.md has the rules.
"""

from __future__ import annotations

import functools
import time

import pytest

import pyroute
from pyroute.bench.limits import measure_limits
from pyroute.bench.suite import models, options, peers, shapes
from pyroute.bench.suite.peers.ours import ISAS
from pyroute.bench.suite.problems import TOLERANCES

MODELS = ("deepseek-v3", "deepseek-v4", "kimi-k2", "mixtral", "qwen3-moe", "gpt-oss", "kimi-k3-like")
LOADS = ("balanced", "zipf:1.2", "one-hot", "half-empty")
MEMORY = 1 << 30  # of a form of the weights
SECONDS = 0.5  # of a column


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=0, help="threads of the cpu backend (default: all)")
    parser.addoption("--model", choices=options.MODELS, help="only this one")
    parser.addoption("--load", type=options.load, help="of the experts: " + ", ".join(options.LOADS))


def pytest_configure(config):
    if threads := config.getoption("--threads"):
        pyroute.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    """``timed``: every column of every case of the module's rows."""
    if "timed" in metafunc.fixturenames:
        small = metafunc.config.getoption("benchmark_disable")
        model, load = metafunc.config.getoption("--model"), metafunc.config.getoption("--load")
        found = [
            one
            for each in ([model] if model else MODELS)
            for one in columns_of(metafunc.module.ROWS, each, load, small)
        ]
        metafunc.parametrize("timed", found, ids=[one.name for one in found], indirect=True)


def columns_of(rows, model, load, small):
    first = model == MODELS[0]
    for each in [load] if load else LOADS if first else LOADS[:1]:
        for case in models.cases(model, each, MEMORY):
            if case.row in rows and (not small or first or load or case.row == "gate"):
                yield from columns_for(case, all_of_them=not small or each == LOADS[0])


def columns_for(case, *, all_of_them):
    """On every backend with old and fresh results, or on the best instruction set only."""
    ours, numpy = backends()
    for peer in (ours, numpy) if all_of_them else (ours,):
        for column in peer.columns:
            if column.op == case.op and (all_of_them or not column.name.endswith(("fresh", *ISAS[1:]))):
                yield Timed(case, peer, column)


@functools.cache
def backends():
    return tuple(peers.load(("ours", "numpy_arrays")))


@functools.lru_cache(maxsize=1)
def problem_of(case, small):
    """The columns of a case follow each other and share its inputs."""
    few = shapes.few_tokens if case.row == "gate" else shapes.small
    return case.make(few if small else lambda s: s)


class Timed:
    """One column of one case: ``timed()`` checks its result once and times it."""

    def __init__(self, case, peer, column):
        self.case, self.peer, self.column = case, peer, column
        self.name = f"{case.name} {column.name}"

    def __call__(self, benchmark, small, limits):
        problem, column = problem_of(self.case, small), self.column
        self.peer.set_threads(limits.threads)
        work = column.build(problem)
        if work is None:
            pytest.skip("not of this case")
        if work.before:
            work.before()
        error = problem.error(work.read(work.run()))
        assert error <= TOLERANCES[column.kind]
        benchmark.group, benchmark.name = f"{problem.op} {problem.case}", column.name
        benchmark.extra_info.update(
            error=error, bytes=problem.nbytes, flops=problem.flops, threads=limits.threads, isa=limits.isa
        )
        if small:
            benchmark(work.run)
            return
        start = time.perf_counter()
        work.run()
        seconds = time.perf_counter() - start
        calls = max(1, int(0.02 / max(seconds, 1e-7)))  # of a round: several ticks of the scheduler
        rounds = max(3, min(30, int(SECONDS / (calls * seconds))))
        benchmark.pedantic(work.run, rounds=rounds, iterations=calls)
        share = limits.share(benchmark.stats.stats.median, problem.nbytes, problem.flops, reads=problem.reads)
        benchmark.extra_info["share_of_limit"] = share and round(share, 3)


@pytest.fixture
def timed(request, benchmark, small, limits):
    return functools.partial(request.param, benchmark, small, limits)


@pytest.fixture(scope="session")
def small(pytestconfig) -> bool:
    """Whether cases only have to run."""
    return pytestconfig.getoption("benchmark_disable")


@pytest.fixture(scope="session")
def limits(small):
    return measure_limits(quick=small)
