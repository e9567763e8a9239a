"""The ring of csrc/cuda/sm90/ring.cuh as a model: random orders of everything that may happen, with planted mistakes.

One loader and ``warps`` math warps per block, ``cluster`` blocks. A step of the model is one barrier operation or the
arrival of one copy. Copies land in any order. A stage holds, per block, its own b and a share of a from every block of
the cluster; a math warp that reads anything but the k-block it counts to has found a broken protocol.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest


class BrokenProtocolError(Exception):
    pass


@dataclass
class Barrier:
    count: int
    arrived: int = 0
    pending_bytes: int = 0
    phase: int = 0

    def update(self, arrivals=0, num_bytes=0):
        self.arrived += arrivals
        self.pending_bytes += num_bytes
        if self.arrived > self.count:
            raise BrokenProtocolError("more arrivals than a phase has")
        if self.arrived == self.count and self.pending_bytes == 0:
            self.arrived, self.phase = 0, self.phase + 1

    def ended(self, parity):
        return self.phase % 2 != parity


@dataclass
class Plan:
    """What the kernel does; the defaults are right."""

    stages: int = 3
    warps: int = 3
    cluster: int = 1
    tiles: tuple[int, ...] = (4, 1, 7)
    first_empty_parity: int = 1
    releases: int | None = None
    expected_bytes: int | None = None
    loader_restarts: bool = False  # (stage, phase) anew in every tile
    math_restarts: bool = False
    tail_wait: bool = True
    looks_back: bool = False  # after the last stage of a tile: asks again for a stage that it has released


@dataclass
class Block:
    full: list[Barrier]
    empty: list[Barrier]
    held: list[dict] = field(default_factory=list)
    live: int = 0


def run(plan: Plan, seed: int) -> None:
    order = random.Random(seed)
    releases = plan.warps * plan.cluster if plan.releases is None else plan.releases
    copies = 1 + plan.cluster  # of one byte: b, and a share of a from each block
    blocks = [
        Block(
            [Barrier(1) for _ in range(plan.stages)],
            [Barrier(releases) for _ in range(plan.stages)],
            [{} for _ in range(plan.stages)],
            plan.warps + 1,
        )
        for _ in range(plan.cluster)
    ]
    in_flight: list[tuple[int, int, str, int]] = []

    def alive(rank):
        if blocks[rank].live == 0:
            raise BrokenProtocolError("a signal into a block that has ended")
        return blocks[rank]

    def positions(restarts):
        stage = phase = 0
        number = 0
        for tile in plan.tiles:
            if restarts:
                stage = phase = 0
            for left in reversed(range(tile)):
                yield number, stage, phase, left
                number += 1
                stage += 1
                if stage == plan.stages:
                    stage, phase = 0, phase ^ 1
        yield None, stage, phase, 0

    def loader(rank):
        for number, stage, phase, _ in positions(plan.loader_restarts):
            if number is None:
                break
            yield lambda s=stage, p=phase: blocks[rank].empty[s].ended(p ^ plan.first_empty_parity)
            blocks[rank].full[stage].update(1, copies if plan.expected_bytes is None else plan.expected_bytes)
            in_flight.append((rank, stage, "b", number))
            for peer in range(plan.cluster):
                in_flight.append((peer, stage, f"a{rank}", number))
        if plan.tail_wait and plan.cluster > 1:
            for _ in range(plan.stages):
                yield lambda s=stage, p=phase: blocks[rank].empty[s].ended(p ^ 1)
                stage += 1
                if stage == plan.stages:
                    stage, phase = 0, phase ^ 1
        blocks[rank].live -= 1

    def math(rank):
        for number, stage, phase, left in positions(plan.math_restarts):
            if number is None:
                break
            yield lambda s=stage, p=phase: blocks[rank].full[s].ended(p)
            for _ in range(2):  # the products take a while
                wanted = {"b": number, **{f"a{peer}": number for peer in range(plan.cluster)}}
                if blocks[rank].held[stage] != wanted:
                    raise BrokenProtocolError("a stage with other data than the block of depth that is due")
                yield lambda: True
            for peer in range(plan.cluster):
                alive(peer).empty[stage].update(1)
            if left > 0:  # asks whether the next stage is there before it adds the sums
                following = (0, phase ^ 1) if stage + 1 == plan.stages else (stage + 1, phase)
                yield lambda s=following[0], p=following[1]: blocks[rank].full[s].ended(p)
            elif plan.looks_back:
                yield lambda s=stage, p=phase: blocks[rank].full[s].ended(p)
        blocks[rank].live -= 1

    threads = []
    for rank in range(plan.cluster):
        for body in (loader(rank), *(math(rank) for _ in range(plan.warps))):
            threads.append([body, next(body, None)])
    while any(ready for _, ready in threads) or in_flight:
        able = [t for t in threads if t[1] is not None and t[1]()]
        if not able and not in_flight:
            raise BrokenProtocolError("nothing can go on")
        pick = order.randrange(len(able) + len(in_flight))
        if pick < len(able):
            able[pick][1] = next(able[pick][0], None)
        else:
            rank, stage, what, number = in_flight.pop(pick - len(able))
            alive(rank).held[stage][what] = number
            blocks[rank].full[stage].update(0, -1)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_the_protocol_holds_in_every_order(cluster, stages):
    for seed in range(60):
        run(Plan(stages=stages, cluster=cluster), seed)


@pytest.mark.parametrize("tiles", [(1,), (3,), (2, 2), (0, 4, 0), (9,)])
@pytest.mark.parametrize("cluster", [1, 2])
def test_any_number_of_blocks_of_depth(tiles, cluster):
    for seed in range(20):
        run(Plan(tiles=tiles, cluster=cluster), seed)


@pytest.mark.parametrize(
    "mistake",
    [
        {"first_empty_parity": 0},
        {"releases": 2},
        {"releases": 4},
        {"releases": 3, "cluster": 2},
        {"loader_restarts": True},
        {"math_restarts": True},
        {"loader_restarts": True, "math_restarts": True},
        {"expected_bytes": 1},
        {"expected_bytes": 3},
        {"expected_bytes": 2, "cluster": 2},
        {"tail_wait": False, "cluster": 2},
        {"looks_back": True},
    ],
    ids=str,
)
def test_mistakes_are_found(mistake):
    def breaks(seed):
        try:
            run(Plan(**mistake), seed)
        except BrokenProtocolError:
            return True
        return False

    assert any(breaks(seed) for seed in range(60))
