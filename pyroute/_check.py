"""The error sentences: ``function: argument must be <expected>, got <what came>``.

Everything here runs before memory is touched. A wrong kind of thing is a TypeError, a wrong value of the right kind a
ValueError. Arrays are checked by metadata alone, except ids, whose values are checked where a bad one could be read.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

Array = Any

# one axis of an expected shape: its name, and its extent where that is already known
Axis = tuple[str, "int | None"]


def type_error(function: str, argument: str, expected: str, got: str) -> TypeError:
    return TypeError(f"{function}: {argument} must be {expected}, got {got}")


def value_error(function: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{function}: {argument} must be {expected}, got {got}")


def describe(x: object) -> str:
    """What came, in a few words: ``float32 [4, 8]`` for arrays, the type's name otherwise."""
    shape = getattr(x, "shape", None)
    if shape is None:
        return "None" if x is None else type(x).__name__
    return f"{getattr(x, 'dtype', '')} {list(shape)}".strip()


def integer(function: str, argument: str, value: Any, low: int, high: int | None = None, high_name: str = "") -> int:
    """An integer in low..high; ``high_name`` names what the upper bound is."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise type_error(function, argument, "an integer", describe(value))
    number = int(value)
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"in {low}..{f'{high_name} ({high})' if high_name else high}"
        raise value_error(function, argument, bound, number)
    return number


def real(function: str, argument: str, value: Any, *, minimum: float | None = None) -> float:
    """A finite real number, at least ``minimum``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise type_error(function, argument, "a number", describe(value))
    result = float(value)
    if not np.isfinite(result) or (minimum is not None and result < minimum):
        raise value_error(function, argument, "finite" if minimum is None else f"finite and at least {minimum}", result)
    return result


def one_of(function: str, argument: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if isinstance(value, (str, type(None), type(allowed[0]))):
        if value in allowed:
            return value
        raise value_error(function, argument, "one of " + ", ".join(map(repr, allowed)), repr(value))
    raise type_error(function, argument, "one of " + ", ".join(map(repr, allowed)), describe(value))


def _shape_text(axes: tuple[Axis, ...]) -> str:
    return "[" + ", ".join(name if extent is None else f"{name}={extent}" for name, extent in axes) + "]"


def dtype(function: str, argument: str, x: Array, allowed: tuple[str, ...]) -> None:
    if x.dtype.name not in allowed or not x.dtype.isnative:
        raise type_error(function, argument, " or ".join(allowed), str(x.dtype))


def shape(function: str, argument: str, x: Array, axes: tuple[Axis, ...]) -> None:
    if x.ndim != len(axes) or any(
        extent is not None and extent != got for (_, extent), got in zip(axes, x.shape, strict=True)
    ):
        raise value_error(function, argument, "of shape " + _shape_text(axes), list(x.shape))


def array(function: str, argument: str, x: Array, dtypes: tuple[str, ...], axes: tuple[Axis, ...]) -> None:
    """``x`` is an array (see _backend.as_array) with one of these dtypes and this shape."""
    dtype(function, argument, x, dtypes)
    shape(function, argument, x, axes)


def output(function: str, argument: str, out: Array, dtype_name: str, axes: tuple[Axis, ...], *inputs: Array) -> None:
    """A caller's ``out=``: exact dtype and shape, C-contiguous, writeable, and not sharing memory with an input."""
    if not hasattr(out, "dtype") or not hasattr(out, "flags"):
        raise type_error(function, argument, "an array", describe(out))
    array(function, argument, out, (dtype_name,), axes)
    if not out.flags.c_contiguous or (isinstance(out, np.ndarray) and not (out.flags.aligned and out.flags.writeable)):
        raise value_error(function, argument, "C-contiguous, aligned and writeable", "a view that is not")
    if isinstance(out, np.ndarray) and any(isinstance(x, np.ndarray) and np.may_share_memory(out, x) for x in inputs):
        raise value_error(function, argument, "memory that no input uses", "an overlapping array")
