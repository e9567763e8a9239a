"""Moves on the GPU: the CPU floor's bytes, from any address, for any routing."""

from __future__ import annotations

import ctypes
import mmap

import emulated
import ml_dtypes
import numpy as np
import pytest
from emulated import launched, memory, to_device, to_host

import pyroute
from pyroute import RoutePlan, _backend, permute, permute_quantize, plan_routes, quantize_fp8, unpermute
from pyroute._device import arrays
from pyroute._device.arrays import DeviceArray
from pyroute._device.route_plan import maps as maps_of
from pyroute.quantization import unchecked_fp8

SEEDS = pytest.mark.parametrize("seed", range(4), indirect=True)
TYPES = [np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("float16"), np.dtype("float64")]
FIELDS = ("tokens_per_expert", "expert_offsets", "row_to_token", "token_to_row")
# places of an array: aligned, moved by one item, against the inaccessible page behind it
PLACES = [{}, {"offset": 1}, {"at": "end"}]


def same_bytes(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes(), f"{np.flatnonzero(a.view(np.uint8) != b.view(np.uint8))[:8]}"


class Routes:
    """A routing as a plan of each floor. The GPU's has more rows, all of them padding."""

    def __init__(self, rng, num_tokens, top_k, num_experts, unrouted=0.1, alignment=1):
        ids = rng.integers(0, num_experts, (num_tokens, top_k))
        ids[rng.random(ids.shape) < unrouted] = -1
        self.host = plan_routes(ids, num_experts, alignment=alignment)
        self.ours = plan_routes(to_device(ids), num_experts, alignment=alignment)

    def rows_of(self, host_rows, filler=0):
        """The host's rows with the GPU's padding."""
        more = self.ours.num_rows - self.host.num_rows
        return np.concatenate([host_rows, np.full((more, host_rows.shape[1]), filler, host_rows.dtype)])

    def weights(self, rng, dtype):
        """Those of slots that are not routed are NaN, which must not be read."""
        weights = rng.normal(size=self.host.token_to_row.shape).astype("float64" if dtype == "float64" else "float32")
        weights[self.host.token_to_row < 0] = np.nan
        return weights


def numbers(rng, shape, dtype):
    """Of every kind: NaN with payloads, infinities, subnormals, zeros of both signs, and ordinary ones."""
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-7, 448, 6e4], np.float64).astype(dtype)
    kind = rng.random(shape)
    x = np.where(kind < 0.02, raw, x)
    return np.where(kind > 0.97, rng.choice(special, shape), x)


def poisoned(shape, dtype, **place):
    out = np.empty(shape, dtype)
    out.view(np.uint8).reshape(-1)[...] = 0x7F
    return to_device(out, **place)


# --- permute --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("dtype", ["int8", "bool", "uint16", "bfloat16", "int32", "float64", "complex64"])
def test_bytes_move_as_they_are(dtype, alignment, rng):
    """Random bytes of rows of every length and address, to poisoned memory."""
    dtype = TYPES[1] if dtype == "bfloat16" else np.dtype(dtype)
    routes = Routes(rng, 37, 3, 5, 0.2, alignment)
    for hidden in (1, 2, 3, 8, 15, 16, 33, 64, 100, 256, 257, 1040):
        raw = rng.integers(0, 2 if dtype.kind == "b" else 256, (37, hidden * dtype.itemsize), dtype=np.uint8)
        expected = routes.rows_of(permute(raw, routes.host)).view(dtype)
        for place in PLACES:
            out = poisoned(expected.shape, dtype, **place)
            assert permute(to_device(raw.view(dtype), **place), routes.ours, out=out) is out
            same_bytes(to_host(out).view(np.uint8), expected.view(np.uint8))
        same_bytes(to_host(permute(to_device(raw.view(dtype)), routes.ours)).view(np.uint8), expected.view(np.uint8))
        memory.check()


@pytest.mark.parametrize(("num_bytes", "kernel"), [(64, "16"), (72, "4"), (70, "2"), (69, "1")])
def test_the_widest_words_that_rows_allow(num_bytes, kernel, rng):
    routes = Routes(rng, 9, 2, 3)
    x = rng.integers(0, 256, (9, num_bytes), dtype=np.uint8)
    launched()
    permute(to_device(x), routes.ours)
    assert launched() == [f"permute_{kernel}"]
    for offset, expected in ((16, "16"), (4, "4"), (2, "2"), (1, "1")):
        permute(to_device(x, offset=offset), routes.ours)
        assert launched() == [f"permute_{min(int(kernel), int(expected))}"]


@SEEDS
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "alignment"),
    [(0, 3, 4, 8), (1, 8, 256, 128), (130, 8, 7, 16), (70, 9, 3, 1), (40, 32, 40, 4), (25, 17, 2000, 2)],
)
def test_any_routing_there_and_back(seed, num_tokens, top_k, num_experts, alignment, rng):
    routes = Routes(rng, num_tokens, top_k, num_experts, 0.2, alignment)
    for dtype, hidden in zip(TYPES, (40, 264, 33, 6), strict=True):
        x = numbers(rng, (num_tokens, hidden), dtype)
        rows = permute(x, routes.host)
        ours = permute(to_device(x), routes.ours)
        same_bytes(to_host(ours), routes.rows_of(rows))
        weights = routes.weights(rng, dtype)
        same_bytes(to_host(unpermute(ours, routes.ours, to_device(weights))), unpermute(rows, routes.host, weights))
        same_bytes(to_host(pyroute.permute_backward(ours, routes.ours)), pyroute.permute_backward(rows, routes.host))
        memory.check()


def test_nothing_to_move(rng):
    routes = Routes(rng, 5, 2, 3, 1.0)
    for hidden in (0, 3, 8):
        x = np.ones((5, hidden), np.float32)
        assert (to_host(permute(to_device(x), routes.ours)) == 0).all()
        rows = to_device(np.full((routes.ours.num_rows, hidden), np.nan, np.float32))
        weights = to_device(np.full((5, 2), np.nan, np.float32))
        assert (to_host(unpermute(rows, routes.ours, weights)) == 0).all()
        assert (to_host(unpermute(rows, routes.ours)) == 0).all()
        for gradient in to_host(pyroute.unpermute_backward(to_device(x), rows, routes.ours, weights)):
            assert (gradient == 0).all()
        codes, scales = (to_host(part) for part in parts_of(permute_quantize(to_device(x), routes.ours)))
        assert (codes == 0).all()
        assert (scales == 1).all()
        memory.check()


# --- FP8 ------------------------------------------------------------------------------------------------------------


def parts_of(q):
    return q.codes.view(np.uint8), q.scales


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_fp8_moves_with_its_scales(format, rng):
    routes = Routes(rng, 30, 2, 4, 0.1, 8)
    for hidden in (1, 127, 200, 512):
        q = quantize_fp8(rng.normal(size=(30, hidden)).astype(np.float32), format=format)
        codes, scales = parts_of(permute(q, routes.host))
        for place in PLACES:
            given = unchecked_fp8(to_device(q.codes, **place), to_device(q.scales, **place), q.block, format, None)
            moved = permute(given, routes.ours)
            assert (moved.block, moved.format) == (q.block, format)
            same_bytes(to_host(moved.codes).view(np.uint8), routes.rows_of(codes))
            same_bytes(to_host(moved.scales), routes.rows_of(scales, 1.0))
        memory.check()


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_permute_quantize_is_permute_then_quantize(dtype, scale_format, rng):
    routes = Routes(rng, 21, 3, 4, 0.2, 4)
    for hidden in (1, 3, 4, 100, 127, 128, 129, 200, 256, 1000, 1024, 1028, 2176):
        x = numbers(rng, (21, hidden), dtype)
        x[0] = rng.normal(size=hidden)  # a row of finite numbers, one of zeros, a tiny one, one that saturates
        x[1] = 0
        x[2] = np.float64(1e-42 if dtype != "float16" else 1e-7)
        x[3] = ml_dtypes.finfo(dtype).max if dtype != "float64" else 1e300
        with np.errstate(all="ignore"):
            codes, scales = parts_of(permute_quantize(x, routes.host, scale_format=scale_format))
        for place in PLACES:
            moved = permute_quantize(to_device(x, **place), routes.ours, scale_format=scale_format)
            assert (moved.block, moved.format) == ((1, 128), "e4m3")
            same_bytes(to_host(moved.codes).view(np.uint8), routes.rows_of(codes))
            same_bytes(to_host(moved.scales), routes.rows_of(scales, 1.0))
        memory.check()


@SEEDS
@pytest.mark.parametrize("card", [80, 90], indirect=True)
def test_quantised_rows_of_many_slots(card, seed, rng):
    routes = Routes(rng, 60, 19, 33, 0.3, 2)
    x = numbers(rng, (60, 1160), TYPES[1])
    codes, scales = parts_of(permute_quantize(x, routes.host))
    moved = permute_quantize(to_device(x), routes.ours)
    same_bytes(to_host(moved.codes).view(np.uint8), routes.rows_of(codes))
    same_bytes(to_host(moved.scales), routes.rows_of(scales, 1.0))


# --- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 8, 9, 16, 32])
def test_weighted_and_plain_sums(dtype, top_k, rng):
    """Rows that no slot points to, and weights of slots that are not routed, are NaN."""
    routes = Routes(rng, 19, top_k, 6, 0.3, 4)
    for hidden in (1, 8, 31, 64, 264, 515):
        rows = numbers(rng, (routes.host.num_rows, hidden), dtype)
        rows[routes.host.row_to_token < 0] = np.nan
        weights = routes.weights(rng, dtype)
        weighted, plain = unpermute(rows, routes.host, weights), unpermute(rows, routes.host)
        for place in PLACES:
            given = to_device(routes.rows_of(rows, np.nan), **place)
            out = poisoned((19, hidden), dtype, **place)
            assert unpermute(given, routes.ours, to_device(weights, **place), out=out) is out
            same_bytes(to_host(out), weighted)
            same_bytes(to_host(unpermute(given, routes.ours)), plain)
            same_bytes(to_host(pyroute.permute_backward(given, routes.ours)), plain)
        memory.check()


def test_a_single_routed_slot_moves_bytes(rng):
    """-0 and the payloads of NaN come back; a second slot sums them away."""
    ids = np.full((7, 11), -1)
    ids[np.arange(6), [0, 3, 7, 8, 10, 5]] = 1
    ids[5, 9] = 0
    host, ours = plan_routes(ids, 2), plan_routes(to_device(ids), 2)
    for dtype in TYPES:
        for hidden in (16, 17):
            raw = rng.integers(0, 256, (host.num_rows, hidden * dtype.itemsize), dtype=np.uint8)
            raw[:, ::3] = 0x80
            given = np.zeros((ours.num_rows, hidden * dtype.itemsize), np.uint8)
            given[: host.num_rows] = raw
            expected = unpermute(raw.view(dtype), host)
            same_bytes(to_host(unpermute(to_device(given.view(dtype)), ours)), expected)
            assert (expected[0].view(np.uint8) == raw[host.token_to_row[0, 0]]).all()


@pytest.mark.parametrize("dtype", ["uint8", "int32", "complex64", "bool", "bfloat16"])
def test_top_1_moves_any_type_back(dtype, rng):
    routes = Routes(rng, 29, 1, 4, 0.3, 2)
    dtype = TYPES[1] if dtype == "bfloat16" else np.dtype(dtype)
    rows = rng.integers(0, 2, (routes.host.num_rows, 5 * dtype.itemsize), dtype=np.uint8).view(dtype)
    back = unpermute(to_device(routes.rows_of(rows)), routes.ours)
    same_bytes(to_host(back), unpermute(rows, routes.host))


# --- gradients of the weighted sum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 8, 11])
def test_unpermute_backward(dtype, top_k, rng):
    routes = Routes(rng, 13, top_k, 5, 0.2, 4)
    for hidden in (1, 8, 31, 32, 33, 40, 128, 200, 264, 515):
        rows, grad_y = numbers(rng, (routes.host.num_rows, hidden), dtype), numbers(rng, (13, hidden), dtype)
        rows[::2] = rng.normal(size=(len(rows[::2]), hidden))  # some whose sums are numbers
        grad_y[::2] = rng.normal(size=(7, hidden))
        weights = routes.weights(rng, dtype)
        expected = pyroute.unpermute_backward(grad_y, rows, routes.host, weights)
        for place in PLACES:
            given = [to_device(x, **place) for x in (grad_y, routes.rows_of(rows, np.nan))]
            grad_rows, grad_weights = pyroute.unpermute_backward(*given, routes.ours, to_device(weights, **place))
            same_bytes(to_host(grad_rows), routes.rows_of(expected[0]))
            same_bytes(to_host(grad_weights), expected[1])
        memory.check()


@SEEDS
def test_gradients_of_many_slots(seed, rng):
    routes = Routes(rng, 150, 5, 9, 0.1, 16)
    for dtype in TYPES:
        rows, grad_y = (
            rng.normal(size=(routes.host.num_rows, 96)).astype(dtype),
            rng.normal(size=(150, 96)).astype(dtype),
        )
        weights = routes.weights(rng, dtype)
        expected = pyroute.unpermute_backward(grad_y, rows, routes.host, weights)
        ours = pyroute.unpermute_backward(
            to_device(grad_y), to_device(routes.rows_of(rows, np.nan)), routes.ours, to_device(weights)
        )
        same_bytes(to_host(ours[0]), routes.rows_of(expected[0]))
        same_bytes(to_host(ours[1]), expected[1])


# --- large arrays ---------------------------------------------------------------------------------------------------


def untouched(shape, dtype):
    """Memory of which only the pages that are used exist."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if emulated.REAL:
        address, owner = memory.allocate(num_bytes)
    else:
        owner = mmap.mmap(-1, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    return DeviceArray(address, shape, np.dtype(dtype), memory, owner)


def test_offsets_pass_2_to_the_31(rng):
    """The last rows of 2 GiB of each type, whose other rows are a token's too, so that nothing fills them."""
    num_rows, hidden = 2**16 + 4, 2**15
    ids = np.zeros((2, 2), np.int32)
    small = plan_routes(ids, 1)
    slots = small.token_to_row + num_rows - 4
    maps = (np.array([num_rows], np.int32), np.array([0, num_rows]), np.zeros(num_rows, np.int32), slots)
    plan = RoutePlan(*map(to_device, maps))
    weights = rng.normal(size=(2, 2)).astype(np.float32)

    def last_rows(rows):
        return to_host(rows[num_rows - 4 : num_rows])

    x = numbers(rng, (2, hidden), TYPES[1])
    expected = permute(x, small)
    rows = permute(to_device(x), plan, out=untouched((num_rows, hidden), TYPES[1]))
    same_bytes(last_rows(rows), expected)
    same_bytes(to_host(unpermute(rows, plan, to_device(weights))), unpermute(expected, small, weights))
    grads = pyroute.unpermute_backward(x, expected, small, weights)

    place, bfloat16 = arrays.place(rows), 1
    given = [to_device(x), rows, to_device(weights)]
    made = [untouched((num_rows, hidden), TYPES[1]), poisoned((2, 2), np.float32)]
    _backend.cuda.unpermute_backward(*place, maps_of(plan), hidden, bfloat16, *map(arrays.pointer, (*given, *made)))
    same_bytes(last_rows(made[0]), grads[0])
    same_bytes(to_host(made[1]), grads[1])

    codes, scales = untouched((num_rows, hidden), np.uint8), untouched((num_rows, hidden // 128), np.float32)
    x, codes_at, scales_at = map(arrays.pointer, (given[0], codes, scales))
    _backend.cuda.permute_quantize(*place, maps_of(plan), hidden, bfloat16, x, False, codes_at, scales_at)
    q = permute_quantize(to_host(given[0]), small)
    same_bytes(last_rows(codes), q.codes.view(np.uint8))
    same_bytes(last_rows(scales), q.scales)


# --- hostile input --------------------------------------------------------------------------------------------------

HOSTILE = [-(2**31), -2, -1, 6, 7, 2**31 - 1]


@pytest.mark.parametrize("bad", HOSTILE)
def test_maps_that_lead_outside_are_not_followed(bad):
    """Rows outside 0..5 are not routed, tokens outside 0..2 are padding; nothing is read or written elsewhere."""
    maps = [np.array([2, 2, 2], np.int32), np.array([0, 2, 4, 6]), np.array([0, 1, 0, 2, bad, bad], np.int32),
            np.array([[0, 2], [1, bad], [bad, 3]], np.int32)]  # fmt: skip
    counted = [np.where((m < 0) | (m >= n), -1, m).astype(np.int32) for m, n in ((maps[2], 3), (maps[3], 6))]
    ours = RoutePlan(*(to_device(m) for m in maps))
    x = np.arange(3 * 40, dtype=np.float32).reshape(3, 40)
    rows = to_host(permute(to_device(x), ours, out=poisoned((6, 40), np.float32)))
    same_bytes(rows, np.where(counted[0][:, None] < 0, np.float32(0), x[counted[0]]))
    weights = np.ones((3, 2), np.float32)
    total = sum(np.where(counted[1][:, j, None] < 0, np.float32(0), rows[counted[1][:, j]]) for j in range(2))
    same_bytes(to_host(unpermute(to_device(rows), ours, to_device(weights))), total)
    same_bytes(to_host(unpermute(to_device(rows), ours)), total)
    grad_rows, grad_weights = pyroute.unpermute_backward(to_device(x), to_device(rows), ours, to_device(weights))
    assert (to_host(grad_rows)[4:] == 0).all()
    assert (to_host(grad_weights)[counted[1] < 0] == 0).all()
    codes, scales = (to_host(part) for part in parts_of(permute_quantize(to_device(x), ours)))
    assert (codes[4:] == 0).all()
    assert (scales[4:] == 1).all()
    memory.check()


def test_a_mistake_is_one_sentence(rng):
    routes = Routes(rng, 6, 2, 3)
    plan, x = routes.ours, np.ones((6, 8), np.float32)
    device_x, rows = to_device(x), to_device(np.ones((plan.num_rows, 8), np.float32))
    wide = to_device(np.ones((plan.num_rows, 8)))
    for error, match, call in [
        (TypeError, "permute: arrays must be on one device", lambda: permute(x, plan)),
        (TypeError, "permute: arrays must be on one device", lambda: permute(device_x, routes.host)),
        (TypeError, "permute: backend must be one for the arrays", lambda: permute(device_x, plan, backend="cpu")),
        (ValueError, r"permute: x must be of shape \[num_tokens=6", lambda: permute(rows, plan)),
        (TypeError, "permute: out must be float32", lambda: permute(device_x, plan, out=wide)),
        (ValueError, "permute: out must be of shape", lambda: permute(device_x, plan, out=device_x)),
        (ValueError, "unpermute: rows must be of shape", lambda: unpermute(device_x, plan)),
        (TypeError, "unpermute: topk_weights must be float64, got float32",
         lambda: unpermute(wide, plan, to_device(np.ones((6, 2), np.float32)))),
    ]:  # fmt: skip
        with pytest.raises(error, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    shared = to_device(np.ones((6 + plan.num_rows, 8), np.float32))
    with pytest.raises(ValueError, match="permute: out must be memory that no input uses"):
        permute(shared[plan.num_rows - 1 : plan.num_rows + 5], plan, out=shared[: plan.num_rows])


def test_results_are_the_same_every_time(rng):
    routes = Routes(rng, 50, 4, 7, 0.1, 8)
    rows = to_device(rng.normal(size=(routes.ours.num_rows, 72)).astype(np.float32))
    weights = to_device(routes.weights(rng, "float32"))
    first = to_host(unpermute(rows, routes.ours, weights))
    for _ in range(3):
        same_bytes(to_host(unpermute(rows, routes.ours, weights)), first)
