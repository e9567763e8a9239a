"""``pyroute placement``: from a recorded trace of loads to a plan and its balance, as a report or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ..placement import Placement, load_metrics, place_experts
from ..scaling import zipf_trace
from . import scaling_report
from .model_sizes import MODELS, ModelSizes
from .terminal import RAMP, UsageError, show_rows, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console

Array = Any
MAP_ROWS = 16  # layers of the heat map; more are averaged in runs
COLOURS = ((1.75, "bold red"), (1.25, "yellow"), (0.75, "green"), (-1, "blue"))  # above so much of the mean
DRAWN_STEPS = 8


def read_trace(path: str, model: str = "deepseek-v3") -> Array:
    """float64 [steps, L, E] of a ``.npy`` file or of JSON lists, with or without the axes of steps and layers.

    ``zipf:0.7`` is no file: loads of the model's layers and experts are drawn, with that exponent.
    """
    name, _, exponent = path.partition(":")
    if name == "zipf":
        return _drawn(exponent or "0.5", MODELS[model])
    try:
        if path.endswith(".npy"):
            found = np.load(path, allow_pickle=False)
        else:
            with open(path, encoding="utf-8") as file:
                found = np.asarray(json.load(file), np.float64)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (TypeError, ValueError, EOFError, RecursionError):
        raise UsageError(f"{path} holds no array of numbers: .npy, or JSON lists of one length") from None
    if found.dtype.kind not in "iuf" or found.ndim not in (1, 2, 3) or 0 in found.shape:
        raise UsageError(f"{path} must hold tokens per expert [E], [L, E] or [steps, L, E], got {list(found.shape)}")
    trace = found.astype(np.float64).reshape((1,) * (3 - found.ndim) + found.shape)
    with np.errstate(over="ignore"):
        finite = np.isfinite(trace.sum(axis=-1)).all()
    if not (finite and (trace >= 0).all()):
        raise UsageError(f"{path} must hold finite numbers that are not negative, and of a finite sum")
    return trace


def _drawn(exponent: str, model: ModelSizes) -> Array:
    try:
        drawn = zipf_trace(DRAWN_STEPS, model.moe_layers, model.shape.num_experts, exponent=float(exponent))
    except ValueError:
        raise UsageError(f"zipf:{exponent} must end in a number that is not negative") from None
    return drawn.astype(np.float64)


def make(trace: Array, devices: int, **sizes: Any) -> dict[str, Any]:
    """The plan from the mean of the trace, and how it does on every step of it; JSON-ready."""
    mean = trace.mean(axis=0)
    try:
        plan = place_experts(mean, devices, **sizes)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).partition(": ")[2]) from None
    steps = [plan.balance(step) for step in trace]
    return {
        "steps": len(trace), "layers": mean.shape[0], "experts": mean.shape[1], "devices": devices,
        "slots": plan.num_slots, **sizes,
        "loads": {key: np.atleast_1d(value).tolist() for key, value in load_metrics(mean)._asdict().items()},
        "unplaced_balance": _balance(_in_order(mean, devices)).tolist(),
        "balance": plan.balance(mean).tolist(),
        "balance_of_worst_step": np.min(steps, axis=0).tolist(),
        "replicas": plan.replicas.tolist(),
        "slot_to_expert": plan.slot_to_expert.tolist(),
        "mean_loads": mean.tolist(),
    }  # fmt: skip


def add_cluster(report: dict[str, Any], trace: Array, options: scaling_report.Options) -> None:
    """What the plan means on a cluster, as ``report["scaling"]``."""
    devices, experts = report["devices"], report["experts"]
    if experts % devices:
        raise UsageError(f"--cluster: --devices must divide the {experts} experts, got {devices}")
    in_order = np.tile(np.arange(experts, dtype=np.int32), (report["layers"], 1))
    report["scaling"] = scaling_report.make(trace, _plan(report), Placement(in_order, devices, experts), options)


def _plan(report: dict[str, Any]) -> Placement:
    return Placement(np.array(report["slot_to_expert"]), report["devices"], report["experts"])


def relative_loads(report: dict[str, Any]) -> dict[str, Array]:
    """Device loads over their mean [L, D]: experts in order, and this plan."""
    mean = np.array(report["mean_loads"])
    found = {"experts in order": _in_order(mean, report["devices"]), "this plan": _plan(report).device_loads(mean)}
    return {name: loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-300) for name, loads in found.items()}


def _in_order(loads: Array, devices: int) -> Array:
    """float64 [L, D]: device loads of experts in order, without replicas; the first E % D devices hold one more."""
    runs = np.array_split(np.arange(loads.shape[1]), devices)
    return np.stack([loads[:, run].sum(axis=1) for run in runs], axis=1)


def _balance(device_loads: Array) -> Array:
    most = device_loads.max(axis=1)
    return np.where(most > 0, device_loads.mean(axis=1) / np.where(most > 0, most, 1), 1.0)


def show(console: Console, report: dict[str, Any]) -> None:
    sizes = ("layers", "experts", "slots", "devices")
    what = ", ".join(f"{report[name]} {name}" for name in sizes)
    console.print(f"[head]Expert placement[/]  {what}")
    balances = [np.array(report[key]) for key in ("unplaced_balance", "balance", "balance_of_worst_step")]
    rows = [
        (name, f"{b.mean():.3f}", f"{b.min():.3f}", f"{1 / b.mean():.2f} x")
        for name, b in zip(("experts in order", "this plan", "this plan, its worst step"), balances, strict=True)
    ]
    console.print("\n[head]Balance[/]  mean over largest device load")
    show_table(console, ("", "layers' mean", "worst layer", "time, ideal = 1"), rows, align="<>>>")
    loads, replicas = report["loads"], np.array(report["replicas"])
    heaviest = np.array(report["mean_loads"]).sum(axis=0).argsort()[::-1][:5]
    often = ", ".join(f"{e} ({replicas[:, e].mean():.1f})" for e in heaviest)
    violation = np.array(loads["max_violation"])
    console.print("\n[head]Experts[/]")
    facts = [
        ("violation", f"{violation.max():.2f} at most, {violation.mean():.2f} in the mean"),
        ("unused", f"{int(np.sum(loads['unused']))} of {replicas.size}"),
        ("heaviest", f"{often}  [note]expert (its mean number of replicas)[/]"),
    ]
    show_rows(console, facts)
    console.print("\n[head]Load of the devices[/]  a line for each layer: experts in order, and this plan")
    for line in heat_map(report, (console.width - 10) // 2):
        console.print(line)
    show_text(console, f"[note]{RAMP.strip()}: from nothing to twice the mean.[/]", indent=2)
    if "scaling" in report:
        scaling_report.show(console, report["scaling"])


def heat_map(report: dict[str, Any], width: int) -> list[str]:
    """Device loads over their mean, before and after; layers and devices beyond what fits are averaged."""
    found, devices = list(relative_loads(report).values()), report["devices"]
    columns = np.array_split(np.arange(devices), min(max(width, 1), devices))
    lines = []
    for layers in np.array_split(np.arange(report["layers"]), min(MAP_ROWS, report["layers"])):
        maps = ("".join(_mark(loads[np.ix_(layers, column)].mean()) for column in columns) for loads in found)
        lines.append(f"  {layers[0]:>3}  {'  '.join(maps)}")
    return lines


def _mark(cell: float) -> str:
    """A block as high as the load; far from the mean in a colour."""
    mark = RAMP[min(len(RAMP) - 1, round(cell / 2 * (len(RAMP) - 1)))]
    colour = next((name for limit, name in COLOURS if cell > limit), "")
    return f"[{colour}]{mark}[/]" if colour and mark != " " else mark
