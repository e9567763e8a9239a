"""One picture per operation: time against every size, with the line that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyroute.bench.terminal import UsageError

NAMES = {"T": "tokens T", "k": "slots k", "E": "experts E", "H": "hidden H", "I": "intermediate I"}


def draw(lines: list[dict[str, Any]], folder: str) -> list[Path]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for op in dict.fromkeys(found["op"] for found in lines if "fit" in found):
        panels = [found for found in lines if found["op"] == op and "fit" in found]
        figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels) + 0.4, 2.7), squeeze=False)
        for axis, found in zip(axes[0], panels, strict=True):
            _panel(axis, found)
        axes[0, 0].set_ylabel("time, ms")
        figure.suptitle(f"{op}, {panels[0]['threads']} threads", fontsize=10, x=0.01, ha="left")
        figure.tight_layout()
        paths.append(Path(folder) / f"scaling_{op}.png")
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def _panel(axis: Any, found: dict[str, Any]) -> None:
    x, fit = np.array(found["x"]), found["fit"]
    milliseconds = {key: 1e3 * np.array(found[f"{key}_s"]) for key in ("median", "p10", "p90")}
    median = milliseconds["median"]
    spread = np.maximum([median - milliseconds["p10"], milliseconds["p90"] - median], 0)
    smooth = np.geomspace(x[0], x[-1], 100)
    axis.plot(smooth, 1e3 * (fit["start"] + fit["slope"] * smooth), color="0.65", linewidth=1.2)
    axis.errorbar(x, median, yerr=spread, fmt="o", markersize=3.5, linewidth=1, color="#1f6fb4")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel(NAMES[found["case"].rsplit(" ", 1)[-1]], fontsize=9)
    axis.set_title(f"line within {fit['worst']:.0%}", fontsize=8, color="0.3")
    axis.set_ylim(median.min() / 2, median.max() * 2)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(True, which="major", color="0.92")
    axis.set_axisbelow(True)
