"""Gradients of experts that several slots hold: the same sum in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ._expert_exchange import Ranks, check_same
from ._expert_parallel_plan import ExpertSlots

_KINDS = ("False", "True", "True for a DTensor")


def check_gradients(function: str, parameters: dict[str, Tensor], ranks: Ranks) -> None:
    """Raise on every rank if they do not all have gradients of the same parameters to sum; one collective."""
    kinds = [0 if not p.requires_grad else 1 + hasattr(p, "device_mesh") for p in parameters.values()]
    device = next(iter(parameters.values())).device
    send, one = torch.tensor([kinds] * ranks.size, device=device), [1] * ranks.size
    found = ranks.all_to_all("the agreement on gradients", send, one, one).wait().tolist()
    for name, of_rank in zip(parameters, zip(*found, strict=True), strict=True):
        check_same(function, f"{name}.requires_grad", [_KINDS[kind] for kind in of_rank])
        if of_rank[0] == 2:
            raise TypeError(f"{function}: replicated experts must not be sharded again, got {name} as a DTensor")


def sum_over_replicas(gradients: Iterable[Tensor], slots: ExpertSlots, ranks: Ranks) -> None:
    """Give every replica's entry of each gradient [local slots, ...] the sum over all of them, in place.

    Summed in float32 in the order of slots, the same on every rank, and rounded once. One collective for a gradient, in
    which a slot goes to the ranks that hold its expert too; none where nothing is replicated.
    """
    if (slots.replicas == 1).all():
        return
    held = [slots.of_rank(rank) for rank in range(ranks.size)]
    first, mine = int(slots.first[ranks.rank]), held[ranks.rank]
    others = [rank if rank != ranks.rank else None for rank in range(ranks.size)]
    send = [[] if rank is None else _common(mine, held[rank]) for rank in others]
    arrive = [[] if rank is None else _common(held[rank], mine) for rank in others]
    places = [int(slots.first[rank]) + local for rank, found in enumerate(arrive) for local in found]
    for gradient in gradients:
        rows = gradient[[place for found in send for place in found]].flatten(1)
        what = "the sum over replicas"
        received = ranks.all_to_all(what, rows, [len(found) for found in send], [len(found) for found in arrive]).wait()
        by_slot = {place: row.view(gradient.shape[1:]) for place, row in zip(places, received, strict=True)}
        by_slot |= {first + local: gradient[local].clone() for local in range(len(mine))}
        for expert, local in _replicated(mine, slots):
            terms = [by_slot[slot] for slot in slots.expert_slots[expert].tolist() if slot >= 0]
            total = terms[0].to(torch.float32)
            for term in terms[1:]:
                total = total + term.to(torch.float32)
            gradient[local] = total.to(gradient.dtype)


def _common(experts: list[int], of: list[int]) -> list[int]:
    """Places in ``experts`` of those that ``of`` has too."""
    return [place for place, expert in enumerate(experts) if expert in set(of)]


def _replicated(experts: list[int], slots: ExpertSlots) -> Iterator[tuple[int, int]]:
    return ((expert, place) for place, expert in enumerate(experts) if slots.replicas[expert] > 1)
