"""Whatever is wrong with an argument of the layer: one sentence, before any work, and nothing written."""

from __future__ import annotations

import numpy as np
import pytest
from bad_input import (
    BACKENDS,
    FLOATS,
    INTEGERS,
    Case,
    assert_refused,
    table,
    wrong_arrays,
    wrong_backends,
    wrong_choices,
    wrong_ids,
    wrong_integers,
    wrong_reals,
)

import pyroute

T, K, E, H, I = 4, 2, 3, 6, 5  # noqa: E741
TYPES = ("float32", "bfloat16")


def forward(**options):
    rng = np.random.default_rng(2)
    return {
        "x": rng.standard_normal((T, H), np.float32),
        "topk_idx": rng.integers(0, E, (T, K)),
        "topk_weights": rng.random((T, K), np.float32),
        "w_gate_up": rng.standard_normal((E, 2 * I, H), np.float32),
        "w_down": rng.standard_normal((E, H, I), np.float32),
    } | options


def saved(**options):
    return pyroute.moe_forward(**forward(**options), return_saved=True, backend="numpy")[1]


def backward():
    return {"grad_y": np.ones((T, H), np.float32), "saved": saved()}


def fp8(*shape):
    return pyroute.quantize_fp8(np.ones(shape, np.float32), backend="numpy")


FORWARD = [
    *wrong_arrays("x", (T, H), TYPES, ".."),
    *wrong_arrays("topk_idx", (T, K), INTEGERS, "x."),
    *wrong_arrays("topk_weights", (T, K), FLOATS, "xx"),
    *wrong_arrays("w_gate_up", (E, 2 * I, H), TYPES, "x" * 3),
    *wrong_arrays("w_down", (E, H, I), TYPES, ".x."),
    *wrong_arrays("b_gate_up", (E, 2 * I), TYPES, "xx", none_is_legal=True),
    *wrong_arrays("b_down", (E, H), TYPES, "xx", none_is_legal=True),
    *wrong_ids("topk_idx", (T, K), E),
    *wrong_choices("activation"),
    *wrong_choices("weight_on"),
    *wrong_choices("return_saved"),
    *wrong_choices("quantize_activations"),
    *wrong_integers("alignment", 1, 2**31 - 1),
    *(
        Case(f"clamp {case.name}", case.change | {"activation": "swiglu_clamp"}, case.error, case.words)
        for case in wrong_reals("limit", values=(-1.0,), none_is_legal=True)
    ),
    *(
        Case(f"oai {case.name}", case.change | {"activation": "swiglu_oai"}, case.error, case.words)
        for case in wrong_reals("alpha", none_is_legal=True)
    ),
    Case("limit without clamp", {"limit": 1.0}, ValueError, "limit must be None with activation 'swiglu'"),
    Case("alpha without oai", {"alpha": 1.0}, ValueError, "alpha must be None with activation 'swiglu'"),
    Case("gate without a gate", {"activation": "relu2"}, ValueError, "w_gate_up must be of shape"),
    Case("activations without fp8", {"quantize_activations": True}, ValueError, "quantize_activations must be False"),
    Case(
        "no slots", {"topk_idx": np.zeros((T, 0), int), "topk_weights": np.zeros((T, 0))}, ValueError, "topk_idx must"
    ),
    Case("fp8 x", {"x": fp8(T, H)}, TypeError, "x must be an array, got Fp8Array [4, 6]"),
    Case("fp8 weights of other experts", {"w_gate_up": fp8(E + 1, 2 * I, H)}, ValueError, "w_gate_up must be of shape"),
    Case("too many rows", {"alignment": 2**31 - 1}, ValueError, "alignment must be small enough"),
]
NO_EXPERTS = {"w_gate_up": np.zeros((0, 2 * I, H), np.float32), "w_down": np.zeros((0, H, I), np.float32)}
BACKWARD = [
    *wrong_arrays("grad_y", (T, H), ("float32",), "xx"),
    *(
        Case(f"saved is {name}", {"saved": x}, TypeError, "saved must be a MoeSaved, got")
        for name, x in {"None": None, "y": np.ones((T, H)), "tuple": (1, 2), "class": pyroute.MoeSaved}.items()
    ),
    Case("saved of fewer tokens", {"grad_y": np.ones((T - 1, H), np.float32)}, ValueError, "grad_y must be of shape"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "legal", "case"), table((pyroute.moe_forward, forward, FORWARD)))
def test_refused(backend, function, legal, case):
    assert_refused(function, {**legal(), "backend": backend}, case)


@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table((pyroute.moe_forward, forward, wrong_backends()), (pyroute.moe_backward, backward, BACKWARD)),
)
def test_refused_whatever_the_backend(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_without_experts(backend):
    case = Case("", NO_EXPERTS, ValueError, "w_down must be of at least one expert")
    assert_refused(pyroute.moe_forward, {**forward(), "backend": backend}, case)


MADE_UP = {
    "layer": [(None, TypeError), (forward(), TypeError), (pyroute.MoeSaved, TypeError)],
    "plan": [
        (None, TypeError),
        (np.zeros((T, K), int), TypeError),
        (pyroute.plan_routes(np.zeros((T + 1, K), int), E), ValueError),
        (pyroute.plan_routes(np.zeros((T, K), int), E + 1), ValueError),
    ],
    "gate_up": [
        (None, TypeError),
        ([[1.0]], TypeError),
        (np.zeros((T * K, 2 * I)), TypeError),
        (np.zeros((T * K - 1, 2 * I), np.float32), ValueError),
        (np.zeros((T * K, 2 * I - 1), np.float32), ValueError),
    ],
}


@pytest.mark.parametrize(
    ("field", "number"), [(field, i) for field, items in MADE_UP.items() for i in range(len(items))]
)
def test_saved_made_up(field, number):
    thing, error = MADE_UP[field][number]
    original = saved()
    arguments = {name: getattr(original, name) for name in ("layer", "plan", "gate_up")}
    assert_refused(pyroute.MoeSaved, arguments, Case("", {field: thing}, error, f"{field} must be"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_past_float32_are_infinite(backend):
    """float64 weights are rounded to float32, silently as any rounding."""
    weights = np.ones((T, K)) * 1e300
    y = pyroute.moe_forward(**forward(topk_weights=weights), backend=backend)
    assert not np.isfinite(y).any()
