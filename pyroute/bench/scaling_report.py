"""``pyroute placement --cluster``: what a plan means on a cluster of published machines, with every assumption."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..placement import Placement
from ..router_config import RouterConfig
from ..scaling import H800, Cluster, Layer, Training, layer_time, step_time
from .model_sizes import MODELS
from .terminal import UsageError, duration, number_of_bytes, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console

Array = Any
CLUSTERS = {"h800": H800}
SEQUENCE = 4096


class Options(NamedTuple):
    """What the command line says about the machines and the model."""

    cluster: str | None
    model: str
    tokens: int  # of a device, in a micro-batch
    total: int | None  # devices of the whole run
    stages: int
    batch: int  # tokens of a step

    def checked(self) -> Options:
        """Itself; UsageError for a name that is not known."""
        for option, name, known in (("--cluster", self.cluster, CLUSTERS), ("--model", self.model, MODELS)):
            if name is not None and name not in known:
                raise UsageError(f"{option} must be one of {', '.join(known)}, got {name}")
        return self


def make(trace: Array, plan: Placement, unplaced: Placement, options: Options) -> dict[str, Any]:
    """Times of the mean layer, and with ``total`` of a training step, for experts in order and for the plan."""
    model = MODELS[options.model]
    config = RouterConfig.preset(options.model)
    if config.num_experts != plan.num_experts:
        raise UsageError(f"{options.model} has {config.num_experts} experts, the trace {plan.num_experts}")
    try:
        cluster = CLUSTERS[options.cluster or "h800"].of_devices(plan.num_devices)
        layer = Layer(config, model.shape.hidden, model.shape.intermediate, options.tokens)
        report: dict[str, Any] = {"cluster": options.cluster, "model": options.model, "tokens": options.tokens}
        plans = {"experts in order": unplaced, "this plan": plan}
        even = Placement(unplaced.slot_to_expert[:1], plan.num_devices, plan.num_experts)
        report["layers"] = [_layer("even load, in order", cluster, layer, even, np.ones((1, 1, plan.num_experts)))]
        report["layers"] += [_layer(name, cluster, layer, chosen, trace) for name, chosen in plans.items()]
        if options.total:
            training = _training(options)
            report["training"] = dataclasses.asdict(training)
            ones = np.ones((1, *trace.shape[1:]))
            report["steps"] = [_step("even load, in order", cluster, layer, training, unplaced, ones)]
            report["steps"] += [_step(name, cluster, layer, training, p, trace) for name, p in plans.items()]
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).partition(": ")[2]) from None
    report["assumed"] = _assumed(cluster, options)
    return report


def _training(options: Options) -> Training:
    model = MODELS[options.model]
    routed = model.moe_layers * model.shape.top_k * model.expert
    other = 2.0 * (model.active - routed) + model.attention_flops(SEQUENCE)
    return Training(options.batch, options.total or 1, options.stages, other)


def _layer(name: str, cluster: Cluster, layer: Layer, plan: Placement, trace: Array) -> dict[str, Any]:
    found = [layer_time(cluster, layer, plan, row, i) for step in trace for i, row in enumerate(step)]
    keys = ("dispatch", "experts", "combine", "network_bytes", "inside_bytes", "imbalance")
    mean = {key: float(np.mean([getattr(time, key) for time in found])) for key in keys}
    binds = [time.binds for time in found]
    return {"name": name, **mean, "messages": found[0].messages, "binds": max(set(binds), key=binds.count)}


def _step(
    name: str, cluster: Cluster, layer: Layer, training: Training, plan: Placement, trace: Array
) -> dict[str, Any]:
    found = [step_time(cluster, layer, training, plan, step) for step in trace]
    seconds = [time.seconds for time in found]
    keys = ("compute", "exchange", "exposed", "bubble", "imbalance")
    mean = {key: float(np.mean([getattr(time, key) for time in found])) for key in keys}
    return {"name": name, "seconds": float(np.mean(seconds)), "worst_seconds": max(seconds), **mean}


def _assumed(cluster: Cluster, options: Options) -> list[str]:
    lines = [
        f"NVLink {cluster.inside.source}", f"network {cluster.network.source}", f"products at {cluster.rate_source}",
        "a token travels once to each node and is handed on inside (DeepSeek-V3's report, section 3.2.2); FP8 with a "
        "float32 scale for 128 values on its way to the experts, bfloat16 back; ids and weights 8 bytes a slot",
        "experts are drawn with the trace's frequencies, wherever the token is; every device has equally many tokens",
        "the links' peaks: DeepEP's published times are up to a quarter longer",
    ]  # fmt: skip
    if options.total:
        lines.append(
            "backward takes twice the products and the same exchanges; exchanges run beside products; the bubble is "
            "DualPipe's; clusters of a stage see the same loads; no time for optimiser and gradient reduction"
        )
    return lines


def show(console: Console, report: dict[str, Any]) -> None:
    console.print(f"\n[head]One layer of {report['model']}[/]  {report['tokens']} tokens a device, forward")
    rows = [
        (
            found["name"], duration(found["dispatch"]), duration(found["experts"]), duration(found["combine"]),
            number_of_bytes(found["network_bytes"]), number_of_bytes(found["inside_bytes"]), found["binds"],
        )
        for found in report["layers"]
    ]  # fmt: skip
    show_table(console, ("", "dispatch", "experts", "combine", "network", "inside", "bound by"), rows, align="<>>>>>>")
    if "steps" in report:
        training = report["training"]
        what = f"{training['devices']} devices, {training['stages']} stages, {training['tokens'] / 1e6:.1f} M tokens"
        console.print(f"\n[head]A training step[/]  {what}")
        first = report["steps"][0]["seconds"]
        steps = [
            (
                found["name"], f"{found['seconds']:.2f} s", f"{found['worst_seconds']:.2f} s",
                f"{found['seconds'] / first:.2f} x", f"{found['imbalance']:.2f}", f"{found['exposed']:.2f} s",
            )
            for found in report["steps"]
        ]  # fmt: skip
        show_table(console, ("", "mean", "worst", "even = 1", "imbalance", "exposed"), steps, align="<>>>>>")
    console.print("\n[head]Assumed[/]")
    for line in report["assumed"]:
        show_text(console, f"[note]{line}.[/]", indent=2)
