"""Devices in nodes, a link inside a node and one between nodes, and where their figures come from."""

from __future__ import annotations

import dataclasses

from .. import _check


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects one device with others: an exchange takes ``latency + bytes / bandwidth`` seconds.

    Parameters
    ----------
    bandwidth : float
        Bytes a second that one device sends, while it receives as many.
    latency : float
        Seconds of an exchange with all others that do not depend on its bytes.
    source : str
        Where both come from.
    """

    bandwidth: float
    latency: float
    source: str = "stated"

    def __post_init__(self) -> None:
        if not _check.real("Link", "bandwidth", self.bandwidth, minimum=0.0) > 0:
            raise _check.value_error("Link", "bandwidth", "positive", self.bandwidth)
        _check.real("Link", "latency", self.latency, minimum=0.0)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """N nodes of G devices each that share the experts of a layer; device d is on node ``d // G``.

    Parameters
    ----------
    nodes, devices_per_node : int
    inside, network : Link
        Between the devices of a node, and between nodes: one network port for each device.
    rate : float
        Operations a second that a device sustains.
    rate_source : str
    """

    nodes: int
    devices_per_node: int
    inside: Link
    network: Link
    rate: float
    rate_source: str = "stated"

    def __post_init__(self) -> None:
        _check.integer("Cluster", "nodes", self.nodes, 1)
        _check.integer("Cluster", "devices_per_node", self.devices_per_node, 1)
        if not _check.real("Cluster", "rate", self.rate, minimum=0.0) > 0:
            raise _check.value_error("Cluster", "rate", "positive", self.rate)

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def of_devices(self, devices: int) -> Cluster:
        """The same machines, as many as that many devices take; fewer than a node's share one node."""
        each = min(self.devices_per_node, _check.integer("Cluster.of_devices", "devices", devices, 1))
        if devices % each:
            raise _check.value_error("Cluster.of_devices", "devices", f"a multiple of {each}", devices)
        return dataclasses.replace(self, nodes=devices // each, devices_per_node=each)


# DeepSeek-V3's machines: 8 H800 a node, NVLink inside, one 400 Gb/s InfiniBand port for each device.
H800 = Cluster(
    8,
    8,
    Link(160e9, 30e-6, "160 GB/s: DeepEP's README, NVLink of an H800; 30 us: its low-latency dispatch with 8 devices"),
    Link(50e9, 42e-6, "50 GB/s: DeepEP's README, InfiniBand; 42 us: its low-latency dispatch with 32 devices"),
    4.22e14,
    "422 TFLOP/s, so that a balanced step of DeepSeek-V3 takes what its published 2.664 million H800 hours say",
)
