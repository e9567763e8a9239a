"""RouterConfig: what it accepts, the sentence for what it does not, and the string that carries it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyroute
from pyroute import RouterConfig, router_models
from pyroute.router_presets import model_shape


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
        {"top_k": 5, "num_groups": 16, "topk_groups": 1},
        "topk_groups must be enough groups of 4 to hold top_k (5) experts, got 1",
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


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(1, 1),
        RouterConfig(7, 7),
        RouterConfig(8, 8, num_groups=8, topk_groups=8),
        RouterConfig(1, 1, score="sigmoid", group_score="top2_sum"),  # one group: its score is not used
        RouterConfig(1024, 32, num_groups=64, topk_groups=2),
        RouterConfig(8, 2, renormalize="sum", renormalize_eps=0),
    ],
    ids=str,
)
def test_ordinary_edges(config):
    assert RouterConfig.from_string(str(config)) == config


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


# --- presets ----------------------------------------------------------------------------------------------------------


def test_presets_are_sorted_names_of_legal_configs():
    names = pyroute.presets()
    assert list(names) == sorted(set(names))
    for name in names:
        config = RouterConfig.preset(name)
        assert RouterConfig.from_string(str(config)) == config
        shape = model_shape(name)
        assert (shape.num_experts, shape.top_k) == (config.num_experts, config.top_k)
        assert shape.hidden % 64 == 0
        assert shape.intermediate % 64 == 0
        assert shape.shared_intermediate % 64 == 0
        assert shape.activation in ("swiglu", "swiglu_clamp", "swiglu_oai")


def test_presets_hold_every_model_that_is_promised():
    promised = [
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseek-v3",
        "deepseek-v4",
        "kimi-k2",
        "mixtral",
        "qwen2-moe",
        "qwen3-moe",
        "qwen3-next",
        "gpt-oss",
        "llama4",
        "glm-4.5",
        "minimax-m2",
        "ernie-4.5",
        "granite-moe",
        "olmoe",
        "lfm2-moe",
    ]
    assert set(promised) <= set(pyroute.presets())


@pytest.mark.parametrize("call", [RouterConfig.preset, model_shape])
def test_unknown_preset(call):
    with pytest.raises(
        ValueError, match=r"(preset|model_shape): name must be one of pyroute.presets\(\), got 'gpt-5' "
    ):
        call("gpt-5")
    with pytest.raises(TypeError, match=r"name must be a string, got int"):
        call(3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("Deepseek_V3", "'deepseek-v3' or"), ("Mixtral-8x7B", "'mixtral-8x22b' or 'mixtral'"), ("kimi", "'kimi-k2'")],
)
def test_unknown_preset_names_those_that_are_near(name, near):
    with pytest.raises(ValueError, match=rf"got '{name}' \(did you mean {near}.*\?\)$"):
        RouterConfig.preset(name)


# --- a model's own configuration --------------------------------------------------------------------------------------


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 2048,
}
# What the released config.json files say about routing.
RELEASED = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek-v4": {
        "model_type": "deepseek_v4",
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "kimi-k2": {
        **DEEPSEEK_V3,
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
    },
    "glm-4.5": {
        "model_type": "glm4_moe",
        "n_routed_experts": 160,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "qwen3-next": {
        "model_type": "qwen3_next",
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": {"model_type": "llama4_text", "num_local_experts": 16, "num_experts_per_tok": 1},
        "vision_config": {"model_type": "llama4_vision_model"},
    },
    "minimax-m2": {
        "model_type": "minimax_m2",
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
    "ernie-4.5": {"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6, "moe_norm_min": 1e-12},
    "granite-moe": {"model_type": "granitemoe", "num_local_experts": 32, "num_experts_per_tok": 8},
    "olmoe": {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    "lfm2-moe": {
        "model_type": "lfm2_moe",
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configuration_gives_the_preset(name):
    assert RouterConfig.from_model_config(RELEASED[name]) == RouterConfig.preset(name)


def test_model_config_from_a_file_a_folder_and_an_object(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    expected = RouterConfig.preset("deepseek-v3")
    assert RouterConfig.from_model_config(tmp_path / "config.json") == expected
    assert RouterConfig.from_model_config(str(tmp_path)) == expected

    class Config:
        def to_dict(self):
            return DEEPSEEK_V3

    assert RouterConfig.from_model_config(Config()) == expected
    sentence = r"^RouterConfig.from_model_config: model_config must be a file or folder that exists, got \S*ing.json$"
    with pytest.raises(FileNotFoundError, match=sentence):
        RouterConfig.from_model_config(tmp_path / "nothing.json")


def test_a_file_that_is_no_configuration_is_one_sentence(tmp_path):
    call = r"^RouterConfig\.from_model_config: model_config must be "
    for content in ("[" * 100_000, '{"a":' * 100_000, "", "{", '{"num_experts": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=call + r"the path of a JSON file, got .*config\.json \("):
            RouterConfig.from_model_config(tmp_path)
    with pytest.raises(OSError, match=call + r"a file that can be read, got .*name too long"):
        RouterConfig.from_model_config(json.dumps(DEEPSEEK_V3 | {"architectures": ["x" * 5000]}))
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=call + r"a file that can be read, got .*config\.json"):
        RouterConfig.from_model_config(tmp_path / "folder")


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_model_config_of_a_multimodal_model(key):
    outer = {"model_type": "some_vl", "vision_config": {"hidden_size": 8}, key: DEEPSEEK_V3}
    assert RouterConfig.from_model_config(outer) == RouterConfig.preset("deepseek-v3")
    unnamed = {"model_type": "mixtral", key: without(RELEASED["mixtral"], "model_type")}
    assert RouterConfig.from_model_config(unnamed) == RouterConfig.preset("mixtral")
    nested = {"model_type": "omni", "thinker_config": outer}
    assert RouterConfig.from_model_config(nested) == RouterConfig.preset("deepseek-v3")


@pytest.mark.parametrize(
    ("renamed", "to"),
    [
        ("n_routed_experts", "num_local_experts"),
        ("n_routed_experts", "num_experts"),
        ("n_routed_experts", "moe_num_experts"),
        ("num_experts_per_tok", "num_experts_per_token"),
        ("num_experts_per_tok", "experts_per_token"),
        ("num_experts_per_tok", "moe_k"),
        ("num_experts_per_tok", "moe_topk"),
        ("num_experts_per_tok", "moe_top_k"),
        ("num_experts_per_tok", "top_k"),
        ("n_group", "num_expert_group"),
        ("norm_topk_prob", "moe_renormalize"),
        ("routed_scaling_factor", "router_scaling_factor"),
        ("routed_scaling_factor", "route_scale"),
        ("scoring_func", "score_func"),
        ("scoring_func", "score_function"),
        ("scoring_func", "moe_router_activation_func"),
    ],
)
def test_every_spelling(renamed, to):
    config = {**without(DEEPSEEK_V3, renamed), to: DEEPSEEK_V3[renamed]}
    assert RouterConfig.from_model_config(config) == RouterConfig.preset("deepseek-v3")
    assert RouterConfig.from_model_config({**config, "model_type": "unheard"}) == RouterConfig.preset("deepseek-v3")


def test_sampling_top_k_is_not_the_routers():
    assert RouterConfig.from_model_config({**DEEPSEEK_V3, "top_k": 50}).top_k == 8


def test_two_spellings_that_disagree():
    with pytest.raises(ValueError, match=r"num_experts must be equal to n_routed_experts \(256\), got 64"):
        RouterConfig.from_model_config({**DEEPSEEK_V3, "num_experts": 64})
    with pytest.raises(ValueError, match=r"num_experts must be equal to n_routed_experts \( \), got 64$"):
        RouterConfig.from_model_config({**DEEPSEEK_V3, "n_routed_experts": "\n", "num_experts": 64})


def test_one_number_per_layer_counts_when_all_are_equal():
    config = {**RELEASED["mixtral"], "num_experts_per_tok": [2, 2, 2]}
    assert RouterConfig.from_model_config(config) == RouterConfig.preset("mixtral")
    with pytest.raises(TypeError, match="top_k must be an integer, got list"):
        RouterConfig.from_model_config({**config, "num_experts_per_tok": [2, 4]})


def test_topk_method_goes_before_the_model_type():
    config = {**RELEASED["deepseek-v2"], "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
    rule = RouterConfig.from_model_config(config)
    assert (rule.score, rule.group_score, rule.renormalize) == ("sigmoid", "top2_sum", "sum")
    greedy = RouterConfig.from_model_config({**DEEPSEEK_V3, "topk_method": "greedy"})
    assert (greedy.num_groups, greedy.topk_groups) == (1, 1)


@pytest.mark.parametrize("absent", [None, 0, 1])
def test_no_groups(absent):
    config = {**without(DEEPSEEK_V3, "topk_group"), "n_group": absent}
    assert RouterConfig.from_model_config(config).num_groups == 1


def test_a_model_type_whose_code_has_no_groups_ignores_them():
    config = {**RELEASED["deepseek-v4"], "n_group": 8, "topk_group": 4}
    assert RouterConfig.from_model_config(config) == RouterConfig.preset("deepseek-v4")


MISSING = [
    ({}, "n_routed_experts or num_local_experts or num_experts or moe_num_experts, and num_experts_per_tok or"),
    ({"model_type": "llama", "hidden_size": 4096}, "(model_type 'llama', which is not known)"),
    (
        {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8},
        "with norm_topk_prob or moe_renormalize",
    ),
    (
        without(DEEPSEEK_V3, "routed_scaling_factor"),
        "with routed_scaling_factor or router_scaling_factor or route_scale",
    ),
    (without(DEEPSEEK_V3, "topk_group"), "with topk_group, got one without (model_type 'deepseek_v3')"),
    (
        {"model_type": "unheard", "num_experts": 8, "num_experts_per_tok": 2},
        "with scoring_func or score_func or score_function or moe_router_activation_func, and norm_topk_prob or "
        "moe_renormalize, got one without (model_type 'unheard', which is not known)",
    ),
    ({**without(DEEPSEEK_V3, "topk_method"), "model_type": "unheard"}, "with topk_method, got one without"),
]


@pytest.mark.parametrize(("config", "part"), MISSING)
def test_missing_keys_are_named(config, part):
    with pytest.raises(ValueError, match=r"^RouterConfig\.from_model_config: model_config must be a config") as error:
        RouterConfig.from_model_config(config)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"topk_method": "best"},
            "topk_method must be one of 'greedy', 'group_limited_greedy', 'noaux_tc', got 'best'",
        ),
        ({"scoring_func": "relu"}, "scoring_func must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got 'relu'"),
        (
            {"model_type": "phimoe"},
            "model_config must be a configuration whose routing RouterConfig covers, got 'phimoe' (sparsemixer)",
        ),
    ],
)
def test_what_is_not_covered_is_said(change, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared
        RouterConfig.from_model_config({**DEEPSEEK_V3, **change})
    assert str(error.value) == "RouterConfig.from_model_config: " + sentence


@pytest.mark.parametrize("thing", [None, 3, [1, 2], b"config.json"])
def test_model_config_of_another_type(thing):
    with pytest.raises(TypeError, match=r"^RouterConfig\.from_model_config: model_config must be a transformers conf"):
        RouterConfig.from_model_config(thing)


# --- the table in the documentation -----------------------------------------------------------------------------------


def test_documentation_lists_every_preset_with_its_sizes_and_every_model_type():
    path = Path(__file__).parent.parent / "docs" / "routers.md"
    if not path.is_file():
        pytest.skip("needs the source tree")
    text = path.read_text(encoding="utf-8")
    for name in pyroute.presets():
        shape = model_shape(name)
        sizes = (*shape[:4], shape.shared_intermediate or "–", shape.activation)
        assert "| ".join([f"| `{name}` ", *(f"{size} " for size in sizes)]) + "|" in text
        assert text.count(f"`{name}`") >= 2
    for model_type in router_models._RULES:
        assert f"`{model_type}`" in text
    for spellings in router_models._SPELLINGS.values():
        assert all(f"`{key}`" in text for key in spellings)
