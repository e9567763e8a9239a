"""Recorded comparisons and scaling as Markdown: of every case the latest line, with what it was held against.

    python benches/summary.py                                     this machine's file of benches/results
    python benches/summary.py --since 2026-11-22 results.jsonl    only what was measured that day and later

Groups by instruction set, threads and caches. benches/results/README.md is such a summary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pyroute.bench.suite import records
from pyroute.bench.terminal import duration

Line = dict[str, Any]
SCALING = """## Scaling

For each size the slope of the logarithms and the largest distance from a fitted line; the time on one thread over that
on n, over n; the slowest load against the balanced one; the two odd sizes that differ most from their neighbours.

| | T | k | E | H | I | threads | loads | odd sizes |
|---|---|---|---|---|---|---|---|---|"""
HEADER = "| work | pyroute, median (p10 to p90) | beside | ratio | bar | |\n|---|---|---|---:|---:|---|"


def latest(lines: Iterable[Line]) -> list[Line]:
    """Of lines about the same thing the last one, in the order of the first."""
    kept: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        kept[tuple(line.get(key) for key in ("isa", "threads", "cache", "op", "case", "column"))] = line
    return list(kept.values())


def title(lines: list[Line]) -> str:
    last = lines[-1]
    days = sorted({line["date"][:10] for line in lines})
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    return (
        f"# {last['cpu']}, {last['cores']} cores, {last['compiler']}\n\n"
        f"Measured {' to '.join(days[:1] + days[1:][-1:])} at {commits}; written by `make readme`.\n"
        "[docs/benchmarking.md](../../docs/benchmarking.md) holds the rules; "
        "no figure of a GPU exists yet, [gpu.md](gpu.md) lists what is owed.\n"
    )


def tables(lines: list[Line]) -> Iterator[str]:
    held = [line for line in latest(lines) if line.get("bars")]
    for group in dict.fromkeys((line["isa"], line["threads"], line["cache"]) for line in held):
        isa, threads, cache = group
        yield f"## {isa}, {threads} thread{'s' * (threads > 1)}{', cold caches' * (cache == 'cold')}\n"
        yield HEADER
        for line in held:
            if (line["isa"], line["threads"], line["cache"]) == group:
                yield from (row(line, bar, lines) for bar in line["bars"])
        yield ""


def row(line: Line, bar: Line, lines: list[Line]) -> str:
    ours, value = line["median_s"], bar["value"]
    spread = f"{line['column']} {duration(ours)} ({duration(line['p10_s'])} to {duration(line['p90_s'])})"
    in_seconds = bar["bar"].endswith(", us")
    other = "" if in_seconds else beside(line, bar, lines) or bar["bar"].split(" : ")[1]
    found = "" if value is None else f"{value:.2f}" + " us" * in_seconds
    verdict = {True: "met", False: "**missed**", None: "no time"}[bar["met"]]
    target = f"{bar['target']:g}" + " us" * in_seconds
    return f"| {line['op']} {line['case']} | {spread} | {other} | {found} | {target} | {verdict} |"


def beside(line: Line, bar: Line, lines: list[Line]) -> str:
    """The column of the same run that gave the ratio."""
    if bar["value"] is None:
        return ""
    seconds = bar["value"] * line["median_s"]
    run = [
        other
        for other in lines
        if "ratio_to_pyroute" in other and all(other[key] == line[key] for key in ("date", "op", "case", "cache"))
    ]
    nearest = min(run, key=lambda other: abs(other["median_s"] - seconds))
    if abs(nearest["median_s"] / seconds - 1) > 1e-6:
        return ""
    return f"{nearest['column']} {duration(nearest['median_s'])}"


def of_models(lines: list[Line]) -> Iterator[str]:
    """A row per operation of every model and load: pyroute's columns, and the fastest of the others of that run."""
    held = [line for line in latest(lines) if line.get("model") and "median_s" in line]
    for group in dict.fromkeys((line["isa"], line["threads"], line["cache"]) for line in held):
        isa, threads, cache = group
        mine = [line for line in held if (line["isa"], line["threads"], line["cache"]) == group]
        yield f"## Models, {isa}, {threads} thread{'s' * (threads > 1)}{', cold caches' * (cache == 'cold')}\n"
        yield "| work | load | pyroute | of the limit | fastest peer |\n|---|---|---|---:|---|"
        for key in dict.fromkeys((line["model"], line["load"], line["op"], line["case"]) for line in mine):
            model, load, op, case = key
            run = [line for line in mine if (line["model"], line["load"], line["op"], line["case"]) == key]
            ours = [line for line in run if line["column"].startswith("pyroute") and not other_isa(line["column"])]
            if not ours:
                continue
            times = ", ".join(f"{line['column']} {duration(line['median_s'])}" for line in ours).replace("pyroute ", "")
            share = max(line["share_of_limit"] or 0.0 for line in ours)
            others = [line for line in run if line["column"].split()[0] not in ("pyroute", "machine", "numpy")]
            best = min(others, key=lambda line: line["median_s"], default=None)
            beside = f"{best['column']} {duration(best['median_s'])}" if best else ""
            work = case.replace(f" {load}", "").replace(f"{model} ", "")
            yield f"| {model} {op} {work} | {load} | {times} | {share:.0%} | {beside} |"
        yield ""


def other_isa(column: str) -> bool:
    return column.endswith((" avx2", " scalar", " avx512"))


def scaling(lines: list[Line]) -> Iterator[str]:
    """A row per operation: growth by axis, threads, the worst load and the worst odd size."""
    points = [line for line in latest(lines) if "points" in line]
    if not points:
        return
    yield SCALING
    for op in dict.fromkeys(line["op"] for line in points):
        mine = [line for line in points if line["op"] == op]
        fits = {line["case"].rsplit(" ", 1)[-1]: line["fit"] for line in mine if "fit" in line}
        cells = [f"{fits[axis]['power']:.2f}, {fits[axis]['worst']:.0%}" if axis in fits else "" for axis in "TkEHI"]
        cells.append(", ".join(f"{line['efficiency']:.2f}" for line in mine if "efficiency" in line))
        cells.append(", ".join(f"{line['loss']:+.0%}" for line in mine if "loss" in line))
        odd = sorted(((line["excess"], line["case"]) for line in mine if "excess" in line), reverse=True)
        cells.append(", ".join(f"{excess:+.0%} at {case.split(' ')[-1]}" for excess, case in odd[:2]))
        yield f"| {op} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="summary.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=records.machine_file())
    parser.add_argument("--since", default="", help="only lines of this date or later")
    args = parser.parse_args(argv)
    lines = [json.loads(text) for text in args.file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["date"] >= args.since]
    if not lines:
        print(f"summary.py: {args.file} holds no line of {args.since or 'any day'}", file=sys.stderr)
        return 2
    print("\n".join([title(lines), *tables(lines), *of_models(lines), *scaling(lines)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
