"""topk_gating: choices, weights, ties, NaN, groups, masks and replay, on every floor."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bytes, guarded
from oracle import gating as oracle

import pyroute
from pyroute import RouterConfig, topk_gating

U = 2.0**-24
GROUPED = {"num_groups": 8, "topk_groups": 4}
# name: (config, with a bias)
ROUTERS = {
    "softmax": (RouterConfig(60, 4), False),
    "softmax-renormalised": (RouterConfig(64, 8, renormalize="sum"), False),
    "softmax-clamp-bias": (RouterConfig(64, 6, renormalize="clamp", renormalize_eps=1e-12), True),
    "softmax-group-max": (RouterConfig(160, 6, num_groups=8, topk_groups=3, scaling_factor=16.0), False),
    "softmax-top2-sum": (RouterConfig(64, 8, **GROUPED, group_score="top2_sum", renormalize="sum"), False),
    "softmax-bias-groups": (RouterConfig(64, 8, **GROUPED, group_score="topn_sum"), True),
    "post": (RouterConfig(32, 4, score_stage="post"), False),
    "post-bias": (RouterConfig(32, 4, score_stage="post"), True),
    "sigmoid": (RouterConfig(37, 5, score="sigmoid", scaling_factor=0.5), False),
    "sigmoid-k1": (RouterConfig(16, 1, score="sigmoid", weight_on="input"), False),
    "sigmoid-groups": (RouterConfig(64, 8, score="sigmoid", **GROUPED, group_score="max"), False),
    "deepseek-v3": (
        RouterConfig(256, 8, "sigmoid", **GROUPED, group_score="top2_sum", renormalize="sum", scaling_factor=2.5),
        True,
    ),
    "sigmoid-clamp": (RouterConfig(12, 8, "sigmoid", renormalize="clamp", renormalize_eps=1e-3), False),
    "sqrtsoftplus-bias": (RouterConfig(256, 6, "sqrtsoftplus", renormalize="sum", scaling_factor=2.827), True),
    "sqrtsoftplus": (RouterConfig(33, 33, "sqrtsoftplus"), False),
    "long-list": (RouterConfig(200, 40, "sigmoid", renormalize="sum"), False),
    "long-list-groups": (RouterConfig(200, 50, "sigmoid", num_groups=4, topk_groups=2, group_score="topn_sum"), True),
    "one-expert": (RouterConfig(1, 1, renormalize="sum"), False),
    "all": (RouterConfig(130, 130, "sigmoid", renormalize="sum"), True),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}


def weight_type(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def rule_of(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def case(rng, config, with_bias, num_tokens=64, dtype=np.float32, scale=3.0):
    logits = rng.normal(0, scale, (num_tokens, config.num_experts)).astype(dtype)
    bias = rng.normal(0, 0.2, config.num_experts).astype(weight_type(dtype)) if with_bias else None
    return logits, bias


def hard_logits(rng, num_tokens, num_experts, dtype=np.float32):
    """Rows of ties, infinities, NaN, zeros of both signs, subnormals and saturated values among ordinary ones."""
    z = rng.normal(0, 3, (num_tokens, num_experts))
    z[0::7] = rng.integers(-2, 3, z[0::7].shape)
    near_thresholds = rng.uniform(-60, -15, 64)
    kinds = ([np.nan], [np.inf], [-np.inf], [0.0, -0.0], [1e-40, -1e-40], [300.0, -300.0], near_thresholds)
    for start, values in enumerate(kinds):
        rows = z[start + 1 :: 9]
        rows[...] = np.where(rng.random(rows.shape) < 0.3, rng.choice(values, rows.shape), rows)
    if num_tokens > 8:
        z[7] = np.nan
        z[8] = -np.inf
    with np.errstate(over="ignore"):
        return z.astype(dtype)


def run(floor, logits, config, **kwargs):
    return topk_gating(logits, config, backend=floor.backend, **kwargs)


def check_against_oracle(logits, bias, config, gating, *, given=None, mask=None):
    """Ids equal wherever the oracle has a margin, weights within the bound of the contract."""
    rule, double = rule_of(config), logits.dtype == np.float64
    unit = 2.0**-53 if double else U
    z = logits.astype(np.float64)
    decided = 0
    for t in range(len(z)):
        ids = gating.topk_idx[t]
        if mask is not None and not mask[t]:
            assert (ids == -1).all()
            assert (gating.topk_weights[t] == 0).all()
            continue
        if given is None:
            expected, margin = oracle.choose(z[t], rule, None if bias is None else bias.astype(np.float64))
            exact = bias is None and config.num_groups == 1
            if exact or margin > 2**6 * unit:
                decided += 1
                assert ids.tolist() == expected
        else:
            decided += 1
            assert ids.tolist() == list(given[t])
        w = oracle.weights(z[t], ids, rule)
        bound = weight_bound(z[t], ids, config) * unit
        assert (np.abs(gating.topk_weights[t] - w) <= bound * np.abs(w) + 1e-44).all()
    assert decided >= 0.8 * (len(z) if mask is None else mask.sum())
    routed = gating.topk_idx[gating.topk_idx >= 0]
    assert_same_bytes(gating.tokens_per_expert, np.bincount(routed, minlength=config.num_experts).astype(np.int32))


def weight_bound(row, ids, config):
    """Relative error of a weight in units of 2**-24: the score's own bound (semantics of the op), then the sum.

    A renormalised weight is g / (G + eps): the errors of g and of G (at most the largest of its terms'), k roundings
    in the sum, one for eps, one for the quotient, one for the scaling.
    """
    chosen = ids[ids >= 0]
    if config.score_stage == "post":
        own = 12 + 2 * ((row[chosen].max() if chosen.size else 0) - row[ids]) + config.top_k
        return own + 1
    own = score_bound(row, ids) if config.score == "softmax" else np.full(len(ids), 8.0)
    if not config.renormalize:
        return own + 1
    return own + own.max() + config.top_k + 3


def score_bound(row, ids):
    """Relative error of a softmax score in units of 2**-24: docs/ops/gating.md says where the terms come from."""
    return (row.max() - row[ids]) + np.log(row.size) + np.ceil(row.size / 32) + 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTERS)
def test_against_the_oracle(floor, rng, name, dtype):
    config, with_bias = ROUTERS[name]
    # bfloat16 logits tie often, and their ties are decided by the id, so the margins stay wide
    logits, bias = case(rng, config, with_bias, 24, DTYPES[dtype])
    gating = run(floor, logits, config, bias=bias)
    check_against_oracle(logits, bias, config, gating)
    assert gating.topk_idx.dtype == np.int32
    assert gating.topk_weights.dtype == weight_type(DTYPES[dtype])
    assert all(a.flags.c_contiguous for a in gating)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_scores_keep_their_bound_far_from_zero(floor, rng, score):
    """All experts chosen, logits to +-80: the bound of the score itself, without renormalisation."""
    for num_experts in (3, 64, 512):
        config = RouterConfig(num_experts, num_experts, score)
        logits = rng.uniform(-80, 80, (40, num_experts)).astype(np.float32)
        gating = run(floor, logits, config)
        for row, ids, w in zip(logits.astype(np.float64), gating.topk_idx, gating.topk_weights, strict=True):
            exact = oracle.weights(row, ids, rule_of(config))
            bound = score_bound(row, ids) if score == "softmax" else 8.0
            assert (np.abs(w - exact) <= bound * U * exact + 2.0**-149).all()


@pytest.mark.parametrize("num_experts", [64, 512, 1000, 1024])
def test_a_sum_whose_every_addition_rounds_the_same_way_keeps_the_bound(floor, num_experts):
    """A lane's further terms are just above half a step of its first, and each is rounded up to a whole one."""
    logits = np.full((1, num_experts), np.log(0.51 * 2.0**-23), np.float32)
    logits[0, :32] = 0
    score = run(floor, logits, RouterConfig(num_experts, 1)).topk_weights[0, 0]
    error = abs(score * np.exp(logits[0].astype(np.float64)).sum() - 1) / U
    assert 0.95 * (num_experts // 32 - 1) < error <= score_bound(logits[0], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_floor_gives_the_same_bytes(cpu_floor, rng, name, dtype):
    config, with_bias = ROUTERS[name]
    for num_tokens in (0, 1, 65):
        logits = hard_logits(rng, num_tokens, config.num_experts, DTYPES[dtype])
        _, bias = case(rng, config, with_bias, 0, DTYPES[dtype])
        mask = rng.random(num_tokens) < 0.8
        replay = rng.integers(-1, config.num_experts, (num_tokens, config.top_k))
        for kwargs in ({}, {"token_mask": mask}, {"topk_idx": replay}, {"topk_idx": replay, "token_mask": mask}):
            expected = topk_gating(logits, config, bias=bias, backend="numpy", **kwargs)
            for a, b in zip(run(cpu_floor, logits, config, bias=bias, **kwargs), expected, strict=True):
                assert_same_bytes(a, b)


@pytest.mark.parametrize("name", ROUTERS)
def test_ids_are_distinct_and_in_range_whatever_the_logits(floor, rng, name):
    config, with_bias = ROUTERS[name]
    logits = hard_logits(rng, 80, config.num_experts)
    _, bias = case(rng, config, with_bias, 0)
    biases = [bias] if bias is None else [bias, np.full_like(bias, np.nan), np.full_like(bias, -np.inf)]
    for b in biases:
        ids = run(floor, logits, config, bias=b).topk_idx
        assert ((ids >= 0) & (ids < config.num_experts)).all()
        assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()


def test_nan_ranks_below_minus_infinity(floor):
    z = np.array([[np.nan, -np.inf, 1.0, -np.inf, np.nan, 2.0]], np.float32)
    ids = run(floor, z, RouterConfig(6, 6, "sigmoid")).topk_idx
    assert ids.tolist() == [[5, 2, 1, 3, 0, 4]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_of_either_sign_and_any_payload(floor, dtype):
    bits = {"float32": [0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], "float64": [0xFFF8 << 48, (0x7FF0 << 48) + 1]}
    nans = np.array(bits[dtype], f"u{np.dtype(dtype).itemsize}").view(dtype)
    z = np.concatenate([nans, np.array([-np.inf, 0.0], dtype)])[None]
    count = z.shape[1]
    gating = run(floor, z, RouterConfig(count, count, "sigmoid"))
    assert gating.topk_idx.tolist() == [[count - 1, count - 2, *range(count - 2)]]
    assert_same_bytes(gating.topk_weights[0, 2:], np.full(count - 2, np.nan, dtype))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFC00155, 0x7F800001, 0x7FFFFFFF])
@pytest.mark.parametrize("num_experts", [8, 16, 60, 128])
def test_a_nan_among_ordinary_logits_whatever_its_payload(floor, rng, num_experts, bits):
    """Eight tokens at a time too: a payload can turn the NaN of an exponential into a number."""
    z = rng.normal(size=(17, num_experts)).astype(np.float32)
    z.view(np.uint32)[np.arange(3, 11), rng.integers(0, num_experts, 8)] = bits
    for config in (RouterConfig(num_experts, 2), RouterConfig(num_experts, 2, score_stage="post")):
        gating = run(floor, z, config)
        assert np.isfinite(gating.topk_weights[11:]).all()
        assert (gating.topk_idx == np.argsort(-z, axis=1, kind="stable")[:, :2]).all()
        if config.score_stage == "pre":
            assert_same_bytes(gating.topk_weights[3:11], np.full((8, 2), np.nan, np.float32))


def test_a_nan_row_changes_no_other_row(floor, rng):
    for name in ("softmax-renormalised", "deepseek-v3", "post"):
        config, with_bias = ROUTERS[name]
        logits, bias = case(rng, config, with_bias, 9)
        clean = run(floor, logits, config, bias=bias)
        logits[4, 3] = np.nan
        dirty = run(floor, logits, config, bias=bias)
        others = np.arange(9) != 4
        assert_same_bytes(clean.topk_idx[others], dirty.topk_idx[others])
        assert_same_bytes(clean.topk_weights[others], dirty.topk_weights[others])


def test_one_nan_logit_poisons_a_softmax_row_but_not_its_ids(floor, rng):
    z = rng.normal(size=(1, 8)).astype(np.float32)
    z[0, 5] = np.nan
    gating = run(floor, z, RouterConfig(8, 3))
    assert gating.topk_idx.tolist() == [oracle.ranked(z[0])[:3]]
    assert_same_bytes(gating.topk_weights, np.full((1, 3), np.nan, np.float32))
    kept = run(floor, z, RouterConfig(8, 3, "sigmoid"))  # sigmoid scores stand alone
    assert np.isfinite(kept.topk_weights).all()


def test_a_softmax_row_with_all_keys_nan_is_a_row_of_ties(floor, rng):
    z = rng.normal(size=(1, 8)).astype(np.float32)
    z[0, 0] = np.nan
    biased = run(floor, z, RouterConfig(8, 3), bias=np.zeros(8, np.float32))
    assert biased.topk_idx.tolist() == [[0, 1, 2]]
    # without a bias the groups tie and the lowest two are kept; inside them the logits still choose
    grouped = run(floor, z, RouterConfig(8, 3, num_groups=4, topk_groups=2))
    assert grouped.topk_idx.tolist() == [oracle.ranked(z[0, :4])[:3]]


def test_rows_without_a_finite_maximum(floor):
    inf = np.inf
    z = np.array([[-inf] * 4, [inf, 0, 0, 0], [inf] * 4], np.float32)
    gating = run(floor, z, RouterConfig(4, 2))
    assert gating.topk_idx.tolist() == [[0, 1], [0, 1], [0, 1]]
    assert_same_bytes(gating.topk_weights, np.full((3, 2), np.nan, np.float32))
    sigmoid = run(floor, z, RouterConfig(4, 2, "sigmoid"))
    assert sigmoid.topk_weights.tolist() == [[0, 0], [1, 0.5], [1, 1]]


def test_padded_rows_of_nan_give_k_distinct_experts(floor):
    gating = run(floor, np.full((3, 60), np.nan, np.float32), RouterConfig(60, 4))
    assert gating.topk_idx.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("name", ROUTERS)
def test_ties_go_to_the_lower_id(floor, rng, name):
    """Few distinct values: most keys tie, and a tie in the logits is one in every score."""
    config, with_bias = ROUTERS[name]
    logits = rng.integers(-1, 2, (50, config.num_experts)).astype(np.float32)
    logits[logits == 0] *= np.where(rng.random((logits == 0).sum()) < 0.5, -1.0, 1.0)  # zeros of both signs
    bias = np.zeros(config.num_experts, np.float32) if with_bias else None
    ids = run(floor, logits, config, bias=bias).topk_idx
    for row, got in zip(logits.astype(np.float64), ids, strict=True):
        assert got.tolist() == oracle.choose(row, rule_of(config), bias)[0]


def test_saturated_sigmoids_are_ranked_by_their_logits(floor):
    z = np.array([[20.0, 30.0, 25.0, 40.0]], np.float32)
    gating = run(floor, z, RouterConfig(4, 3, "sigmoid"))
    assert gating.topk_idx.tolist() == [[3, 1, 2]]
    assert (gating.topk_weights == 1).all()


def test_saturated_experts_of_a_group_are_ranked_by_their_logits_too(floor):
    """Groups are ranked by scores: 1 + 1 ties with 1 + 1, and the lower group is kept; inside it the logits choose."""
    z = np.array([[20.0, 30.0, 25.0, 40.0, 50.0, 60.0, 70.0, 80.0]], np.float32)
    config = RouterConfig(8, 3, "sigmoid", num_groups=2, topk_groups=1, group_score="top2_sum")
    assert run(floor, z, config).topk_idx.tolist() == [[3, 1, 2]]


def test_a_bias_ranks_rounded_scores(floor):
    """With a bias saturated scores tie, as they do in the models that use one."""
    z = np.array([[20.0, 30.0, 25.0, 40.0]], np.float32)
    ids = run(floor, z, RouterConfig(4, 3, "sigmoid"), bias=np.zeros(4, np.float32)).topk_idx
    assert ids.tolist() == [[0, 1, 2]]


def test_the_bias_chooses_and_never_weighs(floor, rng):
    config = RouterConfig(64, 8, "sigmoid")
    logits, _ = case(rng, config, False)
    bias = rng.normal(0, 5, 64).astype(np.float32)
    gating = run(floor, logits, config, bias=bias)
    unbiased = run(floor, logits, config, topk_idx=gating.topk_idx)
    assert_same_bytes(gating.topk_weights, unbiased.topk_weights)
    exact = np.take_along_axis(oracle.sigmoid(logits.astype(np.float64)), gating.topk_idx.astype(int), 1)
    assert (np.abs(gating.topk_weights - exact) <= 8 * U * exact).all()


def test_experts_of_excluded_groups_are_never_chosen(floor, rng):
    """Biased scores below zero: a group excluded by writing 0 would win."""
    config = RouterConfig(64, 8, "sigmoid", num_groups=8, topk_groups=2, group_score="top2_sum")
    logits, _ = case(rng, config, False, 40)
    bias = np.full(64, -1.5, np.float32)
    gating = run(floor, logits, config, bias=bias)
    assert all(len({e // 8 for e in ids}) <= 2 for ids in gating.topk_idx.tolist())
    check_against_oracle(logits, bias, config, gating)


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_kept_group_of_hopeless_logits_keeps_its_experts(floor, value):
    """No value marks an excluded group, so no legal key can be mistaken for one."""
    config = RouterConfig(8, 4, "sigmoid", num_groups=4, topk_groups=2, group_score="max")
    z = np.full((1, 8), value, np.float32)
    z[0, 6] = 1.0
    assert run(floor, z, config).topk_idx.tolist() == [[6, 0, 1, 7]]
    bias = np.full(8, -np.inf, np.float32)
    bias[6] = 0
    assert run(floor, z, config, bias=bias).topk_idx.tolist() == [[6, 0, 1, 7]]


def test_a_group_whose_score_is_nan_ranks_below_every_other(floor):
    config = RouterConfig(8, 2, "sigmoid", num_groups=4, topk_groups=1, group_score="top2_sum")
    bias = np.array([np.inf, -np.inf, 0, 0, -np.inf, -np.inf, np.nan, 5], np.float32)
    z = np.zeros((1, 8), np.float32)
    assert run(floor, z, config, bias=bias).topk_idx.tolist() == [[2, 3]]
    bias[2:4] = np.nan
    assert run(floor, z, config, bias=bias).topk_idx.tolist() == [[4, 5]]


def test_a_group_score_is_a_sum_from_the_largest_down(floor):
    """2 + 1e8 - 1e8 in float32 tells the order: largest first loses the 2 in the first sum."""
    config = RouterConfig(6, 3, "sigmoid", num_groups=2, topk_groups=1, group_score="topn_sum")
    z = np.zeros((1, 6), np.float32)
    bias = np.array([-1e8, 2, 1e8, -2, 0.25, 0], np.float32)  # sums 0 and, with the scores of 1/2, -0.25
    assert run(floor, z, config, bias=bias).topk_idx.tolist() == [[2, 1, 0]]


def test_a_tie_counts_twice_in_a_group_score(floor):
    config = RouterConfig(6, 2, "sigmoid", num_groups=2, topk_groups=1, group_score="top2_sum")
    z = np.array([[1.0, 1.0, -9.0, 1.5, 0.0, 0.0]], np.float32)
    assert run(floor, z, config).topk_idx.tolist() == [[0, 1]]


def test_renormalised_top1_is_one(floor, rng):
    logits = rng.normal(0, 4, (30, 16)).astype(np.float32)
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for kind in ("sum", "clamp"):
            w = run(floor, logits, RouterConfig(16, 1, score, renormalize=kind)).topk_weights
            assert w.shape == (30, 1)
            assert (w == 1).all()


def test_scores_that_underflow_do_not_divide_by_zero(floor):
    z = np.full((1, 8), -800.0, np.float32)
    bias = np.linspace(1, 2, 8).astype(np.float32)
    for score in ("sigmoid", "sqrtsoftplus"):
        w = run(floor, z, RouterConfig(8, 2, score, renormalize="sum"), bias=bias).topk_weights
        assert (w == 0).all()


def test_masked_tokens_and_ids_of_minus_one(floor, rng):
    config = RouterConfig(32, 4, renormalize="sum")
    logits, _ = case(rng, config, False, 20)
    mask = rng.random(20) < 0.5
    logits[~mask] = np.nan
    masked = run(floor, logits, config, token_mask=mask)
    alone = run(floor, logits[mask], config)
    assert_same_bytes(masked.topk_weights[mask], alone.topk_weights)
    assert_same_bytes(masked.tokens_per_expert, alone.tokens_per_expert)
    assert (masked.topk_idx[~mask] == -1).all()
    assert_same_bytes(masked.topk_weights[~mask], np.zeros(((~mask).sum(), 4), np.float32))


@pytest.mark.parametrize("name", ["softmax-renormalised", "post", "deepseek-v3", "softmax", "softmax-clamp-bias"])
def test_replayed_ids(floor, rng, name):
    config, with_bias = ROUTERS[name]
    logits, bias = case(rng, config, with_bias, 30)
    chosen = run(floor, logits, config, bias=bias)
    for dtype in (np.int32, np.int64, np.int16, np.uint64):
        ids = chosen.topk_idx.astype(dtype)
        again = run(floor, logits, config, topk_idx=ids)
        assert not np.shares_memory(again.topk_idx, ids)
        for a, b in zip(again, chosen, strict=True):
            assert_same_bytes(a, b)
    # any ids: some -1, some twice
    given = rng.integers(-1, 5, (30, config.top_k)).astype(np.int64)
    given[0], given[1] = -1, 3
    gating = run(floor, logits, config, topk_idx=given)
    check_against_oracle(logits, bias, config, gating, given=given)


def test_recomputed_ties_give_the_same_ids(floor):
    logits = np.zeros((50, 60), np.float32)
    first = run(floor, logits, RouterConfig(60, 4))
    for _ in range(20):
        again = run(floor, logits.copy(), RouterConfig(60, 4))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["softmax", "deepseek-v3", "softmax-group-max", "post"])
def test_a_token_does_not_depend_on_its_batch(floor, rng, name):
    config, with_bias = ROUTERS[name]
    logits = hard_logits(rng, 1000, config.num_experts)
    _, bias = case(rng, config, with_bias, 0)
    whole = run(floor, logits, config, bias=bias)
    for num_tokens in (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 257):
        for start in (0, 5, 1000 - num_tokens):
            part = run(floor, logits[start : start + num_tokens], config, bias=bias)
            assert_same_bytes(part.topk_idx, whole.topk_idx[start : start + num_tokens])
            assert_same_bytes(part.topk_weights, whole.topk_weights[start : start + num_tokens])


def test_the_number_of_threads_changes_nothing(cpu_floor, threads, rng):
    config, _ = ROUTERS["deepseek-v3"]
    logits = hard_logits(rng, 700, 256)
    bias = rng.normal(0, 0.1, 256).astype(np.float32)
    expected = topk_gating(logits, config, bias=bias, backend="numpy")
    for a, b in zip(run(cpu_floor, logits, config, bias=bias), expected, strict=True):
        assert_same_bytes(a, b)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 9, 31, 33, 60, 96, 160, 384, 513, 1000, 1024])
def test_any_number_of_experts(floor, rng, num_experts):
    config = RouterConfig(num_experts, min(num_experts, 32), renormalize="sum")
    logits, _ = case(rng, config, False, 9)
    check_against_oracle(logits, None, config, run(floor, logits, config))


def test_any_number_of_tokens(floor, rng):
    config = RouterConfig(24, 3, "sigmoid", num_groups=3, topk_groups=2)
    logits, _ = case(rng, config, False, 130)
    whole = run(floor, logits, config)
    for num_tokens in range(131):
        part = run(floor, logits[:num_tokens], config)
        assert_same_bytes(part.topk_idx, whole.topk_idx[:num_tokens])
        assert part.tokens_per_expert.sum() == 3 * num_tokens


@pytest.mark.parametrize("group_score", ["max", "top2_sum", "topn_sum"])
def test_up_to_64_groups(floor, rng, group_score):
    for num_groups, size, topk_groups, top_k in ((64, 4, 5, 20), (64, 4, 8, 32), (6, 6, 5, 30), (3, 33, 2, 7)):
        config = RouterConfig(
            num_groups * size, top_k, "sigmoid", num_groups=num_groups, topk_groups=topk_groups, group_score=group_score
        )
        logits, _ = case(rng, config, False, 12, scale=1.0)
        bias = rng.normal(0, 0.3, config.num_experts).astype(np.float32)
        for b in (None, bias):
            check_against_oracle(logits, b, config, run(floor, logits, config, bias=b))


def test_topn_sum_of_a_group_smaller_than_n(floor, rng):
    config = RouterConfig(8, 6, "sigmoid", num_groups=4, topk_groups=3, group_score="topn_sum")
    assert config.group_topn <= config.experts_per_group  # n = top_k // topk_groups never exceeds what a group holds
    logits, _ = case(rng, config, False, 20)
    check_against_oracle(logits, None, config, run(floor, logits, config))


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_stay_inside_the_inputs(cpu_floor, rng, dtype, at):
    for num_experts, top_k in ((1, 1), (7, 3), (37, 5), (64, 64)):
        config = RouterConfig(num_experts, top_k, "sigmoid")
        logits, bias = case(rng, config, True, 5, DTYPES[dtype])
        mask = np.array([True, False, True, True, True])
        expected = topk_gating(logits, config, bias=bias, token_mask=mask, backend="numpy")
        got = run(cpu_floor, guarded(logits, at=at), config, bias=guarded(bias, at=at), token_mask=guarded(mask, at=at))
        for a, b in zip(got, expected, strict=True):
            assert_same_bytes(a, b)
        given = run(cpu_floor, guarded(logits, at=at), config, topk_idx=guarded(expected.topk_idx, at=at))
        assert_same_bytes(given.topk_idx, expected.topk_idx)


def test_strided_read_only_and_fortran_inputs(floor, rng):
    config = RouterConfig(16, 3, "sigmoid")
    logits, bias = case(rng, config, True, 12)
    expected = run(floor, logits, config, bias=bias)
    wide = np.repeat(np.repeat(logits, 2, axis=0), 3, axis=1)
    bias3 = np.repeat(bias, 3)
    frozen = logits.copy()
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"x" + logits.tobytes(), np.uint8)[1:].view(np.float32).reshape(logits.shape)
    for z in (wide[::2, ::3], np.asfortranarray(logits), frozen, unaligned, memoryview(logits)):
        got = run(floor, z, config, bias=bias3[::3])
        for a, b in zip(got, expected, strict=True):
            assert_same_bytes(a, b)
    assert_same_bytes(frozen, logits)


def test_inputs_are_never_written(floor, rng):
    config = RouterConfig(16, 3)
    logits, _ = case(rng, config, False, 12)
    ids = rng.integers(-1, 16, (12, 3)).astype(np.int32)
    mask = rng.random(12) < 0.5
    before = logits.copy(), ids.copy(), mask.copy()
    run(floor, logits, config, topk_idx=ids, token_mask=mask)
    for a, b in zip((logits, ids, mask), before, strict=True):
        assert_same_bytes(a, b)


def test_low_precision_logits_are_computed_in_float32(floor, rng):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        config = RouterConfig(64, 8, renormalize="sum")
        low = rng.normal(0, 3, (20, 64)).astype(dtype)
        for a, b in zip(run(floor, low, config), run(floor, low.astype(np.float32), config), strict=True):
            assert_same_bytes(a, b)


def test_every_float16_and_bfloat16_logit_is_read_exactly(floor):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        logits = np.arange(65536, dtype=np.uint16).view(dtype).reshape(-1, 64)
        config = RouterConfig(64, 64, "sigmoid")
        for a, b in zip(run(floor, logits, config), run(floor, logits.astype(np.float32), config), strict=True):
            assert_same_bytes(a, b)


def test_subnormal_scores_are_kept(floor):
    z = np.array([[-88.0, -95.0, -103.0]], np.float32)
    w = run(floor, z, RouterConfig(3, 3, "sigmoid")).topk_weights[0]
    assert (w > 0).all()
    assert abs(float(w[2]) - math.exp(-103)) <= 2.0**-149


def test_the_gating_unpacks_as_a_triple(floor, rng):
    logits = rng.normal(size=(4, 8)).astype(np.float32)
    gating = run(floor, logits, RouterConfig(8, 2))
    idx, weights, counts = gating
    assert idx is gating.topk_idx
    assert weights is gating.topk_weights
    assert counts is gating.tokens_per_expert
    assert isinstance(gating, pyroute.Gating)


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 9, 16, 17, 32, 33, 95, 97])
@pytest.mark.parametrize("num_experts", [2, 7, 8, 16, 60, 100, 384, 1024])
def test_choices_are_a_stable_sort_whatever_the_shortlist(cpu_floor, rng, num_experts, top_k):
    """Ties beyond the shortlist's room, sorted rows, rows that are mostly -inf, rows with NaN: ids of a stable sort."""
    top_k = min(top_k, num_experts)
    rows = rng.normal(0, 3, (20, num_experts)).astype(np.float32)
    rows[1] = 0.0
    rows[2] = rng.integers(0, 2, num_experts)
    rows[3] = np.arange(num_experts)
    rows[4] = -np.arange(num_experts)
    rows[5, 1:] = -np.inf
    rows[6] = np.where(rng.random(num_experts) < 0.9, -np.inf, rows[6])
    rows[7] = rng.integers(-1, 2, num_experts) * np.float32(0.0)  # zeros of both signs
    rows[8, rng.integers(num_experts)] = np.nan
    rows[9] = 200 * rows[9]  # exponentials that underflow
    rows[10:] = np.round(rows[10:] * 2) / 2  # a few ties, inside the shortlist
    for bias in (None, np.zeros(num_experts, np.float32), np.linspace(0, 1, num_experts, dtype=np.float32)):
        for score in ("softmax", "sigmoid", "sqrtsoftplus"):
            config = RouterConfig(num_experts, top_k, score, renormalize="sum")
            ours = run(cpu_floor, rows, config, bias=bias)
            for got, expected in zip(ours, topk_gating(rows, config, bias=bias, backend="numpy"), strict=True):
                assert_same_bytes(got, expected)
    expected = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]  # NaN last
    assert (run(cpu_floor, rows, RouterConfig(num_experts, top_k)).topk_idx == expected).all()


@pytest.mark.parametrize(("num_groups", "size"), [(2, 1), (3, 7), (8, 20), (9, 8), (17, 3), (64, 5), (65, 4)])
@pytest.mark.parametrize("bias", [0.0, 0.5, -np.inf])
def test_groups_of_any_number_and_size(cpu_floor, rng, num_groups, size, bias):
    num_experts = num_groups * size
    rows = rng.normal(0, 2, (24, num_experts)).astype(np.float32)
    rows[3::5] = rng.integers(-1, 2, rows[3::5].shape)  # tied groups
    rows[4] = -np.inf
    b = np.where(rng.random(num_experts) < 0.3, bias, 0).astype(np.float32) if bias else None
    for group_score in ("max", "top2_sum")[: 1 if size == 1 else 2]:
        for topk_groups in {1, (num_groups + 1) // 2, num_groups}:
            top_k = min(8, topk_groups * size)
            for score in ("softmax", "sigmoid"):
                config = RouterConfig(
                    num_experts, top_k, score, num_groups=num_groups, topk_groups=topk_groups, group_score=group_score
                )
                ours = run(cpu_floor, rows, config, bias=b)
                for got, expected in zip(ours, topk_gating(rows, config, bias=b, backend="numpy"), strict=True):
                    assert_same_bytes(got, expected)
