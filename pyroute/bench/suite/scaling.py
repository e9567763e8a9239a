"""``pyroute bench --scaling``: how times grow, with T, k, E, H and I over two decades, threads, load and odd sizes.

The points of a part are interleaved; docs/benchmarking.md holds the rules.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pyroute

from ..limits import Limits, measure_limits
from ..terminal import duration, progress
from . import harness, report
from . import scaling_cases as cases
from .peers import Work


class Fit(NamedTuple):
    """``start + slope * x``, never negative, of least squared relative error."""

    start: float
    slope: float
    worst: float  # largest relative distance of a point
    power: float  # slope of the logarithms: 1 where time grows as x does, less where a start is in it

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> Fit:
        candidates = []
        for columns in ((0, 1), (0,), (1,)):
            design = np.stack([1 / y, x / y], axis=1)[:, columns]
            found, *_ = np.linalg.lstsq(design, np.ones(len(x)), rcond=None)
            full = np.zeros(2)
            full[list(columns)] = found
            if (full >= 0).all():
                candidates.append((float(np.sum((full[0] / y + full[1] * x / y - 1) ** 2)), full))
        start, slope = min(candidates, key=lambda one: one[0])[1]
        worst = np.abs((start + slope * x) / y - 1).max()
        return cls(float(start), float(slope), float(worst), float(np.polyfit(np.log(x), np.log(y), 1)[0]))


def _always(threads: int, asked: int) -> None:
    pyroute.set_num_threads(threads)


def measure(works: list[tuple[str, Work, int]], rounds: int) -> list[harness.Cell]:
    """Works with their threads, interleaved."""
    cells = []
    for name, work, threads in works:
        cell = harness.Cell("pyroute", pyroute.__version__, name, "")
        cell.set_threads = functools.partial(_always, threads)
        cell.set_threads(threads)
        work.run()
        cell.work = work
        harness.gauge(cell)
        cells.append(cell)
    harness.sample(cells, 0, rounds, pause=0.0)  # nobody else's threads are here
    for cell in cells:
        cell.work = None
    return cells


def line(op: str, case: str, cells: list[harness.Cell], args: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    return {
        "op": op,
        "case": case,
        "column": "pyroute",
        "version": pyroute.__version__,
        "points": [cell.name for cell in cells],
        **{f"{key}_s": [cell.percentile(q) for cell in cells] for key, q in (("median", 50), ("p10", 10), ("p90", 90))},
        "rounds": min(len(cell.samples) for cell in cells),
        "threads": args.threads,
        "limits": report.rates(args.limits.as_dict()),
        **facts,
    }


def growth(op: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    for axis, points in cases.GROWTH[op].items():
        sizes = [points[0], points[len(points) // 2], points[-1]] if args.quick else points
        works = [(str(getattr(s, axis)), cases.BUILD[op](s), args.threads) for s in sizes]
        cells = measure(works, args.rounds)
        x = np.array([float(getattr(s, axis)) for s in sizes])
        fit = Fit.of(x, np.array([cell.median for cell in cells]))
        facts = {"x": x.tolist(), "fit": fit._asdict(), "least_s": least(op, sizes, args.limits)}
        lines.append(line(op, f"growth with {axis}", cells, args, **facts))
    return lines


def least(op: str, sizes: list[cases.Sizes], limits: Limits) -> list[float]:
    """Seconds below which the memory's or the processor's rate does not allow any point; none without those rates."""
    if limits.fma_gflops is None:
        return []
    needs = [cases.least(op, s) for s in sizes]
    return [max(moved / limits.copy_gbs, flops / limits.fma_gflops) / 1e9 for moved, flops in needs]


def threads(op: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time on one thread over n times the time on n; beside it what the memory's own rates would allow."""
    work = cases.BUILD[op](cases.LARGE[op])
    cells = measure([("1", work, 1), (str(args.threads), work, args.threads)], args.rounds)
    limits = args.limits
    efficiency = cells[0].median / cells[1].median / args.threads
    memory = (limits.copy_gbs / limits.copy_gbs_one_thread / args.threads) if limits.copy_gbs_one_thread else None
    return [line(op, "threads", cells, args, efficiency=efficiency, efficiency_of_copy=memory)]


def loads(op: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Balanced, Zipf and one-hot with the same number of rows; the loss against the balanced one."""
    works = [(load, cases.BUILD[op](cases.LARGE[op]._replace(load=load)), args.threads) for load in cases.LOADS]
    cells = measure(works, args.rounds)
    loss = max(cell.median for cell in cells) / cells[0].median - 1
    return [line(op, "loads", cells, args, loss=loss)]


def sizes(op: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time per unit of work at an odd size over the mean of its round neighbours."""
    lines = []
    for axis, below, size, above in cases.ODD[op]:
        middle = cases.MIDDLE[op]
        three = [middle.along(axis, value) for value in (below, size, above)]
        if axis == "E" and op in cases.WITH_WEIGHTS:  # as many rows for every expert
            three = [s._replace(T=s.T * s.E // middle.E) for s in three]
        names = [f"{axis}={value}" for value in (below, size, above)]
        works = [(name, cases.BUILD[op](s), args.threads) for name, s in zip(names, three, strict=True)]
        cells = measure(works, args.rounds)
        per_work = [cell.median / cases.work(op, s) for cell, s in zip(cells, three, strict=True)]
        excess = per_work[1] / ((per_work[0] + per_work[2]) / 2) - 1
        lines.append(line(op, f"size {axis}={size}", cells, args, excess=excess))
    return lines


MEASURES: dict[str, Callable[[str, argparse.Namespace], list[dict[str, Any]]]] = {
    "growth": growth,
    "threads": threads,
    "loads": loads,
    "sizes": sizes,
}


def verdict(found: dict[str, Any]) -> tuple[str, str, bool | None]:
    """What was found, the bar, whether it is met."""
    if "fit" in found:
        return f"worst distance from a line {found['fit']['worst']:.0%}", "<= 25%", found["fit"]["worst"] <= 0.25
    if "efficiency" in found:
        memory = found["efficiency_of_copy"]
        text = f"efficiency {found['efficiency']:.2f}" + (f" (copying memory: {memory:.2f})" if memory else "")
        enough = 0.9 if memory is None or found["op"] in cases.WITH_WEIGHTS else min(0.9, memory)
        return text, f">= {enough:.2g}", found["efficiency"] >= enough
    if "loss" in found:
        return f"loss {found['loss']:+.0%}", "<= 10%", found["loss"] <= 0.10
    return f"{found['excess']:+.0%} against neighbours", "<= 15%", found["excess"] <= 0.15


def show(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    rows = []
    for found in lines:
        text, bar, met = verdict(found)
        times = f"{duration(found['median_s'][0])} .. {duration(found['median_s'][-1])}"
        points = f"{found['points'][0]} .. {found['points'][-1]}"
        mark = report.Cell.of(*(("met", "good") if met else ("missed", "bad")))
        rows.append([*map(report.Cell, (found["op"], found["case"], points, times, text, bar)), mark])
    title = f"scaling, {args.threads} threads, pyroute {pyroute.__version__}"
    report.print_table(title, ("op", "case", "points", "median", "found", "bar", ""), rows, [], "<<<<<<<")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the operations and parts that are asked for; interrupted, those that are complete."""
    lines: list[dict[str, Any]] = []
    pieces = [(part, op) for part in args.parts for op in args.rows if part in cases.parts_of(op)]
    pyroute.set_num_threads(args.threads)
    args.limits = measure_limits(quick=True)
    with progress(len(pieces)) as step:
        for part, op in pieces:
            step(f"{part} {op}")
            try:
                lines += MEASURES[part](op, args)
            except KeyboardInterrupt:
                args.interrupted = True
                break
            gc.collect()
    return lines
