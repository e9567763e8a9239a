"""Tables and record lines of a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyroute

from ..terminal import duration, has_rich, report_console
from . import bars

STEADY = 0.6  # of a probe's median run to its best; docs/benchmarking.md


class Cell(str):
    """Text of a table with the style that rich gives it."""

    style = ""

    @classmethod
    def of(cls, text: str, style: str) -> Cell:
        cell = cls(text)
        cell.style = style
        return cell


def ratio_to_ours(outcome: Any, seconds: float) -> float | None:
    """This time over that of the column that the first bar holds, or else of pyroute's first."""
    held = [bar_column(bar) for bar, _ in outcome.bars]
    ours = [cell for cell in outcome.cells if cell.peer == "pyroute" and cell.timed]
    ours.sort(key=lambda cell: held.index(cell.name) if cell.name in held else len(held))
    return seconds / ours[0].median if ours else None


def share_of_limit(outcome: Any, seconds: float) -> float:
    """The least time that memory or arithmetic needs, over this one."""
    m, p = outcome.measured, outcome.problem
    if p.written:
        return bars.limit_seconds(m, p) / seconds
    least = max(p.nbytes / (m.read_gbs if p.reads else m.copy_gbs), p.flops / m.fma_gflops) / 1e9
    return float(least / seconds)


def rate(outcome: Any, seconds: float) -> str:
    p = outcome.problem
    if p.flops:
        return f"{p.flops / seconds / 1e9:.1f} GFLOP/s"
    return f"{p.nbytes / seconds / 1e9:.1f} GB/s"


def lines(outcome: Any, args: Any) -> Iterator[dict[str, Any]]:
    """One record line per column; those that gave no time say why."""
    p = outcome.problem
    for cell in outcome.cells:
        line = {
            "op": p.op,
            "case": p.case,
            "column": f"{cell.name}",
            "version": cell.version,
            "status": cell.status,
            "error": cell.error,
            "tolerance": cell.tolerance,
            "threads": args.threads,
            "cache": "cold" if args.cold else "warm",
        }
        if args.model:
            line |= {"model": args.model, "load": args.load}
        if cell.note:
            line["note"] = cell.note
        if cell.alone:
            line["alone"] = True
        if cell.timed:
            line |= {
                "median_s": cell.median,
                "p10_s": cell.percentile(10),
                "p90_s": cell.percentile(90),
                "rounds": len(cell.samples),
                "samples_s": [float(f"{seconds:.4g}") for seconds in cell.samples],
                "calls": cell.calls,
                "bytes": p.nbytes,
                "flops": p.flops,
                "share_of_limit": share_of_limit(outcome, cell.median),
                "ratio_to_pyroute": ratio_to_ours(outcome, cell.median),
            }
            met = [bar_line(bar, value) for bar, value in outcome.bars if bar_column(bar) == cell.name]
            if met:
                line["bars"] = met
        line["limits"], line["limits_after"] = (rates(limits) for limits in (outcome.limits[0], outcome.limits[-1]))
        yield line


def rates(limits: dict[str, Any]) -> dict[str, Any]:
    """Of a run's limits what belongs into its record."""
    return {key: limits[key] for key in ("isa", "fma_gflops", "read_gbs", "write_gbs", "copy_gbs", "steadiness")}


def bar_column(bar: Any) -> str:
    return re.split(r" : |, us", bar.text)[0]


def bar_line(bar: Any, value: float | None) -> dict[str, Any]:
    known = value is not None and value == value
    return {
        "bar": bar.text,
        "target": bar.target,
        "value": value if known else None,
        "met": bar.met(value) if known else None,
    }


def missing(everyone: list[Any]) -> list[str]:
    """The peers that could not be loaded, and why."""
    return [f"missing: {peer.name}: {peer.problem}" for peer in everyone if peer.problem]


def show(outcomes: list[Any], everyone: list[Any], args: Any) -> None:
    for outcome in outcomes:
        title, header, rows, notes = table(outcome)
        print_table(title, header, rows, notes)
    rows = [bar_row(outcome, bar, value) for outcome in outcomes for bar, value in outcome.bars]
    notes = missing(everyone)
    if args.interrupted:
        notes.append("interrupted: the rows above are what had been measured")
    print_table(
        f"bars, {args.threads} thread{'s' * (args.threads > 1)}, pyroute {pyroute.__version__}",
        ("case", "bar", "target", "measured", "verdict"),
        rows,
        notes,
        "<<>><",
    )


def table(outcome: Any) -> tuple[str, tuple[str, ...], list[list[Cell]], list[str]]:
    m = outcome.measured
    limits = ", ".join(
        f"{name} {before[key]:.0f}/{after[key]:.0f}"
        for name, key in (("FMA", "fma_gflops"), ("read", "read_gbs"), ("write", "write_gbs"), ("copy", "copy_gbs"))
        for before, after in [(outcome.limits[0], outcome.limits[-1])]
        if before[key]
    )
    notes = []
    best = max(one["fma_gflops"] or 0 for one in outcome.limits)
    if any((one["fma_gflops"] or 0) < 0.9 * best or one["steadiness"] < STEADY for one in outcome.limits):
        notes.append("the machine was busy: multiply-adds or bandwidth fell during this case; repeat it")
    title = f"{outcome.op} {outcome.name}   (GFLOP/s and GB/s before/after: {limits})"
    rows = []
    for cell in sorted(outcome.cells, key=lambda cell: cell.median if cell.timed else float("inf")):
        name = Cell.of(cell.name, "mark" if cell.peer == "pyroute" else "")
        if not cell.timed:
            rows.append([name, Cell.of(cell.status, "bad"), *[Cell()] * 5])
            notes.append(f"{cell.name} {cell.version}: {cell.status}: {cell.note}")
            continue
        ratio = ratio_to_ours(outcome, cell.median)
        spread = f"{duration(cell.percentile(10))} - {duration(cell.percentile(90))}"
        share = f"{share_of_limit(outcome, cell.median):.0%}" if m.fma_gflops else ""
        error = "" if cell.error is None else f"{cell.error:.0e}" if cell.error else "exact"
        if cell.alone:
            notes.append(f"{cell.name}: in a process of its own, after the others")
        texts = duration(cell.median), spread, rate(outcome, cell.median), share, f"{ratio:.2f}" if ratio else "", error
        rows.append([name, *map(Cell, texts)])
    header = ("column", "median", "p10 - p90", "rate", "of limit", "/ pyroute", "error")
    return title, header, rows, notes


def bar_row(outcome: Any, bar: Any, value: float | None) -> list[Cell]:
    unknown = value is None or value != value
    target = f"{'<= ' if bar.at_most else ''}{bar.target:g}"
    texts = f"{outcome.op} {outcome.name}", bar.text, target, "-" if unknown else f"{value:.2f}"
    verdict = (
        Cell.of("no time", "note") if unknown else Cell.of(*(("met", "good") if bar.met(value) else ("missed", "bad")))
    )
    return [*map(Cell, texts), verdict]


Line = list[tuple[str, str]]  # pieces of text with their styles


def print_table(
    title: str, header: tuple[str, ...], rows: list[list[Cell]], notes: list[str], align: str = "<>>>>>>"
) -> None:
    """A table with a line a row in files and pipes, where a long line can be cut and a wrapped one cannot be read; in a
    terminal that is narrower than the table each row becomes a paragraph."""
    lines = _lines(header, rows, align)
    console = report_console() if has_rich() else None
    tail: list[Line] = [[(f"  {note}", "note")] for note in notes] + [[("", "")]]
    if console is None:
        print("\n".join("".join(text for text, _ in line).rstrip() for line in [[(title, "head")], *lines, *tail]))
        return
    from rich.text import Text

    narrow = console.is_terminal and max(sum(len(text) for text, _ in line) for line in lines) - 2 > console.width
    if narrow:
        lines = [line for row in rows for line in _paragraph(header, row, console.width)]
    for line in [[(title, "head")], *lines, *tail]:
        text = Text.assemble(*line)
        text.rstrip()
        console.print(text, soft_wrap=not narrow)


def _lines(header: tuple[str, ...], rows: list[list[Cell]], align: str) -> list[Line]:
    texts = [[str(cell) for cell in row] for row in ([Cell(h) for h in header], *rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    styles = [["note"] * len(header), *[[cell.style for cell in row] for row in rows]]
    return [
        [("  ", "")]
        + [
            (f"{cell:{side}{width}}  ", name)
            for cell, side, width, name in zip(row, align, widths, style, strict=False)
        ]
        for row, style in zip(texts, styles, strict=True)
    ]


def _paragraph(header: tuple[str, ...], row: list[Cell], width: int) -> list[Line]:
    """The first cell on its own line, the others below with their names."""
    lines: list[Line] = [[(str(row[0]), row[0].style or "head")]]
    current: Line = []
    for name, cell in zip(header[1:], row[1:], strict=True):
        if not cell:
            continue
        piece: Line = [(f"{name} " if name else "", "note"), (str(cell), cell.style)]
        if current and 2 + sum(len(text) for text, _ in (*current, *piece)) + 2 > width:
            lines.append([("  ", ""), *current])
            current = []
        current += [("  ", ""), *piece] if current else piece
    return [*lines, [("  ", ""), *current]]
