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

import alone
import bars
import harness
import options
import peers
import records
import report
import shapes
from peers.ours import set_threads

from pyroute.bench.limits import measure_limits
from pyroute.bench.terminal import UsageError, progress, write_json


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = options.parser(
        "compare.py",
        "pyroute beside its peers, with its bars.",
        rounds=9,
        quick="pyroute alone on small shapes: whether it runs",
    )
    parser.add_argument("--rows", default="", help=f"some of {','.join(bars.row_names())}")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--columns", default="", help="only columns whose name contains one of these, with commas")
    parser.add_argument("--cold", action="store_true", help="empty the caches before every call")
    args = options.check(parser.parse_args(argv), quick_rounds=3)
    args.rows = options.some_of("--rows", args.rows, bars.row_names())
    return args


class Outcome:
    """One case after its measurement."""

    def __init__(self, case: bars.Case, problem: Any, cells: list[harness.Cell], limits: list[dict[str, Any]]):
        self.case, self.problem, self.cells, self.limits = case, problem, cells, limits
        self.op, self.name = problem.op, problem.case
        names = ("fma_gflops", "read_gbs", "write_gbs", "copy_gbs")
        best = {key: max(one[key] or 0.0 for one in limits) for key in names}
        self.measured = bars.Measured({cell.name: cell.median for cell in cells if cell.timed}, **best)
        self.bars = [(bar, bar.value(self.measured, problem)) for bar in case.bars]


def run_case(number: int, case: bars.Case, everyone: list[peers.Peer], args: argparse.Namespace) -> Outcome | None:
    problem = case.make(shapes.small if args.quick else lambda s: s)
    if args.case not in f"{problem.op} {problem.case}":
        return None
    chosen = [(peer, column) for peer in everyone for column in wanted_columns(peer, problem.op, args.columns)]
    prepared = [harness.prepare(problem, peer, column, args.threads) for peer, column in chosen if not column.alone]
    cells = [cell for cell in prepared if cell]
    limits: list[dict[str, Any]] = []
    try:
        limits.append(machine_limits(args.threads))
        harness.sample(cells, args.threads, args.rounds, cold=args.cold)
        limits.append(machine_limits(args.threads))
        for peer in everyone:
            if columns := [column for other, column in chosen if other is peer and column.alone]:
                cells += alone.measure(number, peer, columns, args)
                limits.append(machine_limits(args.threads))
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


def wanted_columns(peer: peers.Peer, op: str, names: str) -> list[peers.Column]:
    """Those of the operation whose name contains one of the names with commas between them."""
    return [
        column
        for column in peer.columns
        if column.op == op and (not names or any(part in column.name for part in names.split(",")))
    ]


def machine_limits(threads: int) -> dict[str, Any]:
    set_threads(threads)
    return measure_limits(quick=True).as_dict()


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


def run(args: argparse.Namespace, everyone: list[peers.Peer]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    args.interrupted = False
    cases = [(number, case) for number, case in enumerate(bars.cases()) if case.row in args.rows]
    with progress(len(cases)) as step:
        for number, case in cases:
            step(case.row)
            try:
                outcome = run_case(number, case, everyone, args)
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
        started, facts = time.time(), records.common_facts()
        with quiet_stdout():
            everyone = list(peers.load(("ours", "machine") if args.quick else peers.MODULES))
            outcomes = run(args, everyone)
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
