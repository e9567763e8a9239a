"""Every way to hold an argument wrong, as data: a room's tests say what is legal, this says what must be refused.

A refusal is an exact exception type, one sentence that names function, argument, what was expected and what came, and
not one byte of any array changed.
"""

from __future__ import annotations

import dataclasses
import fractions
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyroute

BACKENDS = ["numpy", "cpu"]
DTYPES = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "longdouble", "complex64", "complex128", "object", "S4", "U1", "V4", "datetime64[s]", "timedelta64",
        ">f4", ">f8", ">i4", ">i8", "f4,i4",
    )
} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3b11fnuz", "int4")
}  # fmt: skip
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float32", "bfloat16", "float16", "float64")
HUGE = 2**40


class Exporter:
    """An object whose ``__dlpack__`` does as it likes."""

    shape = "what shape?"

    def __init__(self, answer: Any):
        self.answer = answer

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class OnAnotherDevice:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}


class Lying:
    """Says that it is an array of any shape wanted."""

    dtype = np.dtype("float32")
    flags = np.zeros(1).flags

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.ndim = len(shape)
        self.__array_interface__ = {"shape": (2**40,), "typestr": "<f4", "data": (8, False), "version": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """``change`` of the legal arguments, and what must come of it."""

    name: str
    change: dict[str, Any]
    error: type[Exception]
    words: str = ""  # part of the message


def wrong_kinds(argument: str, shape: tuple[int, ...] = (), *, none_is_legal: bool = False) -> Iterator[Case]:
    """Things that are not arrays."""
    things = {
        "list": np.zeros(shape).tolist(), "tuple": (1, 2), "int": 3, "float": 1.5, "str": "array", "dict": {},
        "set": {1}, "object": object(), "class": np.ndarray, "function": len, "generator": (i for i in range(3)),
        "masked": np.ma.zeros(shape, np.float32), "lying": Lying(shape), "cuda": OnAnotherDevice(),
        "dlpack that raises": Exporter(RuntimeError("no\nmemory")), "dlpack of nothing": Exporter(None),
        "dlpack that divides": Exporter(ZeroDivisionError()),
    }  # fmt: skip
    if not none_is_legal:
        things["None"] = None
    for name, thing in things.items():
        yield Case(f"{argument} is {name}", {argument: thing}, TypeError, f"{argument} must be")


def wrong_dtypes(argument: str, shape: tuple[int, ...], legal: tuple[str, ...]) -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        if name not in legal:
            yield Case(f"{argument} of {name}", {argument: np.zeros(shape, dtype)}, TypeError, f"{argument} must be")
    swapped = np.zeros(shape, DTYPES[legal[0]].newbyteorder())
    if not swapped.dtype.isnative:
        words = f"got {legal[0]} of the other byte order"
        yield Case(f"{argument} of the other byte order", {argument: swapped}, TypeError, words)


def wrong_shapes(argument: str, shape: tuple[int, ...], dtype: str, fixed: str) -> Iterator[Case]:
    """Other ranks, and other extents of the ``fixed`` axes: one character per axis, 'x' where the extent is given."""
    shapes = {"of one axis less": shape[1:], "of one axis more": (1, *shape), "of no axis": ()}
    for axis, mark in enumerate(fixed):
        if mark == "x":
            for extent in {shape[axis] - 1, shape[axis] + 1, 0, HUGE} - {shape[axis]}:
                shapes[f"axis {axis} {extent}"] = (*shape[:axis], extent, *shape[axis + 1 :])
    for name, wrong in shapes.items():
        if wrong != shape:
            # stride 0: an error must come before a copy would
            array = np.broadcast_to(np.zeros((), DTYPES[dtype]), wrong)
            yield Case(f"{argument} {name}", {argument: array}, ValueError, f"{argument} must be of")


def wrong_arrays(
    argument: str, shape: tuple[int, ...], legal: tuple[str, ...], fixed: str, *, none_is_legal: bool = False
) -> list[Case]:
    return [
        *wrong_kinds(argument, shape, none_is_legal=none_is_legal),
        *wrong_dtypes(argument, shape, legal),
        *wrong_shapes(argument, shape, legal[0], fixed),
    ]


def wrong_outputs(argument: str, shape: tuple[int, ...], dtype: str, *, any_of: tuple[str, ...] = ()) -> list[Case]:
    """``out=`` of another dtype or shape, and memory that cannot be written straight through."""
    kind = DTYPES[dtype]
    things = [
        *wrong_kinds(argument, shape, none_is_legal=True),
        *wrong_dtypes(argument, shape, any_of or (dtype,)),
    ]
    for name, wrong in {
        "smaller": (shape[0] - 1, *shape[1:]),
        "larger": (shape[0] + 1, *shape[1:]),
        "flat": (-1,),
    }.items():
        array = np.zeros(shape, kind).reshape(wrong) if wrong == (-1,) else np.zeros(wrong, kind)
        things.append(Case(f"{argument} {name}", {argument: array}, ValueError, f"{argument} must be of shape"))
    read_only = np.zeros(shape, kind)
    read_only.flags.writeable = False
    unaligned = np.zeros(int(np.prod(shape)) * kind.itemsize + 1, np.uint8)[1:].view(kind).reshape(shape)
    views = {
        "strided": np.zeros((*shape[:-1], 2 * shape[-1]), kind)[..., ::2],
        "reversed": np.zeros(shape, kind)[::-1],
        "Fortran": np.zeros(shape[::-1], kind).T,
        "broadcast": np.broadcast_to(np.zeros((), kind), shape),
        "read-only": read_only,
    }
    if kind.itemsize > 1:
        views["unaligned"] = unaligned
    words = f"{argument} must be C-contiguous, aligned and writeable"
    return things + [Case(f"{argument} {name}", {argument: view}, ValueError, words) for name, view in views.items()]


def wrong_integers(argument: str, low: int | None = None, high: int | None = None) -> list[Case]:
    things = {
        "True": True, "np.True_": np.True_, "2.0": 2.0, "np.float32": np.float32(2), "str": "2", "None": None,
        "list": [2], "array": np.array(2), "complex": 2j, "fraction": fractions.Fraction(2), "decimal": Decimal(2),
        "nan": float("nan"), "bytes": b"2",
    }  # fmt: skip
    cases = [Case(f"{argument} {name}", {argument: x}, TypeError, f"{argument} must be") for name, x in things.items()]
    values = set() if low is None else {low - 1, -(2**31), -(2**63), -(10**5000)}
    values |= set() if high is None else {high + 1, 2**70, 10**5000}
    return cases + [
        Case(f"{argument} {x if abs(x) < 2**99 else 'endless'}", {argument: x}, ValueError, f"{argument} must be")
        for x in sorted(values)
    ]


def wrong_reals(argument: str, *, values: tuple[float, ...] = (), none_is_legal: bool = False) -> list[Case]:
    things = {
        "True": True, "np.True_": np.True_, "str": "2", "list": [2.0], "array": np.array(2.0), "complex": 2j,
        "decimal": Decimal(2), "dict": {},
    }  # fmt: skip
    if not none_is_legal:
        things["None"] = None
    cases = [Case(f"{argument} {name}", {argument: x}, TypeError, f"{argument} must be") for name, x in things.items()]
    bad = (float("nan"), float("inf"), -float("inf"), np.float32("nan"), 10**400, -(10**400), 1e39, -1e300, *values)
    return [*cases, *(Case(f"{argument} {str(x)[:9]}", {argument: x}, ValueError, f"{argument} must be") for x in bad)]


def wrong_choices(argument: str, *, none_is_legal: bool = False) -> list[Case]:
    kinds = {"int": 1, "bytes": b"max", "list": ["max"], "dict": {}, "float": 1.5, "array": np.zeros(3), "class": str}
    values = ["", "MAX", "no such thing", "max\n"] + ([] if none_is_legal else [None])
    return [
        *(Case(f"{argument} is {name}", {argument: x}, TypeError, f"{argument} must be") for name, x in kinds.items()),
        *(Case(f"{argument} {x!r}", {argument: x}, ValueError, f"{argument} must be one of") for x in values),
    ]


def wrong_backends() -> list[Case]:
    cuda = Case("backend cuda", {"backend": "cuda"}, RuntimeError, "backend 'cuda' is not available: ")
    if pyroute.backends()["cuda"].available:  # the emulated one, beside its own tests
        cuda = Case("backend cuda", {"backend": "cuda"}, TypeError, "backend must be one for the arrays' device")
    return [
        *wrong_choices("backend", none_is_legal=True),
        cuda,
        Case("backend cupy", {"backend": "cupy"}, RuntimeError, "backend 'cupy' is not available: "),
    ]


def wrong_ids(argument: str, shape: tuple[int, int], num_experts: int) -> list[Case]:
    """Every integer type with values that are no expert, also those that become one when cut to 32 or 8 bits."""
    cases = []
    for name in INTEGERS:
        least, most = int(np.iinfo(name).min), int(np.iinfo(name).max)
        values = {num_experts, num_experts + 1, -2, -num_experts, least, most, 2**31 - 1, -(2**31), 255, 256, 2**16}
        values |= {2**32, 2**32 + 1, 2**32 - 1, 2**63, 2**64 - 1, -(2**32), -(2**63)}
        for value in sorted(values):
            if least <= value <= most and value not in range(-1, num_experts):
                ids = np.zeros(shape, name)
                ids[shape[0] - 1, shape[1] - 1] = value
                words = f"{argument}[{shape[0] - 1}, {shape[1] - 1}] must be"
                cases.append(Case(f"{argument} {name} {value}", {argument: ids}, ValueError, words))
    return cases


def wrong_offsets(argument: str, num_rows: int, num_experts: int | None, legal: list[int]) -> list[Case]:
    """Starts that are not starts of segments of ``num_rows`` rows; ``legal`` are some that are."""
    last = len(legal) - 1
    values = {
        "not from 0": [1, *legal[1:]], "negative": [-1, *legal[1:]], "negative inside": [0, -1, *legal[2:]],
        "decreasing": [0, legal[-1], *legal[2:-1], 0], "one row too far": [*legal[:-1], num_rows + 1],
        "far too far": [*legal[:-1], 2**62], "too far inside": [0, num_rows + 1, *legal[2:]],
        "int32 wrap": [*legal[:-1], legal[-1] + 2**32], "least": [*legal[:-1], -(2**63)],
    }  # fmt: skip
    cases = [Case(f"{argument} {name}", {argument: np.array(x)}, ValueError) for name, x in values.items()]
    cases.append(Case(f"{argument} 2**63", {argument: np.array([*legal[:-1], 2**63], np.uint64)}, ValueError))
    cases.append(Case(f"{argument} 2**64-1", {argument: np.array([*legal[:-1], 2**64 - 1], np.uint64)}, ValueError))
    cases += wrong_arrays(argument, (last + 1,), ("int64", *INTEGERS), "x" if num_experts else ".")
    cases += [Case(f"{argument} empty", {argument: np.zeros(0, np.int64)}, ValueError)]
    return [*cases, Case(f"{argument} one entry", {argument: np.zeros(1, np.int64)}, ValueError)]


def renamed(cases: list[Case], argument: str, wrap: Callable[[Any], dict[str, Any]]) -> list[Case]:
    """The cases of one argument as those of something that contains it."""
    return [dataclasses.replace(case, change=wrap(case.change[argument])) for case in cases]


SENTENCE = re.compile(
    r"(?P<function>[A-Za-z0-9_.]+): (?P<argument>\S+( \S+)?) must be (?P<expected>.+), got (?P<got>.+)"
)
MISSING = re.compile(r"(?P<function>[A-Za-z0-9_.]+): backend '\w+' is not available: .+")


def assert_sentence(message: str, function: str, words: str) -> None:
    match = SENTENCE.fullmatch(message) or MISSING.fullmatch(message)
    assert match, f"not a sentence of the house: {message!r}"
    assert match["function"] == function, message
    assert words in message, f"{words!r} is not in {message!r}"
    assert "\n" not in message
    assert "  " not in message
    assert not message.endswith(".") or message.endswith("...")
    assert len(message) < 450, message


def arrays_in(thing: Any, depth: int = 4) -> Iterator[np.ndarray]:
    """Every array that an argument holds."""
    if isinstance(thing, np.ndarray):
        yield thing
    elif depth and isinstance(thing, (tuple, list)):
        for item in thing:
            yield from arrays_in(item, depth - 1)
    elif depth and dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            yield from arrays_in(getattr(thing, field.name), depth - 1)


def contents(arguments: dict[str, Any]) -> list[Any]:
    return [
        (array.dtype, array.shape, array.tobytes() if array.size < 2**20 else None)
        for value in arguments.values()
        for array in arrays_in(value)
        if not array.dtype.hasobject
    ]


def assert_refused(
    function: Callable[..., Any], arguments: dict[str, Any], case: Case, name: str | None = None
) -> None:
    """``arguments`` with the case's change raise its error, in a sentence, and no array of theirs has changed."""
    arguments = arguments | case.change
    before = contents(arguments)
    with pytest.raises(case.error) as caught:
        function(**arguments)
    assert caught.type is case.error, caught.value
    assert_sentence(str(caught.value), name or function.__name__, case.words)
    assert contents(arguments) == before


def table(*entries: tuple[Callable[..., Any], Callable[[], dict[str, Any]], list[Case]]) -> list[Any]:
    """pytest parameters (function, legal arguments, case) with readable names."""
    return [
        pytest.param(function, legal, case, id=f"{function.__name__}: {case.name}")
        for function, legal, cases in entries
        for case in cases
    ]
