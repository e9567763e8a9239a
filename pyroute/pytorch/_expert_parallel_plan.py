"""Which rank holds which expert, and the agreement of all ranks on it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .. import _check
from ..placement import Placement
from ._expert_exchange import Ranks

_AGREEMENT_BYTES = 4096  # of a rank's description in the one collective of a construction
_PRINTED_SLOTS = 512  # a longer map is compared by its digest


class ExpertSlots:
    """Slots of a layer's experts: rank r holds those from ``first[r]`` to ``first[r + 1]``.

    Attributes
    ----------
    slot_to_expert : int32 [S]
    first : int32 [ranks + 1]
    replicas : int64 [E]
        Slots of each expert, at least one.
    expert_slots : int32 [E, most replicas]
        The slots of each expert, ascending, -1 after the last.
    """

    def __init__(self, slot_to_expert: Any, first: Any, num_experts: int) -> None:
        self.slot_to_expert = np.ascontiguousarray(slot_to_expert, np.int32)
        self.first = np.ascontiguousarray(first, np.int32)
        self.num_experts = num_experts
        plan = Placement(self.slot_to_expert[None], 1, num_experts)
        self.replicas, self.expert_slots = plan.replicas[0], plan.expert_to_slots[0]

    @property
    def num_ranks(self) -> int:
        return len(self.first) - 1

    @property
    def slot_to_rank(self) -> Any:
        """int32 [S]"""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), np.diff(self.first))

    def of_rank(self, rank: int) -> list[int]:
        """The expert in each slot of a rank."""
        experts: list[int] = self.slot_to_expert[self.first[rank] : self.first[rank + 1]].tolist()
        return experts

    def describe(self) -> str:
        """The whole map where it fits into a sentence's description, else its size and digest."""
        by_rank = [self.of_rank(rank) for rank in range(self.num_ranks)]
        if len(self.slot_to_expert) <= _PRINTED_SLOTS:
            return "|".join(" ".join(map(str, experts)) for experts in by_rank)
        return f"{len(self.slot_to_expert)} slots of digest {hashlib.sha256(repr(by_rank).encode()).hexdigest()[:16]}"


def slots_of(function: str, placement: Any, num_experts: int, num_ranks: int) -> ExpertSlots:
    """``None``: blocks of experts in order, the first ranks holding one more where E does not divide by the ranks."""
    if placement is None:
        sizes = [num_experts // num_ranks + (rank < num_experts % num_ranks) for rank in range(num_ranks)]
        return ExpertSlots(np.arange(num_experts), np.cumsum([0, *sizes]), num_experts)
    slots = placement.slot_to_expert if isinstance(placement, Placement) else np.asarray(placement)
    if slots.dtype.kind not in "iu" or slots.ndim not in (1, 2):
        expected = "a Placement or integers [num_slots]"
        raise _check.type_error(function, "placement", expected, _check.describe(placement))
    if slots.ndim == 2:
        if len(slots) != 1:
            raise _check.value_error(function, "placement", "of one layer: pass plan.slot_to_expert[layer]", len(slots))
        slots = slots[0]
    if isinstance(placement, Placement) and (placement.num_devices, placement.num_experts) != (num_ranks, num_experts):
        got = f"{placement.num_experts} on {placement.num_devices}"
        raise _check.value_error(function, "placement", f"of {num_experts} experts on {num_ranks} ranks", got)
    try:
        checked = Placement(slots[None], num_ranks, num_experts).slot_to_expert[0]
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("Placement: slot_to_expert", f"{function}: placement", 1)) from None
    return ExpertSlots(checked, np.arange(num_ranks + 1) * (len(checked) // num_ranks), num_experts)


def group_of(function: str, group: Any) -> dist.ProcessGroup | None:
    """The process group that was meant; None where there is one process only."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        found: dist.ProcessGroup | None = dist.group.WORLD
        return found
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh, whose import takes a second
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            expected = "a DeviceMesh of one dimension, as mesh['ep'] is"
            raise _check.value_error(function, "group", expected, f"{group.ndim} dimensions {names}")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise _check.type_error(function, "group", "a process group or a DeviceMesh", _check.describe(group))
    return group


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors lie that this group can send."""
    types = [device.type for device in group._device_types]
    return torch.device("cpu") if "cpu" in types else torch.device(types[0], torch.cuda.current_device())


def agree(function: str, ranks: Ranks, config: dict[str, Any], error: Exception | None) -> tuple[int, int]:
    """Raise on every rank where one has refused its arguments or has others than the rest; one collective.

    Returns
    -------
    int, int
        Rank 0's ``config["seed"]`` and ``config["number"]``, the entries that may differ.
    """
    group = ranks.group
    if group is None:
        if error is not None:
            raise error
        return config["seed"], config["number"]
    described = {"refused": str(error)[:512]} if error is not None else config
    text = json.dumps(described, ensure_ascii=False, default=_plain).encode(errors="replace")  # 6 bytes a character
    mine = np.zeros(_AGREEMENT_BYTES, np.uint8)
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    send, one = torch.from_numpy(np.tile(mine, (ranks.size, 1))).to(device_of(group)), [1] * ranks.size
    received = ranks.all_to_all("the agreement on a layer's arguments", send, one, one).wait()
    configs = [json.loads(bytes(row).rstrip(b"\0")) for row in received.cpu().numpy()]
    if error is not None:
        raise error
    for rank, config in enumerate(configs):
        if "refused" in config:
            raise ValueError(f"{function}: rank {rank} refused its arguments: {config['refused']}")
    found = [_difference(name, [c.get(name) for c in configs]) for name in configs[0]]
    if differences := [sentence for sentence in found if sentence]:
        raise ValueError(f"{function}: {'; '.join(differences)}")
    return configs[0]["seed"], configs[0]["number"]


def _plain(number: Any) -> Any:
    """NumPy's sizes and limits as Python's."""
    return number.item() if isinstance(number, np.generic) else float(number)


def _difference(name: str, values: list[Any]) -> str:
    """A sentence with all values and who has them, if there are several."""
    if name in ("seed", "number") or all(value == values[0] for value in values):
        return ""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(repr(value) if isinstance(value, str) else str(value), []).append(rank)
    parts = [f"{value} on {_names(ranks)}" for value, ranks in holders.items()]
    return f"{name} must be the same on every rank, got {' and '.join(parts)}"


def _names(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
