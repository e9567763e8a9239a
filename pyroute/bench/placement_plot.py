"""``pyroute placement --plot``: the loads of all devices as a heat map, an SVG file or a page of its own."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from .suite.page import STYLE
from .suite.svg import picture
from .terminal import UsageError

Array = Any
LEVELS = 17  # colours, of which the middle one is the mean
_LOW, _MIDDLE, _HIGH = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # told apart by colour-blind readers too
_WIDTH, _LEFT, _TOP, _GAP = 960, 44, 54, 24


def write(path: str, maps: dict[str, Array], title: str, notes: list[str]) -> None:
    """Loads over their mean, [L, D] under each name, to a ``.svg`` or to a page; UsageError where that cannot be."""
    drawn = heat_maps(maps, title)
    if not path.endswith(".svg"):
        words = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        drawn = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
            f"<body><h1>{html.escape(title)}</h1>{words}<figure>{drawn}</figure></body></html>"
        )
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(drawn + "\n")
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from None


def heat_maps(maps: dict[str, Array], title: str) -> str:
    """The maps side by side: a row for every layer, a column for every device."""
    layers, devices = next(iter(maps.values())).shape
    room = (_WIDTH - _LEFT - _GAP * (len(maps) - 1)) / len(maps)
    width, height = room / devices, min(16.0, max(3.0, 480 / layers))
    parts = [
        "<style>text{fill:#7a828b;font:13px system-ui,sans-serif}</style>",
        f'<text x="{_LEFT - 6}" y="{_TOP - 6}" text-anchor="end">layer</text>',
    ]
    for layer in sorted({0, layers // 2, layers - 1}):
        parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + (layer + 0.8) * height:.1f}" text-anchor="end">{layer}</text>')
    words = []
    for i, (name, loads) in enumerate(maps.items()):
        left, worst = _LEFT + i * (room + _GAP), float(loads.max())
        words.append(f"{name}: up to {worst:.2f} of the mean")
        parts.append(f'<text x="{left:.1f}" y="{_TOP - 26}">{html.escape(words[-1])}</text>')
        parts.append(f'<text x="{left:.1f}" y="{_TOP - 8}">{devices} devices</text>')
        parts += _cells(loads, left, width, height)
    bottom = _TOP + layers * height
    parts += _legend(bottom + 14)
    return picture(_WIDTH, round(bottom + 52), parts, f"{title}. {', '.join(words)}")


def _cells(loads: Array, left: float, width: float, height: float) -> list[str]:
    """One path for every colour."""
    levels = np.clip(np.rint(loads / 2 * (LEVELS - 1)), 0, LEVELS - 1).astype(int)
    parts = []
    for level in np.unique(levels):
        cells = "".join(
            f"M{left + column * width:.1f} {_TOP + row * height:.1f}h{width:.2f}v{height:.2f}h-{width:.2f}z"
            for row, column in np.argwhere(levels == level)
        )
        parts.append(f'<path fill="{colour(int(level))}" d="{cells}"/>')
    return parts


def colour(level: int) -> str:
    """From blue (no load) over white (the mean) to red (twice the mean and more)."""
    t = 2 * level / (LEVELS - 1) - 1
    end = _HIGH if t > 0 else _LOW
    mixed = (round(m + (e - m) * abs(t)) for m, e in zip(_MIDDLE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _legend(top: float) -> list[str]:
    cell = 14
    parts = [
        f'<rect x="{_LEFT + level * cell}" y="{top:.1f}" width="{cell}" height="{cell}" fill="{colour(level)}"/>'
        for level in range(LEVELS)
    ]
    for level, word in ((0, "0"), (LEVELS // 2, "mean"), (LEVELS - 1, "twice")):
        x = _LEFT + (level + 0.5) * cell
        parts.append(f'<text x="{x:.1f}" y="{top + cell + 14:.1f}" text-anchor="middle">{word}</text>')
    return parts
