"""One picture per operation: time against every size, with the line that fits and what the machine allows at best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyroute.bench.terminal import UsageError, duration

NAMES = {"T": "tokens T", "k": "experts per token k", "E": "experts E", "H": "hidden H", "I": "intermediate I"}
UNITS = {"T": "token", "k": "slot", "E": "expert", "H": "column", "I": "column"}
POINT, LINE, LIMIT = "#1f6fb4", "0.6", "#c8552b"


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
        figure, axes = plt.subplots(1, len(panels), figsize=(2.75 * len(panels) + 0.3, 3.2), squeeze=False)
        for axis, found in zip(axes[0], panels, strict=True):
            _panel(axis, found)
        axes[0, 0].set_ylabel("time of a call", fontsize=9)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.text(0.01, 0.955, op, fontsize=11, weight="bold")
        figure.text(0.01, 0.025, _machine(panels[0]), fontsize=7.5, color="0.35")
        figure.legend(handles, names, loc="lower right", ncols=3, fontsize=8, frameon=False, handlelength=1.6)
        figure.tight_layout(rect=(0, 0.045, 1, 0.97))
        paths.append(Path(folder) / f"scaling_{op}.png")
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def _machine(found: dict[str, Any]) -> str:
    limits = found["limits"]
    rates = [f"multiply-adds {limits['fma_gflops']:.0f} GFLOP/s"] if limits["fma_gflops"] else []
    isa = [limits["isa"]] if limits["isa"] else []
    return ", ".join([f"{found['threads']} threads", *isa, *rates, f"copy {limits['copy_gbs']:.0f} GB/s"])


def _panel(axis: Any, found: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    x, fit, name = np.array(found["x"]), found["fit"], found["case"].rsplit(" ", 1)[-1]
    median, p10, p90 = (np.array(found[f"{key}_s"]) for key in ("median", "p10", "p90"))
    smooth = np.geomspace(x[0], x[-1], 100)
    axis.plot(smooth, fit["start"] + fit["slope"] * smooth, color=LINE, linewidth=1.4, label="fitted line")
    if found["least_s"]:
        style = {"color": LIMIT, "linewidth": 1.1, "linestyle": "--", "label": "limit of memory or arithmetic"}
        axis.plot(x, found["least_s"], **style)
    spread = np.maximum([median - p10, p90 - median], 0)
    style = {"fmt": "o", "markersize": 4, "linewidth": 1, "color": POINT}
    axis.errorbar(x, median, yerr=spread, label="median, p10 to p90", **style)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel(NAMES[name], fontsize=9)
    axis.set_title(_in_words(fit, UNITS[name]), fontsize=8, color="0.25")
    low, high = max(min([*median, *found["least_s"]]), median.min() / 20) / 1.6, median.max() * 1.8
    wider = max(1.0, 100 / (high / low)) ** 0.5  # two decades at least, so that flat looks flat
    axis.set_ylim(low / wider, high * wider)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_locator(LogLocator(numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter(NullFormatter())
    axis.tick_params(which="both", labelsize=8)
    axis.grid(True, which="major", color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _in_words(fit: dict[str, float], unit: str) -> str:
    parts = [f"{duration(fit['slope'])} per {unit}"] if fit["slope"] > 0 else []
    parts += [duration(fit["start"])] if fit["start"] > 0 else []
    return f"{' + '.join(parts)}\nwithin {fit['worst']:.0%}, log-log slope {fit['power']:.2f}"
