"""``pyroute bench``: pyroute and its peers on the same work, interleaved in one process, with the machine's limits.

docs/benchmarking.md holds the rules.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import cost
from ..limits import measure_limits
from ..machine import available_memory
from ..terminal import Steps, UsageError, progress, report_console, write_json
from . import alone, bars, changes, harness, models, options, page, peers, records, report, scaling, shapes
from .peers.ours import set_threads

MEMORY = 3 << 30  # of a model's weights in float32
QUICK_PAUSE = 0.01  # of harness.PAUSE_SECONDS: whether it runs, not how fast


class Outcome:
    """One case after its measurement."""

    def __init__(self, case: bars.Case, problem: Any, cells: list[harness.Cell], limits: list[dict[str, Any]]):
        self.case, self.problem, self.cells, self.limits = case, problem, cells, limits
        self.op, self.name = problem.op, problem.case
        names = ("fma_gflops", "read_gbs", "write_gbs", "copy_gbs")
        best = {key: max(one[key] or 0.0 for one in limits) for key in names}
        self.measured = bars.Measured({cell.name: cell.median for cell in cells if cell.timed}, **best)
        self.bars = [(bar, bar.value(self.measured, problem)) for bar in case.bars]


def run_case(
    number: int, case: bars.Case, everyone: list[peers.Peer], args: argparse.Namespace, step: Steps
) -> Outcome | None:
    problem = case.make(shapes.small if args.quick else lambda s: s)
    if args.case not in f"{problem.op} {problem.case}":
        return None
    chosen = [(peer, column) for peer in everyone for column in wanted_columns(peer, problem.op, args.columns)]
    cells: list[harness.Cell] = []
    limits: list[dict[str, Any]] = []
    try:
        for peer, column in chosen:
            if not column.alone:
                step(f"{problem.op} {problem.case}: {column.name}", begins=False)
                cell = harness.prepare(problem, peer, column, args.threads)
                cells += [cell] if cell else []
        step(f"{problem.op} {problem.case}: timing", begins=False)
        limits.append(machine_limits(args, after=False))
        harness.sample(cells, args.threads, args.rounds, cold=args.cold, pause=QUICK_PAUSE if args.quick else None)
        limits.append(machine_limits(args))
        for peer in everyone:
            if columns := [column for other, column in chosen if other is peer and column.alone]:
                step(f"{problem.op} {problem.case}: {peer.name} alone", begins=False)
                cells += alone.measure(number, peer, columns, args)
                limits.append(machine_limits(args))
    except KeyboardInterrupt:  # what was measured stays
        if not any(cell.samples for cell in cells):
            raise
        args.interrupted = True
    for cell in cells:  # inputs and results of this case are no longer needed
        cell.work = None
        if cell.status == "ok" and not cell.samples:
            cell.status, cell.note = "not reached", "interrupted before its first sample"
    outcome = Outcome(case, problem, cells, limits)
    problem.__dict__.pop("_memo", None)
    return outcome


def wanted_columns(peer: peers.Peer, op: str, names: str) -> list[peers.Column]:
    """Those of the operation whose name contains one of the names with commas between them."""
    return [
        column
        for column in peer.columns
        if column.op == op
        and (any(part in column.name for part in names.split(",")) if names else not column.on_request)
    ]


def machine_limits(args: argparse.Namespace, *, after: bool = True) -> dict[str, Any]:
    """Before a case those that were measured after the one before; in quick mode once for all, since that takes longer
    than a case."""
    if args.limits is None or (after and not args.quick):
        set_threads(args.threads)
        args.limits = measure_limits(quick=True).as_dict()
    known: dict[str, Any] = args.limits
    return known


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Standard output is for the report: what libraries print, in C++ too, goes to standard error."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def run(args: argparse.Namespace, everyone: list[peers.Peer], keep: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """``keep`` is given what there is after every case, for who may not live to see the end."""
    outcomes: list[Outcome] = []
    args.interrupted, args.limits = False, None
    cases = [(number, case) for number, case in enumerate(models.chosen(args)) if case.row in args.rows]
    with progress(len(cases)) as step:
        for number, case in cases:
            step(case.name or case.row)
            try:
                outcome = run_case(number, case, everyone, args, step)
                outcomes += [outcome] if outcome else []
            except KeyboardInterrupt:
                args.interrupted = True
            keep(outcomes)
            gc.collect()
            if args.interrupted:
                break
    return outcomes


def lines_of(outcomes: list[Outcome], args: argparse.Namespace) -> list[dict[str, Any]]:
    return [line for outcome in outcomes for line in report.lines(outcome, args)]


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """``timeout`` and batch systems send SIGTERM: it ends the run as Ctrl-C does, and what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def product_rates(lines: list[dict[str, Any]]) -> dict[str, float]:
    """TFLOP/s of pyroute's products of many rows, by column: what a model's operations would run at."""
    return {
        line["column"].removeprefix("pyroute "): line["flops"] / line["median_s"] / 1e12
        for line in lines
        if line["op"] == "gemm" and line["column"].startswith("pyroute") and "decode" not in line["case"]
        if line.get("median_s")
    }


def bench(args: argparse.Namespace) -> int:
    """The command: measure, write, show; 130 if it was interrupted, 1 if something became slower."""
    if args.scaling:
        options.check(args, rounds=7, quick_rounds=1)
        args.parts = options.some_of("--parts", args.parts, options.PARTS)
    else:
        options.check(args, rounds=7, quick_rounds=3)
    args.rows = options.some_of("OP", args.rows, options.SCALED if args.scaling else options.ROWS)
    options.load(args.load)
    args.memory = min(MEMORY, available_memory() // 3)  # peers keep their own form of the weights, wider or narrower
    args.interrupted = False
    if args.cost:
        if not args.model or args.scaling:
            raise UsageError("--cost needs --model, and times of its operations")
        cost.sizes_of(args.model)
        args.rows = list(dict.fromkeys([*args.rows, "prefill"]))
    old = changes.read(args.compare) if args.compare else []
    started, facts = time.time(), records.common_facts()
    outcomes: list[Outcome] = []
    everyone: list[peers.Peer] = []
    with quiet_stdout(), terminated_as_interrupted():
        if args.scaling:
            lines = scaling.run(args)
        else:
            everyone = list(peers.load(peers.MODULES if args.peers else ("ours", "machine")))

            def keep(outcomes: list[Outcome]) -> None:
                if args.json not in (None, "-"):
                    write_json({**facts, "lines": lines_of(outcomes, args)}, args.json)

            outcomes = run(args, everyone, keep)
            lines = lines_of(outcomes, args)
    changed = changes.find(old, lines)
    costs = cost.estimate(args.model, measured=product_rates(lines)) if args.cost else None
    if args.json:
        found: dict[str, Any] = {"changes": [change.as_dict() for change in changed]} if args.compare else {}
        found |= {"cost": costs} if costs else {}
        write_json({**facts, "seconds": time.time() - started, "lines": lines, **found}, args.json)
    if args.json != "-":
        if args.scaling:
            scaling.show(lines, args)
        else:
            report.show(outcomes, everyone, args)
        if args.compare:
            changes.show(changed, changes.machine_changed(old, lines), args.compare)
        if costs:
            cost.show(report_console(), costs)
    if args.plot:
        page.write(args.plot, facts, lines, report.missing(everyone))
    if args.record and lines:
        path = records.append(lines, {**facts, "threads": args.threads})
        print(f"{len(lines)} lines added to {os.path.relpath(path)}", file=sys.stderr)
    if args.interrupted:
        return 130
    return 1 if any(change.verdict == "slower" for change in changed) else 0
