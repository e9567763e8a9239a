"""The plot of train_moe_lm.py. Alone: python examples/train_moe_lm_plot.py train_moe_lm.json train_moe_lm.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"float32": "#1f6fb4", "eager": "#e08214", "balanced": "#35978f", "bfloat16": "#7b7b7b", "fp8": "#b2182b"}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False,
}  # fmt: skip


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each step."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def loss_panel(axes: Any, runs: dict[str, Any]) -> None:
    axes.set_title("Loss in float32: pyroute and transformers' eager experts")
    axes.plot(runs["float32"]["loss"], color=COLORS["float32"], lw=3.5, alpha=0.45, label="pyroute")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    if "eager" not in runs:
        return
    axes.plot(runs["eager"]["loss"], color=COLORS["eager"], lw=0.9, label="transformers eager")
    axes.legend(loc="upper right")
    apart = [max(abs(a - b), 1e-9) for a, b in zip(runs["float32"]["loss"], runs["eager"]["loss"], strict=True)]
    inset = axes.inset_axes((0.36, 0.34, 0.60, 0.30))
    inset.semilogy(apart, color="#444444", lw=0.8)
    inset.set_title(f"their difference, at most {max(apart):.0e}", fontsize=8, fontweight="normal")
    inset.tick_params(labelsize=7)


def fp8_panel(axes: Any, runs: dict[str, Any]) -> None:
    axes.set_title("Loss: FP8 recipe and bfloat16, mean of 10 steps")
    for name, width in (("bfloat16", 3.0), ("fp8", 1.0)):
        loss = smooth(runs[name]["loss"], 10)
        axes.plot(range(9, len(loss)), loss[9:], color=COLORS[name], lw=width, label=name)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    text = "\n".join(f"held out {runs[name]['held_out_loss']:.3f} {name}" for name in ("bfloat16", "fp8"))
    axes.text(0.98, 0.58, text, transform=axes.transAxes, ha="right")
    axes.legend(loc="upper right")


def load_panel(axes: Any, runs: dict[str, Any]) -> None:
    axes.set_title("Load of each expert, one line per layer")
    for name, label in (("float32", "without balancing"), ("balanced", "selection bias updated every step")):
        for i, layer in enumerate(runs[name]["load"]):
            load = sorted(layer, reverse=True)
            axes.plot(load, color=COLORS[name], lw=1.2, alpha=0.8, label=None if i else label)
    axes.axhline(1, color="#999999", lw=0.8, ls="--")
    axes.set(xlabel="expert, fullest first", ylabel="load / mean load")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def speed_panel(axes: Any, runs: dict[str, Any]) -> None:
    axes.set_title("Tokens per second, whole training step")
    names = [name for name in ("eager", "float32", "balanced", "bfloat16", "fp8") if name in runs]
    speeds = [runs[name]["tokens_per_second"] for name in names]
    labels = {"eager": "transformers eager", "float32": "pyroute float32"}
    places = range(len(names))
    axes.barh(places, speeds, color=[COLORS[name] for name in names], height=0.62)
    axes.set_yticks(places, [labels.get(name, name) for name in names])
    axes.invert_yaxis()
    for place, speed in zip(places, speeds, strict=True):
        ratio = f"  {speed / speeds[0]:.2f}x" if names[0] == "eager" and place else ""
        axes.text(speed, place, f" {speed:,.0f}{ratio}", va="center")
    axes.set_xlim(0, max(speeds) * 1.28)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def plot(log: dict[str, Any], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
        for draw, axes in zip((loss_panel, speed_panel, fp8_panel, load_panel), panels.flat, strict=True):
            draw(axes, log["runs"])
        size = log["size"]
        figure.suptitle(
            f"{size['layers']} layers, {size['experts']} experts top-{size['top_k']}, hidden {size['hidden']}, "
            f"{log['parameters'] / 1e6:.1f} M parameters, {log['threads']} CPU threads",
            fontsize=9, color="#555555",
        )  # fmt: skip
        figure.savefig(path, dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
