"""Routes: maps, moved bytes and sums are the oracle's on every floor."""

from __future__ import annotations

import mmap

import ml_dtypes
import numpy as np
import pytest
from conftest import CPU_FLOORS, assert_same_bytes, guarded, poison
from oracle import permutation as oracle
from routes import checked_plan, random_ids

from pyroute import (
    Fp8Array,
    RoutePlan,
    _backend,
    permute,
    permute_backward,
    permute_quantize,
    plan_routes,
    quantize_fp8,
    unpermute,
    unpermute_backward,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [np.dtype("float32"), BFLOAT16, np.dtype("float16"), np.dtype("float64")]
# half the spacing at 1 of the type that a result is rounded to
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24, "float64": 2.0**-1074}


# --- permute --------------------------------------------------------------------------------------------------------

MOVED = ["int8", "bool", "uint16", "float16", "int32", "float32", "float64", "complex64", "M8[s]", BFLOAT16]


@pytest.mark.parametrize("dtype", [np.dtype(d) for d in MOVED], ids=str)
@pytest.mark.parametrize("alignment", [1, 8])
def test_bytes_move_as_they_are(floor, dtype, alignment, rng):
    """Random bytes: NaN payloads and signs survive; padding rows are zero in memory that was not."""
    plan = checked_plan(random_ids(rng, 37, 3, 5, 0.2), 5, floor, alignment)
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, (37, 11 * dtype.itemsize), dtype=np.uint8)
    x = raw.view(dtype)
    out = poison((plan.num_rows, 11), dtype)
    result = permute(x, plan, out=out, backend=floor.backend)
    assert result is out
    assert_same_bytes(result.view(np.uint8), oracle.permute(raw, plan.row_to_token))
    assert_same_bytes(permute(x, plan, backend=floor.backend), out)


@pytest.mark.parametrize("at", ["end", "start"])
@pytest.mark.parametrize("dtype", [np.dtype("uint8"), *TYPES], ids=str)
def test_nothing_beyond_the_buffers_is_touched(floor, dtype, at, rng):
    for hidden in [1, 2, 7, 8, 9, 31, 32, 33, 64, 127, 257]:
        plan = plan_routes(random_ids(rng, 9, 3, 4, 0.2), 4, alignment=4, backend="numpy")
        held = RoutePlan(
            guarded(plan.tokens_per_expert, at=at),
            guarded(plan.expert_offsets, at=at),
            guarded(plan.row_to_token, at=at),
            guarded(plan.token_to_row, at=at),
            4,
        )
        x = guarded((rng.normal(size=(9, hidden)) * 50).astype(dtype), at=at)
        out = guarded(poison((plan.num_rows, hidden), dtype), at=at)
        permute(x, held, out=out, backend=floor.backend)
        assert_same_bytes(out, oracle.permute(x, plan.row_to_token))
        if dtype == np.uint8:
            continue
        back = guarded(poison((9, hidden), dtype), at=at)
        weights = guarded(rng.random((9, 3)).astype(np.float32), at=at)
        unpermute(out, held, weights, out=back, backend=floor.backend)
        assert_same_bytes(back, unpermute(out, plan, weights, backend="numpy"))
        unpermute(out, held, out=back, backend=floor.backend)
        assert_same_bytes(back, unpermute(out, plan, backend="numpy"))
        ours = unpermute_backward(x, out, held, weights, backend=floor.backend)
        base = unpermute_backward(x, out, plan, weights, backend="numpy")
        assert_same_bytes(ours[0], base[0])
        assert_same_bytes(ours[1], base[1])


def test_strided_and_unaligned_inputs(floor, rng):
    plan = plan_routes(random_ids(rng, 20, 3, 4, 0.2), 4, alignment=2, backend=floor.backend)
    x = rng.normal(size=(40, 60)).astype(np.float32)
    unaligned = np.frombuffer(bytearray(20 * 30 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(20, 30)
    unaligned[...] = x[:20, :30]
    for view in [x[::2, ::2], x[19::-1, ::-1], x[:, :20].T, np.broadcast_to(x[:1], (20, 60)), unaligned]:
        assert_same_bytes(permute(view, plan, backend=floor.backend), oracle.permute(view, plan.row_to_token))
    rows = np.asfortranarray(rng.normal(size=(plan.num_rows, 13)).astype(BFLOAT16))
    weights = np.asfortranarray(rng.random((20, 3)).astype(np.float32))
    expected = unpermute(rows.copy("C"), plan, weights.copy("C"), backend=floor.backend)
    assert_same_bytes(unpermute(rows, plan, weights, backend=floor.backend), expected)
    # the gradient of a sum is a broadcast scalar: stride 0
    ones = np.broadcast_to(np.ones((1, 1), BFLOAT16), (20, 13))
    strided = unpermute_backward(ones, rows, plan, weights, backend=floor.backend)
    plain = unpermute_backward(ones.copy("C"), rows, plan, weights, backend=floor.backend)
    assert_same_bytes(strided[0], plain[0])
    assert_same_bytes(strided[1], plain[1])


def test_fp8_moves_with_its_scales(floor, rng):
    plan = plan_routes(random_ids(rng, 30, 2, 4, 0.1), 4, alignment=8, backend=floor.backend)
    q = quantize_fp8(rng.normal(size=(30, 200)).astype(np.float32), format="e5m2", backend=floor.backend)
    moved = permute(q, plan, backend=floor.backend)
    assert (moved.block, moved.format) == (q.block, q.format)
    assert_same_bytes(moved.codes.view(np.uint8), oracle.permute(q.codes.view(np.uint8), plan.row_to_token))
    scales = oracle.permute(q.scales, plan.row_to_token)
    scales[plan.row_to_token < 0] = 1
    assert_same_bytes(moved.scales, scales)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_permute_quantize_is_permute_then_quantize(floor, dtype, scale_format, rng):
    for hidden in [0, 1, 64, 127, 128, 129, 512]:
        plan = plan_routes(random_ids(rng, 41, 3, 6, 0.2), 6, alignment=16, backend=floor.backend)
        x = (rng.normal(size=(41, hidden)) * 10.0 ** rng.uniform(-3, 3, (41, 1))).astype(dtype)
        x[3, :1], x[4, :1], x[5] = np.nan, np.inf, 0
        fused = permute_quantize(x, plan, scale_format=scale_format, backend=floor.backend)
        rows = permute(x, plan, backend=floor.backend)
        steps = quantize_fp8(rows, scale_format=scale_format, backend=floor.backend)
        assert_same_bytes(fused.codes.view(np.uint8), steps.codes.view(np.uint8))
        assert_same_bytes(fused.scales, steps.scales)
        padding = plan.row_to_token < 0
        assert (fused.scales[padding] == 1).all()
        assert (fused.codes.view(np.uint8)[padding] == 0).all()


# --- unpermute ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_weighted_sum_error(floor, dtype, top_k, rng):
    """(k + 1) roundings of the accumulator relative to the sum of magnitudes, and one to the result's type."""
    plan = plan_routes(random_ids(rng, 40, top_k, 7, 0.15), 7, alignment=4, backend=floor.backend)
    rows = rng.normal(size=(plan.num_rows, 50)).astype(dtype)
    weights = rng.random((40, top_k)).astype(np.float64 if dtype == np.float64 else np.float32)
    for chosen in (weights, None):
        result = unpermute(rows, plan, chosen, backend=floor.backend)
        exact, magnitude = oracle.unpermute(rows, plan.token_to_row, chosen)
        unit = 2.0**-53 if dtype == np.float64 else 2.0**-24
        bound = (top_k + 1) * unit * magnitude + HALF_ULP[dtype.name] * np.abs(exact) + SMALLEST[dtype.name]
        assert (np.abs(result.astype(np.float64) - exact) <= bound * (1 + 2.0**-20)).all()


def test_weighted_sum_is_the_promised_program(floor, rng):
    """Separate products and sums in slot order from +0: the bytes of one scalar operation at a time."""
    plan = plan_routes(random_ids(rng, 12, 4, 5, 0.2), 5, backend=floor.backend)
    rows = rng.normal(size=(plan.num_rows, 37)).astype(np.float32)
    weights = rng.normal(size=(12, 4)).astype(np.float32)
    expected = oracle.unpermute_float32(rows, plan.token_to_row, weights)
    assert_same_bytes(unpermute(rows, plan, weights, backend=floor.backend), expected)
    half = rows.astype(BFLOAT16)
    expected = oracle.unpermute_float32(half, plan.token_to_row, weights).astype(BFLOAT16)
    assert_same_bytes(unpermute(half, plan, weights, backend=floor.backend), expected)


def test_no_fused_multiply_add(floor):
    """w * r is 1 + 2**-23 + 2**-46: fused, the low part would survive the cancellation with slot 0."""
    w = np.float32(1 + 2.0**-23)
    plan = plan_routes(np.array([[0, 1]]), 2, backend=floor.backend)
    rows = np.array([[-1 - 2.0**-22], [1 + 2.0**-23]], np.float32)
    result = unpermute(rows, plan, np.array([[1, w]], np.float32), backend=floor.backend)
    assert result[0, 0] == 0.0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_floors_agree_on_every_kind_of_value(cpu_floor, dtype, rng):
    """NaN, infinities, subnormals, overflow of the sum and of the last rounding."""
    plan = plan_routes(random_ids(rng, 60, 3, 5, 0.1), 5, alignment=3, backend="numpy")
    bits = rng.integers(0, 256, (plan.num_rows, 70 * dtype.itemsize), dtype=np.uint8)
    rows = bits.view(dtype)
    weights = np.exp2(rng.integers(-20, 20, (60, 3))).astype(np.float32) * rng.choice([1, -1], (60, 3)).astype(
        np.float32
    )
    weights[3], weights[4], weights[5] = np.nan, np.inf, 0
    grad = rng.integers(0, 256, (60, 70 * dtype.itemsize), dtype=np.uint8).view(dtype)
    for chosen in (weights, None):
        ours = unpermute(rows, plan, chosen, backend="cpu")
        assert_same_bytes(ours, unpermute(rows, plan, chosen, backend="numpy"))
    ours = unpermute_backward(grad, rows, plan, weights, backend="cpu")
    base = unpermute_backward(grad, rows, plan, weights, backend="numpy")
    assert_same_bytes(ours[0], base[0])
    assert_same_bytes(ours[1], base[1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_single_routed_slot_moves_bytes(floor, dtype, rng):
    """Without weights: -0, NaN payloads and all, whichever slot is the routed one."""
    ids = np.full((50, 3), -1)
    ids[np.arange(50), rng.integers(0, 3, 50)] = rng.integers(0, 4, 50)
    ids[7] = -1
    plan = plan_routes(ids, 4, alignment=5, backend=floor.backend)
    raw = rng.integers(0, 256, (50, 19 * dtype.itemsize), dtype=np.uint8)
    raw[3] = 0
    x = raw.view(dtype)
    x[3] = -0.0
    rows = permute(x, plan, backend=floor.backend)
    expected = x.copy()
    expected[7] = 0
    assert_same_bytes(unpermute(rows, plan, backend=floor.backend), expected)
    assert_same_bytes(permute_backward(rows, plan, backend=floor.backend), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "complex64", "bool"])
def test_top_1_moves_any_type_back(floor, dtype, rng):
    plan = plan_routes(random_ids(rng, 30, 1, 4), 4, alignment=4, backend=floor.backend)
    x = rng.integers(0, 2, (30, 9)).astype(dtype)
    out = poison((30, 9), np.dtype(dtype))
    assert unpermute(permute(x, plan, backend=floor.backend), plan, out=out, backend=floor.backend) is out
    assert_same_bytes(out, x)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_no_slot_points_to_is_not_read(floor, dtype, rng):
    """NaN in padding rows, NaN weights and NaN gradients at slots that are not routed: nothing changes."""
    ids = random_ids(rng, 31, 4, 6, 0.4)
    ids[5] = -1
    plan = plan_routes(ids, 6, alignment=8, backend=floor.backend)
    rows = rng.normal(size=(plan.num_rows, 40)).astype(dtype)
    weights = rng.random((31, 4)).astype(np.float32)
    grad_y = rng.normal(size=(31, 40)).astype(dtype)
    results = []
    for filler in (0, np.nan, np.inf):
        rows[plan.row_to_token < 0] = filler
        weights[ids < 0] = filler
        grad_y[5] = filler  # a token without any row
        y = unpermute(rows, plan, weights, out=poison((31, 40), dtype), backend=floor.backend)
        s = unpermute(rows, plan, backend=floor.backend)
        results.append((y, s, *unpermute_backward(grad_y, rows, plan, weights, backend=floor.backend)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bytes(a, b)
    y, s, grad_rows, grad_weights = results[0]
    assert (y[5] == 0).all()
    assert (s[5] == 0).all()
    assert not grad_rows[plan.row_to_token < 0].view(np.uint8).any()
    assert (grad_weights[ids < 0] == 0).all()
    assert np.isfinite(grad_weights).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_token_does_not_depend_on_the_batch(floor, dtype, rng):
    hidden, weights_of, x_of = 70, rng.random((1000, 3)).astype(np.float32), rng.normal(size=(1000, 70)).astype(dtype)
    ids_of = random_ids(rng, 1000, 3, 9, 0.1)

    def layer(tokens):
        plan = plan_routes(ids_of[tokens], 9, alignment=4, backend=floor.backend)
        rows = permute(x_of[tokens], plan, backend=floor.backend)
        y = unpermute(rows, plan, weights_of[tokens], backend=floor.backend)
        grads = unpermute_backward(x_of[tokens], rows, plan, weights_of[tokens], backend=floor.backend)
        return y, permute_backward(grads[0], plan, backend=floor.backend), grads[1]

    everything = layer(np.arange(1000))
    assert everything[0].shape == (1000, hidden)
    for size in [1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 257]:
        tokens = rng.permutation(1000)[:size]
        for part, whole in zip(layer(tokens), everything, strict=True):
            assert_same_bytes(part, whole[tokens])


def test_there_and_back_for_any_routing(floor, rng):
    """Integers, so sums are exact: a token's rows sum to the token times its slots; weight 1 on one row returns it."""
    for _ in range(150):
        num_tokens, top_k, alignment, hidden = rng.integers(0, 13), *rng.integers(1, 9, 2), rng.integers(0, 41)
        ids = rng.integers(-1, 7, (num_tokens, top_k))
        plan = checked_plan(ids, 7, floor, int(alignment))
        x = np.arange(1, num_tokens * hidden + 1, dtype=np.float32).reshape(num_tokens, hidden)
        rows = permute(x, plan, backend=floor.backend)
        routed = ids >= 0
        total = permute_backward(rows, plan, backend=floor.backend)
        np.testing.assert_array_equal(total, x * routed.sum(axis=1)[:, None])
        first = (routed & (np.cumsum(routed, axis=1) == 1)).astype(np.float32)
        back = unpermute(rows, plan, first, backend=floor.backend)
        np.testing.assert_array_equal(back, x * routed.any(axis=1)[:, None])


# --- backward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 200])
def test_unpermute_backward(floor, dtype, hidden, rng):
    """grad_rows: one product, one rounding. grad_weights: a lane adds hidden / 32 products and a tree of 5, each
    product rounded once: (ceil(hidden / 32) + 6) units of the sum of magnitudes."""
    plan = plan_routes(random_ids(rng, 25, 3, 6, 0.2), 6, alignment=4, backend=floor.backend)
    rows = rng.normal(size=(plan.num_rows, hidden)).astype(dtype)
    grad_y = rng.normal(size=(25, hidden)).astype(dtype)
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    weights = rng.normal(size=(25, 3)).astype(wide)
    grad_rows, grad_weights = unpermute_backward(grad_y, rows, plan, weights, backend=floor.backend)
    exact_rows, exact_weights = oracle.unpermute_backward(grad_y, rows, plan.token_to_row, weights)
    assert grad_rows.dtype == dtype
    assert grad_weights.dtype == wide
    unit = HALF_ULP[wide.name]
    bound = (HALF_ULP[dtype.name] + 2 * unit) * np.abs(exact_rows) + SMALLEST[dtype.name]
    assert (np.abs(grad_rows.astype(np.float64) - exact_rows) <= bound).all()
    size = np.zeros(weights.shape)
    for t, j in np.argwhere(plan.token_to_row >= 0):
        size[t, j] = np.abs(grad_y[t].astype(np.float64)) @ np.abs(rows[plan.token_to_row[t, j]].astype(np.float64))
    terms = -(-hidden // 32) + 6
    assert (np.abs(grad_weights - exact_weights) <= (terms + 1) * unit * size).all()


def test_the_dot_product_is_the_promised_program(floor, rng):
    for hidden in [1, 5, 32, 33, 64, 100, 259]:
        plan = plan_routes(np.array([[1, 0], [0, -1]]), 2, backend=floor.backend)
        rows = rng.normal(size=(3, hidden)).astype(np.float32)
        grad_y = rng.normal(size=(2, hidden)).astype(np.float32)
        _, grad = unpermute_backward(grad_y, rows, plan, np.ones((2, 2), np.float32), backend=floor.backend)
        for t, j in [(0, 0), (0, 1), (1, 0)]:
            assert_same_bytes(grad[t, j], oracle.dot_float32(grad_y[t], rows[plan.token_to_row[t, j]]))


def test_gradients_against_finite_differences(floor, rng):
    """The loss is linear in each argument, so a central difference in float64 is exact up to rounding."""
    plan = plan_routes(random_ids(rng, 6, 2, 3, 0.2), 3, alignment=2, backend=floor.backend)
    x, weights, probe = rng.normal(size=(6, 4)), rng.normal(size=(6, 2)), rng.normal(size=(6, 4))

    def loss(x, weights):
        rows = permute(x, plan, backend=floor.backend)
        return (unpermute(rows, plan, weights, backend=floor.backend) * probe).sum()

    rows = permute(x, plan, backend=floor.backend)
    grad_rows, grad_weights = unpermute_backward(probe, rows, plan, weights, backend=floor.backend)
    grad_x = permute_backward(grad_rows, plan, backend=floor.backend)
    for argument, grad in ((x, grad_x), (weights, grad_weights)):
        for index in np.ndindex(argument.shape):
            kept = argument[index]
            argument[index] = kept + 0.5
            high = loss(x, weights)
            argument[index] = kept - 0.5
            low = loss(x, weights)
            argument[index] = kept
            assert abs(high - low - grad[index]) < 1e-12


# --- threads, sizes -------------------------------------------------------------------------------------------------


def test_any_number_of_threads(cpu_floor, threads, rng):
    plan = plan_routes(random_ids(rng, 1500, 4, 20, 0.1), 20, alignment=16, backend="numpy")
    for dtype in TYPES:
        x = rng.normal(size=(1500, 200)).astype(dtype)
        weights = rng.random((1500, 4)).astype(np.float32)
        results = {}
        for backend in ("cpu", "numpy"):
            rows = permute(x, plan, backend=backend)
            q = permute_quantize(x, plan, backend=backend)
            results[backend] = (
                rows,
                q.codes.view(np.uint8),
                q.scales,
                unpermute(rows, plan, weights, backend=backend),
                unpermute(rows, plan, backend=backend),
                *unpermute_backward(x, rows, plan, weights, backend=backend),
            )
        for ours, base in zip(results["cpu"], results["numpy"], strict=True):
            assert_same_bytes(ours, base)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_rows_that_pass_the_caches(cpu_floor, shift, rng):
    """Above 8 MiB rows are written by streaming stores, whose heads and tails depend on the address."""
    hidden = 2051
    plan = plan_routes(random_ids(rng, 300, 4, 9, 0.05), 9, alignment=8, backend="numpy")
    assert plan.num_rows * hidden * 4 > 8 << 20
    x = rng.normal(size=(300, hidden)).astype(np.float32)
    memory = guarded(poison(plan.num_rows * hidden + shift, np.float32))
    out = memory[: plan.num_rows * hidden].reshape(plan.num_rows, hidden)
    for target in (out, guarded(out), guarded(out, at="start")):
        assert_same_bytes(permute(x, plan, out=target, backend="cpu"), oracle.permute(x, plan.row_to_token))
    assert (memory.view(np.uint8)[out.nbytes :] == 0x7F).all()
    weights = rng.random((300, 4)).astype(np.float32)
    for y, rows in ((x, out), (x[:, :2048].copy(), out[:, :2048].copy()), (x.astype(BFLOAT16), out.astype(BFLOAT16))):
        ours = unpermute_backward(y, rows, plan, weights, backend="cpu")
        base = unpermute_backward(y, rows, plan, weights, backend="numpy")
        assert_same_bytes(ours[0], base[0])
        assert_same_bytes(ours[1], base[1])


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_quantised_rows_that_pass_the_caches(cpu_floor, threads, rng):
    plan = plan_routes(random_ids(rng, 1100, 8, 9, 0.05), 9, alignment=8, backend="numpy")
    x = rng.normal(size=(1100, 1027)).astype(BFLOAT16)
    ours = permute_quantize(x, plan, backend="cpu")
    base = permute_quantize(x, plan, backend="numpy")
    assert ours.codes.size > 8 << 20
    assert_same_bytes(ours.codes, base.codes)
    assert_same_bytes(ours.scales, base.scales)


@pytest.mark.slow
@pytest.mark.skipif(not CPU_FLOORS, reason="the array floor would hold the rows three times")
def test_permute_writes_past_2_to_the_31(rng):
    """One byte per item and 2**31 + 2**20 of them: the last row is where 32-bit products break."""
    hidden = 2**20
    ids = np.zeros((2, 1025), np.int32)
    ids[0, 1024] = -1
    ids[1, 1024] = 1
    plan = plan_routes(ids, 2)
    x = rng.integers(1, 256, (2, hidden), dtype=np.uint8)
    rows = permute(x, plan, backend="cpu")
    assert rows.size == 2049 * hidden
    for row in (0, 1023, 1024, 2046, 2047, 2048):
        assert_same_bytes(rows[row], x[plan.row_to_token[row]])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_unpermute_reads_past_2_to_the_31(floor, dtype, rng):
    """Token 1's row begins 2**31 + 2**21 items into the rows; the padding between is never touched memory."""
    hidden = 2**21
    plan = plan_routes(np.array([[0], [1]]), 2, alignment=1025, backend=floor.backend)
    # not np.zeros: under MALLOC_PERTURB_ glibc's calloc writes every byte, here 17 GB
    num_bytes = 2050 * hidden * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = np.frombuffer(memory, dtype).reshape(2050, hidden)
    rows[0], rows[1025] = rng.integers(1, 256, (2, hidden))
    weights = None if dtype == "uint8" else np.ones((2, 1), np.float32)
    assert_same_bytes(unpermute(rows, plan, weights, backend=floor.backend), rows[[0, 1025]])


# --- mistakes -------------------------------------------------------------------------------------------------------

PLAN = plan_routes(np.array([[0, 1], [1, 0]]), 2, backend="numpy")
X = np.ones((2, 3), np.float32)
ROWS = np.ones((4, 3), np.float32)
W = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "permute: plan must be a RoutePlan", lambda: permute(X, PLAN.token_to_row)),
        (ValueError, r"x must be of shape \[num_tokens=2, hidden\], got \[4, 3\]", lambda: permute(ROWS, PLAN)),
        (ValueError, "x must be of shape", lambda: permute(X[0], PLAN)),
        (TypeError, "items of 1, 2, 4 or 8 bytes", lambda: permute(X.astype(np.complex128), PLAN)),
        (TypeError, "items of 1, 2, 4 or 8 bytes", lambda: permute(X.astype(object), PLAN)),
        (TypeError, "out must be an array", lambda: permute(X, PLAN, out=[1])),
        (TypeError, "out must be float32", lambda: permute(X, PLAN, out=ROWS.astype(np.float64))),
        (ValueError, "out must be of shape", lambda: permute(X, PLAN, out=X.copy())),
        (ValueError, "out must be C-contiguous", lambda: permute(X, PLAN, out=np.ones((3, 4), np.float32).T)),
        (ValueError, "memory that no input uses", lambda: permute(ROWS[:2], PLAN, out=ROWS)),
        (ValueError, "blocks of one row", lambda: permute(quantize_fp8(X, block=(2, 3)), PLAN)),
        (ValueError, "blocks of one row", lambda: permute(quantize_fp8(np.ones((1, 2, 3), "f4")), PLAN)),
        (ValueError, "x must be of shape", lambda: permute(quantize_fp8(ROWS), PLAN)),
        (TypeError, "out must be None", lambda: permute(quantize_fp8(X), PLAN, out=ROWS)),
        (TypeError, "permute_quantize: x must be", lambda: permute_quantize(X.astype(np.int32), PLAN)),
        (ValueError, "scale_format must be", lambda: permute_quantize(X, PLAN, scale_format="e4m3")),
        (ValueError, "rows must be of shape", lambda: unpermute(X, PLAN, W)),
        (TypeError, "rows must be float32", lambda: unpermute(ROWS.astype(np.int32), PLAN)),
        (TypeError, "rows must be", lambda: unpermute(quantize_fp8(ROWS), PLAN)),
        (TypeError, "topk_weights must be float32", lambda: unpermute(ROWS, PLAN, W.astype(np.float64))),
        (TypeError, "topk_weights must be float32", lambda: unpermute(ROWS, PLAN, W.astype(BFLOAT16))),
        (ValueError, "topk_weights must be of shape", lambda: unpermute(ROWS, PLAN, W[:1])),
        (ValueError, "memory that no input uses", lambda: unpermute(ROWS, PLAN, W, out=ROWS[:2])),
        (ValueError, "grad_rows must be of shape", lambda: permute_backward(X, PLAN)),
        (TypeError, "grad_y must be float32", lambda: unpermute_backward(X.astype(BFLOAT16), ROWS, PLAN, W)),
        (ValueError, "grad_y must be of shape", lambda: unpermute_backward(ROWS, ROWS, PLAN, W)),
        (TypeError, "topk_weights must be an array", lambda: unpermute_backward(X, ROWS, PLAN, None)),
        (ValueError, "block must be in 1..2147483647, got 0", lambda: PLAN.to_block_lists(0)),
    ],
)
def test_a_mistake_is_one_sentence(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("field", ["row_to_token", "token_to_row"])
def test_a_plan_that_was_changed_cannot_reach_outside_the_arrays(cpu_floor, field, bad):
    """Maps that name rows or tokens which do not exist raise in every kernel that would follow them."""
    maps = {"row_to_token": PLAN.row_to_token.copy(), "token_to_row": PLAN.token_to_row.copy()}
    plan = RoutePlan(PLAN.tokens_per_expert, PLAN.expert_offsets, **maps)
    maps[field].reshape(-1)[1] = bad
    calls = [
        lambda: permute(X, plan, backend="cpu"),
        lambda: permute_quantize(X, plan, backend="cpu"),
        lambda: unpermute_backward(X, ROWS, plan, W, backend="cpu"),
    ]
    if field == "token_to_row":
        calls.append(lambda: unpermute(ROWS, plan, W, backend="cpu"))
    for call in calls:
        with pytest.raises(IndexError, match="route map"):
            call()


@pytest.mark.skipif(not CPU_FLOORS, reason="needs the extension")
@pytest.mark.parametrize(
    "call",
    [
        lambda core, m: core.permute(X, *m, ROWS[:3].copy()),
        lambda core, m: core.permute(X, *m, ROWS.astype(np.float64)),
        lambda core, m: core.permute(X, m[0], m[1].astype(np.int64), ROWS.copy()),
        lambda core, m: core.permute(X[:, ::2], *m, ROWS.copy()),
        lambda core, m: core.permute_quantize(X, *m, 0, False, np.zeros((4, 3), np.uint8), np.ones((4, 1), np.float32)),
        lambda core, m: core.permute_quantize(X, *m, 2, False, np.zeros((4, 3), np.uint8), np.ones((4, 1), np.float32)),
        lambda core, m: core.unpermute(ROWS, *m, W.astype(np.float64), X.copy()),
        lambda core, m: core.unpermute(ROWS, *m, W, X.astype(np.float16)),
        lambda core, m: core.unpermute(ROWS.astype(np.int32), *m, W, X.copy()),
        lambda core, m: core.unpermute(ROWS, *m, [1.0], X.copy()),
        lambda core, m: core.unpermute_backward(X, ROWS, *m, W, ROWS.copy(), W.astype(np.float64)),
        lambda core, m: core.plan_routes(np.zeros((2, 2), np.uint8), 2, 1),
        lambda core, m: core.plan_routes(np.zeros(2, np.int32), 2, 1),
        lambda core, m: core.plan_routes(np.zeros((2, 2), np.int32), 0, 1),
    ],
)  # fmt: skip
def test_the_extension_itself_refuses_what_does_not_fit(call):
    with pytest.raises((ValueError, TypeError), match="_core"):
        call(_backend.core, (PLAN.row_to_token, PLAN.token_to_row))


def test_results_are_the_same_every_time(floor, rng):
    ids = random_ids(rng, 300, 4, 11, 0.1)
    x = rng.normal(size=(300, 40)).astype(BFLOAT16)
    weights = rng.random((300, 4)).astype(np.float32)
    first = None
    for _ in range(20):
        plan = plan_routes(ids, 11, alignment=4, backend=floor.backend)
        rows = permute(x, plan, backend=floor.backend)
        y = unpermute(rows, plan, weights, backend=floor.backend)
        q = permute_quantize(x, plan, backend=floor.backend)
        seen = b"".join(a.tobytes() for a in (plan.row_to_token, plan.token_to_row, rows, y, q.codes, q.scales))
        first = first or seen
        assert seen == first
    assert isinstance(q, Fp8Array)
