"""ExpertParallel in models: data parallelism, meshes, checkpointing, autocast, the shared expert between."""

from __future__ import annotations

import copy

import pytest
from processes import run_ranks, values

torch = pytest.importorskip("torch")

import expert_parallel_models as models  # noqa: E402

from pyroute.pytorch import ExpertParallel, GroupedExperts, set_precision  # noqa: E402


def test_under_data_parallelism(tmp_path):
    assert values(run_ranks(2, models.in_ddp, store=tmp_path / "store")) == [None] * 2


def test_sharded_over_another_dimension_of_the_mesh(tmp_path):
    assert values(run_ranks(4, models.in_fsdp, store=tmp_path / "store")) == [None] * 4


def test_a_mesh_of_two_dimensions_is_refused(tmp_path):
    expected = "ExpertParallel: group must be a DeviceMesh of one dimension, as mesh['ep'] is, got 2 dimensions"
    for message in values(run_ranks(2, models.two_dimensions, store=tmp_path / "store")):
        assert message.startswith(expected)


def test_checkpointing(tmp_path):
    calls = values(run_ranks(3, models.checkpointed, store=tmp_path / "store"))
    assert calls == [["all_to_all_single"] * 11] * 3


def test_the_shared_expert_runs_while_rows_travel(tmp_path):
    assert values(run_ranks(2, models.shared_between, store=tmp_path / "store")) == [(4, 5)] * 2


def test_a_rank_without_gradients_takes_part_in_those_of_others(tmp_path):
    calls = values(run_ranks(3, models.gradients_of_one_rank, store=tmp_path / "store"))
    assert calls == [["all_to_all_single"] * (4 + 2 + 4)] * 3


def test_autocast(tmp_path):
    assert values(run_ranks(4, models.under_autocast, store=tmp_path / "store")) == [None] * 4


def test_experts_start_alike_wherever_they_live(tmp_path):
    found = [values(run_ranks(world, models.initial_weights, store=tmp_path / str(world))) for world in (1, 2, 3)]
    weights = found[0][0]
    assert [rank for every in found for rank in every] == [weights] * 6
    assert weights[0] == weights[5]  # a replica
    assert weights[0] != weights[1]


def test_without_torch_distributed_it_is_grouped_experts():
    whole = GroupedExperts(5, 16, 8, bias=True)
    layer = ExpertParallel.from_experts(whole)
    x, ids, weights = torch.randn(7, 16), torch.randint(-1, 5, (7, 3)), torch.rand(7, 3)
    assert torch.equal(layer(x, ids, weights), whole(x, ids, weights))
    assert layer.state_dict().keys() == whole.state_dict().keys()
    set_precision(layer, "fp8")
    set_precision(whole, "fp8")
    assert torch.equal(copy.deepcopy(layer)(x, ids, weights), whole(x, ids, weights))
    assert "slots 5 of 5, rank 0 of 1" in repr(layer)
