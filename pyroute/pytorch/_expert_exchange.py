"""What travels between the ranks of an expert-parallel layer, through ``torch.distributed``.

All traffic is ``all_to_all_single``: of one header per pair of ranks, then of rows with uneven splits. Ranks that send
and receive nothing take part in each of them: how many there are in a step depends on the layer and on what all
headers say together, never on one rank's routes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._rank_failure import FailureReport
from ._tensors import empty_beside, reinterpret

_HEADER = 9  # int64: rows, slots, layer, top_k, type of x, payload, precision, flags, refused
_ROW_TYPES = (torch.float32, torch.bfloat16)
_FORMATS = (None, "fp8", "fp8_ue8m0")


class Ranks:
    """The ranks of a group, as the layer talks to them; one of its own without a group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._failure = None if group is None else FailureReport(group)

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(
                "ExpertParallel: a layer of a process group cannot be pickled; save its state_dict() on every rank, "
                "and load it into a layer that is constructed over such a group"
            )
        return Ranks, (None,)

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
    layer: int
    top_k: int
    dtype: torch.dtype
    payload: str | None
    precision: str | None
    grad_enabled: bool
    needs_x: bool
    needs_weights: bool
    needs_parameters: bool

    def exchange(self, function: str, ranks: Ranks, device: torch.device) -> Agreement:
        """Raise on every rank if the calls do not fit together."""
        flags = self.grad_enabled + 2 * self.needs_x + 4 * self.needs_weights + 8 * self.needs_parameters
        formats = _FORMATS.index(self.payload), _FORMATS.index(self.precision)
        common = (self.layer, self.top_k, _ROW_TYPES.index(self.dtype), *formats, flags, 0)
        send = torch.tensor([(*pair, *common) for pair in zip(self.rows, self.slots, strict=True)])
        found = _exchange(ranks, send, device)
        _check_headers(function, found)
        every = [header[-2] for header in found]
        needs = [any(flag & bit for flag in every) for bit in (2, 4, 8)]
        records = bool(every[0] & 1) and any(needs)
        rows, slots = [header[0] for header in found], [header[1] for header in found]
        return Agreement(rows, slots, records, records and needs[0], records and needs[1])


@contextlib.contextmanager
def refused_by_all(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Whatever is raised inside, every other rank is told in place of this one's header."""
    try:
        yield
    except Exception:
        if ranks.group is not None:
            _exchange(ranks, torch.tensor([[0] * (_HEADER - 1) + [1]] * ranks.size), device)
        raise


def _exchange(ranks: Ranks, send: Tensor, device: torch.device) -> list[list[int]]:
    one = [1] * ranks.size
    found: list[list[int]] = ranks.all_to_all("the exchange of headers", send.to(device), one, one).wait().tolist()
    return found


def _check_headers(function: str, found: list[list[int]]) -> None:
    refused = [rank for rank, header in enumerate(found) if header[-1]]
    if refused:
        raise RuntimeError(f"{function}: rank {refused[0]} refused the arguments of its call; its own error says why")
    _, _, layer, top_k, dtype, payload, precision, flags, _ = zip(*found, strict=True)
    check_same(function, "the layer that is called", [f"number {number}" for number in layer])
    check_same(function, "top_k", [str(k) for k in top_k])
    check_same(function, "the type of x", [str(_ROW_TYPES[place]).removeprefix("torch.") for place in dtype])
    for name, places in (("payload", payload), ("precision", precision)):
        check_same(function, name, [str(_FORMATS[place]) for place in places])
    check_same(function, "torch.is_grad_enabled()", [str(bool(flag & 1)) for flag in flags])


def check_same(function: str, name: str, values: list[str]) -> None:
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        text = f"{values[0]} on rank 0 and {values[other]} on rank {other}"
        raise RuntimeError(f"{function}: {name} must be the same on every rank, got {text}")
