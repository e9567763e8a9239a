"""Quantile balancing: against the definition in float64, across floors, and that it balances what it has seen."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bytes
from oracle import gating as oracle
from test_gating import rule_of

import pyroute
from pyroute import RouterConfig, bias_from_histogram, bias_histogram, quantile_bias, topk_gating, update_bias

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}


def skewed(rng, num_tokens, num_experts, dtype=np.float32):
    return (rng.normal(size=(num_tokens, num_experts)) + np.linspace(-1, 1, num_experts)).astype(dtype)


def problem(rng, config, num_tokens, dtype, *, hard=False):
    """Logits, a bias and a mask; hard: ties, NaN and infinities in some rows."""
    z = skewed(rng, num_tokens, config.num_experts)
    if hard and num_tokens:
        z[::3] = np.round(z[::3])
        z[1::5, 0], z[2::5, 1], z[3::5] = np.nan, np.inf, -np.inf
    bias = rng.normal(0, 0.1, config.num_experts).astype(np.float64 if dtype == np.float64 else np.float32)
    return z.astype(dtype), bias, rng.random(num_tokens) < 0.8


def bound(z, rule, bias, mask):
    """Of float32. A score's relative error is at most 12.8 u, u = 2^-24 (softmax: 12 + 2 x with p x <= 0.37; others 8).

    Order statistics are 1-Lipschitz in the largest error, so the cutoff has one score's error and one rounding, what is
    needed two scores' and two roundings, and centring doubles it and rounds once.
    """
    s = np.array([oracle.scores(row, rule["score"]) for row in z[mask]])
    s = s[np.isfinite(s).all(axis=1)]
    key, needed = np.abs(s + bias).max(), np.abs(oracle.needed_bias(z, rule, bias, mask)).max()
    return 2.0**-24 * (4 * 12.8 * max(1, s.max()) + 2 * (key + needed) + 2 * needed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_tokens", "experts", "k"), [(1, 4, 1), (37, 8, 3), (64, 16, 2), (50, 40, 39)])
def test_against_the_definition(floor, rng, dtype, score, num_tokens, experts, k):
    config = RouterConfig(experts, k, score)
    z, bias, mask = problem(rng, config, num_tokens, DTYPES[dtype], hard=num_tokens > 40)
    mask[0] = True
    if np.isnan(z[mask].astype(float)).all():
        pytest.skip("nothing counts")
    with np.errstate(all="ignore"):
        wide, rule = z.astype(float), rule_of(config)
        exact = oracle.quantile_bias(wide, rule, bias.astype(float), mask)
        tolerance = 1e-14 if dtype == "float64" else bound(wide, rule, bias.astype(float), mask)
    got = quantile_bias(z, config, bias, token_mask=mask, backend=floor.backend)
    assert got.dtype == bias.dtype
    assert (np.abs(got - exact) <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 33, 200])
def test_every_floor_gives_the_same_bytes(floor, rng, dtype, num_tokens):
    for score in SCORES:
        config = RouterConfig(40, 5, score)
        z, bias, mask = problem(rng, config, num_tokens, DTYPES[dtype], hard=True)
        for kwargs in ({}, {"token_mask": mask}):
            got, expected = (
                quantile_bias(z, config, bias, backend=b, **kwargs) for b in (floor.backend, "numpy")
            )  # fmt: skip
            assert_same_bytes(got, expected)
            counts = [
                bias_histogram(z, config, bias, (-1.5, 1.5), 30, backend=b, **kwargs) for b in (floor.backend, "numpy")
            ]
            assert_same_bytes(*counts)


def test_the_number_of_threads_changes_nothing(rng, threads):
    config = RouterConfig(64, 6, "sigmoid")
    z, bias, _ = problem(rng, config, 333, np.float32)
    assert_same_bytes(quantile_bias(z, config, bias), quantile_bias(z, config, bias, backend="numpy"))


def test_by_hand(floor):
    """Scores 0.92, 0.68, 0.31, 0.07: the best one is chosen, 0.68 just misses. The mean of what is needed is 0.185."""
    scores = np.array([0.92, 0.68, 0.31, 0.07])
    z = np.tile(np.log(scores / (1 - scores)), (4, 1)).astype(np.float32)
    config = RouterConfig(4, 1, "sigmoid")
    got = quantile_bias(z, config, np.zeros(4, np.float32), backend=floor.backend)
    assert got == pytest.approx(np.array([-0.24, 0, 0.37, 0.61]) - 0.185, abs=1e-6)
    counts = bias_histogram(z, config, np.zeros(4, np.float32), (-1.0, 1.0), 10, backend=floor.backend)
    assert [np.flatnonzero(row).tolist() for row in counts] == [[3], [5], [6], [8]]  # bins of 0.2
    # one of four equal tokens: a quarter into the bin, -0.35, 0.05, 0.25 and 0.65, whose mean is 0.15
    assert bias_from_histogram(counts, (-1.0, 1.0), 1) == pytest.approx([-0.5, -0.1, 0.1, 0.5], abs=1e-6)


@pytest.mark.parametrize("num_tokens", [331, 320])  # of which the second one's share is no fraction
def test_every_expert_gets_its_share_at_the_old_cutoffs(rng, num_tokens):
    config = RouterConfig(16, 3, "sigmoid")
    z, bias, mask = problem(rng, config, num_tokens, np.float64)
    mask[:] = True
    needed = oracle.needed_bias(z, rule_of(config), bias, mask)
    share = num_tokens * 3 // 16
    got = quantile_bias(z, config, bias) + np.sort(needed, axis=0)[share].mean()  # which centring took away
    assert ((needed < got - 1e-12).sum(axis=0) <= share).all()  # less only where tokens tie: all that just miss it
    assert ((needed < got + 1e-12).sum(axis=0) > share).all()


@pytest.mark.parametrize("score", SCORES)
def test_it_balances_in_a_few_steps(rng, score):
    config = RouterConfig(16, 2, score)
    z, bias = skewed(rng, 4096, 16), np.zeros(16, np.float32)
    first = topk_gating(z, config, bias=bias).tokens_per_expert
    by_rate = bias
    for _ in range(12):
        by_rate = update_bias(by_rate, topk_gating(z, config, bias=by_rate).tokens_per_expert)
        bias = quantile_bias(z, config, bias)
    after = [topk_gating(z, config, bias=b).tokens_per_expert for b in (bias, by_rate)]
    violation = [counts.max() / counts.mean() - 1 for counts in (first, *after)]
    assert violation[0] > 1
    assert violation[1] < 0.02
    assert violation[1] < violation[2] / 10
    assert abs(bias.mean()) < 1e-6


def test_a_shift_of_the_bias_changes_nothing_but_rounding(rng):
    config = RouterConfig(8, 2, "sigmoid")
    z, bias, _ = problem(rng, config, 100, np.float64)
    assert np.abs(quantile_bias(z, config, bias) - quantile_bias(z, config, bias + 3)).max() < 1e-14


def test_tokens_that_do_not_count_are_as_if_removed(floor, rng):
    config = RouterConfig(8, 2, "sqrtsoftplus")
    z, bias, mask = problem(rng, config, 60, np.float32)
    z[4, 3], z[9, 0] = np.nan, np.inf  # a NaN score, an infinite one
    counted = mask.copy()
    counted[[4, 9]] = False
    for function, more in ((quantile_bias, ()), (bias_histogram, ((-1.0, 2.0), 50))):
        got = function(z, config, bias, *more, token_mask=mask, backend=floor.backend)
        assert_same_bytes(got, function(z[counted], config, bias, *more, backend=floor.backend))


def test_without_tokens_the_bias_stays(floor):
    bias = np.array([0.5, 0.25, 1, 8.08], np.float32)
    config = RouterConfig(4, 2, "sigmoid")
    for z, mask in ((np.zeros((0, 4), np.float32), None), (np.zeros((3, 4), np.float32), np.zeros(3, bool))):
        got = quantile_bias(z, config, bias, token_mask=mask, backend=floor.backend)
        assert_same_bytes(got, bias)
        assert got is not bias
        assert not np.shares_memory(got, bias)


def test_histograms_of_shards_add_up_to_that_of_the_whole(rng):
    config = RouterConfig(32, 4, "sigmoid")
    z, bias, mask = problem(rng, config, 300, np.float32)
    bounds = (float(bias.min()) - 1, float(bias.max()) + 1)
    whole = bias_histogram(z, config, bias, bounds, token_mask=mask)
    shards = [bias_histogram(z[i::3], config, bias, bounds, token_mask=mask[i::3]) for i in range(3)]
    assert whole.shape == (32, 1000)
    assert whole.dtype == np.int64
    assert np.array_equal(sum(shards), whole)
    assert (whole.sum(axis=1) == mask.sum()).all()
    assert (
        whole[:, 0] + whole[:, -1]
    ).sum() <= 32  # nothing needs more than these bounds, up to rounding at their ends


@pytest.mark.parametrize("num_bins", [1, 7, 1000])
def test_histograms_give_the_bias_within_a_bin(rng, num_bins):
    """The quantile is in the bin of the exact one; their difference, centred, is below two bins and the roundings."""
    for k, num_tokens in ((1, 50), (7, 333), (3, 16)):
        config = RouterConfig(16, k, "softmax")
        z, bias, _ = problem(rng, config, num_tokens, np.float32)
        bounds = (float(bias.min()) - 1, float(bias.max()) + 1)
        got = bias_from_histogram(bias_histogram(z, config, bias, bounds, num_bins), bounds, k)
        assert got.dtype == np.float32
        width = (bounds[1] - bounds[0]) / num_bins
        assert np.abs(got - quantile_bias(z, config, bias)).max() <= 2 * width + 1e-5


def test_what_lies_outside_counts_at_the_ends():
    z = np.array([[0.0, 4.0, -4.0]], np.float32)
    config = RouterConfig(3, 1, "sigmoid")
    counts = bias_histogram(z, config, np.zeros(3, np.float32), (-0.1, 0.1), 4)
    # the cutoff is 0.5: expert 0 needs 0 (third bin), expert 1 less than -0.1, expert 2 more than 0.1
    assert counts.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_megatrons_rule(rng):
    """Its own function where its version has one: it ranks any scores; its quantile is negated and not centred."""
    pytest.importorskip("megatron.core")
    torch = pytest.importorskip("torch")
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "qb_dual_update"):
        pytest.skip("this Megatron-Core has no quantile balancing")
    z, bias = skewed(rng, 64, 16, np.float64), rng.normal(0, 0.1, 16)
    s = torch.from_numpy(1 / (1 + np.exp(-z)))
    beta = moe_utils.qb_dual_update(s, 4, torch.from_numpy(-bias))[1].numpy()
    assert np.abs(quantile_bias(z, RouterConfig(16, 4, "sigmoid"), bias) + beta - beta.mean()).max() < 1e-13


def test_placement_has_the_rules_too():
    from pyroute import placement

    for name in ("update_bias", "quantile_bias", "bias_histogram", "bias_from_histogram"):
        assert getattr(placement, name) is getattr(pyroute, name)
        assert name in placement.__all__
