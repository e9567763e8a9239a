"""Whatever is wrong with an argument of the gating room: one sentence, before any work, and nothing written."""

from __future__ import annotations

import numpy as np
import pytest
from bad_input import (
    BACKENDS,
    FLOATS,
    HUGE,
    INTEGERS,
    Case,
    assert_refused,
    renamed,
    table,
    wrong_arrays,
    wrong_backends,
    wrong_choices,
    wrong_ids,
    wrong_integers,
    wrong_reals,
)

import pyroute
from pyroute import Gating, RouterConfig

T, E, K = 4, 6, 2
CONFIG = RouterConfig(E, K)


def logits():
    return np.random.default_rng(1).standard_normal((T, E), np.float32)


def gating():
    return pyroute.topk_gating(logits(), CONFIG, backend="numpy")


def forward():
    return {"logits": logits(), "config": CONFIG}


def backward():
    return {**forward(), "gating": gating(), "grad_topk_weights": np.ones((T, K), np.float32)}


def loss():
    return {**forward(), "gating": gating()}


def choice():
    return {"logits": logits(), "capacity": 2}


def router():
    return {"num_experts": 12, "top_k": 4}


def quantiles():
    return {**forward(), "bias": np.zeros(E, np.float32)}


def counted():
    return {**quantiles(), "bounds": (-1.0, 1.0), "num_bins": 5}


def histogram():
    return {"histogram": np.ones((E, 5), np.int64), "bounds": (-1.0, 1.0), "top_k": K}


def bias_rule():
    return {"bias": np.zeros(E, np.float32), "tokens_per_expert": np.arange(E)}


CONFIGS = [
    Case(f"config is {name}", {"config": x}, TypeError, "config must be a RouterConfig, got")
    for name, x in {
        "None": None,
        "dict": {"num_experts": E},
        "str": str(CONFIG),
        "class": RouterConfig,
        "int": 2,
    }.items()
]
OTHER_CONFIG = [Case("another model's config", {"config": RouterConfig(E + 1, K)}, ValueError, f"num_experts={E + 1}]")]
LOGITS = [
    *wrong_arrays("logits", (T, E), FLOATS, ".x"),
    Case("no experts", {"logits": np.zeros((T, 0), np.float32)}, ValueError, "logits must be of"),
]
MASK = wrong_arrays("token_mask", (T,), ("bool",), "x", none_is_legal=True)
BIAS = wrong_arrays("bias", (E,), ("float32",), "x", none_is_legal=True)
IDS = [*wrong_arrays("topk_idx", (T, K), INTEGERS, "xx", none_is_legal=True), *wrong_ids("topk_idx", (T, K), E)]


def in_gating(ids):
    return {"gating": gating()._replace(topk_idx=ids)}


GATING = [
    *(
        Case(f"gating is {name}", {"gating": x}, TypeError, "gating must be a Gating, got")
        for name, x in {"None": None, "tuple": tuple(gating()), "list": list(gating()), "ids": gating()[0]}.items()
    ),
    *renamed(wrong_arrays("topk_idx", (T, K), INTEGERS, "xx"), "topk_idx", in_gating),
    *renamed(wrong_ids("topk_idx", (T, K), E), "topk_idx", in_gating),
]


def scopes(argument):
    counts = np.zeros(E, np.int64)
    sequence, whole = {argument: "sequence"}, {argument: "global"}
    ids = wrong_arrays("sequence_ids", (T,), INTEGERS, "x", none_is_legal=True)
    pairs = {"None": None, "counts": counts, "list": [counts, T], "one": (counts,), "three": (counts, T, T), "int": 3}
    named = [
        *renamed(wrong_arrays("x", (E,), INTEGERS, "x"), "x", lambda x: whole | {"global_counts": (x, T)}),
        *renamed(wrong_integers("x", T), "x", lambda n: whole | {"global_counts": (counts, n)}),
    ]
    return [
        *wrong_choices(argument),
        Case("no sequences", sequence, ValueError, "sequence_ids must be given with scope 'sequence' and only then"),
        Case("sequences without scope", {"sequence_ids": np.zeros(T, int)}, ValueError, "sequence_ids must be given"),
        Case(
            "sequences with global",
            whole | {"sequence_ids": np.zeros(T, int)},
            ValueError,
            "sequence_ids must be given",
        ),
        Case("counts without scope", {"global_counts": (counts, T)}, ValueError, "global_counts must be given"),
        Case("negative counts", whole | {"global_counts": (counts - 1, T)}, ValueError, "global_counts[0] must be"),
        *(Case(case.name, sequence | case.change, case.error, case.words) for case in ids),
        *(
            Case(f"global_counts {name}", whole | {"global_counts": x}, ValueError if x is None else TypeError)
            for name, x in pairs.items()
        ),
        *(Case(f"global {case.name}", case.change, case.error, "global_counts[") for case in named),
    ]


BACKWARD = [
    *wrong_arrays("grad_topk_weights", (T, K), ("float32",), "xx"),
    *wrong_reals("balance_loss_coef"),
    *wrong_reals("z_loss_coef"),
    *scopes("balance_loss_scope"),
    Case("a scale of a narrow type", {"loss_scale": np.ones((), np.float32)}, TypeError, "loss_scale must be float64"),
    Case("two scales", {"loss_scale": np.ones(2)}, ValueError, "loss_scale must be of shape []"),
]
BIAS_RULE = [
    *wrong_arrays("bias", (E,), ("float32", "float64"), "."),
    *wrong_arrays("tokens_per_expert", (E,), INTEGERS, "x"),
    *wrong_reals("rate", values=(-1e-3, -1, 1e300)),
    Case("negative load", {"tokens_per_expert": np.arange(E) - 1}, ValueError, "tokens_per_expert must be at least 0"),
    Case("load of 2**63", {"tokens_per_expert": np.full(E, 2**63, np.uint64)}, ValueError, "tokens_per_expert must be"),
]
QUANTILES = [
    *wrong_arrays("bias", (E,), ("float32",), "x"),
    Case("a bias of NaN", {"bias": np.full(E, np.nan, np.float32)}, ValueError, "bias must be finite, got NaN"),
    Case("groups", {"config": RouterConfig(E, K, num_groups=3, topk_groups=2)}, ValueError, "config must be a router"),
    Case(
        "all experts", {"config": RouterConfig(E, E)}, ValueError, "config must be a router without groups that leaves"
    ),
]
BOUNDS = [
    *(
        Case(f"bounds are {name}", {"bounds": x}, TypeError, "bounds must be a pair of numbers, got")
        for name, x in {"None": None, "one": (1.0,), "an array": np.zeros(2), "a string": "ab"}.items()
    ),
    Case("bounds of strings", {"bounds": ("a", "b")}, TypeError, "bounds[0] must be a number"),
    Case("bounds of NaN", {"bounds": (0.0, np.nan)}, ValueError, "bounds[1] must be finite"),
    Case("bounds that meet", {"bounds": (1.0, 1.0)}, ValueError, "bounds must be a lower number and a higher one"),
    Case("bounds that meet in float32", {"bounds": (1.0, 1.0 + 1e-12)}, ValueError, "bounds must be a lower number"),
]
HISTOGRAM = [
    *wrong_arrays("histogram", (E, 5), INTEGERS, ".."),
    Case("negative counts", {"histogram": np.full((E, 5), -1)}, ValueError, "histogram must be counts"),
    Case("no tokens", {"histogram": np.zeros((E, 5), int)}, ValueError, "histogram must be counts of at least one"),
    Case("no bins", {"histogram": np.zeros((E, 0), int)}, ValueError, "histogram must be of two experts and one bin"),
    *wrong_integers("top_k", 1, E - 1),
]
BINS = wrong_integers("num_bins", 1, 2**20)
CAPACITY = wrong_integers("capacity", 0, 2**31 - 1)
WITHOUT_EXPERTS = [case for case in LOGITS if "axis 1" not in case.name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        (pyroute.topk_gating, forward, LOGITS + CONFIGS + OTHER_CONFIG + BIAS + MASK + IDS),
        (pyroute.topk_gating_backward, backward, LOGITS + CONFIGS + OTHER_CONFIG + BIAS + MASK + GATING + BACKWARD),
        (pyroute.balance_loss, loss, LOGITS + CONFIGS + OTHER_CONFIG + MASK + GATING + scopes("scope")),
        (pyroute.z_loss, lambda: {"logits": logits()}, WITHOUT_EXPERTS + MASK),
        (pyroute.update_bias, bias_rule, BIAS_RULE),
        (pyroute.quantile_bias, quantiles, LOGITS + CONFIGS + OTHER_CONFIG + MASK + QUANTILES),
        (pyroute.bias_histogram, counted, LOGITS + CONFIGS + MASK + QUANTILES + BOUNDS + BINS),
        (pyroute.expert_choice_gating, choice, WITHOUT_EXPERTS + MASK + CAPACITY),
    ),
)
def test_refused(backend, function, legal, case):
    assert_refused(function, {**legal(), "backend": backend}, case)


@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        (pyroute.topk_gating, forward, wrong_backends()),
        (pyroute.topk_gating_backward, backward, wrong_backends()),
        (pyroute.balance_loss, loss, wrong_backends()),
        (pyroute.z_loss, lambda: {"logits": logits()}, wrong_backends()),
        (pyroute.update_bias, bias_rule, wrong_backends()),
        (pyroute.quantile_bias, quantiles, wrong_backends()),
        (pyroute.bias_histogram, counted, wrong_backends()),
        (pyroute.expert_choice_gating, choice, wrong_backends()),
    ),
)
def test_backend_refused(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize(
    ("function", "legal", "case"), table((pyroute.bias_from_histogram, histogram, HISTOGRAM + BOUNDS))
)
def test_histogram_refused(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_logits_want_float64_beside_them(backend):
    arguments = {**backward(), "logits": logits().astype(np.float64), "backend": backend}
    assert_refused(
        pyroute.topk_gating_backward, arguments, Case("", {}, TypeError, "grad_topk_weights must be float64")
    )
    arguments = {**forward(), "logits": logits().astype(np.float64), "backend": backend}
    bias = {"bias": np.zeros(E, np.float32)}
    assert_refused(pyroute.topk_gating, arguments, Case("", bias, TypeError, "bias must be float64, got float32"))


GROUPS = {"num_groups": 4, "topk_groups": 2}
ROUTER = [
    *wrong_integers("num_experts", 1, 2**31 - 1),
    *wrong_integers("top_k", 1, 12),
    *wrong_integers("num_groups", 1, 12),
    *wrong_integers("topk_groups", 1, 1),
    *wrong_choices("score"),
    *wrong_choices("score_stage"),
    *wrong_choices("group_score"),
    *wrong_choices("weight_on"),
    *wrong_choices("renormalize", none_is_legal=True),
    *wrong_reals("renormalize_eps", values=(-1e-20, -1)),
    *wrong_reals("scaling_factor", values=(0, -1.0)),
    Case("k > E", {"num_experts": 3}, ValueError, "top_k must be in 1..num_experts (3), got 4"),
    Case(
        "groups that do not divide", {"num_groups": 5}, ValueError, "num_groups must be a divisor of num_experts (12)"
    ),
    Case("too few experts kept", {"num_groups": 6}, ValueError, "topk_groups must be enough groups of 2"),
    Case("more groups kept than there are", {"num_groups": 2, "topk_groups": 3}, ValueError, "topk_groups must be in"),
    Case("post with groups", {**GROUPS, "score_stage": "post"}, ValueError, "num_groups must be 1"),
    Case("post with sum", {"score_stage": "post", "renormalize": "sum"}, ValueError, "renormalize must be None"),
    Case("post with sigmoid", {"score_stage": "post", "score": "sigmoid"}, ValueError, "score_stage must be 'pre'"),
    Case(
        "top2 of one", {"num_groups": 12, "topk_groups": 4, "group_score": "top2_sum"}, ValueError, "group_score must"
    ),
]


@pytest.mark.parametrize(("function", "legal", "case"), table((RouterConfig, router, ROUTER)))
def test_router_refused(function, legal, case):
    assert_refused(function, legal(), case)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
ENDLESS: dict = {"model_type": "mixtral"}
ENDLESS["text_config"] = ENDLESS


class Config:
    def __init__(self, answer):
        self.answer = answer

    def to_dict(self):
        return self.answer


TEXTS = ["", ",", "num_experts", "num_experts=8", "num_experts=8,top_k=2,", "num_experts=8,top_k=2,top_k=2"]
TEXTS += ["num_experts=8;top_k=2", "num_experts=8,top_k=two", "num_experts=8,top_k=2.0"]
TEXTS += ["num_experts=8,top_k=2,scaling_factor=much", "num_experts=8,top_k=2,__class__=int", "\0", "top_k=2" * 1000]
VALUES = ["num_experts=8,top_k=9", "num_experts=8,top_k=2,score=SOFTMAX", "num_experts=8,top_k=2,renormalize=None"]
VALUES += ["num_experts=8,top_k=2,score", "num_experts=8,top_k=2,scaling_factor=nan", "num_experts=-1,top_k=2"]
MODELS = {
    "None": (None, TypeError), "int": (8, TypeError), "list": ([MIXTRAL], TypeError), "bytes": (b"config", TypeError),
    "class": (Config, TypeError), "to_dict of nothing": (Config(None), TypeError), "empty": ({}, ValueError),
    "endless": (ENDLESS, ValueError), "path inside": ({"text_config": "/dev/zero"}, TypeError),
    "list inside": ({"text_config": [MIXTRAL]}, TypeError), "two numbers": (MIXTRAL | {"num_experts": 9}, ValueError),
    "not covered": ({"model_type": "phimoe"}, ValueError), "unknown": (MIXTRAL | {"model_type": "new"}, ValueError),
    "unknown list": (MIXTRAL | {"model_type": ["mixtral"]}, ValueError),
}  # fmt: skip
RULES = {"str": "8", "float": 8.0, "True": True, "array": np.full(3, 8), "list": [8, 9]}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:40]))
def test_no_text_of_a_router(text):
    assert_refused(RouterConfig.from_string, {"text": text}, Case("", {}, ValueError), "RouterConfig.from_string")


@pytest.mark.parametrize("text", VALUES)
def test_text_of_an_impossible_router(text):
    assert_refused(RouterConfig.from_string, {"text": text}, Case("", {}, ValueError), "RouterConfig")


@pytest.mark.parametrize("thing", [None, 3, b"num_experts=8,top_k=2", ["top_k=2"], CONFIG])
def test_text_that_is_none(thing):
    assert_refused(RouterConfig.from_string, {"text": thing}, Case("", {}, TypeError), "RouterConfig.from_string")


@pytest.mark.parametrize("name", MODELS)
def test_no_model_config(name):
    config, error = MODELS[name]
    case = Case(name, {}, error)
    assert_refused(RouterConfig.from_model_config, {"model_config": config}, case, "RouterConfig.from_model_config")


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
@pytest.mark.parametrize("name", RULES)
def test_model_config_with_a_wrong_value(name, key):
    arguments = {"model_config": MIXTRAL | {key: RULES[name]}}
    assert_refused(RouterConfig.from_model_config, arguments, Case(name, {}, TypeError), "RouterConfig")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": NaN', "\0"])
def test_no_json(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    error = TypeError if text in ("[]", "null") else ValueError
    case = Case("", {}, error, "model_config must be")
    for place in (path, str(path), tmp_path):
        assert_refused(RouterConfig.from_model_config, {"model_config": place}, case, "RouterConfig.from_model_config")


@pytest.mark.parametrize("case", wrong_choices("name", none_is_legal=True), ids=lambda case: case.name)
def test_no_preset(case):
    assert_refused(RouterConfig.preset, {"name": "mixtral"}, case, "RouterConfig.preset")


@pytest.mark.parametrize("case", wrong_integers("n", 1, 1024), ids=lambda case: case.name)
def test_no_number_of_threads(case):
    before = pyroute.get_num_threads()
    assert_refused(pyroute.set_num_threads, {"n": 1}, case)
    assert pyroute.get_num_threads() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_than_memory(backend):
    """A legal shape that cannot be copied ends in MemoryError at once."""
    with pytest.raises(MemoryError):
        pyroute.topk_gating(np.broadcast_to(np.float32(0), (HUGE, E)), CONFIG, backend=backend)
    with pytest.raises(MemoryError):
        pyroute.z_loss(np.broadcast_to(np.float32(0), (HUGE, E)), backend=backend)


def test_gating_is_not_believed():
    """Weights and counts of a Gating that a caller made up are not read."""
    made_up = Gating(gating().topk_idx, None, "counts")
    arguments = backward()
    expected = pyroute.topk_gating_backward(**arguments)
    assert (pyroute.topk_gating_backward(**{**arguments, "gating": made_up}) == expected).all()
