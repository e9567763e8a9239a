"""place_experts: replicas for the heaviest experts, groups to nodes, experts to devices; and the plan that it gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import _check
from . import _moves, _packing
from .loads import as_loads

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Which expert every slot of every device holds; made by :func:`place_experts`.

    Parameters
    ----------
    slot_to_expert : int32 [L, S]
        Slots of device d are ``d * S / D`` and the following. Every expert has one slot at least.
    num_devices : int
        D, which divides S.
    num_experts : int
    """

    slot_to_expert: Array
    num_devices: int
    num_experts: int

    def __post_init__(self) -> None:
        slots = np.asarray(self.slot_to_expert)
        if slots.dtype.kind not in "iu" or slots.ndim != 2:
            raise _check.type_error("Placement", "slot_to_expert", "integers [L, S]", _check.describe(slots))
        D = _check.integer("Placement", "num_devices", self.num_devices, 1)
        E = _check.integer("Placement", "num_experts", self.num_experts, 1)
        if slots.shape[1] % D or slots.shape[1] < E:
            expected = f"of at least {E} slots a layer, a multiple of {D}"
            raise _check.value_error("Placement", "slot_to_expert", expected, list(slots.shape))
        if slots.size and (slots.min() < 0 or slots.max() >= E):
            bad = slots[(slots < 0) | (slots >= E)][0]
            raise _check.value_error("Placement", "slot_to_expert", f"in 0..{E - 1}", int(bad))
        object.__setattr__(self, "slot_to_expert", np.ascontiguousarray(slots, np.int32))
        if slots.size and (self.replicas == 0).any():
            layer, expert = np.argwhere(self.replicas == 0)[0]
            raise _check.value_error("Placement", "slot_to_expert", "one slot at least for every expert",
                                     f"none for expert {expert} of layer {layer}")  # fmt: skip

    @property
    def num_slots(self) -> int:
        """S, of all devices together."""
        return int(self.slot_to_expert.shape[1])

    @property
    def replicas(self) -> Array:
        """int64 [L, E]: slots of each expert."""
        layers = len(self.slot_to_expert)
        flat = self.slot_to_expert + np.arange(layers, dtype=np.int64)[:, None] * self.num_experts
        return np.bincount(flat.reshape(-1), minlength=layers * self.num_experts).reshape(layers, self.num_experts)

    @property
    def expert_to_slots(self) -> Array:
        """int32 [L, E, most replicas]: the slots of each expert, ascending, -1 after the last."""
        counts = self.replicas
        result = np.full((*counts.shape, int(counts.max(initial=0))), -1, np.int32)
        order = np.argsort(self.slot_to_expert, axis=1, kind="stable")
        experts = np.take_along_axis(self.slot_to_expert, order, axis=1)
        first = np.cumsum(counts, axis=1) - counts
        place = np.arange(self.num_slots) - np.take_along_axis(first, experts.astype(np.int64), axis=1)
        result[np.arange(len(order))[:, None], experts, place] = order
        return result

    def device_loads(self, loads: Any) -> Array:
        """float64 [L, D]: what each device has to do if an expert's load is split evenly over its slots."""
        x = _layers("Placement.device_loads", loads)
        if x.shape != self.replicas.shape:
            expected = f"of shape {list(self.replicas.shape)}"
            raise _check.value_error("Placement.device_loads", "loads", expected, list(x.shape))
        shares = np.take_along_axis(x / self.replicas, self.slot_to_expert.astype(np.int64), axis=1)
        return shares.reshape(len(x), self.num_devices, -1).sum(axis=-1)

    def balance(self, loads: Any) -> Array:
        """float64 [L]: mean over largest device load, 1 at perfect balance (and where there is no load)."""
        found = self.device_loads(loads)
        most = found.max(axis=-1)
        return np.where(most > 0, found.mean(axis=-1) / np.where(most > 0, most, 1), 1.0)

    def moves_from(self, previous: Placement) -> Array:
        """int64 [L]: slots that hold another expert than before, each of which has to be sent its weights."""
        if not isinstance(previous, Placement):
            raise _check.type_error("Placement.moves_from", "previous", "a Placement", _check.describe(previous))
        if previous.slot_to_expert.shape != self.slot_to_expert.shape or previous.num_devices != self.num_devices:
            expected = f"of {list(self.slot_to_expert.shape)} slots on {self.num_devices} devices"
            got = f"{list(previous.slot_to_expert.shape)} on {previous.num_devices}"
            raise _check.value_error("Placement.moves_from", "previous", expected, got)
        return (previous.slot_to_expert != self.slot_to_expert).sum(axis=1)


def place_experts(
    loads: Any,
    num_devices: int,
    *,
    num_slots: int | None = None,
    num_nodes: int = 1,
    num_groups: int = 1,
    previous: Placement | None = None,
    max_moves: int | None = None,
) -> Placement:
    """Give the experts of every layer their slots, so that the most loaded device has as little to do as possible.

    Experts get replicas by load per replica; what replicas then carry is packed in falling order to the least loaded
    device with a free slot, and slots are exchanged while that lowers the heaviest device. Up to 10 slots every
    packing of every choice of replicas is tried: those answers are optimal.

    Parameters
    ----------
    loads : real numbers [E] or [L, E], not negative, with a finite sum
        For example ``LoadAverage.average`` of ``tokens_per_expert``.
    num_devices : int
        D; at least one expert or replica for each.
    num_slots : int, optional
        S, of all devices together: a multiple of D, at least E, at most E * D. By default E, rounded up to a multiple.
    num_nodes, num_groups : int
        With several nodes, whole groups of experts (as the router ranks them) are packed to nodes first, and replicas
        stay within the node: node-limited routing then reaches every expert of a group on one node. Groups are a
        multiple of nodes, E of groups, D and S of nodes.
    previous : Placement, optional
        Devices and slots of the new plan are named so that few of its slots change.
    max_moves : int, optional
        Start from ``previous`` and change at most this many slots a layer, those that lower the heaviest device most.

    Returns
    -------
    Placement
        The same for the same loads on every machine.

    Notes
    -----
    Replicas and hierarchical packing as in DeepSeek's expert-parallel load balancer (technical report of DeepSeek-V3,
    section 3.4); exchange, search and bounded moves are ours. Cost: about ``S * D`` steps a layer and exchange.
    """
    function = "place_experts"
    x = _layers(function, loads)
    E, D = x.shape[1], _check.integer(function, "num_devices", num_devices, 1, 2**20)
    S = -(-E // D) * D if num_slots is None else _check.integer(function, "num_slots", num_slots, E, E * D, "E * D")
    N = _check.integer(function, "num_nodes", num_nodes, 1, D, "num_devices")
    G = _check.integer(function, "num_groups", num_groups, 1, E, "num_experts")
    if S % D:
        raise _check.value_error(function, "num_slots", f"a multiple of num_devices ({D})", S)
    if N > 1 and (G % N or E % G or D % N or E // N * (D // N) * N < S):
        what = f"num_groups {G}, {E} experts, {D} devices"
        raise _check.value_error(function, "num_nodes", "a divisor of num_groups, num_experts and num_devices",
                                 f"{N} with {what}")  # fmt: skip
    if max_moves is not None:
        _check.integer(function, "max_moves", max_moves, 0)
        if previous is None:
            raise _check.type_error(function, "previous", "a Placement with max_moves", "None")
        if N > 1:
            raise _check.value_error(function, "max_moves", "None with several nodes", max_moves)
    if previous is not None:
        _fits(function, previous, (len(x), S), D, E)
    if max_moves is not None and previous is not None:
        slots = previous.slot_to_expert.copy()
        _moves.improve_within(x, slots, D, min(max_moves, 2 * S))
        return Placement(slots, D, E)
    slots = _on_nodes(x, D, S, N, G) if N > 1 else _packed(x, D, S)
    if previous is not None:
        _moves.keep_places(previous.slot_to_expert, slots, D)
    return Placement(slots, D, E)


def _layers(function: str, loads: Any) -> Array:
    return np.atleast_2d(as_loads(function, "loads", loads))


def _fits(function: str, previous: Any, shape: tuple[int, int], devices: int, experts: int) -> None:
    if not isinstance(previous, Placement):
        raise _check.type_error(function, "previous", "a Placement", _check.describe(previous))
    got = (*previous.slot_to_expert.shape, previous.num_devices, previous.num_experts)
    if got != (*shape, devices, experts):
        expected = f"of {shape[0]} layers, {shape[1]} slots, {devices} devices, {experts} experts"
        raise _check.value_error(function, "previous", expected, ", ".join(map(str, got)))


def _packed(x: Array, devices: int, slots: int) -> Array:
    result = np.empty((len(x), slots), np.int32)
    _packing.place(x, devices, result)
    return result


def _on_nodes(x: Array, devices: int, slots: int, nodes: int, groups: int) -> Array:
    """Groups to nodes, then every node by itself."""
    layers, experts = x.shape
    per_group = experts // groups
    order = np.empty((layers, groups), np.int32)
    _packing.groups_to_nodes(np.ascontiguousarray(x.reshape(layers, groups, -1).sum(axis=-1)), nodes, order)
    members = (order[:, :, None] * per_group + np.arange(per_group)).reshape(layers * nodes, -1)
    owner = np.arange(layers).repeat(nodes)[:, None]
    local = _packed(np.ascontiguousarray(x[owner, members]), devices // nodes, slots // nodes)
    return np.take_along_axis(members, local, axis=1).reshape(layers, slots).astype(np.int32)
