"""ExpertParallel at its edges: what one rank alone has or lacks, and how a layer is made and differentiated."""

from __future__ import annotations

import pickle

import pytest
from processes import run_ranks, values

torch = pytest.importorskip("torch")

import expert_parallel_edges as ranks  # noqa: E402

from pyroute.pytorch import ExpertParallel, GroupedExperts  # noqa: E402


def test_numpys_sizes_are_those_of_python(tmp_path):
    first, second = values(run_ranks(2, ranks.numpy_sizes, store=tmp_path / "store"))
    assert first == second


def test_whatever_one_rank_lacks_the_others_hear_of(tmp_path):
    """RuntimeError for want of memory, as much as ValueError; a text that takes four bytes a character."""
    for refused, message in (
        ({"intermediate_size": 2**56}, "rank 1 refused its arguments: "),
        ({"payload": "\N{CAT}" * 3000}, "rank 1 refused its arguments: ExpertParallel: payload must be one of"),
    ):
        mine, theirs = run_ranks(2, ranks.construct_and_step, [{}, refused])
        assert mine.error.startswith(f"ValueError: ExpertParallel: {message}")
        assert "Error" in theirs.error
        assert "is lost" not in theirs.error


def test_a_layer_is_made_on_the_meta_device(tmp_path):
    whole, other = values(run_ranks(2, ranks.meta_device, store=tmp_path / "store"))
    assert whole == other != 0


def test_a_layer_of_the_meta_device_is_sharded_before_it_is_filled(tmp_path):
    for sharded, plain in values(run_ranks(4, ranks.meta_and_sharded, store=tmp_path / "store")):
        assert sharded == plain != 0


def test_ids_of_every_integer_type():
    layer, whole = ExpertParallel(200, 16, 8), GroupedExperts(200, 16, 8)
    whole.load_state_dict(layer.state_dict())
    x, weights = torch.randn(3, 16), torch.rand(3, 2)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        ids = torch.tensor([[0, 1], [100, 5], [127, 3]]).to(getattr(torch, name))
        assert torch.equal(layer(x, ids, weights), whole(x, ids, weights)), name
        if name[0] == "u":
            with pytest.raises(ValueError, match=f"topk_idx must be -1 or in 0..199, got {torch.iinfo(ids.dtype).max}"):
                layer(x, torch.full_like(ids, torch.iinfo(ids.dtype).max), weights)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.complex64), torch.ones(4, 2), "TypeError: ExpertParallel: topk_idx must be int"),
        (torch.zeros(4, 2, dtype=torch.int64).to_sparse(), torch.ones(4, 2),
         "TypeError: ExpertParallel: topk_idx must be a matrix on cpu, as the experts are, got sparse_coo int64"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2).to_sparse(),
         "TypeError: ExpertParallel: topk_weights must be a matrix on cpu, as the experts are, got sparse_coo float32"),
    ],
)  # fmt: skip
def test_tensors_that_no_kernel_takes_are_refused_before_anything_is_sent(ids, weights, message, tmp_path):
    good = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    given = [good[0], ids], [good[1], weights]
    theirs, mine = values(run_ranks(2, ranks.call_twice, *given, store=tmp_path / "store"))
    assert mine[0].startswith(message)
    assert "rank 1 refused the arguments" in theirs[0]
    assert mine[1]
    assert theirs[1]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layer", "the layer that is called must be the same on every rank, got number 0 on rank 0 and "
         "number 1 on rank 1"),
        ("payload=fp8", "payload must be the same on every rank, got None on rank 0 and fp8 on rank 1"),
        ("precision=fp8_ue8m0", "precision must be the same on every rank, got None on rank 0 and fp8_ue8m0 on rank 1"),
    ],
)  # fmt: skip
def test_ranks_that_call_another_layer_are_found(what, message, tmp_path):
    for error, works in values(run_ranks(2, ranks.call_differently, what, store=tmp_path / "store")):
        assert error == f"RuntimeError: ExpertParallel: {message}"
        assert works


def test_a_layer_that_was_changed_for_the_worse_is_refused(tmp_path):
    theirs, mine = values(run_ranks(2, ranks.call_differently, "precision=fp4", store=tmp_path / "store"))
    assert mine[0].startswith("ValueError: ExpertParallel: precision must be one of")
    assert "rank 1 refused the arguments" in theirs[0]
    assert mine[1]
    assert theirs[1]


def test_layers_are_copied_and_saved_by_their_values_but_not_pickled(tmp_path):
    for pickled, saved, copied, loaded in values(run_ranks(2, ranks.keep, store=tmp_path / "store")):
        assert pickled == saved
        assert pickled.startswith("TypeError: ExpertParallel: a layer of a process group cannot be pickled; save its")
        assert copied
        assert loaded


def test_without_a_group_a_layer_is_pickled():
    layer = ExpertParallel(8, 16, 8)
    assert ranks.step(pickle.loads(pickle.dumps(layer))) == ranks.step(layer)


def test_experts_of_another_type_are_refused_by_ranks_that_have_none_too(tmp_path):
    for outcome in run_ranks(3, ranks.half_precision, store=tmp_path / "store"):
        assert outcome.error.startswith(
            "TypeError: ExpertParallel: gate_up_proj must be float32 or bfloat16, got float16"
        )


def test_replicas_that_are_frozen_on_one_rank_are_found_by_all(tmp_path):
    for outcome in run_ranks(2, ranks.reduce_frozen, store=tmp_path / "store"):
        assert outcome.error.startswith(
            "RuntimeError: ExpertParallel: down_proj.requires_grad must be the same on every rank, "
            "got True on rank 0 and False on rank 1"
        )


@pytest.mark.parametrize("payload", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_scales_of_a_payload_lie_at_any_address(payload, num_tokens):
    layer = ExpertParallel(4, 41, 8, payload=payload)
    x, ids, weights = (
        torch.ones(num_tokens, 41),
        torch.zeros(num_tokens, 1, dtype=torch.int64),
        torch.ones(num_tokens, 1),
    )
    one = layer(x, ids, weights)[:1]
    assert torch.equal(one, ExpertParallel.forward(layer, x[:1], ids[:1], weights[:1]))


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_gradients_of_gradients_are_refused(loss):
    """Also where the gradient that comes in needs none: a zero would be silent."""
    layer, x = ExpertParallel(4, 8, 8), torch.randn(3, 8, requires_grad=True)
    y = layer(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    (grad,) = torch.autograd.grad(loss(y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (grad.sum() + x.sum()).backward()


def test_a_share_is_not_shared_out_again():
    with pytest.raises(TypeError, match=r"ExpertParallel: experts must be a GroupedExperts with all experts, got"):
        ExpertParallel.from_experts(ExpertParallel(4, 8, 8))


def test_a_rank_that_dies_before_the_layer_is_made_is_named():
    for rank, outcome in enumerate(run_ranks(3, ranks.end_before_construction, 1)):
        if rank != 1:
            assert outcome.error.startswith("RuntimeError: ExpertParallel: rank 1 is lost, silent for"), outcome.error


@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_fails_within_a_step_is_named(backward):
    outcomes = run_ranks(3, ranks.fail_in_step, 1, backward)
    assert outcomes[1].error.startswith("ZeroDivisionError")
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error.startswith("RuntimeError: ExpertParallel: rank 1 is lost, silent for"), outcome.error


def test_a_process_that_stands_still_with_the_store_is_named():
    timeout = 3.0
    outcomes = run_ranks(3, ranks.stop_process, 0, timeout=timeout, patience=9)
    for outcome in outcomes[1:]:
        assert outcome.error.startswith("RuntimeError: ExpertParallel: rank 0 is lost, and the group's store with it")
        assert outcome.seconds < 9
