"""Whatever is wrong with an argument of the grouped_gemm room: one sentence, before any work, and nothing written."""

from __future__ import annotations

import numpy as np
import pytest
from bad_input import (
    BACKENDS,
    HUGE,
    INTEGERS,
    Case,
    assert_refused,
    table,
    wrong_arrays,
    wrong_backends,
    wrong_choices,
    wrong_offsets,
    wrong_outputs,
)

import pyroute

R, E, N, K = 6, 3, 4, 5
OFFSETS = [0, 2, 2, R]
TYPES = ("float32", "bfloat16")


def forward():
    return {
        "a": np.ones((R, K), np.float32),
        "b": np.ones((E, N, K), np.float32),
        "expert_offsets": np.array(OFFSETS),
    }


def dgrad():
    arguments = forward()
    del arguments["a"]
    return arguments | {"grad_out": np.ones((R, N), np.float32)}


def wgrad():
    arguments = forward()
    del arguments["b"]
    return arguments | {"grad_out": np.ones((R, N), np.float32)}


def fp8(*shape, block=(1, 128), **options):
    return pyroute.quantize_fp8(np.ones(shape, np.float32), block=block, backend="numpy", **options)


SEGMENTS = wrong_offsets("expert_offsets", R, E, OFFSETS)
FREE_SEGMENTS = [case for case in wrong_offsets("expert_offsets", R, None, OFFSETS) if str(HUGE) not in case.name]
OUT_DTYPES = [
    *(case for case in wrong_choices("out_dtype", none_is_legal=True) if case.error is ValueError),
    *(
        Case(f"out_dtype {name}", {"out_dtype": x}, TypeError, "out_dtype must be float32 or bfloat16, got")
        for name, x in {"int": 1, "float64": np.float64, "list": ["float32"], "other order": np.dtype(">f4")}.items()
    ),
    Case("out and out_dtype", {"out_dtype": "bfloat16", "out": np.ones((R, N), np.float32)}, TypeError, "out must be"),
]


def over(argument, shape):
    """An output that begins where the offsets are: the kernel would lose its way while it writes."""
    memory = np.zeros(int(np.prod(shape)), np.float32)
    offsets = memory[: 2 * (E + 1)].view(np.int64)
    offsets[:] = OFFSETS
    change = {argument: memory.reshape(shape), "expert_offsets": offsets}
    return Case(f"{argument} over the offsets", change, ValueError, f"{argument} must be memory that no input uses")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        (
            pyroute.grouped_gemm,
            forward,
            [
                *wrong_arrays("a", (R, K), TYPES, ".."),
                *wrong_arrays("b", (E, N, K), TYPES, "..x"),
                *SEGMENTS,
                *OUT_DTYPES,
                *wrong_outputs("out", (R, N), "float32", any_of=TYPES),
                over("out", (R, N)),
                Case("fp8 a of another width", {"a": fp8(R, K + 1)}, ValueError, "b must be of shape"),
                Case("fp8 b of another width", {"b": fp8(E, N, K + 1)}, ValueError, "b must be of shape"),
                Case("fp8 a of three axes", {"a": fp8(1, R, K)}, ValueError, "a must be of shape [R, K]"),
                Case("fp8 b of two axes", {"b": fp8(N, K)}, ValueError, "b must be of shape"),
                Case(
                    "fp8 a of other segments",
                    {"a": fp8(R, K, block=(2, 1), expert_offsets=np.array([0, 1, 3, R]))},
                    ValueError,
                    "a must be quantised with the expert_offsets of this call",
                ),
                Case(
                    "fp8 a of other experts",
                    {"a": fp8(R, K, block=(2, 1), expert_offsets=np.array([0, R]))},
                    ValueError,
                    "a must be quantised with the expert_offsets of this call",
                ),
            ],
        ),
        (
            pyroute.grouped_gemm_dgrad,
            dgrad,
            [
                *wrong_arrays("grad_out", (R, N), TYPES, ".."),
                *wrong_arrays("b", (E, N, K), TYPES, ".x."),
                *SEGMENTS,
                *OUT_DTYPES[:-1],
                *wrong_outputs("out", (R, K), "float32", any_of=TYPES),
                over("out", (R, K)),
            ],
        ),
        (
            pyroute.grouped_gemm_wgrad,
            wgrad,
            [
                *wrong_arrays("grad_out", (R, N), TYPES, ".."),
                *wrong_arrays("a", (R, K), TYPES, "x."),
                *FREE_SEGMENTS,
                *wrong_outputs("out", (E, N, K), "float32"),
                *wrong_outputs("accumulate_into", (E, N, K), "float32"),
                over("out", (E, N, K)),
                over("accumulate_into", (E, N, K)),
                Case(
                    "both outputs",
                    {"out": np.ones((E, N, K), np.float32), "accumulate_into": np.ones((E, N, K), np.float32)},
                    ValueError,
                    "out must be None together with accumulate_into",
                ),
            ],
        ),
    ),
)
def test_refused(backend, function, legal, case):
    assert_refused(function, {**legal(), "backend": backend}, case)


@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        (pyroute.grouped_gemm, forward, wrong_backends()),
        (pyroute.grouped_gemm_dgrad, dgrad, wrong_backends()),
        (pyroute.grouped_gemm_wgrad, wgrad, wrong_backends()),
    ),
)
def test_backend_refused(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["a", "b", "scales", "codes"])
def test_out_may_not_lie_in_an_operand(backend, name):
    arguments = {**forward(), "backend": backend}
    if name in ("scales", "codes"):
        arguments["b"] = fp8(E, N, K, block=(1, 1))
    source = getattr(arguments["b"], name, None) if name in ("scales", "codes") else arguments[name]
    memory = np.zeros(1000, np.uint8)
    shared = memory[: source.nbytes].view(source.dtype).reshape(source.shape)
    if name in ("scales", "codes"):
        fields = {"codes": arguments["b"].codes, "scales": arguments["b"].scales, "block": (1, 1)} | {name: shared}
        arguments["b"] = pyroute.Fp8Array(**fields)
    else:
        arguments[name] = shared
    out = memory[: R * N * 4].view(np.float32).reshape(R, N)
    case = Case("", {"out": out}, ValueError, "out must be memory that no input uses")
    assert_refused(pyroute.grouped_gemm, arguments, case)


@pytest.mark.parametrize("long", [2**50, 2**58])
def test_nothing_however_long_takes_no_time(long):
    f32, offsets = np.float32, np.array([0, 0])
    assert pyroute.grouped_gemm(np.empty((0, long), f32), np.empty((1, 0, long), f32), offsets).shape == (0, 0)
    rows = np.array([0, long])
    assert pyroute.grouped_gemm(np.empty((long, 0), f32), np.empty((1, 0, 0), f32), rows).shape == (long, 0)
    assert pyroute.grouped_gemm_dgrad(np.empty((0, 0), f32), np.empty((1, 0, long), f32), offsets).shape == (0, long)
    assert pyroute.grouped_gemm_wgrad(np.empty((0, 0), f32), np.empty((0, long), f32), offsets).shape == (1, 0, long)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_of_every_type_are_offsets(backend):
    expected = pyroute.grouped_gemm(**forward(), backend=backend)
    for name in INTEGERS:
        offsets = {"expert_offsets": np.array(OFFSETS, name)}
        assert (pyroute.grouped_gemm(**forward() | offsets, backend=backend) == expected).all()
