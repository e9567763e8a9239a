"""``pyroute bench --gpu``: every row on the current GPU; docs/benchmarking.md holds the rules."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

import pyroute

from ...terminal import UsageError, duration, write_json
from .. import bars, changes, options, records, report
from ..harness import Cell
from . import peers
from .cases import ROWS, Problem, Sizes
from .clock import Clock, Column, DeviceLostError, ceilings, measure

EQUAL = ("decode", "prefill", "backward", "tiles")  # products in which every expert has as many rows


def bench(args: argparse.Namespace) -> int:
    """The command: measure, show, write; 130 if interrupted, 1 where pyroute failed, was wrong, or became slower."""
    options.check(args, rounds=30, quick_rounds=3)
    args.rows = rows_of(args)
    if not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU here")
    old = changes.read(args.compare) if args.compare else []
    device = torch.device("cuda", torch.cuda.current_device())
    about, clock = facts(device), Clock(device)
    outcomes, ended = run(args, clock, stream=sys.stderr if args.json == "-" else sys.stdout)
    slower = deliver(args, old, about, [line for outcome in outcomes for line in outcome.lines()])
    if ended == "interrupted":
        return 130
    return 1 if ended or slower or failures(outcomes) else 0


def rows_of(args: argparse.Namespace) -> list[str]:
    """The rows to measure, which can be had with this load."""
    loaded = [row for row in ROWS if row not in EQUAL]
    rows = options.some_of("OP", args.rows, list(ROWS)) if args.rows or args.load == "random" else loaded
    if options.load(args.load) != "random" and (equal := [row for row in rows if row in EQUAL]):
        raise UsageError(f"bench --gpu takes --load for {', '.join(loaded)}, not for {', '.join(equal)}")
    return rows


def deliver(
    args: argparse.Namespace, old: list[dict[str, Any]], about: dict[str, Any], lines: list[dict[str, Any]]
) -> bool:
    """Write what was asked for; whether a column is slower than in ``old``."""
    changed = changes.find(old, lines)
    if args.json:
        found: dict[str, Any] = {"changes": [change.as_dict() for change in changed]} if args.compare else {}
        write_json({**about, "lines": lines, **found}, args.json)
    if args.compare and args.json != "-":
        changes.show(changed, changes.machine_changed(old, lines), args.compare)
    if args.record and lines:
        name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        path = records.append(lines, about, records.ROOT / f"benches/results/{name}.jsonl")
        print(f"{len(lines)} lines added to {os.path.relpath(path)}", file=sys.stderr)
    return any(change.verdict == "slower" for change in changed)


def facts(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(device)
    return {key: value for key, value in records.common_facts().items() if key in ("date", "commit", "python")} | {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "kernels": pyroute.backends()["cuda"].kernels,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


class Outcome:
    """A problem after its measurement."""

    def __init__(self, problem: Problem, cells: list[Cell], rates: dict[str, float]):
        self.problem, self.cells, self.rates = problem, cells, rates
        seconds = {cell.name: cell.median for cell in cells if cell.timed}
        measured = bars.Measured(seconds, rates["bf16_tflops"] * 1e3, 0.0, 0.0, rates["copy_gbs"])
        self.bars = [(bar, bar.value(measured, problem)) for bar in problem.bars]

    def share(self, cell: Cell) -> float:
        """The least time that copying the bytes or multiplying takes, over this one."""
        peak = self.rates.get("fp8_tflops" if "FP8" in cell.name else "bf16_tflops", self.rates["bf16_tflops"])
        least = max(self.problem.nbytes / self.rates["copy_gbs"] / 1e9, self.problem.flops / peak / 1e12)
        return least / cell.median

    def lines(self) -> list[dict[str, Any]]:
        """One record line per column; those that gave no time say why."""
        p = self.problem
        made = []
        for cell in self.cells:
            line: dict[str, Any] = {"op": p.op, "case": p.case, "column": cell.name, "backend": "cuda"}
            line["version"] = cell.version
            line |= {"status": cell.status, "error": cell.error, "tolerance": cell.tolerance}
            if cell.note:
                line["note"] = cell.note
            if cell.timed:
                line |= {"median_s": cell.median, "p10_s": cell.percentile(10), "p90_s": cell.percentile(90)}
                line |= {"rounds": len(cell.samples), "bytes": p.nbytes, "flops": p.flops}
                line["share_of_limit"] = self.share(cell)
                held = [report.bar_line(bar, value) for bar, value in self.bars if _column(bar) == cell.name]
                line |= {"bars": held} if held else {}
            made.append(line | {"limits": self.rates})
        return made


def failures(outcomes: list[Outcome]) -> list[str]:
    """Columns of pyroute's that gave no times, with the reason."""
    return [
        f"{outcome.problem.op} {outcome.problem.case}, {cell.name}: {cell.note}"
        for outcome in outcomes
        for cell in outcome.cells
        if cell.peer == "pyroute" and cell.status != "ok"
    ]


def _column(bar: bars.Bar) -> str:
    return re.split(r" : |, (?:us|TFLOP/s)$", bar.text)[0]


def show(outcome: Outcome, stream: Any) -> None:
    p = outcome.problem
    ours = next((cell.median for cell in outcome.cells if cell.peer == "pyroute" and cell.timed), None)
    print(f"\n{p.op} {p.case}", file=stream)
    for cell in outcome.cells:
        name = f"  {cell.name:38}"
        if not cell.timed:
            print(f"{name} {cell.version} {cell.status}: {cell.note}", file=stream)
            continue
        rate = (
            f"{p.flops / cell.median / 1e12:8.1f} TFLOP/s" if p.flops else f"{p.nbytes / cell.median / 1e9:8.0f} GB/s"
        )
        spread = f"{duration(cell.median):>9} ({duration(cell.percentile(10))} to {duration(cell.percentile(90))})"
        ratio = f"{cell.median / ours:5.2f} of pyroute" if ours else ""
        share = f"{outcome.share(cell):5.0%} of limit"
        error = "exact" if not cell.error else f"error {cell.error:.0e}"
        print(f"{name} {spread} {rate} {share} {ratio}  {error}  {cell.note}".rstrip(), file=stream)
    for bar, value in outcome.bars:
        held = report.bar_line(bar, value)
        verdict = "not measured" if held["met"] is None else "met" if held["met"] else "missed"
        got = "-" if held["met"] is None else f"{held['value']:.3g}"
        print(f"  bar {bar.text}: {bar.target:g} {bar.unit}, measured {got}: {verdict}", file=stream)


def run(
    args: argparse.Namespace, clock: Clock, stream: Any, keep: Callable[[Outcome], None] = lambda outcome: None
) -> tuple[list[Outcome], str]:
    """Row after row, the memory of one free before the next; and why it ended early, "" if it did not.

    ``keep`` is called with every outcome at once.
    """
    torch.manual_seed(20251122)
    rates = ceilings(clock, args.quick)
    print("limits: " + ", ".join(f"{name} {value:.0f}" for name, value in rates.items()), file=stream)
    everyone = list(peers.load(peers.MODULES if args.peers else peers.ALWAYS))
    print("\n".join(report.missing(everyone)), file=stream)
    sizes = Sizes(args.quick, args.model or "", args.load)
    outcomes: list[Outcome] = []
    ended = ""
    for row in args.rows:
        try:
            for problem in problems(row, clock, sizes, everyone):
                columns = [column for column in problem.columns if _wanted(column.name, args.columns)]
                if columns and args.case in f"{problem.op} {problem.case}":
                    cells = measure(columns, clock, args.rounds, problem.check)
                    outcomes.append(Outcome(problem, cells, rates))
                    show(outcomes[-1], stream)
                    keep(outcomes[-1])
                problem.columns.clear()
        except KeyboardInterrupt:
            ended = "interrupted"
        except DeviceLostError as lost:
            ended = f"the GPU can do no more in this process: {lost}"
        if ended:
            print(f"{ended}; the rows above are what had been measured", file=stream)
            break
        gc.collect()
        if clock.real:
            torch.cuda.empty_cache()
    return outcomes, ended


def _wanted(name: str, columns: str) -> bool:
    return not columns or any(part in name for part in columns.split(","))


def problems(row: str, clock: Clock, sizes: Sizes, everyone: list[Any]) -> list[Problem]:
    try:
        return list(ROWS[row](clock, sizes, everyone))
    except Exception as error:  # what the inputs need failed: the other rows go on
        return [_failed(row, error)]


def _failed(row: str, error: Exception) -> Problem:
    def fail() -> Any:
        raise error

    return Problem(row, "inputs", 0, 0, [Column("pyroute", [fail])], lambda name, result: 0.0)
