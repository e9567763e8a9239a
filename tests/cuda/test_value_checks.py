"""PYROUTE_CHECK=1: values on a GPU are looked at before they are used, and refused in the CPU's words."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from emulated import REAL, EmulatedMemory, launched, library, to_device, to_host

import pyroute
from pyroute import Fp8Array, RoutePlan, RouterConfig, _check
from pyroute._device.arrays import DeviceArray

T, K, E, H = 6, 2, 4, 8
CONFIG = RouterConfig(E, K)
IDS = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [-1, 1], [2, 0]], np.int32)


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(_check, "checks_gpu", True)


def spoiled(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def logits():
    return np.linspace(-1, 1, T * E, dtype=np.float32).reshape(T, E)


def gated(put, ids):
    return pyroute.Gating(put(ids), put(np.ones(ids.shape, np.float32)), put(np.ones(E, np.int32)))


def moe(put, ids):
    w_gate_up, w_down = np.ones((E, 2 * H, H), np.float32), np.ones((E, H, H), np.float32)
    weights = np.ones(ids.shape, np.float32)
    return pyroute.moe_forward(*(put(x) for x in (np.ones((T, H), np.float32), ids, weights, w_gate_up, w_down)))


BY_ID = {
    "plan_routes": lambda put, ids: pyroute.plan_routes(put(ids), E),
    "topk_gating": lambda put, ids: pyroute.topk_gating(put(logits()), CONFIG, topk_idx=put(ids)),
    "topk_gating_backward": lambda put, ids: pyroute.topk_gating_backward(
        put(np.ones((T, K), np.float32)), put(logits()), gated(put, ids), CONFIG
    ),
    "balance_loss": lambda put, ids: pyroute.balance_loss(put(logits()), gated(put, ids), CONFIG),
    "moe_forward": moe,
}


def gemm(put, offsets):
    a, b = np.ones((T, H), np.float32), np.ones((E, H, H), np.float32)
    return pyroute.grouped_gemm(put(a), put(b), put(offsets))


def dgrad(put, offsets):
    a, b = np.ones((T, H), np.float32), np.ones((E, H, H), np.float32)
    return pyroute.grouped_gemm_dgrad(put(a), put(b), put(offsets))


def wgrad(put, offsets):
    rows = np.ones((T, H), np.float32)
    return pyroute.grouped_gemm_wgrad(put(rows), put(rows), put(offsets))


def quantized(put, offsets):
    return pyroute.quantize_fp8(put(np.ones((T, H), np.float32)), block=(1, 128), expert_offsets=put(offsets))


BY_OFFSET = {"grouped_gemm": gemm, "grouped_gemm_dgrad": dgrad, "grouped_gemm_wgrad": wgrad, "quantize_fp8": quantized}


def refused_alike(call, *arguments):
    """The host's sentence and the GPU's; no kernel runs."""
    sentences = []
    for put in (lambda x: x, to_device):
        if not REAL:
            launched()
        with pytest.raises((ValueError, TypeError)) as raised:
            call(put, *arguments)
        assert REAL or not launched()
        sentences.append(f"{type(raised.value).__name__}: {raised.value}")
    assert sentences[0] == sentences[1]
    return sentences[1]


@pytest.mark.parametrize("function", BY_ID)
@pytest.mark.parametrize(("value", "dtype"), [(E, np.int32), (-2, np.int64), (2**63, np.uint64), (2**40, np.int64)])
def test_ids(function, value, dtype, checked):
    ids = spoiled(np.maximum(IDS, 0).astype(dtype), (3, 1), value)
    said = refused_alike(BY_ID[function], ids)
    argument = "gating.topk_idx" if function in ("topk_gating_backward", "balance_loss") else "topk_idx"
    assert said == f"ValueError: {function}: {argument}[3, 1] must be in 0..3, or -1 for not routed, got {value}"


@pytest.mark.parametrize("value", [T + 1, -1, 2**31 - 1])
def test_tokens_per_expert(value, checked):
    def masked(put, counts):
        a, b = np.ones((E, T, H), np.float32), np.ones((E, H, H), np.float32)
        return pyroute.grouped_gemm(put(a), put(b), tokens_per_expert=put(counts))

    said = refused_alike(masked, spoiled(np.full(E, T, np.int32), 2, value))
    assert said == f"ValueError: grouped_gemm: tokens_per_expert[2] must be in 0..6 (rows of an expert), got {value}"


@pytest.mark.parametrize("function", BY_OFFSET)
@pytest.mark.parametrize("offsets", [[0, 2, 1, 4, 6], [1, 2, 3, 4, 6], [0, 2, 3, 4, 7], [0, 2, 3, 4, 2**62]])
def test_offsets(function, offsets, checked):
    said = refused_alike(BY_OFFSET[function], np.array(offsets))
    assert said.startswith(
        f"ValueError: {function}: expert_offsets must be from 0, not decreasing, to at most 6 (rows)"
    )
    assert said.endswith(str(offsets))


def test_offsets_of_an_fp8_array(checked):
    codes, scales = np.zeros((T, H), np.uint8), np.ones((2, H), np.float32)

    def rows(put, offsets):
        return Fp8Array(put(codes), put(scales), (4, 1), expert_offsets=put(np.array(offsets)))

    def product(put, offsets):
        g = pyroute.quantize_fp8(put(np.ones((T, H), np.float32)), block=(4, 1), expert_offsets=put(np.array([0, T])))
        return pyroute.grouped_gemm_wgrad(g, g, put(np.array(offsets)))

    assert "expert_offsets" in refused_alike(rows, [0, T + 1])
    with pytest.raises(ValueError, match="grad_out must be quantised with the expert_offsets of this call"):
        product(to_device, [0, T - 1])
    product(to_device, [0, T])


def test_loads(checked):
    def rule(put, counts):
        return pyroute.update_bias(put(np.zeros(E, np.float32)), put(counts))

    for counts in ([1, -1, 2, 3], [2**62, 0, 0, 0]):
        assert "tokens_per_expert must be at least 0" in refused_alike(rule, np.array(counts))


MAPS = ("tokens_per_expert", "expert_offsets", "row_to_token", "token_to_row")


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize(
    ("field", "place", "value"),
    [("tokens_per_expert", 1, -1), ("expert_offsets", 0, 1), ("expert_offsets", 2, 2**40), ("row_to_token", 1, T),
     ("row_to_token", 0, -1), ("token_to_row", (2, 1), 99), ("token_to_row", (4, 0), 0), ("token_to_row", (0, 0), -7)],
)  # fmt: skip
def test_a_plan_made_by_hand(field, place, value, alignment, checked):
    for put in (lambda x: x, to_device):
        plan = pyroute.plan_routes(put(IDS), E, alignment=alignment)
        parts = {name: np.asarray(to_host(getattr(plan, name))) for name in MAPS}
        RoutePlan(**{name: put(part) for name, part in parts.items()}, alignment=alignment)
        parts[field] = spoiled(parts[field], place, value)
        with pytest.raises(ValueError, match=r"^RoutePlan: \w+ must be .*, got"):
            RoutePlan(**{name: put(part) for name, part in parts.items()}, alignment=alignment)


def test_rows_past_the_last_segment_are_padding(checked):
    plan = pyroute.plan_routes(to_device(IDS), E, alignment=4)
    parts = {name: to_host(getattr(plan, name)) for name in MAPS}
    assert parts["row_to_token"].size > parts["expert_offsets"][-1]
    parts["row_to_token"] = spoiled(parts["row_to_token"], -1, 0)
    with pytest.raises(ValueError, match="RoutePlan: row_to_token must be tokens, and -1 on the padding"):
        RoutePlan(**{name: to_device(part) for name, part in parts.items()}, alignment=4)
    short = {**parts, "row_to_token": parts["row_to_token"][:4]}
    with pytest.raises(ValueError, match=r"RoutePlan: row_to_token must be of shape \[num_rows >= \d+\], got \[4\]"):
        RoutePlan(**{name: to_device(part) for name, part in short.items()}, alignment=4)


def test_good_values_pass(checked):
    for call in BY_ID.values():
        call(to_device, IDS)
    for call in BY_OFFSET.values():
        call(to_device, np.array([0, 2, 2, 5, 6]))
    pyroute.plan_routes(to_device(np.zeros((0, K), np.int32)), E)


def test_without_it_nothing_is_read():
    library().pyroute_emulator_calls.argtypes = [ctypes.c_char_p]
    before = library().pyroute_emulator_calls(b"cuMemcpyDtoHAsync_v2")
    for call in BY_ID.values():
        call(to_device, spoiled(IDS, (3, 1), E))
    for call in BY_OFFSET.values():
        call(to_device, np.array([0, 2, 1, 4, 2**40]))
    assert library().pyroute_emulator_calls(b"cuMemcpyDtoHAsync_v2") == before


def test_values_of_a_stream_that_is_captured_are_not_looked_at(checked):
    """Nothing can be waited for: the call is recorded as it is without PYROUTE_CHECK."""
    driver, stream, graph = library(), ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuStreamCreate(ctypes.byref(stream), 0)

    class OnStream(EmulatedMemory):
        def stream(self):
            return stream.value

    made = to_device(spoiled(IDS, (3, 1), E))
    ids = DeviceArray(made.pointer, made.shape, made.dtype, OnStream(), made.owner)
    assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
    pyroute.plan_routes(ids, E)
    assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
    driver.cuGraphDestroy(graph)
    with pytest.raises(ValueError, match=r"topk_idx\[3, 1\]"):
        pyroute.plan_routes(ids, E)
    driver.cuStreamDestroy_v2(stream)


@pytest.mark.parametrize(("setting", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_environment(setting, expected):
    code = "from pyroute import _check; print(_check.checks_gpu)"
    made = dict(os.environ, PYROUTE_CHECK=setting)
    said = subprocess.run([sys.executable, "-c", code], env=made, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(expected)
