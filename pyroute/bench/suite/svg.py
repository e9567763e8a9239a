"""The pictures of a page: bars with their spread, and a roofline. Classes name things, the page has the colours."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

from ..terminal import duration

WIDTH = 440
_ROW, _LABEL, _VALUE = 24, 172, 62  # pixels: height of a bar, room for its name and for its number


def bars(lines: list[dict[str, Any]]) -> str:
    """A bar per column, the fastest first, with a whisker from the 10th to the 90th percentile."""
    lines = sorted(lines, key=lambda line: float(line["median_s"]))
    longest = max(float(line["p90_s"]) for line in lines)
    room = WIDTH - _LABEL - _VALUE
    parts = []
    for i, line in enumerate(lines):
        y, scale = i * _ROW, room / longest
        kind = {"pyroute": "ours", "machine": "machine"}.get(line["column"].partition(" ")[0], "other")
        width = max(1.0, line["median_s"] * scale)
        low, high = _LABEL + line["p10_s"] * scale, _LABEL + line["p90_s"] * scale
        name = html.escape(_short(line["column"]))
        parts += [
            f'<text x="{_LABEL - 8}" y="{y + 16}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{_LABEL}" y="{y + 5}" width="{width:.1f}" height="{_ROW - 10}" rx="2"/>',
            f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{y + _ROW / 2}" y2="{y + _ROW / 2}"/>',
            f'<text x="{WIDTH}" y="{y + 16}" text-anchor="end">{duration(line["median_s"])}</text>',
        ]
    label = ", ".join(f"{line['column']} {duration(line['median_s'])}" for line in lines)
    return picture(WIDTH, len(lines) * _ROW, parts, label)


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def picture(width: int, height: int, parts: list[str], label: str) -> str:
    """The parts as one image, with words for who cannot see it."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(parts)
        + "</svg>"
    )


class LogScale:
    """From a range of positive numbers to pixels, by their logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, *, whole: bool = True):
        if whole:  # decades
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        self.low, self.high = low, high if high > low else 10 * low
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def decades(self) -> Iterator[float]:
        for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1):
            yield 10.0**power


def roofline(lines: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """GFLOP/s against operations per byte, under the roof of reading and of multiply-adds."""
    points = [(line["flops"] / line["bytes"], line["flops"] / line["median_s"] / 1e9, line) for line in lines]
    width, height, left, top, bottom = 520, 320, 48, 26, 40
    bandwidth, peak = limits["read_gbs"], limits["fma_gflops"]
    ridge = peak / bandwidth
    x = LogScale(
        min([ridge / 10, *(p[0] for p in points)]), max([ridge * 10, *(p[0] for p in points)]), left, width - 12
    )
    y = LogScale(min([peak / 100, *(p[1] for p in points)]), max([peak, *(p[1] for p in points)]), height - bottom, top)
    parts = []
    for decade in x.decades():
        parts += [
            f'<line class="grid" x1="{x(decade):.1f}" x2="{x(decade):.1f}" y1="{top}" y2="{height - bottom}"/>',
            f'<text class="soft" x="{x(decade):.1f}" y="{height - bottom + 16}" text-anchor="middle">{decade:g}</text>',
        ]
    for decade in y.decades():
        parts += [
            f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y(decade):.1f}" y2="{y(decade):.1f}"/>',
            f'<text class="soft" x="{left - 6}" y="{y(decade) + 4:.1f}" text-anchor="end">{decade:g}</text>',
        ]
    corner = max(x.low, y.low / bandwidth)
    roof = f"M{x(corner):.1f},{y(corner * bandwidth):.1f} L{x(ridge):.1f},{y(peak):.1f} H{width - 12}"
    middle = math.sqrt(corner * ridge)
    parts += [
        f'<path class="limit" stroke-width="2" d="{roof}"/>',
        f'<text class="limit-text" x="{width - 16}" y="{y(peak) - 6:.1f}" text-anchor="end">{peak:.0f} GFLOP/s</text>',
        f'<text class="limit-text" x="{x(middle) - 8:.1f}" y="{y(middle * bandwidth) - 8:.1f}" text-anchor="end">'
        f"read {bandwidth:.0f} GB/s</text>",
    ]
    for intensity, rate, line in points:
        title = html.escape(f"{line['op']} {line['case']}, {line['column']}: {rate:.4g} GFLOP/s")
        parts.append(
            f'<circle class="ours" cx="{x(intensity):.1f}" cy="{y(rate):.1f}" r="4"><title>{title}</title></circle>'
        )
    parts.append(f'<text x="{width - 12}" y="{height - 6}" text-anchor="end">operations per byte</text>')
    parts.append('<text x="4" y="14">GFLOP/s</text>')
    return picture(width, height, parts, "roofline: every point is one case and column of pyroute")
