"""Gating on the emulated GPU: the bytes of the CPU floor, for every router, type and kernel."""

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bytes
from test_gating import DTYPES, ROUTERS, hard_logits, weight_type

import pyroute
from cuda.emulated import launched, memory, to_device, to_host
from pyroute import RouterConfig, topk_gating

V3_GROUPS = {"num_groups": 8, "topk_groups": 4, "group_score": "top2_sum"}


def on_gpu(x, **where):
    return None if x is None else to_device(x, **where)


def assert_cpus_bytes(config, logits, *, bias=None, **kwargs):
    expected = topk_gating(logits, config, bias=bias, backend="cpu", **kwargs)
    kwargs = {name: on_gpu(value) for name, value in kwargs.items()}
    gating = to_host(topk_gating(on_gpu(logits), config, bias=on_gpu(bias), **kwargs))
    for name in gating._fields:
        assert_same_bytes(getattr(gating, name), getattr(expected, name))
    memory.check()  # each array has pages of its own, of which a process has only so many


def bias_of(rng, config, dtype, with_bias=True):
    return rng.normal(0, 0.2, config.num_experts).astype(weight_type(dtype)) if with_bias else None


def one_config_of_each(sizes, scores=("softmax", "sigmoid", "sqrtsoftplus")):
    return [RouterConfig(e, k, score, renormalize="sum") for e, k in sizes for score in scores]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(rng, name, dtype):
    config, with_bias = ROUTERS[name]
    bias = bias_of(rng, config, DTYPES[dtype], with_bias)
    for num_tokens in (0, 1, 33):
        logits = hard_logits(rng, num_tokens, config.num_experts, DTYPES[dtype])
        mask = rng.random(num_tokens) < 0.8
        replay = rng.integers(-1, config.num_experts, (num_tokens, config.top_k), np.int32)
        for kwargs in ({}, {"token_mask": mask}, {"topk_idx": replay}, {"topk_idx": replay, "token_mask": mask}):
            assert_cpus_bytes(config, logits, bias=bias, **kwargs)


@pytest.mark.parametrize("name", pyroute.presets())
def test_every_released_model(rng, name):
    config = RouterConfig.preset(name)
    logits = rng.normal(0, 2, (35, config.num_experts)).astype(ml_dtypes.bfloat16).astype(np.float32)
    for with_bias in (False, True):
        assert_cpus_bytes(config, logits, bias=bias_of(rng, config, np.float32, with_bias))


SIZES = (
    (8, 2), (9, 9), (15, 3), (16, 4), (17, 5), (32, 8), (33, 8), (60, 4), (64, 16), (65, 1), (100, 32), (128, 8),
    (129, 33), (160, 6), (255, 8), (256, 8), (257, 8), (384, 8), (512, 10), (513, 3), (1000, 40), (1024, 8),
    (1025, 2),
)  # fmt: skip


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_every_number_of_experts(rng, num_experts, top_k):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        logits = hard_logits(rng, 9, num_experts, dtype)
        for score in ("softmax", "sigmoid", "sqrtsoftplus"):
            config = RouterConfig(num_experts, top_k, score, renormalize="sum")
            assert_cpus_bytes(config, logits)
            assert_cpus_bytes(config, logits, bias=bias_of(rng, config, dtype))


GROUPS = (
    # experts, top_k, groups, kept, how they are ranked, the kernel that takes it
    (256, 8, 8, 4, "top2_sum", "topk_gating_32x8"), (64, 8, 8, 4, "top2_sum", "topk_gating_8x8"),
    (64, 4, 16, 3, "max", "topk_gating_16x8"), (160, 6, 8, 3, "max", "topk_gating_32x8"),
    (200, 8, 4, 2, "top2_sum", "topk_gating_32x8"), (96, 8, 3, 1, "top2_sum", "topk_gating_16x8"),
    (32, 2, 32, 2, "max", "topk_gating_32x8"), (62, 3, 31, 2, "top2_sum", "topk_gating_32x8"),
    (1024, 8, 32, 4, "top2_sum", "topk_gating_32x32"), (264, 8, 24, 5, "max", "topk_gating_32x16"),
    (960, 8, 3, 2, "top2_sum", "topk_gating_any_float32"), (256, 8, 64, 9, "max", "topk_gating_any_float32"),
    (256, 12, 8, 4, "topn_sum", "topk_gating_any_float32"), (18, 2, 9, 1, "top2_sum", "topk_gating_16x8"),
)  # fmt: skip


@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "kept", "score", "kernel"), GROUPS)
def test_groups(rng, num_experts, top_k, num_groups, kept, score, kernel):
    launched()
    for kind in ("softmax", "sigmoid"):
        config = RouterConfig(
            num_experts, top_k, kind, num_groups=num_groups, topk_groups=kept, group_score=score, renormalize="sum"
        )
        for logits in (
            hard_logits(rng, 20, num_experts),
            rng.integers(-2, 3, (9, num_experts)).astype(np.float32),
            rng.normal(0, 3, (5, num_experts)).astype(np.float32),
        ):
            assert_cpus_bytes(config, logits)
            assert_cpus_bytes(config, logits, bias=bias_of(rng, config, np.float32))
    assert set(launched()) == {kernel}


def test_which_kernel(rng):
    """The cheapest that holds the experts."""
    for num_experts, kernel in (
        (1, "8x1"), (8, "8x1"), (16, "8x2"), (32, "8x4"), (64, "8x8"), (128, "16x8"), (256, "32x8"), (512, "32x16"),
        (1024, "32x32"), (1025, "any_float32"),
    ):  # fmt: skip
        launched()
        assert_cpus_bytes(RouterConfig(num_experts, 1), rng.normal(size=(3, num_experts)).astype(np.float32))
        assert launched() == [f"topk_gating_{kernel}"]


@pytest.mark.parametrize("kind", ["equal", "quantised", "nan", "all-nan", "-inf", "inf", "zeros", "wide"])
@pytest.mark.parametrize("num_experts", [8, 40, 128, 256, 300])
def test_ties_and_what_is_no_number(rng, num_experts, kind):
    shape = (13, num_experts)
    z = rng.normal(0, 3, shape)
    some = rng.random(shape) < 0.2
    z = {
        "equal": np.zeros(shape),
        "quantised": np.round(z / 3),
        "nan": np.where(some, np.nan, z),
        "all-nan": np.full(shape, np.nan),
        "-inf": np.where(rng.random(shape) < 0.97, -np.inf, z),
        "inf": np.where(some, np.inf, z),
        "zeros": np.where(some, 0.0, -0.0),
        "wide": z * 40,
    }[kind].astype(np.float32)
    top_k = min(9, num_experts)
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        config = RouterConfig(num_experts, top_k, score, renormalize="sum")
        grouped = RouterConfig(num_experts, top_k // 2, score, num_groups=4, topk_groups=2, group_score="top2_sum")
        bias = bias_of(rng, config, np.float32)
        for rule in (config, grouped):
            assert_cpus_bytes(rule, z)
            assert_cpus_bytes(rule, z, bias=bias)
            assert_cpus_bytes(rule, z, bias=np.where(rng.random(num_experts) < 0.1, np.nan, bias).astype(np.float32))
            assert_cpus_bytes(rule, z, bias=np.where(rng.random(num_experts) < 0.1, -np.inf, bias).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_experts", [64, 256])
def test_views_at_any_address(rng, num_experts, dtype):
    config = RouterConfig(num_experts, 8, "sigmoid", renormalize="sum")
    logits = rng.normal(size=(5, num_experts)).astype(DTYPES[dtype])
    bias = bias_of(rng, config, np.float32)
    expected = topk_gating(logits, config, bias=bias, backend="cpu")
    for where in ({"offset": 1}, {"offset": 2}, {"at": "end"}):
        gating = to_host(topk_gating(on_gpu(logits, **where), config, bias=on_gpu(bias, **where)))
        for a, b in zip(gating, expected, strict=True):
            assert_same_bytes(a, b)


def test_bad_ids_are_not_routed(rng):
    logits = rng.normal(size=(7, 20)).astype(np.float32)
    for dtype in (np.int32, np.int64, np.int8, np.uint64):
        ids = rng.integers(0, 20, (7, 4)).astype(dtype)
        ids[0] = np.array([-1, 20, 100, 19]).astype(dtype)
        ids[1, 0] = np.iinfo(dtype).max
        ids[2] = np.iinfo(dtype).min if dtype != np.uint64 else 2**32 + 1
        known = np.where((ids >= 0) & (ids < 20), ids, dtype(0)).astype(np.int32)
        known[~((ids >= 0) & (ids < 20))] = -1
        for config in (RouterConfig(20, 4, renormalize="sum"), RouterConfig(20, 4, score_stage="post")):
            gating = to_host(topk_gating(on_gpu(logits), config, topk_idx=on_gpu(ids)))
            for a, b in zip(gating, topk_gating(logits, config, topk_idx=known, backend="cpu"), strict=True):
                assert_same_bytes(a, b)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 31, 64, 1100])
def test_any_number_of_tokens(rng, num_tokens):
    """One block, one warp to a block, full blocks that come again."""
    for num_experts in (8, 64, 160):
        config = RouterConfig(num_experts, 3, "sigmoid", renormalize="sum")
        assert_cpus_bytes(config, rng.normal(size=(num_tokens, num_experts)).astype(np.float32))


@pytest.mark.parametrize("seed", range(1, 4), indirect=True)
def test_any_order_of_threads(rng, seed):
    config = RouterConfig(256, 8, "sigmoid", **V3_GROUPS, renormalize="sum", scaling_factor=2.5)
    logits = rng.normal(size=(40, 256)).astype(np.float32)
    assert_cpus_bytes(config, logits, bias=bias_of(rng, config, np.float32))
    assert_cpus_bytes(RouterConfig(64, 8), logits[:, :64])
    assert_cpus_bytes(RouterConfig(24, 6, score_stage="post"), logits[:, :24])


def test_a_long_list(rng):
    for num_experts, top_k in ((1024, 1024), (300, 299), (64, 64), (7, 7)):
        logits = np.round(rng.normal(0, 3, (3, num_experts)), 1).astype(np.float32)
        assert_cpus_bytes(RouterConfig(num_experts, top_k, "sigmoid", renormalize="sum"), logits)


def random_config(rng):
    num_groups = int(rng.choice([1, 1, 1, 2, 3, 4, 8, 16, 33]))
    size = int(rng.integers(1, 12 if num_groups > 1 else 300))
    num_experts = num_groups * size
    kept = int(rng.integers(1, num_groups + 1))
    top_k = int(rng.integers(1, min(40, kept * size) + 1))
    rules = {"score": str(rng.choice(["softmax", "sigmoid", "sqrtsoftplus"]))}
    if num_groups > 1:
        rules |= {"num_groups": num_groups, "topk_groups": kept, "group_score": "max"}
        if size >= 2:
            rules["group_score"] = str(rng.choice(["max", "top2_sum", "topn_sum"] if top_k >= kept else ["top2_sum"]))
    elif rules["score"] == "softmax" and rng.random() < 0.3:
        return RouterConfig(num_experts, top_k, score_stage="post", scaling_factor=1.5)
    renormalize = rng.choice(["sum", "clamp", ""])
    return RouterConfig(
        num_experts, top_k, **rules, renormalize=str(renormalize) or None,
        renormalize_eps=float(rng.choice([0.0, 1e-20, 1e-2])), scaling_factor=float(rng.choice([1.0, 2.5])),
    )  # fmt: skip


@pytest.mark.parametrize("start", range(6))
def test_random_routers(start):
    rng = np.random.default_rng(start)
    for _ in range(25):
        config = random_config(rng)
        dtype = DTYPES[str(rng.choice(list(DTYPES)))]
        num_tokens = int(rng.integers(1, 20))
        logits = hard_logits(rng, num_tokens, config.num_experts, dtype)
        if rng.random() < 0.5:
            logits = rng.normal(0, 2, logits.shape).astype(dtype)
        mask = rng.random(num_tokens) < 0.8 if rng.random() < 0.3 else None
        assert_cpus_bytes(config, logits, bias=bias_of(rng, config, dtype, rng.random() < 0.5), token_mask=mask)
