"""Where the tokens of this rank go, and what arrives from the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._expert_parallel_plan import ExpertSlots
from .moe import shares_rows
from .permutation import RoutePlan, permute, plan_routes


class SlotMaps(NamedTuple):
    """:class:`ExpertSlots` as tensors on the layer's device, as seen by one rank.

    Attributes
    ----------
    expert_slots : int32 [E, most replicas]
    replicas : int32 [E]
    slot_to_rank, first_of_slot : int32 [S]
        A slot's rank, and the first slot of that rank.
    """

    expert_slots: Tensor
    replicas: Tensor
    slot_to_rank: Tensor
    first_of_slot: Tensor
    num_ranks: int
    rank: int

    @classmethod
    def of(cls, slots: ExpertSlots, rank: int, device: torch.device) -> SlotMaps:
        owner = slots.slot_to_rank
        arrays = (slots.expert_slots, slots.replicas.astype("int32"), owner, slots.first[owner])
        tensors = [torch.from_numpy(a).to(device) for a in arrays]
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], slots.num_ranks, rank)


class Route(NamedTuple):
    """The way of this rank's T tokens.

    Attributes
    ----------
    rows : RoutePlan
        What is sent, ordered by rank, then token: a row for every rank that has some of a token's experts.
    slots : RoutePlan
        What comes back, ordered by rank, token, slot: a row for every routed slot.
    rank, local_slot : int32 [T, k]
        Of each slot's expert; -1 where it is not routed.
    row_counts, slot_counts : list of int
        Rows for each rank, and slots.
    """

    rows: RoutePlan
    slots: RoutePlan
    rank: Tensor
    local_slot: Tensor
    row_counts: list[int]
    slot_counts: list[int]

    @classmethod
    def of(cls, topk_idx: Tensor, maps: SlotMaps, once_per_rank: bool) -> Route:
        """``once_per_rank``: a token goes to a rank once, however many of its experts are there."""
        routed = topk_idx >= 0
        slot = slots_of(topk_idx, maps)
        rank = torch.where(routed, maps.slot_to_rank[slot], -1)
        local = torch.where(routed, slot.to(torch.int32) - maps.first_of_slot[slot], -1)
        slots = plan_routes(rank, maps.num_ranks)
        rows = plan_routes(_without_repeats(rank), maps.num_ranks) if once_per_rank else slots
        row_counts, slot_counts = torch.stack([rows.tokens_per_expert, slots.tokens_per_expert]).tolist()
        slots = _trim(slots, sum(slot_counts))
        rows = _trim(rows, sum(row_counts)) if once_per_rank else slots
        return cls(rows, slots, rank, local, row_counts, slot_counts)

    def describe_rows(self, weights: Tensor | None) -> Tensor:
        """int32 [rows, k], what each row's rank has to do: the local slot for each of the token's slots, or -1.

        With ``weights`` float32 [T, k] twice as wide: their bits follow. [rows, 1] where every slot has a row.
        """
        if self.rows is self.slots:  # a row is one slot
            return _in_order(self.slots.token_to_row.long(), self.local_slot, len(self.slots.row_to_token))
        token = self.rows.row_to_token.long()
        counts = self.rows.tokens_per_expert
        ranks = torch.arange(len(counts), dtype=torch.int32, device=token.device)
        of_row = ranks.repeat_interleave(counts.long(), output_size=len(token))
        here = self.rank[token] == of_row[:, None]
        local = torch.where(here, self.local_slot[token], -1)
        return local if weights is None else torch.cat([local, weights[token].view(torch.int32)], dim=1)


class Arrived(NamedTuple):
    """What is to be done with the rows that arrived: R routed slots in the order of rows.

    Attributes
    ----------
    local_slot : int32 [R, 1]
    weights : float32 [R, 1]
        1 where none travelled.
    row : int32 [R]
        The row of each slot.
    slots_of_row : int32 [rows, k]
        Places in 0..R - 1, -1 where a slot is not routed here.
    """

    local_slot: Tensor
    weights: Tensor
    row: Tensor
    slots_of_row: Tensor

    @classmethod
    def of(cls, described: Tensor, num_slots: int, with_weights: bool) -> Arrived:
        """``described`` as :meth:`Route.describe_rows` made it."""
        top_k = described.shape[1] // (1 + with_weights)
        local = described[:, :top_k]
        plan = plan_routes(torch.where(local < 0, -1, 0), 1)
        place = plan.token_to_row.long()
        weights = torch.ones(num_slots, 1, device=described.device)
        if with_weights:
            weights = _in_order(place, described[:, top_k:].view(torch.float32), num_slots)
        return cls(_in_order(place, local, num_slots), weights, plan.row_to_token[:num_slots], plan.token_to_row)

    def slots_of(self, rows: Tensor, precision: str | None) -> tuple[Tensor, Tensor | None]:
        """What the experts read for each slot: rows, and which of them, or None where every slot has one."""
        if len(rows) == len(self.row):
            return rows, None
        if shares_rows(rows, precision):
            return rows, self.row
        return permute(rows, RoutePlan(self.row, self.row, self.row, self.slots_of_row)), None


def _in_order(place: Tensor, values: Tensor, count: int) -> Tensor:
    """[count, 1]: each value at its place; those without one go to the end, which is cut off."""
    result = values.new_empty(count + 1)
    result[place] = values
    return result[:count, None]


def slots_of(topk_idx: Tensor, maps: SlotMaps) -> Tensor:
    """int64 [T, k]: the slot that serves each route; any where it is -1.

    A rank's tokens take an expert's replicas in turn, the first token a replica that depends on the rank.
    """
    expert = topk_idx.clamp(min=0).long()
    if maps.expert_slots.shape[1] == 1:
        return maps.expert_slots[:, 0][expert].long()
    plan = plan_routes(topk_idx, len(maps.replicas))
    turn = plan.token_to_row - plan.expert_offsets[expert] + maps.rank
    return maps.expert_slots[expert, turn.remainder(maps.replicas[expert]).long()].long()


def _without_repeats(rank: Tensor) -> Tensor:
    """-1 where an earlier slot of the token has the same rank."""
    top_k = rank.shape[1]
    if top_k == 1:
        return rank
    earlier = torch.ones((top_k, top_k), dtype=torch.bool, device=rank.device).tril(-1)
    repeats = ((rank[:, :, None] == rank[:, None, :]) & earlier).any(dim=2)
    return rank.masked_fill(repeats, -1)


def _trim(plan: RoutePlan, num_rows: int) -> RoutePlan:
    return plan._replace(row_to_token=plan.row_to_token[:num_rows])
