"""The extension called behind the contract's back: it raises, or computes something, and never leaves its arrays.

Every array lies against an inaccessible page, so a step outside ends the test process.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
from conftest import CPU_FLOORS, guarded

from pyroute import _backend

pytestmark = pytest.mark.skipif(not CPU_FLOORS, reason="needs the extension")

f32, i32, i64, u8 = np.float32, np.int32, np.int64, np.uint8
T, K, E, H, R = 4, 2, 3, 6, 8
ROUTER = (E, K, 1, 1, 1, "softmax", False, "sum", 1e-20, 1.0)
GROUPED = (E, K, 3, 2, 1, "sigmoid", False, "none", 1e-20, 1.0)
SWIGLU = (0, 1.0, 7.0, 0.0)
OFFSETS = np.array([0, 3, 6, R], i64)
ROW_TO_TOKEN = np.array([0, 1, 2, 3, 0, -1, 1, 3], i32)
TOKEN_TO_ROW = np.array([[0, 4], [1, 6], [2, -1], [3, 7]], i32)


def ones(dtype, *shape):
    return np.ones(shape, dtype)


def operand(*shape):
    return (ones(f32, *shape), "float32", None, 1, 1, False)


def fp8_operand(*shape):
    return (ones(u8, *shape), "e4m3", ones(f32, *shape[:-1], 1), 1, 128, True)


def moe_layer(w_gate_up):
    return (
        ones(f32, T, H), ones(f32, T, K), w_gate_up, ones(f32, E, H, 5), ones(f32, E, 10), ones(f32, E, H), SWIGLU,
        "output", None, 2**20,
    )  # fmt: skip


CALLS = {
    "topk_gating": [
        ROUTER, ones(f32, T, E), "float32", ones(f32, E), None, ones(u8, T), ones(i32, T, K), ones(f32, T, K),
        ones(i32, E),
    ],
    "topk_gating replay": [
        GROUPED, ones(f32, T, E), "float32", None, ones(i32, T, K), None, ones(i32, T, K), ones(f32, T, K),
        ones(i32, E),
    ],
    "topk_gating_backward": [
        ROUTER, ones(f32, T, K), ones(f32, T, E), "float32", ones(i32, T, K), ones(u8, T), ones(f32, 2, E),
        ones(f32, 2), ones(i32, T), 0.5, ones(f32, T, E),
    ],
    "gating_loss_terms": [
        "softmax", ones(f32, T, E), "float32", ones(f32, 2, E), ones(f32, 2), ones(i32, T), ones(np.float64, T),
    ],
    "expert_choice": [
        ones(f32, T, E), "float32", np.arange(T, dtype=i32), ones(i32, E, T), ones(i32, E, 2), ones(f32, E, 2),
    ],
    "plan_routes": [ones(i32, T, K), E, 2],
    "permute": [ones(f32, T, H), ROW_TO_TOKEN, TOKEN_TO_ROW, ones(f32, R, H)],
    "permute_quantize": [ones(f32, T, H), ROW_TO_TOKEN, TOKEN_TO_ROW, 128, False, ones(u8, R, H), ones(f32, R, 1)],
    "unpermute": [ones(f32, R, H), ROW_TO_TOKEN, TOKEN_TO_ROW, ones(f32, T, K), ones(f32, T, H)],
    "unpermute_backward": [
        ones(f32, T, H), ones(f32, R, H), ROW_TO_TOKEN, TOKEN_TO_ROW, ones(f32, T, K), ones(f32, R, H), ones(f32, T, K),
    ],
    "quantize_fp8": [ones(f32, 1, R, H), (2, 128), "e4m3", False, OFFSETS, ones(u8, 1, R, H), ones(f32, 1, 5, 1)],
    "dequantize_fp8": [ones(u8, 1, R, H), ones(f32, 1, 5, 1), (2, 128), "e5m2", OFFSETS, ones(f32, 1, R, H)],
    "grouped_gemm": [operand(R, H), operand(E, 5, H), OFFSETS, ones(f32, R, 5), "float32", False],
    "grouped_gemm fp8": [fp8_operand(R, H), operand(E, 5, H), OFFSETS, ones(f32, R, 5), "float32", False],
    "grouped_gemm_wgrad": [operand(R, 5), fp8_operand(R, H), OFFSETS, ones(f32, E, 5, H), True],
    "moe_activate": [
        ones(f32, R, 2 * H), ones(f32, E, 2 * H), OFFSETS, ROW_TO_TOKEN, ones(f32, R), SWIGLU, ones(f32, R, H),
    ],
    "moe_activate_backward": [
        ones(f32, R, 2 * H), ones(f32, E, 2 * H), OFFSETS, ROW_TO_TOKEN, ones(f32, R), SWIGLU, ones(f32, R, H),
        ones(f32, R, H), ones(f32, R, 2 * H), ones(f32, R),
    ],
    "moe_add_bias": [ones(f32, R, H), ones(f32, E, H), OFFSETS, ROW_TO_TOKEN, ones(f32, R)],
    "moe_add_bias_dots": [ones(f32, R, H), ones(f32, E, H), OFFSETS, ROW_TO_TOKEN, ones(f32, R)],
    "moe_bias_grad": [ones(f32, R, H), OFFSETS, ROW_TO_TOKEN, ones(f32, R), ones(f32, E, H)],
    "moe_forward": [
        moe_layer(ones(f32, E, 10, H)), OFFSETS, ROW_TO_TOKEN, TOKEN_TO_ROW, ones(f32, R, 10), ones(f32, T, H),
    ],
    "moe_forward fp8": [
        moe_layer((ones(u8, E, 10, H), "e4m3", ones(f32, E, 1, 1), 128, 128)), OFFSETS, ROW_TO_TOKEN, TOKEN_TO_ROW,
        None, ones(f32, T, H),
    ],
    "moe_backward": [
        moe_layer(ones(f32, E, 10, H)), OFFSETS, ROW_TO_TOKEN, TOKEN_TO_ROW, ones(f32, R, 10), ones(f32, T, H),
        (ones(f32, T, H), ones(f32, T, K), ones(f32, E, 10, H), ones(f32, E, H, 5), ones(f32, E, 10), ones(f32, E, H)),
        True,
    ],
}  # fmt: skip
OUTPUTS = {  # positions of the arrays that a call writes
    "topk_gating": (6, 7, 8), "topk_gating replay": (6, 7, 8), "topk_gating_backward": (10,), "gating_loss_terms": (6,),
    "expert_choice": (3, 4, 5), "permute": (3,), "permute_quantize": (5, 6), "unpermute": (4,),
    "unpermute_backward": (5, 6), "quantize_fp8": (5, 6), "dequantize_fp8": (5,), "grouped_gemm": (3,),
    "grouped_gemm fp8": (3,), "grouped_gemm_wgrad": (3,), "moe_activate": (6,), "moe_activate_backward": (7, 8, 9),
    "moe_add_bias": (0,), "moe_add_bias_dots": (4,), "moe_bias_grad": (4,),
    "moe_forward": (4, 5), "moe_forward fp8": (5,), "moe_backward": (),
}  # fmt: skip
ERRORS = (TypeError, ValueError, IndexError, RuntimeError, OverflowError)


class Values:
    """Other contents for an argument."""

    def __init__(self, array):
        self.array = array


@functools.cache
def protected(name):
    """The legal arguments with every array against a guard page: made once, since a system has 65,530 mappings."""

    def protect(thing):
        if isinstance(thing, np.ndarray):
            return guarded(thing)
        return tuple(map(protect, thing)) if isinstance(thing, tuple) else thing

    return [protect(thing) for thing in CALLS[name]]


def restore(held, original):
    if isinstance(held, np.ndarray):
        held[...] = original
    elif isinstance(held, tuple):
        for pair in zip(held, original, strict=True):
            restore(*pair)


def call(name, change=None):
    """The call with some arguments changed; all arrays hold what they held at first."""
    arguments = list(protected(name))
    restore(tuple(arguments), tuple(CALLS[name]))
    for position, value in (change or {}).items():
        if isinstance(value, Values):  # in the guarded array itself
            arguments[position][...] = value.array
        else:
            arguments[position] = value
    return getattr(_backend.core, name.split()[0])(*arguments)


def survives(name, change):
    """It may raise, or compute something; the process goes on."""
    with contextlib.suppress(*ERRORS):
        call(name, change)
    return True


def wrong_arrays(array):
    """What no argument may be: another rank, no items, items of another size or kind, not in one piece."""
    yield array[None]
    yield np.ones((), array.dtype)
    yield np.ones(0, array.dtype)
    yield array.astype(np.clongdouble)
    yield array.astype(object)
    yield np.repeat(array, 2, -1)[..., ::2]
    if array.shape[0] > 1:
        yield array[::-1]


def other_extents(array):
    """Some of these fit, such as logits of more tokens than are chosen from."""
    for axis in range(array.ndim):
        yield guarded(np.take(array, range(array.shape[axis] - 1), axis))
        yield guarded(np.concatenate([array, np.take(array, [0], axis)], axis))
    if array.itemsize > 1:
        yield np.zeros(array.nbytes + 1, u8)[1:].view(array.dtype).reshape(array.shape)


def arrays_of(name):
    """Every array argument, also those inside a tuple: the array and the change that puts another in its place."""
    for position, value in enumerate(CALLS[name]):
        if isinstance(value, np.ndarray):
            yield value, lambda wrong, position=position: {position: wrong}
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, np.ndarray):
                    yield item, lambda wrong, p=position, v=value, i=i: {p: (*v[:i], wrong, *v[i + 1 :])}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_this_file_are_legal(cpu_floor, name):
    call(name)
    assert name in OUTPUTS or name == "plan_routes"


@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds(name):
    """Nothing of these is followed as if it were an array; where None is legal it is a call without the argument."""
    for position in range(len(CALLS[name])):
        for thing in (None, 5, -1, 2**70, 1.5, "x", b"x", [1], (), (1,), {}, object(), np.float32(1), np.ndarray):
            assert survives(name, {position: thing})


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arrays(name):
    for array, change in arrays_of(name):
        for wrong in wrong_arrays(array):
            with pytest.raises(ERRORS):
                call(name, change(wrong))
        for wrong in other_extents(array):
            assert survives(name, change(wrong))


@pytest.mark.parametrize("name", OUTPUTS)
def test_read_only_outputs(name):
    for position in OUTPUTS[name]:
        array = CALLS[name][position].copy()
        array.flags.writeable = False
        before = array.tobytes()
        with pytest.raises(ValueError, match="writeable"):
            call(name, {position: array})
        assert array.tobytes() == before


def test_read_only_gradients():
    grads = CALLS["moe_backward"][6]
    for i in range(len(grads)):
        array = grads[i].copy()
        array.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            call("moe_backward", {6: (*grads[:i], array, *grads[i + 1 :])})
        assert (array == 1).all()


def test_layers_that_lie():
    """Numbers and names inside the layer's tuple, and Fp8Arrays whose scales are too few."""
    layer = CALLS["moe_forward"][0]
    wrong = {2: [(ones(u8, E, 10, H), "e4m3", ones(f32, E, 1, 1), *block) for block in ((4, 128), (128, 4), (0, 1))]}
    wrong[2] += [(ones(u8, E, 10, H), "e3m4", ones(f32, E, 1, 1), 128, 128), (), (1, 2, 3, 4, 5)]
    wrong[6] = [(3, 1.0, 1.0, 0.0), (-1, 1.0, 1.0, 0.0), (0,)]
    wrong |= {7: ["down", None, 3], 8: [3, ()], 9: ["x", 2**70]}
    for position, values in wrong.items():
        for value in values:
            with pytest.raises(ERRORS):
                call("moe_forward", {0: (*layer[:position], value, *layer[position + 1 :])})
    for part_bytes in (-(2**63), -1, 0, 1, 2**63 - 1):
        call("moe_forward", {0: (*layer[:9], part_bytes)})


BAD = [-1, -2, E, T, R, R + 1, 2**20, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("name", CALLS)
def test_indices_that_lie(cpu_floor, name):
    """Ids, maps and offsets are checked or bounded where they are used; none leads outside the arrays."""
    for position, value in enumerate(CALLS[name]):
        if not isinstance(value, np.ndarray) or value.dtype.kind != "i" or position in OUTPUTS.get(name, ()):
            continue
        for place in range(value.size):
            for bad in [*BAD, 2**40, -(2**40), 2**62, -(2**63)] if value.dtype == i64 else BAD:
                wrong = value.copy()
                wrong.reshape(-1)[place] = bad
                assert survives(name, {position: Values(wrong)})


@pytest.mark.parametrize("router", [ROUTER, GROUPED])
def test_routers_that_lie(router):
    """Sizes that no RouterConfig has."""
    for field in range(5):
        for bad in (-1, 0, 2, 4, 5, 2**31, 2**62, -(2**63)):
            assert survives("topk_gating", {0: (*router[:field], bad, *router[field + 1 :])})


def test_numbers_that_lie():
    for name, position in (("plan_routes", 1), ("plan_routes", 2), ("permute_quantize", 3)):
        for bad in (-1, 0, -(2**63), 2**63 - 1):
            if (name, bad) == ("permute_quantize", 2**63 - 1):
                continue
            with pytest.raises(ERRORS):
                call(name, {position: bad})
    for block in ((0, 1), (1, 0), (-1, 1), (-(2**63), 1)):
        with pytest.raises(ERRORS):
            call("quantize_fp8", {1: block})
        with pytest.raises(ERRORS):
            call("grouped_gemm fp8", {0: (*fp8_operand(R, H)[:3], *block, True)})
    for kind in (-1, 3, 2**31, 2**40):
        with pytest.raises(ERRORS):
            call("moe_activate", {5: (kind, *SWIGLU[1:])})


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**30])
def test_threads_that_no_system_grants(threads):
    with pytest.raises(ValueError, match="threads must be in"):
        _backend.core.probe_fma(1, threads)
    with pytest.raises(ValueError, match="threads must be in"):
        _backend.core.probe_read(np.zeros(1000, u8), threads)
