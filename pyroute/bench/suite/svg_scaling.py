"""Pictures of growth: time against one size on logarithmic axes, with the fitted line and the machine's limit."""

from __future__ import annotations

import html
import math
from typing import Any

from ..terminal import duration
from .svg import LogScale, picture

NAMES = {"T": "tokens T", "k": "experts per token k", "E": "experts E", "H": "hidden H", "I": "intermediate I"}
UNITS = {"T": "token", "k": "slot", "E": "expert", "H": "column", "I": "column"}
WIDTH, HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 300, 270, 58, 44, 40, 10
# for files of their own, which no page gives colours: readable on white and on black
STYLE = (
    "text{fill:#7a828b;font:12px system-ui,sans-serif}.grid{stroke:#8884}.ours{fill:#3d8bd4}.spread{stroke:#3d8bd4}"
    ".limit,.fit{fill:none;stroke-width:1.5}.limit{stroke:#d9683c;stroke-dasharray:5 3}.fit{stroke:#9aa3ad}"
    ".limit-text{fill:#d9683c}.title{font-weight:600;font-size:15px}"
)


def panel(line: dict[str, Any]) -> str:
    """One size of one operation."""
    return picture(WIDTH, HEIGHT, _parts(line), f"{line['op']}, {line['case']}: {in_words(line)}")


def figure(op: str, lines: list[dict[str, Any]]) -> str:
    """All sizes of one operation side by side, as a file of its own."""
    parts = [f"<style>{STYLE}</style>", f'<text class="title" x="4" y="16">{html.escape(op)}</text>']
    for i, line in enumerate(lines):
        inner = "".join(_parts(line))
        parts.append(f'<g transform="translate({i * WIDTH},24)">{inner}</g>')
    notes = (
        "points: median, 10th to 90th percentile; grey: fitted line; dashed: the machine's limit",
        _machine(lines[0]),
    )
    for i, note in enumerate(notes):
        parts.append(f'<text x="4" y="{HEIGHT + 40 + 18 * i}">{html.escape(note)}</text>')
    axes = ", ".join(map(_axis, lines))
    return picture(len(lines) * WIDTH, HEIGHT + 68, parts, f"time of {op} against {axes}") + "\n"


def _axis(line: dict[str, Any]) -> str:
    return str(line["case"].rsplit(" ", 1)[-1])


def _machine(line: dict[str, Any]) -> str:
    limits = line["limits"]
    rates = [f"multiply-adds {limits['fma_gflops']:.0f} GFLOP/s"] if limits["fma_gflops"] else []
    isa = [limits["isa"]] if limits["isa"] else []
    return ", ".join([f"{line['threads']} threads", *isa, *rates, f"copy {limits['copy_gbs']:.0f} GB/s"])


def in_words(line: dict[str, Any]) -> str:
    """The fitted line as ``12 ns per token + 3 us``."""
    fit, unit = line["fit"], UNITS[_axis(line)]
    parts = [f"{duration(fit['slope'])} per {unit}"] if fit["slope"] > 0 else []
    parts += [duration(fit["start"])] if fit["start"] > 0 else []
    return " + ".join(parts)


def _parts(line: dict[str, Any]) -> list[str]:
    times = [*line["median_s"], *line["p10_s"], *line["p90_s"], *line["least_s"]]
    low, high = max(min(times), min(line["median_s"]) / 20), max(times)
    wider = max(1.0, 100 * low / high) ** 0.5  # two decades at least, so that flat looks flat
    x = LogScale(line["x"][0], line["x"][-1], _LEFT, WIDTH - _RIGHT, whole=False)
    y = LogScale(low / wider, high * wider, HEIGHT - _BOTTOM, _TOP)
    fit = line["fit"]
    worst = f"within {fit['worst']:.0%}, log-log slope {fit['power']:.2f}"
    parts = [
        f'<text class="soft" x="{_LEFT}" y="14">{html.escape(in_words(line))}</text>',
        f'<text class="soft" x="{_LEFT}" y="30">{worst}</text>',
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{NAMES[_axis(line)]}</text>',
    ]
    for decade in y.decades():
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(decade):.1f}" y2="{y(decade):.1f}"/>',
            f'<text class="soft" x="{_LEFT - 6}" y="{y(decade) + 4:.1f}" text-anchor="end">{duration(decade)}</text>',
        ]
    for value in (line["x"][0], math.sqrt(line["x"][0] * line["x"][-1]), line["x"][-1]):
        anchor = {line["x"][0]: "start", line["x"][-1]: "end"}.get(value, "middle")
        place = f'x="{x(value):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}"'
        parts.append(f'<text class="soft" {place}>{value:.0f}</text>')
    steps = [line["x"][0] * (line["x"][-1] / line["x"][0]) ** (i / 40) for i in range(41)]
    parts.append(_path("fit", [(x(s), y(fit["start"] + fit["slope"] * s)) for s in steps]))
    if line["least_s"]:
        parts.append(_path("limit", [(x(s), y(t)) for s, t in zip(line["x"], line["least_s"], strict=True)]))
    for size, median, p10, p90 in zip(line["x"], line["median_s"], line["p10_s"], line["p90_s"], strict=True):
        at = f"{x(size):.1f}"
        parts.append(f'<line class="spread" x1="{at}" x2="{at}" y1="{y(p10):.1f}" y2="{y(p90):.1f}"/>')
        parts.append(f'<circle class="ours" cx="{at}" cy="{y(median):.1f}" r="3.5"/>')
    return parts


def _path(name: str, points: list[tuple[float, float]]) -> str:
    return f'<path class="{name}" d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
