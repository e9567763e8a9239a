"""How often a token travels: to which nodes, to which devices, and how many bytes pass every device's ports."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from .. import _check
from ..placement.experts import Placement
from ..router_config import RouterConfig
from .cluster import Cluster

Array = Any
SENDS = ("node", "device", "expert")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One MoE layer, and how its tokens travel.

    Parameters
    ----------
    config : RouterConfig
        Experts, top_k, and groups where the router is limited to some.
    hidden, intermediate : int
    tokens : int
        Of every device, at a time.
    send : {"node", "device", "expert"}
        A copy of a token for each node, which hands it on inside (DeepSeek-V3, DeepEP's normal kernels), for each
        device, or for each chosen expert (DeepEP's low-latency kernels).
    back : {None, "node", "device", "expert"}
        On the way back; as there by default. ``pyroute.pytorch.ExpertParallel`` sends to devices and gets a row back
        for each expert, so that a token's sum has the order that it has on one device.
    dispatch_bytes, combine_bytes : float, optional
        Of a value on its way to the experts and back. By default 1 + 4 / 128 (FP8, a float32 scale for 128 values) and
        2 (bfloat16).
    """

    config: RouterConfig
    hidden: int
    intermediate: int
    tokens: int
    send: str = "node"
    dispatch_bytes: float = 1 + 4 / 128
    combine_bytes: float = 2.0
    back: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "tokens"):
            _check.integer("Layer", name, getattr(self, name), 1)
        _check.one_of("Layer", "send", self.send, SENDS)
        _check.one_of("Layer", "back", self.back, (None, *SENDS))

    @property
    def expert_flops(self) -> float:
        """Of one row through one expert, forward: three matrices, two operations a value."""
        return 6.0 * self.hidden * self.intermediate


class Traffic(NamedTuple):
    """Of one layer's tokens on their way to the experts; the way back has in and out exchanged. Arrays [devices]."""

    network_out: Array  # copies
    network_in: Array
    inside_out: Array
    inside_in: Array
    rows: Array  # token-expert pairs that the device computes
    nodes_per_token: float  # of other nodes, on average
    devices_per_token: float  # of all devices that a token reaches


def layer_traffic(cluster: Cluster, layer: Layer, plan: Placement, loads: Any, index: int = 0) -> Traffic:
    """Copies through every port, in expectation, for one layer of a plan.

    Parameters
    ----------
    cluster : Cluster
    layer : Layer
    plan : Placement
        On as many devices as the cluster has.
    loads : real numbers [E]
        How often the experts are chosen; only their shares count.
    index : int
        Of the layer in the plan.

    Notes
    -----
    Assumed: a token's experts are drawn one after another with the trace's frequencies, wherever the token is; a group
    is open as often as its load says; an expert's rows are spread evenly over its slots. Every device has equally many
    tokens. A copy that stays on its device is not counted.
    """
    function = "layer_traffic"
    D, G, N = cluster.devices, cluster.devices_per_node, cluster.nodes
    if plan.num_devices != D or plan.num_experts != layer.config.num_experts:
        expected = f"for {D} devices and {layer.config.num_experts} experts"
        got = f"{plan.num_devices} devices, {plan.num_experts} experts"
        raise _check.value_error(function, "plan", expected, got)
    loads = np.asarray(loads, np.float64)
    if loads.shape != (plan.num_experts,):
        raise _check.value_error(function, "loads", f"of shape [{plan.num_experts}]", list(loads.shape))
    shares = _shares(plan, index)
    T, k = layer.tokens, layer.config.top_k
    total = loads.sum()
    rows = shares @ loads * (T * D * k / total if total > 0 else 0.0)
    device = reached(layer.config, loads, shares)
    node = reached(layer.config, loads, shares.reshape(N, G, -1).sum(axis=1))
    if layer.send == "expert":
        device = rows / (T * D)  # copies, not a probability
    by_node = device.reshape(N, G)
    if layer.send == "node":
        network_out = np.repeat(T * (node.sum() - node), G)
        network_in = np.repeat(T * (N - 1) * node, G)
        # tokens of N devices, those with one place in their nodes, come through one device of every node
        inside_out = (T * N * (by_node.sum(axis=1, keepdims=True) - by_node)).reshape(-1)
        inside_in = T * N * (G - 1) * device
    else:
        elsewhere = device.sum() - by_node.sum(axis=1)
        network_out = np.repeat(T * elsewhere, G)
        network_in = T * (D - G) * device
        inside_out = (T * (by_node.sum(axis=1, keepdims=True) - by_node)).reshape(-1)
        inside_in = T * (G - 1) * device
    away = float(node.sum() * (N - 1) / N)
    return Traffic(network_out, network_in, inside_out, inside_in, rows, away, float(device.sum()))


def reached(config: RouterConfig, loads: Array, held: Array) -> Array:
    """[P]: how likely a token needs each place, where ``held`` [P, E] says which share of an expert's rows go there.

    top_k experts are drawn one after another from the open groups; every one that misses the place leaves fewer to
    draw from, by the mean weight of those elsewhere. Exact for even loads and places within one group.
    """
    total, groups, k = loads.sum(), config.num_groups, config.top_k
    if total == 0:
        return np.zeros(len(held))
    by_group = held.reshape(len(held), groups, -1)
    weight = (by_group * (loads / total).reshape(groups, -1)).sum(axis=-1)  # [P, groups]
    opened, of_group = config.topk_groups if groups > 1 else 1, (loads / total).reshape(groups, -1).sum(axis=1)
    is_open = np.minimum(1.0, opened * of_group)
    others = (opened - 1) / (groups - 1) if groups > 1 else 0.0
    here = np.minimum(1.0, weight / np.maximum(of_group + (1 - of_group) * others, 1e-300))  # if the group is open
    elsewhere = config.num_experts * opened / groups - by_group.sum(axis=-1)
    lost = (1 - here) / np.maximum(elsewhere, 1e-9)  # by an expert that is drawn elsewhere
    missed = np.ones_like(here)
    for j in range(k):
        missed *= np.clip(1 - here / np.maximum(1 - j * lost, 1e-9), 0.0, 1.0)
    return 1 - (1 - is_open * (1 - missed)).prod(axis=-1)


def _shares(plan: Placement, index: int) -> Array:
    """[D, E]: the share of an expert's rows that each device computes."""
    slots = plan.slot_to_expert[index]
    held = np.zeros((plan.num_devices, plan.num_experts))
    np.add.at(held, (np.arange(len(slots)) * plan.num_devices // len(slots), slots), 1.0)
    return held / held.sum(axis=0)
