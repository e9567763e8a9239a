"""RouterConfig: what it accepts, the sentence for what it does not, and the string that carries it."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pyroute import RouterConfig


def test_defaults_are_plain_softmax_top_k():
    config = RouterConfig(64, 6)
    assert (config.score, config.score_stage, config.num_groups, config.topk_groups) == ("softmax", "pre", 1, 1)
    assert (config.renormalize, config.renormalize_eps, config.scaling_factor) == (None, 1e-20, 1.0)
    assert (config.group_score, config.weight_on) == ("max", "output")


def test_is_frozen_hashable_and_copies():
    config = RouterConfig(256, 8, score="sigmoid", num_groups=8, topk_groups=4, group_score="top2_sum")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 4
    assert {config: 1}[dataclasses.replace(config, top_k=8)] == 1
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, top_k=4) != config
    with pytest.raises(ValueError, match="top_k"):
        dataclasses.replace(config, top_k=257)


def test_bool_renormalize_is_sum_or_none():
    assert RouterConfig(8, 2, renormalize=True) == RouterConfig(8, 2, renormalize="sum")
    assert RouterConfig(8, 2, renormalize=False) == RouterConfig(8, 2)
    assert RouterConfig(8, 2, renormalize=True).renormalize == "sum"


def test_numpy_numbers_are_the_same_config():
    plain = RouterConfig(8, 2, scaling_factor=2.5)
    config = RouterConfig(np.int64(8), np.uint8(2), num_groups=np.int32(1), scaling_factor=np.float32(2.5))
    assert config == plain
    assert hash(config) == hash(plain)
    assert str(config) == str(plain)
    assert type(config.num_experts) is type(config.top_k) is type(config.num_groups) is int
    assert RouterConfig(8, 2, scaling_factor=2) == RouterConfig(8, 2, scaling_factor=2.0)
    assert str(RouterConfig(8, 2, renormalize_eps=-0.0)) == str(RouterConfig(8, 2, renormalize_eps=0.0))
    assert str(RouterConfig(8, 2, scaling_factor=2)) == str(RouterConfig(8, 2, scaling_factor=2.0))


@pytest.mark.parametrize(("group_score", "expected"), [("max", 1), ("top2_sum", 2), ("topn_sum", 3)])
def test_group_topn(group_score, expected):
    config = RouterConfig(160, 9, num_groups=8, topk_groups=3, group_score=group_score)
    assert config.group_topn == expected
    assert config.experts_per_group == 20


BAD_VALUES = [
    ({"num_experts": 0}, "num_experts must be in 1..2147483647, got 0"),
    ({"num_experts": -4}, "num_experts must be in 1..2147483647, got -4"),
    ({"num_experts": 2**31}, "num_experts must be in 1..2147483647, got 2147483648"),
    ({"top_k": 0}, "top_k must be in 1..num_experts (64), got 0"),
    ({"top_k": 65}, "top_k must be in 1..num_experts (64), got 65"),
    ({"score": "tanh"}, "score must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got 'tanh'"),
    ({"score": None}, "score must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got None"),
    ({"score_stage": "mid"}, "score_stage must be one of 'pre', 'post', got 'mid'"),
    ({"group_score": "mean"}, "group_score must be one of 'max', 'top2_sum', 'topn_sum', got 'mean'"),
    ({"weight_on": "gate"}, "weight_on must be one of 'output', 'pre_down', 'input', got 'gate'"),
    ({"renormalize": "l2"}, "renormalize must be one of 'sum', 'clamp', None, got 'l2'"),
    ({"renormalize_eps": -1e-20}, "renormalize_eps must be finite and at least 0.0, got -1e-20"),
    ({"renormalize_eps": float("nan")}, "renormalize_eps must be finite and at least 0.0, got nan"),
    ({"scaling_factor": float("inf")}, "scaling_factor must be finite, got inf"),
    ({"scaling_factor": 0}, "scaling_factor must be above 0, got 0.0"),
    ({"scaling_factor": -1}, "scaling_factor must be above 0, got -1.0"),
    ({"num_groups": 0}, "num_groups must be in 1..num_experts (64), got 0"),
    ({"num_groups": 65}, "num_groups must be in 1..num_experts (64), got 65"),
    ({"num_groups": 7}, "num_groups must be a divisor of num_experts (64), got 7"),
    ({"topk_groups": 2}, "topk_groups must be in 1..num_groups (1), got 2"),
    ({"num_groups": 8, "topk_groups": 9}, "topk_groups must be in 1..num_groups (8), got 9"),
    (
        {"num_groups": 16, "topk_groups": 1},
        "topk_groups must be enough groups of 4 to hold top_k (6) experts, got 1",
    ),
    (
        {"num_groups": 64, "topk_groups": 8, "group_score": "top2_sum"},
        "group_score must be 'max' with groups of one expert, got 'top2_sum'",
    ),
    (
        {"top_k": 2, "num_groups": 8, "topk_groups": 4, "group_score": "topn_sum"},
        "group_score must be 'max' or 'top2_sum' with top_k (2) below topk_groups (4), got 'topn_sum'",
    ),
    ({"score": "sigmoid", "score_stage": "post"}, "score_stage must be 'pre' with score 'sigmoid', got 'post'"),
    (
        {"score": "sqrtsoftplus", "score_stage": "post"},
        "score_stage must be 'pre' with score 'sqrtsoftplus', got 'post'",
    ),
    ({"score_stage": "post", "num_groups": 8, "topk_groups": 4}, "num_groups must be 1 with score_stage 'post', got 8"),
    (
        {"score_stage": "post", "renormalize": True},
        "renormalize must be None with score_stage 'post', whose weights sum to 1, got 'sum'",
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), BAD_VALUES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_value_is_a_value_error_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared
        RouterConfig(**{"num_experts": 64, "top_k": 6, **fields})
    assert str(error.value) == "RouterConfig: " + sentence


BAD_TYPES = [
    *itertools.product(("num_experts", "top_k", "num_groups", "topk_groups"), (2.0, "2", None, True)),
    *itertools.product(("score", "score_stage", "group_score", "weight_on"), (1, True, b"max")),
    *itertools.product(("renormalize_eps", "scaling_factor"), ("1", None, True, 1j)),
    *itertools.product(("renormalize",), (1, 0, 1.0)),
]


@pytest.mark.parametrize(("field", "value"), BAD_TYPES)
def test_bad_type_is_a_type_error_that_names_the_field(field, value):
    with pytest.raises(TypeError, match=f"^RouterConfig: {field} must be "):
        RouterConfig(**{"num_experts": 8, "top_k": 2, field: value})


def test_ordinary_edges():
    RouterConfig(1, 1)
    RouterConfig(7, 7)
    RouterConfig(8, 8, num_groups=8, topk_groups=8)
    RouterConfig(1, 1, score="sigmoid", group_score="top2_sum")  # one group: its score is not used
    RouterConfig(1024, 32, num_groups=64, topk_groups=2)
    RouterConfig(8, 2, renormalize="sum", renormalize_eps=0)


def legal_configs(rng, count):
    """Random legal configs over all fields, scaling factors and eps with every bit in use."""
    while count:
        try:
            config = RouterConfig(
                int(rng.integers(1, 300)),
                int(rng.integers(1, 12)),
                score=str(rng.choice(["softmax", "sigmoid", "sqrtsoftplus"])),
                score_stage=str(rng.choice(["pre", "post"], p=[0.9, 0.1])),
                num_groups=int(rng.choice([1, 2, 4, 8])),
                topk_groups=int(rng.integers(1, 5)),
                group_score=str(rng.choice(["max", "top2_sum", "topn_sum"])),
                renormalize=[None, "sum", "clamp"][rng.integers(3)],
                renormalize_eps=float(10.0 ** rng.uniform(-320, 3)),
                scaling_factor=float(10.0 ** rng.uniform(-300, 300)),
                weight_on=str(rng.choice(["output", "pre_down", "input"])),
            )
        except ValueError:
            continue
        count -= 1
        yield config


def test_string_round_trips_exactly(rng):
    for config in legal_configs(rng, 500):
        back = RouterConfig.from_string(str(config))
        assert back == config
        assert str(back) == str(config)


def test_string_names_only_what_differs_from_the_defaults():
    assert str(RouterConfig(8, 2)) == "num_experts=8,top_k=2"
    config = RouterConfig(
        256, 8, "sigmoid", "pre", 8, 4, "top2_sum", renormalize=True, scaling_factor=2.5, weight_on="pre_down"
    )
    assert str(config) == (
        "num_experts=256,top_k=8,score=sigmoid,num_groups=8,topk_groups=4,group_score=top2_sum,"
        "renormalize=sum,scaling_factor=2.5,weight_on=pre_down"
    )


def test_string_is_the_same_in_another_process():
    code = "import pyroute; print(pyroute.RouterConfig(8, 2, renormalize=True, scaling_factor=0.1 + 0.2))"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert text == str(RouterConfig(8, 2, renormalize=True, scaling_factor=0.1 + 0.2))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "text must be 'field=value' items with each field once, got ''"),
        ("num_experts", "num_experts must be an integer, got ''"),
        ("num_experts=8", "text must be a text with num_experts and top_k, got 'num_experts=8'"),
        ("num_experts=8,top_k=2,depth=3", "text must be 'field=value' items with each field once, got "),
        ("num_experts=8,top_k=2,top_k=3", "text must be 'field=value' items with each field once, got "),
        ("num_experts=8,top_k=2,", "text must be 'field=value' items with each field once, got "),
        ("num_experts=8,top_k=two", "top_k must be an integer, got 'two'"),
        ("num_experts=8,top_k=2,scaling_factor=x", "scaling_factor must be a number, got 'x'"),
    ],
)
def test_bad_string_is_a_value_error(text, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared
        RouterConfig.from_string(text)
    assert str(error.value).startswith("RouterConfig.from_string: " + sentence)


def test_string_with_an_illegal_value_is_the_constructors_error():
    with pytest.raises(ValueError, match=r"^RouterConfig: top_k must be in"):
        RouterConfig.from_string("num_experts=8,top_k=9")


@pytest.mark.parametrize("text", [None, b"num_experts=8,top_k=2", 8])
def test_string_of_another_type(text):
    with pytest.raises(TypeError, match=r"^RouterConfig\.from_string: text must be a string, got "):
        RouterConfig.from_string(text)
