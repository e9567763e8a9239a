"""expert_choice_gating on every floor, and its by-token form through routes and backward."""

import numpy as np
import pytest
from conftest import assert_same_bytes, guarded
from oracle import gating as oracle
from test_gating import DTYPES, hard_logits, weight_type

import pyroute
from pyroute import RouterConfig, expert_choice_gating, plan_routes, topk_gating, topk_gating_backward


def run(floor, logits, capacity, **kwargs):
    return expert_choice_gating(logits, capacity, backend=floor.backend, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_oracle(floor, rng, dtype):
    unit = 2.0**-53 if dtype == "float64" else 2.0**-24
    for num_tokens, num_experts, capacity in ((40, 8, 10), (40, 7, 40), (9, 33, 2), (130, 4, 33), (64, 1, 64)):
        logits = rng.normal(0, 2, (num_tokens, num_experts)).astype(DTYPES[dtype])
        mask = rng.random(num_tokens) < 0.9
        choice = run(floor, logits, capacity, token_mask=mask)
        z = logits.astype(np.float64)
        idx, weights = oracle.expert_choice(z, capacity, mask)
        assert choice.token_idx.dtype == np.int32
        assert choice.token_weights.dtype == weight_type(DTYPES[dtype])
        # scores closer than their error may change places, the weights in each place may not
        assert (np.abs(choice.token_weights - weights) <= 60 * unit * weights).all()
        assert (choice.token_idx == idx).mean() > 0.98
        assert ((choice.token_idx >= 0) == (idx >= 0)).all()
        assert all(mask[row[row >= 0]].all() for row in choice.token_idx)
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in choice.token_idx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_floor_gives_the_same_bytes(cpu_floor, threads, rng, dtype):
    for num_tokens, num_experts, capacity in (
        (0, 8, 3),
        (1, 8, 3),
        (300, 24, 8),
        (300, 5, 16),
        (300, 5, 31),
        (300, 3, 200),
    ):
        logits = hard_logits(rng, num_tokens, num_experts, DTYPES[dtype])
        mask = rng.random(num_tokens) < 0.8
        for kwargs in ({}, {"token_mask": mask}):
            expected = expert_choice_gating(logits, capacity, backend="numpy", **kwargs)
            got = run(cpu_floor, logits, capacity, **kwargs)
            assert_same_bytes(got.token_idx, expected.token_idx)
            assert_same_bytes(got.token_weights, expected.token_weights)


def test_capacities_from_none_to_more_than_there_are(floor, rng):
    logits = rng.normal(size=(12, 4)).astype(np.float32)
    for capacity in (0, 1, 12, 120):
        choice = run(floor, logits, capacity)
        assert choice.token_idx.shape == (4, capacity)
        assert ((choice.token_idx >= 0).sum(axis=1) == min(capacity, 12)).all()
        assert (choice.token_weights[choice.token_idx < 0] == 0).all()
        gating = choice.to_gating()
        assert (gating.tokens_per_expert == min(capacity, 12)).all()


def test_ties_go_to_the_lower_token(floor):
    choice = run(floor, np.zeros((50, 4), np.float32), 40)
    assert choice.token_idx.tolist() == [list(range(40))] * 4
    assert (choice.token_weights == 0.25).all()


def test_nan_rows_are_taken_last(floor, rng):
    logits = rng.normal(size=(10, 4)).astype(np.float32)
    logits[3, 1] = np.nan
    logits[7] = np.inf
    choice = run(floor, logits, 10)
    assert choice.token_idx[:, 8:].tolist() == [[3, 7]] * 4
    assert_same_bytes(choice.token_weights[:, 8:], np.full((4, 2), np.nan, np.float32))
    assert np.isfinite(choice.token_weights[:, :8]).all()


def test_the_form_by_token(floor, rng):
    logits = rng.normal(size=(30, 6)).astype(np.float32)
    mask = rng.random(30) < 0.8
    choice = run(floor, logits, 7, token_mask=mask)
    gating = choice.to_gating()
    pairs = {(int(t), e) for e, row in enumerate(choice.token_idx) for t in row if t >= 0}
    assert pairs == {(t, int(e)) for t, row in enumerate(gating.topk_idx) for e in row if e >= 0}
    config = RouterConfig(6, gating.topk_idx.shape[1])
    again = topk_gating(logits, config, topk_idx=gating.topk_idx, backend=floor.backend)
    for a, b in zip(gating, again, strict=True):
        assert_same_bytes(a, b)
    assert ((gating.topk_idx >= 0).sum(axis=1).max()) == config.top_k
    plan = plan_routes(gating.topk_idx, 6)
    assert (np.asarray(plan.tokens_per_expert) == 7).all()
    rows = np.asarray(plan.row_to_token).reshape(6, 7)
    assert (np.sort(choice.token_idx, axis=1) == rows).all()


def test_the_gradient_goes_through_the_form_by_token(floor, rng):
    logits = rng.normal(size=(12, 5))
    choice = run(floor, logits, 4)
    gating = choice.to_gating()
    config = RouterConfig(5, gating.topk_idx.shape[1])
    grad = rng.normal(size=gating.topk_weights.shape)
    got = topk_gating_backward(grad, logits, gating, config, backend=floor.backend)
    rule = {"num_experts": 5, "top_k": config.top_k, "score": "softmax"}
    exact = oracle.gradient(logits, grad, gating.topk_idx, rule, np.ones(12, bool))
    assert (np.abs(got - exact) <= 1e-13).all()


def test_no_token_taken(floor):
    choice = run(floor, np.zeros((3, 4), np.float32), 2, token_mask=np.zeros(3, bool))
    gating = choice.to_gating()
    assert (choice.token_idx == -1).all()
    assert gating.topk_idx.tolist() == [[-1]] * 3
    assert (gating.topk_weights == 0).all()
    assert run(floor, np.zeros((0, 4), np.float32), 2).to_gating().topk_idx.shape == (0, 1)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_stay_inside_the_inputs(cpu_floor, rng, dtype, at):
    for num_tokens, num_experts in ((1, 1), (5, 7), (33, 37)):
        logits = rng.normal(size=(num_tokens, num_experts)).astype(DTYPES[dtype])
        mask = np.ones(num_tokens, bool)
        expected = expert_choice_gating(logits, 3, backend="numpy")
        got = run(cpu_floor, guarded(logits, at=at), 3, token_mask=guarded(mask, at=at))
        assert_same_bytes(got.token_idx, expected.token_idx)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": np.zeros(4, np.float32)}, ValueError, "logits must be of shape [num_tokens, num_experts], got [4]"),
        ({"logits": np.zeros((3, 4), np.int8)}, TypeError, "logits must be float32 or"),
        ({"logits": np.zeros((3, 0), np.float32)}, ValueError, "logits must be of at least one expert"),
        ({"capacity": -1}, ValueError, "capacity must be in 0..2147483647, got -1"),
        ({"capacity": 1.5}, TypeError, "capacity must be an integer, got float"),
        ({"capacity": True}, TypeError, "capacity must be an integer"),
        ({"token_mask": np.ones(2, bool)}, ValueError, "token_mask must be of shape [num_tokens=3]"),
        ({"token_mask": np.ones(3)}, TypeError, "token_mask must be bool"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_refusals(change, error, words):
    with pytest.raises(error) as refused:
        expert_choice_gating(**{"logits": np.zeros((3, 4), np.float32), "capacity": 2, **change})
    assert str(refused.value).startswith("expert_choice_gating: ")
    assert words in str(refused.value)


def test_the_result_unpacks(floor):
    token_idx, token_weights, num_tokens = run(floor, np.zeros((3, 4), np.float32), 2)
    assert token_idx.shape == token_weights.shape == (4, 2)
    assert num_tokens == 3
    assert {"ExpertChoice", "expert_choice_gating"} <= set(pyroute.__all__)
