"""The error sentences: ``function: argument must be <expected>, got <what came>``.

Everything here runs before memory is touched. A wrong kind of thing is a TypeError, a wrong value of the right kind a
ValueError. Arrays are checked by metadata alone, except ids, whose values are checked where a bad one could be read. On
a GPU looking at values would wait for it: its kernels do not follow ids and offsets that lead outside, and only
PYROUTE_CHECK=1 brings them to the host to be checked here.
An argument that is plainly right is passed by the extension's ``is_plain`` in 0.2 us; text is built only for one that
is wrong.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import ml_dtypes
import numpy as np

Array = Any

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

DTYPES = {name: np.dtype(name) for name in (*INTEGERS, "bool", "float16", "float32", "float64")} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
}
# dtype.name is built anew on each access, 1.8 us; a dtype of the other byte order is not in the table
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

try:
    from . import _core

    is_plain, is_output, are_offsets = _core.is_plain, _core.is_output, _core.are_offsets
    _core.name_dtypes(DTYPE_NAMES)
except ImportError:  # pyroute._backend says why

    def is_plain(x: Any, dtypes: tuple[str, ...], axes: tuple[Axis, ...] | None) -> bool:
        return False

    def is_output(out: Any, dtype: Any, axes: tuple[Axis, ...], inputs: tuple[Any, ...]) -> bool:
        return False

    def are_offsets(x: Any, num_rows: int, num_experts: int | None) -> bool:
        return False


try:
    from . import _cuda

    checks_gpu = _cuda.checks  # PYROUTE_CHECK=1
except ImportError:
    checks_gpu = False

_FLOAT32_MAX = 3.4028234663852886e38
_LONGEST = 120  # characters of what came, so that a sentence stays one

# one axis of an expected shape: its name, and its extent where that is already known
Axis = tuple[str, "int | None"]


def type_error(function: str, argument: str, expected: str, got: str) -> TypeError:
    return TypeError(_sentence(function, argument, expected, got))


def value_error(function: str, argument: str, expected: str, got: object) -> ValueError:
    if isinstance(got, int) and got.bit_length() > 128:  # Python refuses to print one of 4300 digits
        got = f"an integer of {got.bit_length()} bits"
    return ValueError(_sentence(function, argument, expected, str(got)))


def unreadable(function: str, argument: str, error: OSError) -> OSError:
    """The same error for a folder, a link to nothing or no permission, in a sentence."""
    return type(error)(_sentence(function, argument, "a file that can be read", str(error)))


def _sentence(function: str, argument: str, expected: str, got: str) -> str:
    got = " ".join(got.split())
    got = got if len(got) <= _LONGEST else got[:_LONGEST] + "..."
    sentence = f"{function}: {argument} must be {expected}, got {got}"
    if not sentence.isprintable():  # names in files have any characters
        sentence = " ".join("".join(c if c.isprintable() else " " for c in sentence).split())
    return sentence


def is_cupy(x: object) -> bool:
    cupy = sys.modules.get("cupy")  # an array of a module that nobody imported cannot exist
    return cupy is not None and isinstance(x, cupy.ndarray)


def is_device_array(x: object) -> bool:
    """A ``DeviceArray``: memory on a GPU that another library allocated."""
    from ._device.arrays import DeviceArray  # which imports this module

    return isinstance(x, DeviceArray)


def has_values(x: Array) -> bool:
    """Whether the values of an array may be looked at: not those that CUDA kernels are to read."""
    if isinstance(x, np.ndarray):
        return True
    from . import _backend

    return is_cupy(x) and not _backend.kernels(x.device.id).how


def values(x: Array) -> Array | None:
    """``x``, or with PYROUTE_CHECK=1 a GPU's array as NumPy's once work before is done; None: not to be looked at.

    While its stream is captured into a graph a GPU's array has no values yet.
    """
    if has_values(x):
        return x
    if not checks_gpu:
        return None
    from ._device.arrays import host_copy  # which imports this module

    return host_copy(x)


def describe(x: Any) -> str:
    """What came, in a few words: ``float32 [4, 8]`` for arrays, the type's name otherwise."""
    if x is None:
        return "None"
    if isinstance(x, np.ndarray) or is_cupy(x) or is_device_array(x):
        return f"{_dtype_text(x.dtype)} {list(x.shape)}"
    shape = getattr(x, "shape", None)
    return f"{type(x).__name__} {list(shape)}" if isinstance(shape, tuple) else type(x).__name__


def _dtype_text(dtype: Any) -> str:
    return str(dtype) if dtype.isnative else f"{dtype.newbyteorder().name} of the other byte order"


def integer(function: str, argument: str, value: Any, low: int, high: int | None = None, high_name: str = "") -> int:
    """An integer in low..high; ``high_name`` names what the upper bound is."""
    if type(value) is not int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
            raise type_error(function, argument, "an integer", describe(value))
        value = int(value)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"in {low}..{f'{high_name} ({high})' if high_name else high}"
        raise value_error(function, argument, bound, value)
    return int(value)


def real(function: str, argument: str, value: Any, *, minimum: float | None = None) -> float:
    """A real number that is finite, in float32 too, and at least ``minimum``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise type_error(function, argument, "a number", describe(value))
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction
        number = math.inf
    if not abs(number) <= _FLOAT32_MAX or (minimum is not None and number < minimum):
        expected = "in the range of float32" if _FLOAT32_MAX < abs(number) < math.inf else "finite"
        raise value_error(
            function, argument, expected + ("" if minimum is None else f" and at least {minimum}"), number
        )
    return number


def one_of(function: str, argument: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if type(value) is str and value in allowed:
        return value
    if isinstance(value, (str, type(None), type(allowed[0]))):
        if value in allowed:
            return value
        raise value_error(function, argument, "one of " + ", ".join(map(repr, allowed)), repr(value))
    raise type_error(function, argument, "one of " + ", ".join(map(repr, allowed)), describe(value))


def _shape_text(axes: tuple[Axis, ...]) -> str:
    return "[" + ", ".join(name if extent is None else f"{name}={extent}" for name, extent in axes) + "]"


def dtype(function: str, argument: str, x: Array, allowed: tuple[str, ...]) -> None:
    if DTYPE_NAMES.get(x.dtype) not in allowed:
        expected = "integers" if allowed is INTEGERS else " or ".join(allowed)
        raise type_error(function, argument, expected, _dtype_text(x.dtype))


def shape(function: str, argument: str, x: Array, axes: tuple[Axis, ...]) -> None:
    extents = x.shape
    ok = len(extents) == len(axes)
    if ok:
        for (_, expected), got in zip(axes, extents, strict=True):
            if expected is not None and expected != got:
                ok = False
    if not ok:
        raise value_error(function, argument, "of shape " + _shape_text(axes), list(extents))


def output(function: str, argument: str, out: Array, like: Any, axes: tuple[Axis, ...], *inputs: Array) -> None:
    """A caller's ``out=``: dtype ``like`` and shape exactly, C-contiguous, writeable, sharing memory with no input.

    ``inputs`` are the arrays as they were given and as they are read: a strided one is read from a copy.
    """
    if is_output(out, like, axes, inputs):
        return
    on_host = isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray)
    if not on_host and not is_cupy(out) and not is_device_array(out):
        raise type_error(function, argument, "an array", describe(out))
    if out.dtype != like:
        raise type_error(function, argument, _dtype_text(like), _dtype_text(out.dtype))
    shape(function, argument, out, axes)
    if is_device_array(out):
        if any(is_device_array(x) and out.overlaps(x) for x in inputs):
            raise value_error(function, argument, "memory that no input uses", "an overlapping array")
        return
    if not out.flags.c_contiguous or (on_host and not (out.flags.aligned and out.flags.writeable)):
        raise value_error(function, argument, "C-contiguous, aligned and writeable", "a view that is not")
    if on_host and any(isinstance(x, np.ndarray) and np.may_share_memory(out, x) for x in inputs):
        raise value_error(function, argument, "memory that no input uses", "an overlapping array")


def expert_ids(function: str, argument: str, ids: Array, num_experts: int) -> None:
    """Ids [T, k] of any integer type are experts or -1; the first that is not is named. On a GPU it is not routed."""
    ids = values(ids)
    # in the array's own type: 2**64 - 1 is not -1
    if ids is None or not ids.size or (ids.min() >= -1 and ids.max() < num_experts):
        return
    token, slot = divmod(int(((ids < -1) | (ids >= num_experts)).argmax()), ids.shape[1])
    expected = f"in 0..{num_experts - 1}, or -1 for not routed"
    raise value_error(function, f"{argument}[{token}, {slot}]", expected, ids[token, slot])


def map_on_gpu(function: str, argument: str, entries: Array, extent: int) -> None:
    """With PYROUTE_CHECK=1 the entries of a GPU's row map are in 0..extent-1, or -1; the first that is not is named.

    On the host the extension looks at every entry that it follows.
    """
    if not checks_gpu or has_values(entries):
        return
    seen = values(entries)
    if seen is None or not seen.size or (seen.min() >= -1 and seen.max() < extent):
        return
    flat = int(((seen < -1) | (seen >= extent)).argmax())
    place = ", ".join(str(int(i)) for i in np.unravel_index(flat, seen.shape))
    raise value_error(function, f"{argument}[{place}]", f"in 0..{extent - 1}, or -1", seen.flat[flat])


def expert_offsets(function: str, offsets: Array, num_rows: int, num_experts: int | None = None) -> Array:
    """Starts of the experts' segments, then the end of the last one, as int64: 0, not decreasing, within the rows.

    On a GPU they have to be int64, and the kernels keep them within the rows.
    """
    if are_offsets(offsets, num_rows, num_experts):
        return offsets
    dtype(function, "expert_offsets", offsets, ("int64",) if is_device_array(offsets) else INTEGERS)
    shape(function, "expert_offsets", offsets, (("num_experts + 1", None if num_experts is None else num_experts + 1),))
    if offsets.shape[0] < 2:
        raise value_error(function, "expert_offsets", "of shape [num_experts + 1]", list(offsets.shape))
    seen = values(offsets)
    if seen is not None and not (seen[0] == 0 and (seen[1:] >= seen[:-1]).all() and seen[-1] <= num_rows):
        raise value_error(
            function, "expert_offsets", f"from 0, not decreasing, to at most {num_rows} (rows)", first_few(seen)
        )
    return offsets if is_device_array(offsets) else offsets.astype("int64", copy=False)


def tokens_per_expert(function: str, counts: Array, most: int) -> Array:
    """How many of an expert's ``most`` rows exist, as int32. On a GPU the kernels keep them within 0 and ``most``."""
    dtype(function, "tokens_per_expert", counts, ("int32",) if is_device_array(counts) else INTEGERS)
    seen = values(counts)
    if seen is not None and seen.size and not (seen.min() >= 0 and seen.max() <= most):
        wrong = int(((seen < 0) | (seen > most)).argmax())
        raise value_error(function, f"tokens_per_expert[{wrong}]", f"in 0..{most} (rows of an expert)", seen[wrong])
    return counts if is_device_array(counts) else counts.astype("int32", copy=False)


def first_few(values: Array) -> str:
    shown = ", ".join(str(value) for value in values[:8].tolist())
    return f"[{shown}{', ...' if values.size > 8 else ''}]"
