"""Which backend serves a call: the only policy in the package.

    numpy   floor 0, readable array code, always there
    cupy    floor 0 on CuPy arrays
    cpu     floor 1, the C++ kernels in ``pyroute._core``
    cuda    floor 2, the CUDA kernels

``backend=None`` takes the fastest backend that is there for the arrays' device. A backend asked for by name is used or
the call raises and says why: nothing falls back silently. Importing this module starts no threads and touches no GPU:
the first call with an array on one does.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._device import arrays, images

_core_error = ""
try:
    from . import _core

    core = _core
except ImportError as error:  # a source tree without the built extension, or a libgomp that is not installed
    missing = importlib.util.find_spec(f"{__package__}._core") is None  # Python calls that a circular import
    _core_error = "it is not built for this Python" if missing else str(error)
HAS_CORE = not _core_error

_cuda_error = ""
try:
    from . import _cuda

    cuda = _cuda
    _cuda.set_image_source(lambda room, capability: images.image(room, capability, _cuda.driver_version()))
except ImportError as error:
    missing = importlib.util.find_spec(f"{__package__}._cuda") is None
    _cuda_error = "it is not built for this Python" if missing else str(error)

OLDEST_CAPABILITY = 80

# numpy.empty(shape, dtype) whose memory, if it is 64 KiB or more, is kept when the array goes and serves the next call
empty = _core.empty if HAS_CORE else np.empty

Array = Any
NAMES = ("numpy", "cupy", "cpu", "cuda")

BFLOAT16 = _check.DTYPES["bfloat16"]
FLOAT8 = {"e4m3": _check.DTYPES["float8_e4m3fn"], "e5m2": _check.DTYPES["float8_e5m2"]}


def float_dtype(function: str, argument: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """A dtype given by name, as a type or as a dtype; ``allowed`` are names."""
    if isinstance(value, str):
        return _check.DTYPES[_check.one_of(function, argument, value, allowed)]
    if not isinstance(value, (type, np.dtype)):  # np.dtype(None) is float64
        raise _check.type_error(function, argument, " or ".join(allowed), _check.describe(value))
    dtype = next((_check.DTYPES[name] for name in allowed if np.dtype(value) == _check.DTYPES[name]), None)
    if dtype is None:
        raise _check.type_error(function, argument, " or ".join(allowed), str(value))
    return dtype


class BackendInfo(NamedTuple):
    """One backend: whether calls can use it, why not, and what it runs on."""

    available: bool
    reason: str = ""  # empty when available
    device: str = ""  # instruction set or GPU
    threads: int = 1
    kernels: str = ""  # on a GPU: how its kernels come, or why calls do without


def backends() -> dict[str, BackendInfo]:
    """Every backend by name, with the reason for those that are not available.

    Examples
    --------
    >>> pyroute.backends()["numpy"].available
    True
    """
    return {name: _info(name) for name in NAMES}


def _info(name: str) -> BackendInfo:
    match name:
        case "numpy":
            return BackendInfo(True, device=f"NumPy {np.__version__}")
        case "cupy":
            return _cupy_info()
        case "cpu" if HAS_CORE:
            return BackendInfo(True, device=core.isa(), threads=core.num_threads())
        case "cpu":
            return BackendInfo(False, f"pyroute._core did not load: {_core_error}")
        case _:
            return _cuda_info()


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
    without = kernels(0).why_not
    return BackendInfo(
        True,
        device=cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        kernels=f"CuPy's own: {without}" if without else "CuPy's own, when backend='cupy' asks for them",
    )


def _cuda_info() -> BackendInfo:
    """Available if any GPU's kernels are there."""
    if _cuda_error:
        return BackendInfo(False, f"pyroute._cuda did not load: {_cuda_error}")
    if reason := _cuda.why_no_device():
        return BackendInfo(False, reason)
    routes = [(device, kernels(device)) for device in range(_cuda.num_devices())]
    device, route = next((entry for entry in routes if entry[1].how), routes[0])
    if not route.how:
        return BackendInfo(False, route.why_not)
    name, capability, *_ = _cuda.device_info(device)
    return BackendInfo(True, device=f"{name}, compute capability {capability / 10}", kernels=route.how)


_routes: dict[int, images.Route] = {}  # of the GPUs that have kernels


def kernels(device: int) -> images.Route:
    """How the CUDA kernels of this GPU come, or why there are none and CuPy's arrays go through array code."""
    if device in _routes:
        return _routes[device]
    if _cuda_error:
        return images.Route("", f"pyroute._cuda did not load: {_cuda_error}")
    try:
        name, capability, *_ = _cuda.device_info(device)
    except RuntimeError as error:
        return images.Route("", str(error))
    if capability < OLDEST_CAPABILITY:
        least = OLDEST_CAPABILITY / 10
        return images.Route("", f"{name} has compute capability {capability / 10}, the kernels need {least} or newer")
    route = images.route(capability, _cuda.driver_version())
    if route.how:
        _routes[device] = route
    return route


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


def array_module(x: Array) -> Any:
    """``numpy`` or ``cupy``, whichever owns ``x``."""
    return sys.modules["cupy"] if _check.is_cupy(x) else np


def empty_beside(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array that is not filled, where ``x`` is: on the host or on its GPU."""
    return arrays.empty(x, shape, dtype) if arrays.is_device(x) else empty(shape, dtype)


def as_array(
    function: str, argument: str, x: object, dtypes: tuple[str, ...] = (), axes: tuple[_check.Axis, ...] | None = None
) -> Array:
    """``x`` as a C-contiguous array of one of these dtypes and this shape, sharing memory where it can.

    Takes NumPy and CuPy arrays, DeviceArrays, and anything with ``__cuda_array_interface__``, ``__dlpack__`` or the
    buffer protocol. Lists, scalars, masked and object arrays are a TypeError: they would be guesses. What has to be
    copied has been checked before: a broadcast view can be larger than any memory.
    """
    if _check.is_plain(x, dtypes, axes):
        return x
    array = x if type(x) is np.ndarray else _unwrap(function, argument, x)
    if dtypes:
        _check.dtype(function, argument, array, dtypes)
    if axes is not None:
        _check.shape(function, argument, array, axes)
    if type(array) is np.ndarray:
        flags = array.flags
        return array if flags.c_contiguous and flags.aligned else array.copy()
    return arrays.contiguous(array)


def _unwrap(function: str, argument: str, x: Any) -> Array:
    """The NumPy array, CuPy array or DeviceArray that ``x`` is or exports."""
    if isinstance(x, np.ma.MaskedArray):
        raise _check.type_error(function, argument, "an array without a mask", "a masked array")
    if isinstance(x, np.ndarray):
        return x.view(np.ndarray)
    if arrays.is_device(x):
        return x
    try:
        if hasattr(x, "__cuda_array_interface__"):
            import cupy

            return cupy.asarray(x)
        return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(memoryview(x))
    except Exception as error:  # whatever the exporter raises
        what = _check.describe(x)
        if hasattr(type(x), "__dlpack__"):  # a tensor that requires grad, of a type that NumPy lacks, or on a GPU
            elsewhere = "; pyroute.pytorch takes tensors" if type(x).__module__.startswith("torch") else ""
            what += f" ({' '.join(str(error).split()).rstrip('.')}{elsewhere})"
        raise _check.type_error(function, argument, "an array", what) from None


def choose(function: str, backend: str | None, *operands: Array) -> str:
    """The backend's name for these arrays (None among them is skipped); raises if it was asked for and is not there."""
    for x in operands:
        if x is not None and type(x) is not np.ndarray and arrays.is_device(x):
            return _choose_on_gpu(function, backend, operands)
    if backend is None:
        return "cpu" if HAS_CORE else "numpy"
    _check.one_of(function, "backend", backend, (None, *NAMES))
    if not (HAS_CORE if backend == "cpu" else backend == "numpy"):  # _info costs 1 us, and 60 us to look for CuPy
        info = _info(backend)
        if not info.available:
            raise RuntimeError(f"{function}: backend '{backend}' is not available: {info.reason}")
    if backend in ("cupy", "cuda") and operands:
        raise _check.type_error(function, "backend", "one for the arrays' device", f"'{backend}' with NumPy arrays")
    return backend


def check_together(function: str, *operands: Array) -> None:
    """Raise unless these arrays (None among them is skipped) are of one library and on one device."""
    if len({_place(x) for x in operands if x is not None}) > 1:
        together = " and ".join(sorted({_describe_place(x) for x in operands if x is not None}))
        raise TypeError(f"{function}: arrays must be on one device, got {together} together")


def _choose_on_gpu(function: str, backend: str | None, operands: tuple[Array, ...]) -> str:
    """``cuda`` where its kernels serve the arrays' GPU, else ``cupy`` if they are CuPy's."""
    check_together(function, *operands)
    first = next(x for x in operands if x is not None)
    device, is_cupy = arrays.device_of(first), not isinstance(first, arrays.DeviceArray)
    if backend is not None:
        _check.one_of(function, "backend", backend, (None, *NAMES))
        if backend in ("numpy", "cpu") or (backend == "cupy" and not is_cupy):
            got = f"'{backend}' with {_describe_place(first)}"
            raise _check.type_error(function, "backend", "one for the arrays' device", got)
    route = kernels(device)
    if backend == "cupy" or (backend is None and is_cupy and not route.how):
        return "cupy"
    if not route.how:
        raise RuntimeError(f"{function}: backend 'cuda' is not available: {route.why_not}")
    return "cuda"


def _place(x: Array) -> tuple[str, int]:
    """Whose array, and on which GPU; -1 is the host."""
    if type(x) is np.ndarray or not arrays.is_device(x):
        return "NumPy arrays", -1
    return "DeviceArrays" if isinstance(x, arrays.DeviceArray) else "CuPy arrays", arrays.device_of(x)


def _describe_place(x: Array) -> str:
    kind, device = _place(x)
    return kind if device < 0 else f"{kind} on GPU {device}"
