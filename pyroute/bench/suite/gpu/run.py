"""``pyroute bench --gpu``: every row on the current GPU; docs/benchmarking.md holds the rules."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from typing import Any

import torch

import pyroute

from ...terminal import UsageError, duration, write_json
from .. import bars, options, records, report
from .cases import ROWS, Problem, Sizes
from .clock import Clock, Column, ceilings, measure


def bench(args: argparse.Namespace) -> int:
    """The command: measure, show, write; 1 where pyroute itself failed or gave a wrong answer."""
    if not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU here")
    options.check(args, rounds=30, quick_rounds=3)
    args.rows = options.some_of("OP", args.rows, list(ROWS))
    device = torch.device("cuda", torch.cuda.current_device())
    about = facts(device)
    outcomes = run(args, Clock(device), stream=sys.stderr if args.json == "-" else sys.stdout)
    lines = [line for outcome in outcomes for line in outcome.lines()]
    if args.json:
        write_json({**about, "lines": lines}, args.json)
    if args.record and lines:
        name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        path = records.append(lines, about, records.ROOT / f"benches/results/{name}.jsonl")
        print(f"{len(lines)} lines added to {os.path.relpath(path)}", file=sys.stderr)
    return 1 if failures(outcomes) else 0


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

    def __init__(self, problem: Problem, cells: list[Any], rates: dict[str, float]):
        self.problem, self.cells, self.rates = problem, cells, rates
        seconds = {cell.name: cell.median for cell in cells if cell.timed}
        measured = bars.Measured(seconds, rates["bf16_tflops"] * 1e3, 0.0, 0.0, rates["copy_gbs"])
        self.bars = [(bar, bar.value(measured, problem)) for bar in problem.bars]

    def lines(self) -> list[dict[str, Any]]:
        """One record line per column; those that gave no time say why."""
        p = self.problem
        made = []
        for cell in self.cells:
            line = {"op": p.op, "case": p.case, "column": cell.name, "backend": "cuda", "version": cell.version}
            line |= {"status": cell.status, "error": cell.error, "tolerance": cell.tolerance}
            if cell.note:
                line["note"] = cell.note
            if cell.timed:
                line |= {"median_s": cell.median, "p10_s": cell.percentile(10), "p90_s": cell.percentile(90)}
                line |= {"rounds": len(cell.samples), "bytes": p.nbytes, "flops": p.flops}
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
        if cell.name.startswith("pyroute") and cell.status != "ok"
    ]


def _column(bar: bars.Bar) -> str:
    return re.split(r" : |, (?:us|TFLOP/s)$", bar.text)[0]


def show(outcome: Outcome, stream: Any) -> None:
    p = outcome.problem
    print(f"\n{p.op} {p.case}", file=stream)
    for cell in outcome.cells:
        if not cell.timed:
            print(f"  {cell.name:32} {cell.status}: {cell.note}", file=stream)
            continue
        rate = (
            f"{p.flops / cell.median / 1e12:8.1f} TFLOP/s" if p.flops else f"{p.nbytes / cell.median / 1e9:8.0f} GB/s"
        )
        spread = f"{duration(cell.percentile(10))} to {duration(cell.percentile(90))}"
        print(f"  {cell.name:32} {duration(cell.median):>9} ({spread}) {rate}  {cell.note}", file=stream)
    for bar, value in outcome.bars:
        held = report.bar_line(bar, value)
        verdict = "not measured" if held["met"] is None else "met" if held["met"] else "missed"
        got = "-" if held["met"] is None else f"{held['value']:.3g}"
        print(f"  bar {bar.text}: {bar.target:g} {bar.unit}, measured {got}: {verdict}", file=stream)


def run(args: argparse.Namespace, clock: Clock, stream: Any) -> list[Outcome]:
    """Row after row; the memory of one is free before the next."""
    torch.manual_seed(20251122)
    rates = ceilings(clock, args.quick)
    print("limits: " + ", ".join(f"{name} {value:.0f}" for name, value in rates.items()), file=stream)
    outcomes: list[Outcome] = []
    for row in args.rows:
        try:
            problems = list(ROWS[row](clock, Sizes(args.quick)))
        except Exception as error:  # what the inputs need failed: the other rows go on
            problems = [_failed(row, error)]
        for problem in problems:
            if args.case not in f"{problem.op} {problem.case}":
                continue
            cells = measure(problem.columns, clock, args.rounds, problem.check, problem.tolerance)
            outcomes.append(Outcome(problem, cells, rates))
            show(outcomes[-1], stream)
            problem.columns.clear()
        problems.clear()
        gc.collect()
        if clock.real:
            torch.cuda.empty_cache()
    return outcomes


def _failed(row: str, error: Exception) -> Problem:
    def fail() -> Any:
        raise error

    return Problem(row, "inputs", 0, 0, [Column("pyroute", [fail])], lambda name, result: 0.0)
