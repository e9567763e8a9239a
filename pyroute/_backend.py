"""Which backend serves a call: the only policy in the package.

    numpy   floor 0, readable array code, always there
    cupy    floor 0 on CuPy arrays
    cpu     floor 1, the C++ kernels in ``pyroute._core``
    cuda    floor 2, the CUDA kernels

``backend=None`` takes the fastest backend that is there for the arrays' device. A backend asked for by name is used or
the call raises and says why: nothing falls back silently. Importing this module starts no threads and touches no GPU.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from . import _check

_core_error = ""
try:
    from . import _core

    core = _core
except ImportError as error:  # a source tree without the built extension, or a libgomp that is not installed
    _core_error = str(error)
HAS_CORE = not _core_error

Array = Any
NAMES = ("numpy", "cupy", "cpu", "cuda")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


def float_dtype(function: str, argument: str, value: Any, allowed: tuple[str, ...]) -> np.dtype[Any]:
    """A dtype given by name, as a type or as a dtype; ``allowed`` are names."""
    by_name = {name: BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in allowed}
    if isinstance(value, str):
        return by_name[_check.one_of(function, argument, value, allowed)]
    try:
        return by_name[np.dtype(value).name]
    except (TypeError, KeyError):
        raise _check.type_error(function, argument, " or ".join(allowed), repr(value)) from None


class BackendInfo(NamedTuple):
    """One backend: whether calls can use it, why not, and what it runs on."""

    available: bool
    reason: str = ""  # empty when available
    device: str = ""  # instruction set or GPU
    threads: int = 1


def backends() -> dict[str, BackendInfo]:
    """Every backend by name, with the reason for those that are not available.

    Examples
    --------
    >>> pyroute.backends()["numpy"].available
    True
    """
    infos = {"numpy": BackendInfo(True, device=f"NumPy {np.__version__}")}
    infos["cupy"] = _cupy_info()
    if not HAS_CORE:
        infos["cpu"] = BackendInfo(False, f"pyroute._core did not load: {_core_error}")
    else:
        infos["cpu"] = BackendInfo(True, device=core.isa(), threads=core.num_threads())
    infos["cuda"] = BackendInfo(False, "this build has no CUDA kernels")
    return infos


def _cupy_info() -> BackendInfo:
    try:
        import cupy
    except ImportError:
        return BackendInfo(False, "CuPy is not installed")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own error types without a driver
        return BackendInfo(False, f"CuPy finds no GPU: {error}")
    if count == 0:
        return BackendInfo(False, "CuPy finds no GPU")
    return BackendInfo(True, device=cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())


def set_num_threads(n: int) -> None:
    """Threads for the next calls of the cpu backend, n >= 1; ValueError otherwise.

    Until it is called the backend follows OpenMP's own setting (``OMP_NUM_THREADS``, ``torch.set_num_threads``).
    Results do not depend on the number of threads.
    """
    n = _check.integer("set_num_threads", "n", n, 1, 1024)
    if HAS_CORE:
        core.set_num_threads(n)


def get_num_threads() -> int:
    """Threads that the next call of the cpu backend will use; 1 without it."""
    return core.num_threads() if HAS_CORE else 1


def _is_cupy(x: object) -> bool:
    cupy = sys.modules.get("cupy")  # an array of a module that nobody imported cannot exist
    return cupy is not None and isinstance(x, cupy.ndarray)


def array_module(x: Array) -> Any:
    """``numpy`` or ``cupy``, whichever owns ``x``."""
    return sys.modules["cupy"] if _is_cupy(x) else np


def as_array(function: str, argument: str, x: object) -> Array:
    """``x`` as a C-contiguous NumPy or CuPy array, sharing memory where it can.

    Takes NumPy and CuPy arrays, and anything with ``__cuda_array_interface__``, ``__dlpack__`` or the buffer protocol.
    Lists, scalars, masked and object arrays are a TypeError: they would be guesses.
    """
    if type(x) is np.ndarray and x.flags.c_contiguous and x.flags.aligned:
        return x
    if _is_cupy(x):
        return sys.modules["cupy"].ascontiguousarray(x)
    if isinstance(x, np.ma.MaskedArray):
        raise _check.type_error(function, argument, "an array without a mask", "a masked array")
    if isinstance(x, np.ndarray):
        return np.require(x, requirements=["C", "A"]).view(np.ndarray)
    if hasattr(x, "__cuda_array_interface__"):
        import cupy

        return cupy.ascontiguousarray(cupy.asarray(x))
    try:
        if hasattr(x, "__dlpack__"):
            return np.require(np.from_dlpack(x), requirements=["C", "A"])
        return np.require(np.asarray(memoryview(x)), requirements=["C", "A"])  # type: ignore[arg-type]
    except (TypeError, BufferError, ValueError, RuntimeError):
        raise _check.type_error(function, argument, "an array", _check.describe(x)) from None


def choose(function: str, backend: str | None, *arrays: Array) -> str:
    """The backend's name for these arrays (None among them is skipped); raises if it was asked for and is not there."""
    on_gpu = [_is_cupy(x) for x in arrays if x is not None]
    if any(on_gpu) and not all(on_gpu):
        raise TypeError(f"{function}: all arrays must be on one device, got NumPy and CuPy arrays together")
    gpu = any(on_gpu)
    if backend is None:
        if gpu:
            return "cupy"
        return "cpu" if HAS_CORE else "numpy"
    _check.one_of(function, "backend", backend, (None, *NAMES))
    if (backend in ("cupy", "cuda")) != gpu and arrays:
        info = backends()[backend]
        if not info.available:
            raise RuntimeError(f"{function}: backend '{backend}' is not available: {info.reason}")
        raise _check.type_error(
            function, "backend", "one for the arrays' device", f"'{backend}' with {'CuPy' if gpu else 'NumPy'} arrays"
        )
    if backend != "numpy":
        info = backends()[backend]
        if not info.available:
            raise RuntimeError(f"{function}: backend '{backend}' is not available: {info.reason}")
    return backend
