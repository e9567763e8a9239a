"""Legal inputs in unusual memory: the bytes of their contiguous copy on every floor, and no byte of them written."""

from __future__ import annotations

import array as stdlib_array

import numpy as np
import pytest
from bad_input import BACKENDS, DTYPES, arrays_in, contents
from conftest import assert_same_bytes

import pyroute
from pyroute import Fp8Array, RouterConfig

T, E, K, H, N = 6, 8, 2, 10, 7
RNG = np.random.default_rng(7)
CONFIG = RouterConfig(E, K, renormalize="sum")
LOGITS = RNG.standard_normal((T, E), np.float32)
GATING = pyroute.topk_gating(LOGITS, CONFIG, backend="numpy")
PLAN = pyroute.plan_routes(GATING.topk_idx, E, alignment=2, backend="numpy")
R = PLAN.num_rows


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape, np.float32).astype(DTYPES[dtype])


CALLS = {
    "topk_gating": (pyroute.topk_gating, {"logits": LOGITS, "bias": normal(E), "token_mask": RNG.random(T) < 0.7}),
    "topk_gating bfloat16": (pyroute.topk_gating, {"logits": normal(T, E, dtype="bfloat16")}),
    "topk_gating replay": (pyroute.topk_gating, {"logits": LOGITS, "topk_idx": GATING.topk_idx.astype(np.int64)}),
    "topk_gating_backward": (
        pyroute.topk_gating_backward,
        {"grad_topk_weights": normal(T, K), "logits": LOGITS, "gating": GATING, "sequence_ids": np.arange(T) % 2},
    ),
    "balance_loss": (pyroute.balance_loss, {"logits": LOGITS, "gating": GATING, "sequence_ids": np.arange(T) % 2}),
    "z_loss": (pyroute.z_loss, {"logits": normal(T, E, dtype="float64"), "token_mask": RNG.random(T) < 0.5}),
    "update_bias": (pyroute.update_bias, {"bias": normal(E), "tokens_per_expert": np.arange(E)}),
    "expert_choice_gating": (pyroute.expert_choice_gating, {"logits": LOGITS}),
    "plan_routes": (pyroute.plan_routes, {"topk_idx": GATING.topk_idx}),
    "permute": (pyroute.permute, {"x": normal(T, H)}),
    "permute complex64": (pyroute.permute, {"x": normal(T, H).astype(np.complex64)}),
    "permute_quantize": (pyroute.permute_quantize, {"x": normal(T, H, dtype="float16")}),
    "unpermute": (pyroute.unpermute, {"rows": normal(R, H, dtype="bfloat16"), "topk_weights": normal(T, K)}),
    "permute_backward": (pyroute.permute_backward, {"grad_rows": normal(R, H)}),
    "unpermute_backward": (
        pyroute.unpermute_backward,
        {"grad_y": normal(T, H), "rows": normal(R, H), "topk_weights": normal(T, K)},
    ),
    "quantize_fp8": (pyroute.quantize_fp8, {"x": normal(R, H), "expert_offsets": PLAN.expert_offsets}),
    "Fp8Array": (
        lambda codes, scales, backend: pyroute.dequantize_fp8(Fp8Array(codes, scales, (1, 5)), backend=backend),
        {"codes": RNG.integers(0, 100, (T, H), np.uint8), "scales": normal(T, 2)},
    ),
    "grouped_gemm": (
        pyroute.grouped_gemm,
        {"a": normal(R, H), "b": normal(E, N, H, dtype="bfloat16"), "expert_offsets": PLAN.expert_offsets},
    ),
    "grouped_gemm_dgrad": (
        pyroute.grouped_gemm_dgrad,
        {"grad_out": normal(R, N), "b": normal(E, N, H), "expert_offsets": PLAN.expert_offsets},
    ),
    "grouped_gemm_wgrad": (
        pyroute.grouped_gemm_wgrad,
        {"grad_out": normal(R, N), "a": normal(R, H), "expert_offsets": PLAN.expert_offsets},
    ),
    "moe_forward": (
        pyroute.moe_forward,
        {
            "x": normal(T, H),
            "topk_idx": GATING.topk_idx,
            "topk_weights": GATING.topk_weights,
            "w_gate_up": normal(E, 2 * N, H),
            "w_down": normal(E, H, N),
            "b_gate_up": normal(E, 2 * N),
            "b_down": normal(E, H, dtype="bfloat16"),
        },
    ),
}
OTHERS = {
    pyroute.topk_gating: {"config": CONFIG},
    pyroute.topk_gating_backward: {
        "config": CONFIG, "balance_loss_coef": 0.1, "balance_loss_scope": "sequence", "z_loss_coef": 0.1,
    },
    pyroute.balance_loss: {"config": CONFIG, "scope": "sequence"},
    pyroute.expert_choice_gating: {"capacity": 3},
    pyroute.plan_routes: {"num_experts": E},
    pyroute.quantize_fp8: {"block": (2, 4)},
    pyroute.permute: {"plan": PLAN}, pyroute.permute_quantize: {"plan": PLAN}, pyroute.unpermute: {"plan": PLAN},
    pyroute.permute_backward: {"plan": PLAN}, pyroute.unpermute_backward: {"plan": PLAN},
}  # fmt: skip


def unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x):
    view = x.copy()
    view.flags.writeable = False
    return view


def on_disk(x, folder):
    path = folder / "array"
    np.ascontiguousarray(x).view(np.uint8).tofile(path)
    return np.memmap(path, x.dtype, "r", shape=x.shape)


class Subclass(np.ndarray):
    """Arithmetic that gives nonsense: results must not depend on it."""

    def __array_ufunc__(self, *args, **options):
        return 7

    def __getitem__(self, index):
        return 7


class Exporter:
    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


MEMORY = {
    "strided": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "strided rows": lambda x: np.repeat(x, 3, 0)[::3],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "reversed columns": lambda x: x[..., ::-1].copy()[..., ::-1],
    "Fortran": np.asfortranarray,
    "middle": lambda x: np.pad(x, 1)[tuple(slice(1, -1) for _ in x.shape)],
    "unaligned": unaligned,
    "read-only": read_only,
    "subclass": lambda x: x.copy().view(Subclass),
    "metadata": lambda x: x.view(np.dtype(x.dtype, metadata={"note": "a dtype that says more"})),
}


def results(call, arguments, backend):
    function, _ = CALLS[call]
    out = function(**{**OTHERS.get(function, {}), **arguments, "backend": backend})
    return [np.asarray(x) for x in (arrays_in(out) if not isinstance(out, float) else [np.array(out)])]


def assert_same(call, arguments, backend):
    before = contents(arguments)
    got, expected = results(call, arguments, backend), results(call, CALLS[call][1], backend)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert_same_bytes(a, b)
    assert contents(arguments) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("call", CALLS)
def test_unusual_memory(backend, call, memory):
    """One argument at a time, then all."""
    arrays = {name: x for name, x in CALLS[call][1].items() if isinstance(x, np.ndarray)}
    if memory == "metadata" and any(x.dtype.kind == "V" for x in arrays.values()):
        arrays = {name: x for name, x in arrays.items() if x.dtype.kind != "V"}  # ml_dtypes' types carry none
    changed = {name: MEMORY[memory](x) for name, x in arrays.items()}
    for name, x in changed.items():
        assert_same(call, {**CALLS[call][1], name: x}, backend)
    assert_same(call, {**CALLS[call][1], **changed}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_files_and_exporters(backend, call, tmp_path):
    for name, x in CALLS[call][1].items():
        if not isinstance(x, np.ndarray):
            continue
        assert_same(call, {**CALLS[call][1], name: on_disk(x, tmp_path)}, backend)
        if x.dtype.kind in "iuf":
            assert_same(call, {**CALLS[call][1], name: memoryview(x)}, backend)
        if x.dtype.kind in "iufb":
            assert_same(call, {**CALLS[call][1], name: Exporter(x)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_one_value_for_all(backend, call):
    """Stride 0 in every axis, where a constant is a legal value."""
    for name, x in CALLS[call][1].items():
        if isinstance(x, np.ndarray) and name != "expert_offsets":
            constant = np.broadcast_to(x.reshape(-1)[0], x.shape)
            got = results(call, {**CALLS[call][1], name: constant}, backend)
            expected = results(call, {**CALLS[call][1], name: np.ascontiguousarray(constant)}, backend)
            for a, b in zip(got, expected, strict=True):
                assert_same_bytes(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_byte_but_zero_is_true(backend):
    """A mask that came from a buffer of 255s counts its tokens once each."""
    for call in ("topk_gating", "z_loss"):
        mask = CALLS[call][1]["token_mask"]
        for byte in (2, 128, 255):
            odd = (mask.astype(np.uint8) * byte).view(np.bool_)
            assert_same(call, {**CALLS[call][1], "token_mask": odd}, backend)
    arguments = {**CALLS["topk_gating_backward"][1], "token_mask": np.full(T, 255, np.uint8).view(bool)}
    for a, b in zip(
        results("topk_gating_backward", arguments, backend),
        results("topk_gating_backward", {**arguments, "token_mask": np.ones(T, bool)}, backend),
        strict=True,
    ):
        assert_same_bytes(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_of_the_standard_library(backend):
    rows = [stdlib_array.array("f", row) for row in LOGITS.tolist()]
    flat = stdlib_array.array("f", [value for row in rows for value in row])
    logits = memoryview(flat).cast("B").cast("f", (T, E))
    for a, b in zip(
        pyroute.topk_gating(logits, CONFIG, backend=backend),
        pyroute.topk_gating(LOGITS, CONFIG, backend=backend),
        strict=True,
    ):
        assert_same_bytes(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_past_the_next_type_warn_nobody(backend, dtype):
    """Every warning is an error here: infinities and values that overflow on the way are ordinary."""
    largest = 1e300 if dtype == "float64" else 6e4
    x = np.array([[largest, -largest, np.inf, np.nan, 0.0, -0.0]], np.float64).astype(DTYPES[dtype])
    pyroute.quantize_fp8(x, backend=backend)
    q = Fp8Array(np.full((1, 6), 0x7E, np.uint8), np.full((1, 1), 3e38, np.float32))
    assert np.isinf(q.dequantize(dtype).astype(np.float32)).all()
    config = RouterConfig(6, 2, scaling_factor=3e38, renormalize="sum", renormalize_eps=0)
    g = pyroute.topk_gating(x, config, backend=backend)
    grad = np.full_like(g.topk_weights, 3e38)
    pyroute.topk_gating_backward(grad, x, g, config, balance_loss_coef=3e38, z_loss_coef=3e38, backend=backend)
    pyroute.balance_loss(x, g, config, backend=backend)
    pyroute.z_loss(x, backend=backend)


EMPTY = [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 4), (0, 2, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "depth"), EMPTY)
def test_empty_axes(backend, rows, cols, depth):
    a, b = np.ones((rows, depth), np.float32), np.ones((2, cols, depth), np.float32)
    offsets, grad = np.array([0, rows // 2, rows]), np.ones((rows, cols), np.float32)
    assert_same_bytes(pyroute.grouped_gemm(a, b, offsets, backend=backend), np.full((rows, cols), depth, np.float32))
    assert_same_bytes(
        pyroute.grouped_gemm_dgrad(grad, b, offsets, backend=backend), np.full((rows, depth), cols, np.float32)
    )
    expected = np.empty((2, cols, depth), np.float32)
    expected[0], expected[1] = rows // 2, rows - rows // 2
    assert_same_bytes(pyroute.grouped_gemm_wgrad(grad, a, offsets, backend=backend), expected)
    plan = pyroute.plan_routes(np.zeros((rows, 2), int), 1, backend=backend)
    x = np.ones((rows, cols), np.float32)
    assert pyroute.permute(x, plan, backend=backend).shape == (2 * rows, cols)
    assert_same_bytes(pyroute.unpermute(np.ones((2 * rows, cols), np.float32), plan, backend=backend), x + x)
    assert_same_bytes(pyroute.quantize_fp8(x, backend=backend).dequantize(), x)
