"""Whatever is wrong with an argument of the quantization room: one sentence, before any work, and nothing written."""

from __future__ import annotations

import numpy as np
import pytest
from bad_input import (
    BACKENDS,
    DTYPES,
    FLOATS,
    Case,
    assert_refused,
    table,
    wrong_arrays,
    wrong_backends,
    wrong_choices,
    wrong_offsets,
)

import pyroute
from pyroute import Fp8Array

T, H = 4, 5


def values():
    return {"x": np.ones((T, H), np.float32)}


def codes():
    return {"codes": np.zeros((T, 2 * H), np.uint8), "scales": np.ones((T, 2), np.float32), "block": (1, H)}


def segmented():
    return {**codes(), "block": (2, H), "scales": np.ones((3, 2), np.float32), "expert_offsets": np.array([0, 1, T])}


def blocks():
    pairs = {
        "zero": (0, 128), "negative": (1, -128), "huge": (2**31, 1), "endless": (1, 2**64), "empty": (), "one": (1,),
        "three": (1, 1, 1), "int": 128, "None": None, "str": "11", "floats": (1.0, 128.0), "bools": (True, 128),
        "array": np.array([1, 128]), "None inside": (None, 128), "dict": {1: 2}, "nested": ((1,), (128,)),
    }  # fmt: skip
    numbers = ("zero", "negative", "huge", "endless")
    for name, pair in pairs.items():
        yield Case(f"block {name}", {"block": pair}, ValueError if name in numbers else TypeError, "block must be")


def flat(argument, dtype):
    return [
        Case(f"{argument} of {x.ndim} axes", {argument: x}, ValueError, f"{argument} must be of at least two axes")
        for x in (np.zeros(3, dtype), np.zeros((), dtype))
    ]


def segments(legal):
    """Offsets that are none, without those that are legal for other numbers of experts."""
    cases = wrong_offsets("expert_offsets", T, None, legal)
    return [case for case in cases if case.name != "expert_offsets is None"]


QUANTIZE = [
    *(case for case in wrong_arrays("x", (T, H), FLOATS, "..") if case.error is TypeError),
    *flat("x", np.float32),
    *blocks(),
    *wrong_choices("format"),
    *wrong_choices("scale_format"),
    *segments([0, 1, T]),
    Case("segments of a stack", {"x": np.ones((2, T, H)), "expert_offsets": np.array([0, T])}, ValueError, "x must be"),
]
CODES = [
    *(case for case in wrong_arrays("codes", (T, 2 * H), ("uint8", "float8_e4m3fn"), "..") if case.error is TypeError),
    *flat("codes", np.uint8),
    *(
        Case(f"codes {shape}", {"codes": np.zeros(shape, np.uint8)}, ValueError, "scales must be of shape")
        for shape in ((T + 1, 2 * H), (T, 2 * H + 1), (T, H), (0, 2 * H), (T, 0), (1, T, 2 * H))
    ),
    *wrong_arrays("scales", (T, 2), ("float32", "bfloat16", "float8_e8m0fnu"), ".."),
    *blocks(),
    *wrong_choices("format"),
    Case(
        "codes of the other format",
        {"format": "e5m2", "codes": np.zeros((T, 2 * H), DTYPES["float8_e4m3fn"])},
        TypeError,
    ),
    Case("a scale too few", {"scales": np.ones((T, 1), np.float32)}, ValueError, "scales must be of shape [4, 2]"),
    Case("truncated", {"scales": np.ones((T - 1, 2), np.float32)}, ValueError, "scales must be of shape [4, 2]"),
    Case("transposed", {"scales": np.ones((2, T), np.float32)}, ValueError, "scales must be of shape [4, 2]"),
    Case("of another block", {"block": (2, H)}, ValueError, "scales must be of shape [2, 2]"),
]
NO_DTYPES = {
    "None": None, "int": 3, "int32": np.int32, "int32 dtype": np.dtype("int32"), "list": ["float32"], "class": list,
    "big-endian": np.dtype(">f4"), "structure": np.dtype("f4,f4"), "float8": DTYPES["float8_e4m3fn"],
    "array": np.ones(3), "complex": complex, "fields": {"names": ["a", "a"], "formats": ["f4", "f4"]},
}  # fmt: skip
DTYPE_OF = [
    *(Case(f"dtype {name}", {"dtype": x}, TypeError, "dtype must be") for name, x in NO_DTYPES.items()),
    *(Case(f"dtype {x!r}", {"dtype": x}, ValueError, "dtype must be one of") for x in ("", "f4", "int32", "float8")),
]
Q = [
    Case(f"q is {name}", {"q": x}, TypeError, "q must be an Fp8Array, got")
    for name, x in {"None": None, "codes": np.zeros((T, H), np.uint8), "tuple": (1, 2), "class": Fp8Array}.items()
]


def quantized():
    return {"q": pyroute.quantize_fp8(np.ones((T, H), np.float32))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table((pyroute.quantize_fp8, values, QUANTIZE), (pyroute.dequantize_fp8, quantized, DTYPE_OF + Q)),
)
def test_fp8_refused(backend, function, legal, case):
    assert_refused(function, {**legal(), "backend": backend}, case)


@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        (Fp8Array, codes, CODES),
        (Fp8Array, segmented, segments([0, 1, T])),
        (pyroute.quantize_fp8, values, wrong_backends()),
        (pyroute.dequantize_fp8, quantized, wrong_backends()),
    ),
)
def test_fp8_array_refused(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize("index", [True, np.True_, 1.0, None, "0", ..., (0, 0), [0], np.zeros(2, int)])
def test_matrices_are_taken_by_number(index):
    stack = pyroute.quantize_fp8(np.ones((2, T, H), np.float32))
    with pytest.raises(TypeError, match=r"^Fp8Array: index must be an integer or a slice, got "):
        stack[index]
    with pytest.raises(IndexError):
        stack[2]
    with pytest.raises(
        TypeError, match=r"^Fp8Array: codes must be of three axes or more to be indexed, got shape \[4, 5\]"
    ):
        stack[0][0]


@pytest.mark.parametrize(
    "shape", [(2**50, 0), (0, 2**50), (2**40, 1, 0), (0, 2**30, 2**20), (1, 0, 2**50), (2**50, 0, 1)]
)
def test_nothing_however_long_takes_no_time(shape):
    q = pyroute.quantize_fp8(np.empty(shape, np.float32), backend="cpu")
    assert pyroute.dequantize_fp8(q, backend="cpu").shape == shape
