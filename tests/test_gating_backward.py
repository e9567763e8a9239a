"""topk_gating_backward and the losses: against complex-step derivatives, across floors, masks and scopes."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bytes, guarded, poison
from oracle import gating as oracle
from test_gating import DTYPES, ROUTERS, case, hard_logits, rule_of, weight_type

import pyroute
from pyroute import (
    Gating,
    RouterConfig,
    _backend,
    balance_loss,
    expert_choice_gating,
    topk_gating,
    topk_gating_backward,
    update_bias,
    z_loss,
)
from pyroute._gating_contract import core_router

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
RENORMALIZE = (None, "sum", "clamp")


def rules():
    """Every score, stage, renormalisation, grouping and bias, at k = 1, 3 and E."""
    for score, renormalize, groups, with_bias, top_k in itertools.product(
        SCORES, RENORMALIZE, (False, True), (False, True), (1, 3, 8)
    ):
        grouping = {"num_groups": 4, "topk_groups": 4 if top_k == 8 else 2, "group_score": "top2_sum"} if groups else {}
        yield RouterConfig(8, top_k, score, renormalize=renormalize, scaling_factor=1.5, **grouping), with_bias
    for with_bias, top_k in itertools.product((False, True), (1, 3, 8)):
        yield RouterConfig(8, top_k, score_stage="post", scaling_factor=0.5), with_bias


def backward(floor, *args, **kwargs):
    return topk_gating_backward(*args, backend=floor.backend, **kwargs)


def assert_close(got, exact, tolerance):
    """Element by element, relative to the largest gradient of the row: a row's terms cancel against each other."""
    scale = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(got - exact) <= tolerance * scale + 1e-44).all()


def test_every_rule_against_complex_steps(floor, rng):
    for config, with_bias in rules():
        logits = rng.normal(0, 2, (7, 8))
        bias = rng.normal(0, 0.5, 8) if with_bias else None
        mask = np.array([1, 1, 0, 1, 1, 1, 1], bool)
        gating = topk_gating(logits, config, bias=bias, token_mask=mask, backend=floor.backend)
        gating.topk_idx[4, 0] = -1
        gating.topk_idx[5] = -1
        grad_weights = rng.normal(size=gating.topk_weights.shape)
        got = backward(
            floor, grad_weights, logits, gating, config, bias=bias, token_mask=mask,
            balance_loss_coef=0.7, z_loss_coef=0.3,
        )  # fmt: skip
        exact = oracle.gradient(
            logits, grad_weights, gating.topk_idx, rule_of(config), mask, balance_coef=0.7, z_coef=0.3
        )
        assert got.dtype == np.float64
        assert_close(got, exact, 1e-13)
        assert (got[2] == 0).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_float32_gradients_against_complex_steps(floor, rng, name):
    """Bound: the scores' relative errors (at most 12 + 2 * 20 units here), k + 8 roundings, relative to the row."""
    config, with_bias = ROUTERS[name]
    logits, bias = case(rng, config, with_bias, 5, scale=2.0)
    gating = topk_gating(logits, config, bias=bias, backend=floor.backend)
    grad_weights = rng.normal(size=gating.topk_weights.shape).astype(np.float32)
    mask = np.ones(5, bool)
    got = backward(floor, grad_weights, logits, gating, config, balance_loss_coef=0.1, z_loss_coef=0.01)
    exact = oracle.gradient(
        logits.astype(float), grad_weights.astype(float), gating.topk_idx, rule_of(config), mask,
        balance_coef=0.1, z_coef=0.01,
    )  # fmt: skip
    assert got.dtype == np.float32
    assert_close(got, exact, (60 + 2 * config.top_k) * 2.0**-24)


def test_the_gradient_is_the_derivative_of_what_the_package_computes(floor, rng):
    """Central differences of our own forward and losses, ids replayed; float64."""
    for config in (
        RouterConfig(6, 3, renormalize="sum", renormalize_eps=0.2),
        RouterConfig(6, 2, "sqrtsoftplus", renormalize="clamp", renormalize_eps=5.0),
        RouterConfig(6, 2, score_stage="post"),
    ):
        logits = rng.normal(0, 1, (3, 6))
        gating = topk_gating(logits, config, backend=floor.backend)
        grad_weights = rng.normal(size=gating.topk_weights.shape)

        def objective(z, config=config, gating=gating, grad_weights=grad_weights):
            again = topk_gating(z, config, topk_idx=gating.topk_idx, backend=floor.backend)
            balance = balance_loss(z, gating, config, backend=floor.backend)
            return (grad_weights * again.topk_weights).sum() + 0.5 * balance + 0.25 * z_loss(z, backend=floor.backend)

        got = backward(floor, grad_weights, logits, gating, config, balance_loss_coef=0.5, z_loss_coef=0.25)
        for t, e in np.ndindex(3, 6):
            step = np.zeros_like(logits)
            step[t, e] = 1e-6
            difference = (objective(logits + step) - objective(logits - step)) / 2e-6
            assert abs(got[t, e] - difference) <= 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_floor_gives_the_same_bytes(cpu_floor, rng, name, dtype):
    config, with_bias = ROUTERS[name]
    for num_tokens in (0, 1, 70):
        logits = hard_logits(rng, num_tokens, config.num_experts, DTYPES[dtype])
        _, bias = case(rng, config, with_bias, 0, DTYPES[dtype])
        gating = topk_gating(logits, config, bias=bias, backend="numpy")
        some = Gating(rng.integers(-1, config.num_experts, gating.topk_idx.shape), *gating[1:])
        grad = rng.normal(size=gating.topk_weights.shape).astype(weight_type(DTYPES[dtype]))
        mask = rng.random(num_tokens) < 0.8
        sequence = rng.integers(-3, 3, num_tokens) * 1000
        counts = rng.integers(0, 99, config.num_experts), 10_000
        for given, options in itertools.product(
            (gating, some),
            (
                {},
                {"token_mask": mask, "balance_loss_coef": 0.1},
                {"z_loss_coef": 0.1},
                {"token_mask": mask, "balance_loss_coef": 0.1, "z_loss_coef": 0.1,
                 "balance_loss_scope": "sequence", "sequence_ids": sequence},
                {"balance_loss_coef": 0.1, "balance_loss_scope": "global", "global_counts": counts},
            ),
        ):  # fmt: skip
            expected = topk_gating_backward(grad, logits, given, config, backend="numpy", **options)
            assert_same_bytes(backward(cpu_floor, grad, logits, given, config, **options), expected)


def test_losses_are_equal_on_every_floor(cpu_floor, threads, rng):
    for name in ("softmax", "deepseek-v3", "sqrtsoftplus"):
        config, _ = ROUTERS[name]
        for dtype in DTYPES.values():
            logits = rng.normal(0, 2, (333, config.num_experts)).astype(dtype)
            gating = topk_gating(logits, config, backend="numpy")
            mask = rng.random(333) < 0.9
            options = {"scope": "sequence", "sequence_ids": rng.integers(0, 4, 333), "token_mask": mask}
            for kwargs in ({}, {"token_mask": mask}, options):
                expected = balance_loss(logits, gating, config, backend="numpy", **kwargs)
                assert balance_loss(logits, gating, config, backend="cpu", **kwargs) == expected
            assert z_loss(logits, token_mask=mask, backend="cpu") == z_loss(logits, token_mask=mask, backend="numpy")


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7FA00001, 0xFFFFFFFF])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_loss_that_is_nan_is_the_canonical_one(floor, rng, score, pattern):
    logits = rng.normal(0, 2, (70, 8)).astype(np.float32)
    logits[3, 1:3] = np.array(pattern, np.uint32).view(np.float32)
    gating = topk_gating(logits, config := RouterConfig(8, 2, score))
    for loss in (balance_loss(logits, gating, config, backend=floor.backend), z_loss(logits, backend=floor.backend)):
        assert np.float64(loss).view(np.uint64) == 0x7FF8000000000000


def test_losses_against_the_oracle(floor, rng):
    for name in ("softmax", "deepseek-v3", "sqrtsoftplus"):
        config, with_bias = ROUTERS[name]
        logits, bias = case(rng, config, with_bias, 50)
        mask = rng.random(50) < 0.7
        gating = topk_gating(logits, config, bias=bias, token_mask=mask, backend=floor.backend)
        z, rule, ids = logits.astype(float), rule_of(config), gating.topk_idx
        sequence = rng.integers(0, 5, 50)
        reduced = rng.integers(0, 50, config.num_experts), 200
        for kwargs, of in (
            ({}, {}),
            ({"scope": "sequence", "sequence_ids": sequence}, {"sequence": sequence}),
            ({"scope": "global", "global_counts": reduced}, {"reduced": reduced}),
        ):
            got = balance_loss(logits, gating, config, token_mask=mask, backend=floor.backend, **kwargs)
            exact = oracle.balance_rows(z, ids, rule, mask, **of).sum()
            assert abs(got - exact) <= 2e-6 * exact
        exact = oracle.z_rows(z, mask).sum()
        assert abs(z_loss(logits, token_mask=mask, backend=floor.backend) - exact) <= 2e-6 * exact


def test_a_hand_computed_balance_loss(floor):
    """3 tokens, 4 experts, top-1. Counts 2, 1, 0, 0; f = 4 * count / 3; P the column means."""
    p = np.array([[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.1, 0.6, 0.2, 0.1]])
    config = RouterConfig(4, 1)
    gating = topk_gating(np.log(p), config, backend=floor.backend)
    expected = 4 / 3 * (2 * (0.7 + 0.4 + 0.1) / 3 + 1 * (0.1 + 0.2 + 0.6) / 3)
    assert abs(balance_loss(np.log(p), gating, config, backend=floor.backend) - expected) < 1e-14


@pytest.mark.parametrize("score", SCORES)
def test_perfect_balance_is_one_with_a_finite_gradient(floor, score):
    config = RouterConfig(8, 2, score)
    logits = np.zeros((12, 8))
    ids = np.arange(24).reshape(12, 2) % 8
    gating = topk_gating(logits, config, topk_idx=ids, backend=floor.backend)
    assert abs(balance_loss(logits, gating, config, backend=floor.backend) - 1) < 1e-14
    grad = backward(floor, np.zeros((12, 2)), logits, gating, config, balance_loss_coef=1.0)
    assert (np.abs(grad) < 1e-15).all()


@pytest.mark.parametrize("score", SCORES)
def test_masked_padding_equals_removed_padding(floor, rng, score):
    config = RouterConfig(16, 3, score)
    logits = rng.normal(size=(40, 16)).astype(np.float32)
    mask = rng.random(40) < 0.6
    sequence = rng.integers(0, 3, 40)
    logits[~mask] = np.nan
    everything = topk_gating(logits, config, backend=floor.backend)  # forgot the mask: ids are not -1
    kept = topk_gating(logits[mask], config, backend=floor.backend)
    grad = rng.normal(size=(40, 3)).astype(np.float32)
    losses = {"balance_loss_coef": 0.1, "z_loss_coef": 0.1, "balance_loss_scope": "sequence"}
    got = backward(floor, grad, logits, everything, config, token_mask=mask, sequence_ids=sequence, **losses)
    alone = backward(floor, grad[mask], logits[mask], kept, config, sequence_ids=sequence[mask], **losses)
    assert_same_bytes(got[mask], alone)
    assert_same_bytes(got[~mask], np.zeros_like(got[~mask]))
    for scope, ids in (("batch", None), ("sequence", sequence)):
        args = {"scope": scope, "backend": floor.backend}
        masked = balance_loss(logits, everything, config, token_mask=mask, sequence_ids=ids, **args)
        removed = balance_loss(logits[mask], kept, config, sequence_ids=None if ids is None else ids[mask], **args)
        assert abs(masked - removed) <= 1e-14
    assert abs(z_loss(logits, token_mask=mask) - z_loss(logits[mask])) <= 1e-14


@pytest.mark.parametrize("score", SCORES)
def test_global_losses_of_shards_add_up_to_the_whole(floor, rng, score):
    """Gradients are the same bytes however the batch is split; values add up."""
    config = RouterConfig(16, 3, score)
    logits = rng.normal(size=(50, 16)).astype(np.float32)
    gating = topk_gating(logits, config, backend=floor.backend)
    grad = rng.normal(size=(50, 3)).astype(np.float32)
    options = {"balance_loss_coef": 0.3, "balance_loss_scope": "global"}
    counts = gating.tokens_per_expert, 50
    whole = backward(floor, grad, logits, gating, config, balance_loss_coef=0.3)
    value = 0.0
    for part in (slice(0, 0), slice(0, 13), slice(13, 50)):
        shard = topk_gating(logits[part], config, backend=floor.backend)
        got = backward(floor, grad[part], logits[part], shard, config, global_counts=counts, **options)
        assert_same_bytes(got, whole[part])
        value += balance_loss(logits[part], shard, config, scope="global", global_counts=counts, backend=floor.backend)
    assert abs(value - balance_loss(logits, gating, config, backend=floor.backend)) < 1e-14


def test_sequences_may_be_interleaved_and_sparse(floor, rng):
    """Packed, shuffled or renamed: the same loss, and each token the same gradient."""
    config = RouterConfig(16, 3)
    logits = rng.normal(size=(40, 16)).astype(np.float32)
    sequence = np.repeat([0, 1, 2], [10, 25, 5])
    order = rng.permutation(40)
    names = np.array([7_000_000_000, -4, 12])
    results = []
    for z, ids in ((logits, sequence), (logits[order], names[sequence][order])):
        gating = topk_gating(z, config, backend=floor.backend)
        options = {"sequence_ids": ids}
        grad = backward(
            floor, np.zeros((40, 3), np.float32), z, gating, config, balance_loss_coef=1.0,
            balance_loss_scope="sequence", **options,
        )  # fmt: skip
        results.append((grad, balance_loss(z, gating, config, scope="sequence", backend=floor.backend, **options)))
    assert_same_bytes(results[0][0][order], results[1][0])
    assert abs(results[0][1] - results[1][1]) < 1e-14
    parts = [slice(0, 10), slice(10, 35), slice(35, 40)]
    alone = [balance_loss(logits[p], topk_gating(logits[p], config), config, backend=floor.backend) for p in parts]
    assert abs(results[0][1] - np.mean(alone)) < 1e-14


def test_the_backward_of_one_token_does_not_depend_on_its_batch(floor, rng):
    for name in ("softmax", "softmax-renormalised", "deepseek-v3", "post"):
        config, _ = ROUTERS[name]
        logits = hard_logits(rng, 300, config.num_experts)
        gating = topk_gating(logits, config, backend=floor.backend)
        grad = rng.normal(size=gating.topk_weights.shape).astype(np.float32)
        whole = backward(floor, grad, logits, gating, config)
        for num_tokens in (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 257):
            part = slice(300 - num_tokens, 300)
            got = backward(floor, grad[part], logits[part], Gating(*(a[part] for a in gating[:2]), gating[2]), config)
            assert_same_bytes(got, whole[part])


def test_the_number_of_threads_changes_nothing(cpu_floor, threads, rng):
    config, _ = ROUTERS["deepseek-v3"]
    logits = hard_logits(rng, 500, 256)
    gating = topk_gating(logits, config, backend="numpy")
    grad = rng.normal(size=gating.topk_weights.shape).astype(np.float32)
    options = {"balance_loss_coef": 0.1, "z_loss_coef": 0.1}
    expected = topk_gating_backward(grad, logits, gating, config, backend="numpy", **options)
    assert_same_bytes(backward(cpu_floor, grad, logits, gating, config, **options), expected)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_stay_inside_the_inputs(cpu_floor, rng, dtype, at):
    for num_experts, top_k in ((1, 1), (7, 3), (37, 5), (64, 64)):
        for score in SCORES:
            config = RouterConfig(num_experts, top_k, score, renormalize="sum")
            logits, _ = case(rng, config, False, 5, DTYPES[dtype])
            gating = topk_gating(logits, config, backend="numpy")
            grad = np.ones_like(gating.topk_weights)
            mask = np.array([True, False, True, True, True])
            options = {"balance_loss_coef": 0.1, "z_loss_coef": 0.1, "balance_loss_scope": "sequence"}
            expected = topk_gating_backward(
                grad, logits, gating, config, token_mask=mask, sequence_ids=np.arange(5), backend="numpy", **options
            )
            held = Gating(guarded(gating.topk_idx, at=at), *gating[1:])
            got = backward(
                cpu_floor, guarded(grad, at=at), guarded(logits, at=at), held, config,
                token_mask=guarded(mask, at=at), sequence_ids=np.arange(5), **options,
            )  # fmt: skip
            assert_same_bytes(got, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_writes_stay_inside_the_outputs(cpu_floor, rng, dtype):
    """The extension's own functions, over outputs that end at an inaccessible page."""
    core = _backend.core
    for num_tokens, num_experts, top_k in ((1, 1, 1), (3, 7, 3), (5, 37, 33), (2, 65, 65)):
        config = RouterConfig(num_experts, top_k, renormalize="sum")
        fields, name = core_router(config), np.dtype(dtype).name
        logits = rng.normal(size=(num_tokens, num_experts)).astype(dtype)
        expected = topk_gating(logits, config, backend="numpy")
        idx, weights, counts = (guarded(poison(a.shape, a.dtype)) for a in expected)
        core.topk_gating(fields, logits, name, None, None, None, idx, weights, counts)
        for a, b in zip((idx, weights, counts), expected, strict=True):
            assert_same_bytes(np.array(a), b)
        grad, terms = guarded(poison(logits.shape, dtype)), guarded(poison(num_tokens, np.float64))
        core.topk_gating_backward(
            fields, weights, logits, name, idx, None, None, None, None, 2.0 * 0.05 / num_tokens, grad
        )
        exact = topk_gating_backward(weights, logits, expected, config, z_loss_coef=0.05, backend="numpy")
        assert_same_bytes(np.array(grad), exact)
        core.gating_loss_terms("softmax", logits, name, None, None, None, terms)
        assert np.isfinite(terms).all()
        choice = expert_choice_gating(logits, 3, backend="numpy")
        tokens = np.arange(num_tokens, dtype=np.int32)
        keys = guarded(poison((num_experts, num_tokens), name.replace("float", "int")))
        token_idx, token_weights = (guarded(poison(a.shape, a.dtype)) for a in choice[:2])
        core.expert_choice(logits, name, tokens, keys, token_idx, token_weights)
        assert_same_bytes(np.array(token_idx), choice.token_idx)
        assert_same_bytes(np.array(token_weights), choice.token_weights)


def test_slots_that_are_not_routed_contribute_nothing(floor, rng):
    """A NaN gradient or a NaN logit behind id -1 is never read into a sum."""
    for name in ("softmax", "softmax-renormalised", "deepseek-v3", "post", "sqrtsoftplus-bias"):
        config, _ = ROUTERS[name]
        logits, _ = case(rng, config, False, 6)
        gating = topk_gating(logits, config, backend=floor.backend)
        gating.topk_idx[1, 0] = -1
        gating.topk_idx[2] = -1
        grad = rng.normal(size=gating.topk_weights.shape).astype(np.float32)
        clean = backward(floor, grad, logits, gating, config)
        grad[1, 0] = np.nan
        grad[2] = np.nan
        logits[2] = np.nan
        dirty = backward(floor, grad, logits, gating, config)
        assert_same_bytes(clean[[0, 1, 3, 4, 5]], dirty[[0, 1, 3, 4, 5]])
        assert_same_bytes(dirty[2], np.zeros_like(dirty[2]))


def test_ids_that_come_twice_add_their_gradients(floor, rng):
    for config, _ in rules():
        logits = rng.normal(size=(3, 8))
        ids = rng.integers(0, 2, (3, config.top_k))
        gating = topk_gating(logits, config, topk_idx=ids, backend=floor.backend)
        grad = rng.normal(size=ids.shape)
        exact = oracle.gradient(logits, grad, ids, rule_of(config), np.ones(3, bool))
        got = backward(floor, grad, logits, gating, config)
        assert (np.abs(got - exact) <= 1e-13 * max(1.0, np.abs(exact).max())).all()


@pytest.mark.parametrize("score", SCORES)
def test_renormalised_top1_has_no_gradient(floor, rng, score):
    """Documented: such a router learns from its losses alone."""
    config = RouterConfig(16, 1, score, renormalize="sum")
    logits = rng.normal(0, 3, (20, 16)).astype(np.float32)
    gating = topk_gating(logits, config, backend=floor.backend)
    grad = backward(floor, rng.normal(size=(20, 1)).astype(np.float32), logits, gating, config)
    assert (grad == 0).all()


def test_softmax_and_renormalisation_leave_other_experts_alone(floor, rng):
    config = RouterConfig(32, 4, renormalize="sum")
    logits = rng.normal(0, 3, (20, 32)).astype(np.float32)
    gating = topk_gating(logits, config, backend=floor.backend)
    grad = backward(floor, rng.normal(size=(20, 4)).astype(np.float32), logits, gating, config)
    others = np.ones((20, 32), bool)
    np.put_along_axis(others, gating.topk_idx.astype(np.int64), False, axis=1)
    assert_same_bytes(grad[others], np.zeros(others.sum(), np.float32))


@pytest.mark.parametrize("renormalize", ["sum", "clamp"])
def test_an_eps_that_weighs_takes_the_dense_formula(floor, rng, renormalize):
    """Replayed ids far below the maximum: the sum is near eps or under it, row by row."""
    for eps in (1e-20, 1e-12, 1e-3, 0.5):
        config = RouterConfig(8, 2, renormalize=renormalize, renormalize_eps=eps)
        logits = rng.normal(size=(12, 8))
        logits[:, 0] = np.linspace(0, 60, 12)
        ids = np.tile([3, 5], (12, 1))
        gating = topk_gating(logits, config, topk_idx=ids, backend=floor.backend)
        grad = rng.normal(size=(12, 2))
        exact = oracle.gradient(logits, grad, ids, rule_of(config), np.ones(12, bool))
        assert_close(backward(floor, grad, logits, gating, config), exact, 1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_have_finite_gradients(floor, score):
    """sqrtsoftplus underflows where its derivative must not become 0 / 0."""
    z = np.array([[-800.0, -104.0, -90.0, -20.0, 0.0, 20.0, 90.0, 800.0]], np.float32)
    config = RouterConfig(8, 8, score)
    gating = topk_gating(z, config, backend=floor.backend)
    grad = backward(floor, np.ones((1, 8), np.float32), z, gating, config, balance_loss_coef=1.0, z_loss_coef=1.0)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_derivatives_are_accurate_through_the_threshold_of_sqrtsoftplus(floor, dtype):
    z = np.concatenate([np.linspace(-60, 60, 4001), np.linspace(-20.01, -19.99, 200)]).astype(dtype)[:, None]
    config = RouterConfig(1, 1, "sqrtsoftplus")
    gating = topk_gating(z, config, backend=floor.backend)
    grad = backward(floor, np.ones_like(gating.topk_weights), z, gating, config)
    wide = z.astype(np.longdouble)
    softplus = np.where(wide > 0, wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    exact = np.exp(np.where(wide > 0, 0, wide)) / (1 + np.exp(-np.abs(wide))) / (2 * np.sqrt(softplus))
    assert (np.abs(grad - exact) <= 16 * np.finfo(dtype).eps / 2 * exact).all()


def test_nan_rows_stay_where_they_are(floor, rng):
    config = RouterConfig(16, 3, renormalize="sum")
    logits = rng.normal(size=(9, 16)).astype(np.float32)
    gating = topk_gating(logits, config, backend=floor.backend)
    grad = rng.normal(size=(9, 3)).astype(np.float32)
    options = {"balance_loss_coef": 0.1, "z_loss_coef": 0.1}
    clean = backward(floor, grad, logits, gating, config, **options)
    logits[4, 2] = np.nan
    dirty = backward(floor, grad, logits, gating, config, **options)
    others = np.arange(9) != 4
    assert_same_bytes(clean[others], dirty[others])
    assert_same_bytes(dirty[4], np.full(16, np.nan, np.float32))


def test_no_real_tokens(floor):
    config = RouterConfig(8, 2)
    for num_tokens in (0, 3):
        logits = np.ones((num_tokens, 8), np.float32)
        mask = np.zeros(num_tokens, bool)
        gating = topk_gating(logits, config, token_mask=mask, backend=floor.backend)
        for scope, sequence in (("batch", None), ("sequence", np.arange(num_tokens))):
            options = {"token_mask": mask, "sequence_ids": sequence, "backend": floor.backend}
            assert balance_loss(logits, gating, config, scope=scope, **options) == 0.0
            grad = topk_gating_backward(
                gating.topk_weights, logits, gating, config, balance_loss_coef=1.0, z_loss_coef=1.0,
                balance_loss_scope=scope, **options,
            )  # fmt: skip
            assert_same_bytes(grad, np.zeros_like(logits))
        assert z_loss(logits, token_mask=mask, backend=floor.backend) == 0.0


def test_tokens_without_experts_count_as_tokens(floor, rng):
    """Not routed is not padding: such a token has no assignments, and its scores enter P."""
    config = RouterConfig(8, 2)
    logits = rng.normal(size=(6, 8))
    ids = topk_gating(logits, config).topk_idx.copy()
    ids[3] = -1
    gating = topk_gating(logits, config, topk_idx=ids, backend=floor.backend)
    exact = oracle.balance_rows(logits, ids, rule_of(config), np.ones(6, bool)).sum()
    assert abs(balance_loss(logits, gating, config, backend=floor.backend) - exact) < 1e-14


def test_bias_rule(floor):
    bias = np.array([0.5, -0.25, 0.0, 8.08], np.float32)
    counts = np.array([10, 20, 15, 15], np.int32)  # mean 15
    got = update_bias(bias, counts, rate=0.125, backend=floor.backend)
    assert_same_bytes(got, np.array([0.625, -0.375, 0.0, 8.08], np.float32))
    assert_same_bytes(bias, np.array([0.5, -0.25, 0.0, 8.08], np.float32))
    wide = update_bias(bias.astype(np.float64), counts.astype(np.int64))
    assert_same_bytes(wide, bias.astype(np.float64) + np.array([1e-3, -1e-3, 0, 0]))


def test_the_bias_rule_compares_exactly(floor):
    """A mean of 1/3 above: float32 arithmetic on such counts would call it equal."""
    counts = np.array([2**40, 2**40, 2**40 + 1], np.int64)
    got = update_bias(np.zeros(3, np.float32), counts, rate=1.0, backend=floor.backend)
    assert got.tolist() == [1.0, 1.0, -1.0]


def test_the_bias_rule_balances_a_skewed_router(rng):
    config = RouterConfig(16, 2, "sigmoid")
    logits = (rng.normal(size=(600, 16)) + np.linspace(-1, 1, 16)).astype(np.float32)
    bias = np.zeros(16, np.float32)
    for _ in range(300):
        bias = update_bias(bias, topk_gating(logits, config, bias=bias).tokens_per_expert, rate=2e-3)
    counts = topk_gating(logits, config, bias=bias).tokens_per_expert
    assert counts.max() <= 1.1 * counts.mean()
    assert pyroute.topk_gating(logits, config).tokens_per_expert.max() > 1.5 * counts.mean()


def test_low_precision_logits_have_float32_gradients(floor, rng):
    config = RouterConfig(16, 3)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        logits = rng.normal(size=(5, 16)).astype(dtype)
        gating = topk_gating(logits, config, backend=floor.backend)
        grad = np.ones((5, 3), np.float32)
        assert_same_bytes(
            backward(floor, grad, logits, gating, config),
            backward(floor, grad, logits.astype(np.float32), gating, config),
        )
