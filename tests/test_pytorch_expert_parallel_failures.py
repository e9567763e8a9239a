"""ExpertParallel when something goes wrong on one rank: every rank says so, and what, and none hangs."""

from __future__ import annotations

import numpy as np
import pytest
from processes import run_ranks, values

from pyroute.placement import Placement, place_experts

torch = pytest.importorskip("torch")

import expert_parallel_ranks as ranks  # noqa: E402

HEADER, ROUTES, TOKENS, COMBINE, GRADIENTS, COMBINE_GRADIENTS = range(1, 7)


@pytest.mark.parametrize(
    ("world", "victim", "call", "store_lives"),
    [
        (2, 1, HEADER, False), (2, 0, COMBINE, False), (3, 2, COMBINE, False), (3, 0, GRADIENTS, False),
        (3, 0, ROUTES, True), (4, 2, COMBINE_GRADIENTS, False), (4, 0, TOKENS, False),
    ],
)  # fmt: skip
def test_a_rank_that_dies_is_named(world, victim, call, store_lives, tmp_path):
    """Rank 0 keeps the group's store, unless that is a file."""
    store = tmp_path / "store" if store_lives else None
    timeout = 20.0
    outcomes = run_ranks(world, ranks.die_in_step, victim, call, [7] * world, store=store, timeout=timeout)
    assert outcomes[victim].exitcode == 3
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert outcome.error.startswith(f"RuntimeError: ExpertParallel: rank {victim} is lost"), rank
            assert outcome.seconds < timeout


def test_a_rank_that_stands_still_is_named():
    timeout = 6.0
    outcomes = run_ranks(3, ranks.stop_in_step, 1, timeout=timeout, patience=14)
    for rank in (0, 2):
        assert outcomes[rank].error.startswith("RuntimeError: ExpertParallel: rank 1 is lost"), outcomes[rank].error
        assert outcomes[rank].seconds < 2 * timeout


@pytest.mark.parametrize(
    ("of_rank", "name", "values"),
    [
        ([{}, {"hidden_size": 32}, {}], "hidden_size", "16 on ranks 0, 2 and 32 on rank 1"),
        ([{}, {}, {"payload": "fp8"}], "payload", "None on ranks 0, 1 and 'fp8' on rank 2"),
        ([{"dtype": torch.bfloat16}, {}, {}], "dtype", "'bfloat16' on rank 0 and 'float32' on ranks 1, 2"),
        ([{}, {"num_experts": 9}, {}], "num_experts", "8 on ranks 0, 2 and 9 on rank 1; placement must"),
        ([{"placement": [*range(8), 0]}, {"placement": [*range(8), 1]}, {"placement": [*range(8), 0]}], "placement",
         "'0 1 2|3 4 5|6 7 0' on ranks 0, 2 and '0 1 2|3 4 5|6 7 1' on rank 1"),
    ],
)  # fmt: skip
def test_ranks_that_disagree_are_found_at_construction(of_rank, name, values, tmp_path):
    for outcome in run_ranks(3, ranks.construct, of_rank, store=tmp_path / "store"):
        expected = f"ValueError: ExpertParallel: {name} must be the same on every rank, got {values}"
        assert outcome.error.startswith(expected)


def many(layers, devices, experts):
    return Placement(np.tile(np.arange(experts), (layers, 1)), devices, experts)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([*range(8), 0], "placement must be of at least 8 slots a layer, a multiple of 2, got [1, 9]"),
        ([*range(7), 8], "placement must be in 0..7, got 8"),
        ([*range(7), 6], "placement must be one slot at least for every expert, got none for expert 7 of layer 0"),
        (many(1, 4, 8), "placement must be of 8 experts on 2 ranks, got 8 on 4"),
        (many(1, 2, 10), "placement must be of 8 experts on 2 ranks, got 10 on 2"),
        (many(3, 2, 8), "placement must be of one layer: pass plan.slot_to_expert[layer], got 3"),
        ([0.5, 1.0], "placement must be a Placement or integers [num_slots], got"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(placement, message, tmp_path):
    """On the rank that has it; the other says which that is."""
    mine, other = run_ranks(2, ranks.construct, [{"placement": placement}, {}], store=tmp_path / "store")
    assert f"Error: ExpertParallel: {message}" in mine.error
    assert other.error.startswith(
        f"ValueError: ExpertParallel: rank 0 refused its arguments: ExpertParallel: {message}"
    )


def test_a_plan_of_place_experts_fits():
    loads = np.arange(1, 9)
    plan = place_experts(loads, 2, num_slots=10)
    assert values(run_ranks(2, ranks.construct, [{"placement": plan}] * 2)) == [None, None]


@pytest.mark.parametrize(
    ("of_rank", "mine", "theirs"),
    [
        ({"topk_idx": torch.full((4, 2), 8)}, "ValueError: ExpertParallel: topk_idx must be -1 or in 0..7, got 8",
         "RuntimeError: ExpertParallel: rank 1 refused the arguments of its call; its own error says why"),
        ({"x": torch.ones(4, 15)}, "ValueError: ExpertParallel: x must be [num_tokens, hidden=16], got [4, 15]",
         "refused"),
        ({"x": torch.ones(4, 16).double()}, "TypeError: ExpertParallel: x must be float32 or bfloat16, got", "refused"),
        ({"topk_weights": torch.ones(4, 3)}, "ValueError: ExpertParallel: topk_weights must be of shape [4, 2]",
         "refused"),
        ({"topk_idx": torch.zeros(4, 2)}, "TypeError: ExpertParallel: topk_idx must be integers", "refused"),
        ({"topk_idx": [[0, 1]]}, "TypeError: ExpertParallel: topk_idx must be a matrix on cpu", "refused"),
        ({"topk_idx": torch.zeros(4, 1, dtype=torch.int32), "topk_weights": torch.ones(4, 1)}, "RuntimeError: "
         "ExpertParallel: top_k must be the same on every rank, got 2 on rank 0 and 1 on rank 1", "top_k must"),
        ({"x": torch.ones(4, 16).bfloat16()}, "RuntimeError: ExpertParallel: the type of x must be the same on every "
         "rank, got float32 on rank 0 and bfloat16 on rank 1", "the type of x must be the same"),
        ({"grad": False}, "RuntimeError: ExpertParallel: torch.is_grad_enabled() must be the same on every rank, got "
         "True on rank 0 and False on rank 1", "torch.is_grad_enabled() must"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_by_every_rank(of_rank, mine, theirs, tmp_path):
    found = values(run_ranks(3, ranks.call, [{}, of_rank, {}], store=tmp_path / "store"))
    assert found[1][0].startswith(mine)
    assert theirs in found[0][0]
    assert theirs in found[2][0]
    assert [works for _, works in found] == [True] * 3
