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


def expert_offsets(function: str, offsets: Array, num_rows: int, num_experts: int | None = None) -> Array:
    """Starts of the experts' segments, then the end of the last one, as int64: 0, not decreasing, within the rows."""
    if offsets.dtype.kind not in "iu" or not offsets.dtype.isnative:
        raise type_error(function, "expert_offsets", "integers", str(offsets.dtype))
    shape(function, "expert_offsets", offsets, (("num_experts + 1", None if num_experts is None else num_experts + 1),))
    if offsets.shape[0] < 2:
        raise value_error(function, "expert_offsets", "of shape [num_experts + 1]", list(offsets.shape))
    ok = offsets[0] == 0 and (offsets[1:] >= offsets[:-1]).all() and offsets[-1] <= num_rows
    if not ok:
        raise value_error(
            function, "expert_offsets", f"from 0, not decreasing, to at most {num_rows} (rows)", _first_few(offsets)
        )
    return offsets.astype("int64", copy=False)


def _first_few(values: Array) -> str:
    shown = ", ".join(str(value) for value in values[:8].tolist())
    return f"[{shown}{', ...' if values.size > 8 else ''}]"
