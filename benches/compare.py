"""pyroute beside its peers, interleaved in one process, with the machine's limits of the same minutes and our bars.

    python benches/compare.py                          every row, all threads
    python benches/compare.py --rows gate,prefill      some rows
    python benches/compare.py --threads 1 --record     a line per column into benches/results/<machine>.jsonl
    python benches/compare.py --cold                   caches emptied before every call

docs/benchmarking.md holds the rules. Peers are optional: python -m pip install -e ".[peers]"
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import bars
import harness
import peers
import records
import report
import shapes

import pyroute
from pyroute.bench.limits import measure_limits
from pyroute.bench.terminal import UsageError, progress, write_json

undisturbed = contextlib.nullcontext  # held while the clock runs; a shared machine can put a lock here


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare.py", description="pyroute beside its peers, with its bars.")
    parser.add_argument("--rows", default="", help=f"some of {','.join(bars.row_names())}")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--columns", default="", help="only columns whose name contains one of these, with commas")
    parser.add_argument("--threads", type=int, default=0, help="threads of everybody (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="samples a column")
    parser.add_argument("--cold", action="store_true", help="empty the caches before every call")
    parser.add_argument("--quick", action="store_true", help="pyroute alone on small shapes: whether it runs")
    parser.add_argument("--json", metavar="FILE", help="write the results, - for standard output")
    parser.add_argument("--record", action="store_true", help="append to benches/results")
    args = parser.parse_args(argv)
    wanted = [row for row in args.rows.split(",") if row]
    if unknown := [row for row in wanted if row not in bars.row_names()]:
        raise UsageError(f"--rows: no row {', '.join(unknown)}; there are {', '.join(bars.row_names())}")
    if args.threads < 0 or args.rounds < 1:
        raise UsageError("--threads and --rounds must be at least 1")
    args.rows, args.threads = wanted, args.threads or pyroute.get_num_threads()
    args.rounds = 3 if args.quick else args.rounds
    return args


class Outcome:
    """One case after its measurement."""

    def __init__(self, case: bars.Case, problem: Any, cells: list[harness.Cell], limits: list[dict[str, Any]]):
        self.case, self.problem, self.cells, self.limits = case, problem, cells, limits
        self.op, self.name = problem.op, problem.case
        best = {key: max(one[key] or 0.0 for one in limits) for key in ("fma_gflops", "read_gbs", "copy_gbs")}
        self.measured = bars.Measured({cell.name: cell.median for cell in cells if cell.timed}, **best)
        self.bars = [(bar, bar.value(self.measured, problem)) for bar in case.bars]


def run_case(case: bars.Case, everyone: list[peers.Peer], args: argparse.Namespace, step: Any) -> Outcome | None:
    problem = case.make(shapes.small if args.quick else lambda s: s)
    if args.case not in f"{problem.op} {problem.case}":
        return None
    label = f"{problem.op} {problem.case}"
    cells: list[harness.Cell] = []
    for peer in everyone:
        for column in peer.columns:
            if column.op == problem.op and matches(column.name, args.columns):
                step(f"{label}: preparing {column.name}")
                if cell := harness.prepare(problem, peer, column, args.threads):
                    cells.append(cell)
    pyroute.set_num_threads(args.threads)
    limits = []
    with undisturbed():
        try:
            limits.append(measure_limits(quick=True).as_dict())
            harness.sample(cells, args.threads, args.rounds, cold=args.cold, step=lambda name: step(f"{label}: {name}"))
            pyroute.set_num_threads(args.threads)
            limits.append(measure_limits(quick=True).as_dict())
        except KeyboardInterrupt:  # what was measured stays
            if not limits:
                raise
            args.interrupted = True
    for cell in cells:  # inputs and results of this case are no longer needed
        cell.work = None
        if cell.status == "ok" and not cell.samples:
            cell.status, cell.note = "not reached", "interrupted before its first sample"
    outcome = Outcome(case, problem, cells, limits)
    problem.__dict__.pop("_memo", None)
    return outcome


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


def matches(name: str, wanted: str) -> bool:
    return not wanted or any(part in name for part in wanted.split(","))


def run(args: argparse.Namespace, everyone: list[peers.Peer], cases: list[bars.Case]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    args.interrupted = False
    with progress(len(cases)) as step:
        for case in cases:
            step(case.row)
            try:
                outcome = run_case(case, everyone, args, lambda what: None)
                outcomes += [outcome] if outcome else []
            except KeyboardInterrupt:
                args.interrupted = True
            gc.collect()
            if args.interrupted:
                break
    return outcomes


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        chosen = [case for case in bars.cases() if not args.rows or case.row in args.rows]
        started, facts = time.time(), records.common_facts()
        with quiet_stdout():
            everyone = list(peers.load(("ours",) if args.quick else peers.MODULES))
            outcomes = run(args, everyone, chosen)
        lines = [line for outcome in outcomes for line in report.lines(outcome, args)]
        if args.json:
            write_json({**facts, "seconds": time.time() - started, "lines": lines}, args.json)
        if args.json != "-":
            report.show(outcomes, everyone, args)
        if args.record and lines:
            path = records.append(lines, {**facts, "threads": args.threads})
            print(f"{len(lines)} lines added to {os.path.relpath(path)}", file=sys.stderr)
        return 130 if args.interrupted else 0
    except UsageError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
