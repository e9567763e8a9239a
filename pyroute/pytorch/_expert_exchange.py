"""What travels between the ranks of an expert-parallel layer, through ``torch.distributed``.

All traffic is ``all_to_all_single``: of one header per pair of ranks, then of rows with uneven splits. Ranks that send
and receive nothing take part in each of them: how many there are in a step depends on the layer and on what all
headers say together, never on one rank's routes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._rank_failure import FailureReport
from ._tensors import empty_beside, reinterpret

_HEADER = 6  # int64: rows, slots, top_k, type of x, flags, refused
_ROW_TYPES = (torch.float32, torch.bfloat16)


class Ranks:
    """The ranks of a group, as the layer talks to them; one of its own without a group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._failure = None if group is None else FailureReport(group)

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def all_to_all(self, what: str, send: Tensor, sent: list[int], arriving: list[int]) -> Arriving:
        """Start sending ``sent[r]`` rows of ``send`` to each rank r and receiving ``arriving[r]`` rows from it."""
        send = send.contiguous()
        if self.group is None:
            return Arriving(self, what, send, send, None)
        received = empty_beside(send, (sum(arriving), *send.shape[1:]))
        try:
            work = dist.all_to_all_single(
                *(reinterpret(rows, torch.uint8) for rows in (received, send)),  # what every backend can send
                arriving, sent, group=self.group, async_op=True,
            )  # fmt: skip
        except RuntimeError as error:
            raise self.lost(what, error) from error
        return Arriving(self, what, received, send, work)

    def lost(self, what: str, error: RuntimeError) -> RuntimeError:
        return error if self._failure is None else self._failure.explain(what, error)


@dataclasses.dataclass(eq=False)
class Arriving:
    """Rows on their way; both ends of the transfer are kept alive until it is waited for."""

    ranks: Ranks
    what: str
    received: Tensor
    send: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            try:
                self.work.wait()
            except RuntimeError as error:
                raise self.ranks.lost(self.what, error) from error
            self.work = None
        return self.received


class Agreement(NamedTuple):
    """What all headers of a step say together.

    Attributes
    ----------
    rows_in, slots_in : list of int
        Rows and routed slots that come from each rank.
    records : bool
        Whether there will be a backward pass.
    needs_x, needs_weights : bool
        Whether any rank needs the gradient of its x, of its routing weights.
    """

    rows_in: list[int]
    slots_in: list[int]
    records: bool
    needs_x: bool
    needs_weights: bool


@dataclasses.dataclass(frozen=True)
class Header:
    """What a rank tells every other before it sends rows."""

    rows: list[int]  # for each rank
    slots: list[int]
    top_k: int
    dtype: torch.dtype
    grad_enabled: bool
    needs_x: bool
    needs_weights: bool
    needs_parameters: bool

    def exchange(self, function: str, ranks: Ranks, device: torch.device) -> Agreement:
        """Raise on every rank if the calls do not fit together."""
        flags = self.grad_enabled + 2 * self.needs_x + 4 * self.needs_weights + 8 * self.needs_parameters
        common = (self.top_k, _ROW_TYPES.index(self.dtype), flags, 0)
        send = torch.tensor([(*pair, *common) for pair in zip(self.rows, self.slots, strict=True)])
        found = _exchange(ranks, send, device)
        _check_headers(function, found)
        every = [header[4] for header in found]
        needs = [any(flag & bit for flag in every) for bit in (2, 4, 8)]
        records = bool(every[0] & 1) and any(needs)
        rows, slots = [header[0] for header in found], [header[1] for header in found]
        return Agreement(rows, slots, records, records and needs[0], records and needs[1])


def refuse(ranks: Ranks, device: torch.device) -> None:
    """Tell every other rank that this one's call was illegal, in place of its header."""
    if ranks.group is not None:
        _exchange(ranks, torch.tensor([[0] * (_HEADER - 1) + [1]] * ranks.size), device)


def _exchange(ranks: Ranks, send: Tensor, device: torch.device) -> list[list[int]]:
    one = [1] * ranks.size
    found: list[list[int]] = ranks.all_to_all("the exchange of headers", send.to(device), one, one).wait().tolist()
    return found


def _check_headers(function: str, found: list[list[int]]) -> None:
    refused = [rank for rank, header in enumerate(found) if header[5]]
    if refused:
        raise RuntimeError(f"{function}: rank {refused[0]} refused the arguments of its call; its own error says why")
    check_same(function, "top_k", [str(header[2]) for header in found])
    types = [str(_ROW_TYPES[header[3]]).removeprefix("torch.") for header in found]
    check_same(function, "the type of x", types)
    check_same(function, "torch.is_grad_enabled()", [str(bool(header[4] & 1)) for header in found])


def check_same(function: str, name: str, values: list[str]) -> None:
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        text = f"{values[0]} on rank 0 and {values[other]} on rank {other}"
        raise RuntimeError(f"{function}: {name} must be the same on every rank, got {text}")
