"""Times: of a layer's exchanges and products, and of a training step over pipeline stages."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from .. import _check
from ..placement.experts import Placement
from .cluster import Cluster
from .traffic import Layer, Traffic, layer_traffic

Array = Any


class LayerTime(NamedTuple):
    """Seconds of one layer, forward, on the device that takes longest."""

    dispatch: float
    experts: float
    combine: float
    binds: str  # "network", "inside" or "latency": what the exchanges mostly wait for
    network_bytes: float  # there and back, of the device that sends or receives most
    inside_bytes: float
    messages: int  # that a device sends on the way to the experts
    imbalance: float  # rows of the busiest device over the mean


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step: tokens, pipeline, and what a token computes beside its experts.

    Parameters
    ----------
    tokens : int
        Of a step, over all devices.
    devices : int
        All of them: pipeline stages times the devices of a stage, which are one or several clusters' worth.
    stages : int
        Of the pipeline; layers are spread over them in order.
    other_flops : float
        Operations of a token, forward, in all layers beside the routed experts.
    overlap : bool
        Exchanges run beside the products (DualPipe), so that the longer of the two counts; otherwise they add up.
    """

    tokens: int
    devices: int
    stages: int
    other_flops: float
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "devices", "stages"):
            _check.integer("Training", name, getattr(self, name), 1)
        _check.real("Training", "other_flops", self.other_flops, minimum=0.0)
        if self.devices % self.stages:
            raise _check.value_error("Training", "devices", f"a multiple of stages ({self.stages})", self.devices)


class StepTime(NamedTuple):
    """Seconds of a training step, and what they are made of on the slowest stage."""

    seconds: float
    compute: float  # forward and backward, all micro-batches
    exchange: float
    exposed: float  # what the exchanges add
    bubble: float
    imbalance: float  # mean over layers
    stage: int  # the slowest
    micro_batches: float


def layer_time(cluster: Cluster, layer: Layer, plan: Placement, loads: Any, index: int = 0) -> LayerTime:
    """Time of one layer's dispatch, experts and combine; arguments as of :func:`layer_traffic`.

    The two hops of a token, and the two directions of a port, run beside each other: an exchange takes the longest of
    all ports' ``bytes / bandwidth``, and the latency of every link that it uses.
    """
    traffic = layer_traffic(cluster, layer, plan, loads, index)
    there = _exchange(cluster, layer.send, traffic, layer.hidden * layer.dispatch_bytes + 8 * layer.config.top_k)
    home = layer.back or layer.send
    if home != layer.send:
        back = layer_traffic(cluster, dataclasses.replace(layer, send=home), plan, loads, index)
    else:
        back = traffic
    returned = _exchange(cluster, home, back, layer.hidden * layer.combine_bytes)
    waits = {name: getattr(there, name) + getattr(returned, name) for name in ("network", "inside")}
    slower = max(waits, key=lambda name: waits[name])
    mean = traffic.rows.mean()
    return LayerTime(
        there.seconds, float(traffic.rows.max()) * layer.expert_flops / cluster.rate, returned.seconds,
        "latency" if there.latency + returned.latency > waits[slower] else slower,
        waits["network"] * cluster.network.bandwidth, waits["inside"] * cluster.inside.bandwidth,
        _messages(cluster, layer), float(traffic.rows.max() / mean) if mean else 1.0,
    )  # fmt: skip


class _Exchange(NamedTuple):
    seconds: float
    latency: float
    network: float  # seconds of its busiest port
    inside: float


def _exchange(cluster: Cluster, send: str, traffic: Traffic, size: float) -> _Exchange:
    """All copies of ``size`` bytes, there or back: the busiest port is the same."""
    network = size * float(max(traffic.network_out.max(), traffic.network_in.max())) / cluster.network.bandwidth
    inside = size * float(max(traffic.inside_out.max(), traffic.inside_in.max())) / cluster.inside.bandwidth
    latencies = cluster.network.latency * (network > 0), cluster.inside.latency * (inside > 0)
    latency = sum(latencies) if send == "node" else max(latencies)  # one hop after the other, or one of them
    return _Exchange(latency + max(network, inside), latency, network, inside)


def _messages(cluster: Cluster, layer: Layer) -> int:
    """One for each device that it sends to, however many rows are in it."""
    N, G = cluster.nodes, cluster.devices_per_node
    return N - 1 + G - 1 if layer.send == "node" else N * G - 1


def step_time(cluster: Cluster, layer: Layer, training: Training, plan: Placement, loads: Any) -> StepTime:
    """Time of a training step with the loads [L, E] of all layers, each layer on one cluster of a stage.

    Backward takes twice the products and the same exchanges. Assumed besides: every cluster of a stage sees the same
    loads; the busiest device of every layer sets its pace; work outside the experts is spread evenly; the pipeline's
    bubble is DualPipe's (DeepSeek-V3's report, table 2) with equal thirds for forward, backward for inputs and
    backward for weights. Left out: optimiser, gradient reduction, stages' own messages.
    """
    loads = np.atleast_2d(np.asarray(loads, np.float64))
    per_stage = training.devices // training.stages
    if per_stage % cluster.devices:
        expected = f"{training.stages} stages of whole clusters of {cluster.devices}"
        raise _check.value_error("step_time", "training.devices", expected, training.devices)
    micro_batches = training.tokens / per_stage / layer.tokens
    times = [layer_time(cluster, layer, plan, row, i) for i, row in enumerate(loads)]
    other = training.other_flops * layer.tokens / training.stages / cluster.rate
    found = []
    for members in np.array_split(np.arange(len(times)), training.stages):
        compute = 3 * (sum(times[i].experts for i in members) + other)
        exchange = 2 * sum(times[i].dispatch + times[i].combine for i in members)
        one = max(compute, exchange) if training.overlap else compute + exchange
        found.append((one, compute, exchange))
    stage = max(range(len(found)), key=lambda i: found[i][0])
    one, compute, exchange = found[stage]
    bubble = max(0.0, training.stages / 2 - 1) * one * 2 / 3
    imbalance = float(np.mean([time.imbalance for time in times]))
    return StepTime(
        micro_batches * one + bubble, micro_batches * compute, micro_batches * exchange,
        micro_batches * (one - compute), bubble, imbalance, stage, micro_batches,
    )  # fmt: skip
