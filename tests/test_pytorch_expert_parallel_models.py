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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_on_every_rank_for_itself(backend, tmp_path):
    (graphs, calls, error), other = values(run_ranks(2, models.compiled, backend, store=tmp_path / "store"))
    assert graphs == 0  # nothing of the layer is traced
    assert calls == other[1]
    assert len(calls) == 3 * 4 * 7  # a step of the layer and of the model, compiled and not
    assert "the function `ExpertParallel.forward` should not be traced" in error


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


@pytest.mark.parametrize(("world", "top_k", "payload"), [(2, 1, None), (4, 1, "fp8"), (2, 3, None), (4, 2, "fp8")])
def test_deep_ep(world, top_k, payload, tmp_path):
    """One expert per token: the bytes of the other transport. Else two roundings to bfloat16 more in every element."""
    for worst in values(run_ranks(world, models.through_deep_ep, top_k, payload, store=tmp_path / "store")):
        assert worst <= 2**-7


@pytest.mark.parametrize(
    ("of_rank", "mine", "theirs"),
    [
        ({"topk_idx": torch.full((4, 2), 8)}, "topk_idx must be -1 or in 0..7, got 8", "rank 1 refused the arguments"),
        ({"x": torch.ones(4, 128)}, "x must be bfloat16 with transport 'deep_ep', got", "rank 1 refused the arguments"),
        ({"topk_idx": torch.zeros(4, 1, dtype=torch.int64), "topk_weights": torch.ones(4, 1)},
         "top_k must be the same on every rank, got 2 on rank 0 and 1 on rank 1", "top_k must be the same"),
        ({"grad": False}, "torch.is_grad_enabled() must be the same on every rank", "torch.is_grad_enabled() must"),
    ],
)  # fmt: skip
def test_bad_calls_through_deep_ep_are_refused_by_every_rank(of_rank, mine, theirs, tmp_path):
    found = values(run_ranks(2, models.call_through_deep_ep, [{}, of_rank], store=tmp_path / "store"))
    assert f"Error: ExpertParallel: {mine}" in found[1][0]
    assert f"Error: ExpertParallel: {theirs}" in found[0][0]
    assert [works for _, works in found] == [True] * 2


@pytest.mark.parametrize(
    ("options", "installed", "message"),
    [
        ({}, False, "transport 'deep_ep' needs the package deep_ep, which does not import: No module named 'deep_ep'"),
        (
            {"num_experts": 7},
            True,
            "transport must be 'torch' without a group, and where ranks differ in their number of",
        ),
        ({"payload": "fp8_ue8m0"}, True, "payload must be None with transport 'deep_ep', or 'fp8' for a hidden size"),
        ({"payload": "fp8"}, True, "payload must be None with transport 'deep_ep', or 'fp8' for a hidden size"),
        ({"x": torch.float32}, True, "x must be bfloat16 with transport 'deep_ep', got float32 [2, 64]"),
    ],
)
def test_what_deep_ep_cannot_do_is_refused(options, installed, message, tmp_path):
    for error in values(run_ranks(2, models.refused_by_deep_ep, options, installed, store=tmp_path / "store")):
        assert f"ExpertParallel: {message}" in error
