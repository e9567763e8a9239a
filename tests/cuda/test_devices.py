"""Arrays of the host, of the GPU and of another GPU in one call: one sentence, and no kernel has run."""

from __future__ import annotations

import numpy as np
import pytest
from emulated import EmulatedMemory, launched, library, to_device, to_host

import pyroute
from pyroute import Fp8Array, MoeGradients, RoutePlan, plan_routes
from pyroute._device.arrays import DeviceArray

T, K, E, H, N = 5, 2, 3, 16, 4
MAPS = ("tokens_per_expert", "expert_offsets", "row_to_token", "token_to_row")


@pytest.fixture(autouse=True)
def only_emulated():
    library()


def on_another_gpu(array):
    memory = EmulatedMemory()
    memory.device = 1
    near = to_device(array)
    return DeviceArray(near.pointer, near.shape, near.dtype, memory, near.owner)


ELSEWHERE = pytest.mark.parametrize("elsewhere", [np.asarray, on_another_gpu], ids=["host", "another GPU"])


def refused(function, call):
    """Whether nothing was launched; the sentence is checked here."""
    launched()
    with pytest.raises(TypeError, match=f"^{function}: arrays must be on one device, got .* together$"):
        call()
    return not launched()


@ELSEWHERE
@pytest.mark.parametrize("function", ["grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"])
def test_expert_offsets(function, elsewhere, rng):
    a, g = rng.normal(size=(T, H)).astype(np.float32), rng.normal(size=(T, N)).astype(np.float32)
    b = rng.normal(size=(E, N, H)).astype(np.float32)
    operands = {"grouped_gemm": (a, b), "grouped_gemm_dgrad": (g, b), "grouped_gemm_wgrad": (g, a)}[function]
    offsets, call = np.array([0, 2, 2, T]), getattr(pyroute, function)
    assert refused(function, lambda: call(*map(to_device, operands), elsewhere(offsets)))
    assert refused(function, lambda: call(*operands, to_device(offsets)))


@ELSEWHERE
def test_parts_of_an_fp8_array(elsewhere):
    q, offsets = pyroute.quantize_fp8(np.ones((T, H), np.float32)), np.array([0, T])
    codes, scales = q.codes, q.scales
    assert refused("Fp8Array", lambda: Fp8Array(to_device(codes), elsewhere(scales)))
    assert refused("Fp8Array", lambda: Fp8Array(elsewhere(codes), to_device(scales)))
    assert refused("Fp8Array", lambda: Fp8Array(to_device(codes), to_device(scales), expert_offsets=elsewhere(offsets)))


@ELSEWHERE
@pytest.mark.parametrize("moved", MAPS)
def test_parts_of_a_plan(moved, elsewhere):
    near = plan_routes(to_device(np.zeros((T, K), np.int32)), E)
    parts = {name: getattr(near, name) for name in MAPS}
    assert refused("RoutePlan", lambda: RoutePlan(**parts | {moved: elsewhere(to_host(parts[moved]))}))
    host = {name: to_host(part) for name, part in parts.items()}
    assert refused("RoutePlan", lambda: RoutePlan(**host | {moved: to_device(host[moved])}))


@ELSEWHERE
def test_outputs_of_the_moe_layer(elsewhere, rng):
    x = rng.normal(size=(T, H)).astype(np.float32)
    shapes = {"w_gate_up": (E, 2 * N, H), "w_down": (E, H, N), "b_gate_up": (E, 2 * N), "b_down": (E, H)}
    arrays = {"topk_weights": np.ones((T, K), np.float32)}
    arrays |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arguments = {"x": x, "topk_idx": rng.integers(0, E, (T, K)), **arrays}
    near = {name: to_device(array) for name, array in arguments.items()}
    assert refused("moe_forward", lambda: pyroute.moe_forward(**near, out=elsewhere(x.copy())))
    assert refused("moe_forward", lambda: pyroute.moe_forward(**arguments, out=to_device(x)))
    _, saved = pyroute.moe_forward(**near, return_saved=True)
    _, kept = pyroute.moe_forward(**arguments, return_saved=True)
    none = MoeGradients(*[None] * 6)
    for name in MoeGradients._fields:
        out = none._replace(**{name: elsewhere(np.zeros_like(arguments[name]))})
        assert refused("moe_backward", lambda out=out: pyroute.moe_backward(to_device(x), saved, out=out))
        out = none._replace(**{name: to_device(arguments[name])})
        assert refused("moe_backward", lambda out=out: pyroute.moe_backward(x, kept, out=out))
    memory = np.zeros_like(x).view(np.memmap)  # a kind of NumPy's
    pyroute.moe_forward(**arguments, out=memory)
    np.testing.assert_array_equal(memory, pyroute.moe_forward(**arguments))


def test_an_index_past_the_end_is_no_memory_behind_it():
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    array, stack = to_device(values), pyroute.quantize_fp8(to_device(values))
    for index in (-3, -1, 0, 2):
        np.testing.assert_array_equal(to_host(array[index]), values[index])
    for index in (-4, 3, 2**40):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 3 items"):
            array[index]
        with pytest.raises(IndexError):
            stack[index]
    assert len(list(array)) == len(list(stack)) == 3
