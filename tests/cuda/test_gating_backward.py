"""Gating's backward, losses, bias rule and expert choice on the emulated GPU: the bytes of the CPU floor."""

import numpy as np
import pytest
from conftest import assert_same_bytes
from test_gating import DTYPES, ROUTERS, hard_logits, weight_type

import pyroute
from cuda.emulated import launched, memory, to_device, to_host
from pyroute import Gating, RouterConfig, topk_gating_backward


def problem(rng, config, num_tokens, dtype, *, hard=True):
    """Logits, a gating with slots that are not routed and ids that come twice, gradients, a mask, sequences."""
    shape = (num_tokens, config.num_experts)
    z = hard_logits(rng, *shape, dtype) if hard else rng.normal(0, 2, shape).astype(dtype)
    slots = (num_tokens, config.top_k)
    ids = rng.integers(-1, config.num_experts, slots, np.int32)
    if num_tokens > 2:
        ids[2] = -1
        z[2] = 1
    grad = rng.normal(size=slots).astype(weight_type(dtype))
    counts = np.bincount(ids[ids >= 0], minlength=config.num_experts).astype(np.int32)
    gating = Gating(ids, np.zeros(slots, grad.dtype), counts)
    return z, gating, grad, rng.random(num_tokens) < 0.8


def on_gpu(value):
    if isinstance(value, tuple):
        items = [on_gpu(item) for item in value]
        return Gating(*items) if isinstance(value, Gating) else tuple(items)
    return to_device(value) if isinstance(value, np.ndarray) else value


def same(op, *args, **kwargs):
    expected = op(*args, backend="cpu", **kwargs)
    result = to_host(op(*map(on_gpu, args), **{name: on_gpu(value) for name, value in kwargs.items()}))
    assert_same_bytes(np.asarray(result), np.asarray(expected))
    memory.check()  # each array has pages of its own, of which a process has only so many


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(rng, name, dtype):
    config, _ = ROUTERS[name]
    for num_tokens in (0, 1, 20):
        z, gating, grad, mask = problem(rng, config, num_tokens, DTYPES[dtype])
        sequences = rng.integers(-3, 4, num_tokens)
        for kwargs in (
            {},
            {"token_mask": mask},
            {"balance_loss_coef": 0.3},
            {"z_loss_coef": 0.1},
            {"balance_loss_coef": 0.3, "z_loss_coef": 0.1, "token_mask": mask},
            {"balance_loss_coef": 0.3, "z_loss_coef": 0.1, "loss_scale": np.array(0.37)},
            {"z_loss_coef": 0.1, "token_mask": mask, "loss_scale": np.array(3.1)},
            {"balance_loss_coef": 1.0, "balance_loss_scope": "sequence", "sequence_ids": sequences, "token_mask": mask},
        ):
            same(topk_gating_backward, grad, z, gating, config, **kwargs)


@pytest.mark.parametrize("num_experts", [1, 32, 33, 64, 100, 128, 256, 257, 512, 1000, 1024, 1030])
def test_every_number_of_experts(rng, num_experts):
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for renormalize in (None, "sum"):
            config = RouterConfig(num_experts, min(num_experts, 9), score, renormalize=renormalize)
            for hard in (False, True):
                z, gating, grad, _ = problem(rng, config, 5, np.float32, hard=hard)
                for kwargs in ({}, {"balance_loss_coef": 0.3, "z_loss_coef": 0.1}):
                    same(topk_gating_backward, grad, z, gating, config, **kwargs)


def test_which_kernel(rng):
    for num_experts, dtype, kernel in (
        (8, np.float32, "1"), (33, np.float32, "2"), (128, np.float32, "4"), (129, np.float32, "8"),
        (512, np.float32, "16"), (1024, np.float32, "32"), (1025, np.float32, "any_float32"),
        (8, np.float64, "any_float64"),
    ):  # fmt: skip
        config = RouterConfig(num_experts, 3)
        z, gating, grad, _ = problem(rng, config, 3, dtype)
        launched()
        same(topk_gating_backward, grad, z, gating, config)
        assert launched() == [f"topk_gating_backward_{kernel}"]


def test_the_same_id_many_times(rng):
    for num_experts, top_k in ((40, 33), (64, 64), (1100, 80)):
        config = RouterConfig(num_experts, top_k, "sigmoid", renormalize="sum")
        z, gating, grad, _ = problem(rng, config, 4, np.float32)
        few = Gating(gating.topk_idx % 3, *gating[1:])
        same(topk_gating_backward, grad, z, few, config)


def test_an_eps_that_weighs(rng):
    for rule in ({"renormalize": "sum"}, {"renormalize": "clamp"}):
        for eps in (0.0, 1e-3, 0.5, 10.0):
            config = RouterConfig(48, 4, **rule, renormalize_eps=eps)
            z, gating, grad, _ = problem(rng, config, 30, np.float32)
            same(topk_gating_backward, grad, z, gating, config)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_sequences_of_any_ids(rng, dtype):
    config = RouterConfig(24, 3, "sigmoid")
    z, gating, grad, mask = problem(rng, config, 70, np.float32, hard=False)
    info = np.iinfo(dtype)
    for ids in (
        rng.choice(np.array([info.min, info.max, 3], dtype), 70),
        np.arange(70).astype(dtype),
        rng.integers(0, 9, 70).astype(dtype),
        rng.integers(info.min, info.max, 70, dtype),
    ):
        kwargs = {"sequence_ids": ids, "token_mask": mask}
        same(pyroute.balance_loss, z, gating, config, scope="sequence", **kwargs)
        same(
            topk_gating_backward,
            grad,
            z,
            gating,
            config,
            balance_loss_coef=1.0,
            balance_loss_scope="sequence",
            **kwargs,
        )


def ids_that_meet(count, table_size):
    """Sequence ids whose place in csrc/cuda/gating_losses.cuh's table is its last one: looking goes on at its start."""
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    last = 2**64 - 2**64 // table_size
    return np.array([(last + i) * inverse % 2**64 for i in range(count)], np.uint64)


@pytest.mark.parametrize("seed", range(4), indirect=True)
def test_sequences_that_meet_in_the_table(rng, seed):
    """Tokens of one sequence find its first one behind others, whichever of them comes first."""
    config, num_tokens = RouterConfig(24, 3), 70
    z, gating, grad, mask = problem(rng, config, num_tokens, np.float32, hard=False)
    met = ids_that_meet(10, 2 << num_tokens.bit_length())
    for ids in (met[rng.integers(0, 10, num_tokens)], rng.permutation(ids_that_meet(num_tokens, 256))):
        kwargs = {"sequence_ids": ids, "token_mask": mask}
        same(pyroute.balance_loss, z, gating, config, scope="sequence", **kwargs)
        coefs = {"balance_loss_coef": 1.0, "balance_loss_scope": "sequence"}
        same(topk_gating_backward, grad, z, gating, config, **coefs, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 64, 65, 400])
def test_losses(rng, num_tokens, dtype):
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        config = RouterConfig(40, 4, score)
        z, gating, _, mask = problem(rng, config, num_tokens, DTYPES[dtype], hard=num_tokens == 65)
        for kwargs in ({}, {"token_mask": mask}, {"token_mask": np.zeros(num_tokens, bool)}):
            same(pyroute.balance_loss, z, gating, config, **kwargs)
            same(pyroute.z_loss, z, **kwargs)
        loads = rng.integers(0, 9, 40), 4 * num_tokens + 1
        for counts in (loads, (loads[0].astype(np.int32), loads[1])):
            same(pyroute.balance_loss, z, gating, config, scope="global", global_counts=counts, token_mask=mask)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_update_bias(rng, dtype):
    for num_experts in (1, 8, 300):
        bias = rng.normal(size=num_experts).astype(dtype)
        for counts in (
            rng.integers(0, 50, num_experts),
            np.full(num_experts, 3),
            rng.integers(0, 9, num_experts) << 50,
        ):
            same(pyroute.update_bias, bias, counts, 1e-3)
        same(pyroute.update_bias, bias, rng.integers(0, 9, num_experts).astype(np.int32), 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 33, 600])
def test_expert_choice(rng, num_tokens, dtype):
    for num_experts, capacity in ((8, 5), (33, 40), (1, 700), (4, 0)):
        z = hard_logits(rng, num_tokens, num_experts, DTYPES[dtype])
        for mask in (None, rng.random(num_tokens) < 0.7):
            expected = pyroute.expert_choice_gating(z, capacity, token_mask=mask, backend="cpu")
            got = to_host(pyroute.expert_choice_gating(to_device(z), capacity, token_mask=on_gpu(mask)))
            assert got.num_tokens == num_tokens
            assert_same_bytes(got.token_idx, expected.token_idx)
            assert_same_bytes(got.token_weights, expected.token_weights)
            memory.check()


@pytest.mark.parametrize("seed", range(1, 4), indirect=True)
def test_any_order_of_threads(rng, seed):
    config = RouterConfig(64, 6, renormalize="sum")
    z, gating, grad, mask = problem(rng, config, 50, np.float32, hard=False)
    sequences = rng.integers(0, 5, 50)
    same(topk_gating_backward, grad, z, gating, config, balance_loss_coef=1.0, z_loss_coef=0.5, token_mask=mask)
    same(pyroute.balance_loss, z, gating, config, scope="sequence", sequence_ids=sequences)
    expected = pyroute.expert_choice_gating(z, 20, backend="cpu")
    for a, b in zip(to_host(pyroute.expert_choice_gating(to_device(z), 20)), expected, strict=True):
        assert np.array_equal(a, b)


def test_by_token_needs_an_array_library(rng):
    choice = pyroute.expert_choice_gating(to_device(rng.normal(size=(6, 4)).astype(np.float32)), 2)
    with pytest.raises(TypeError, match=r"to_gating: token_idx must be NumPy or CuPy arrays"):
        choice.to_gating()
