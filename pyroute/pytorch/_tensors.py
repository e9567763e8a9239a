"""Tensors as NumPy arrays over the same memory, and back.

In: a NumPy array made over the tensor's address, 1 us for every dtype and layout, whether or not it requires grad.
``Tensor.numpy`` costs 2 us after ``detach`` and has no bfloat16 or float8, which take two views and 6 us; DLPack 13.
Such an array does not keep the memory alive: it lives as long as one call, whose arguments hold the tensors.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _check

Array = Any

NUMPY_DTYPES = {
    getattr(torch, name): dtype for name, dtype in _check.DTYPES.items() if getattr(torch, name, None) is not None
}
_TORCH_DTYPES = {numpy_dtype: dtype for dtype, numpy_dtype in NUMPY_DTYPES.items()}

# What torch.from_numpy does not take, and the type of the same width that it takes.
_CARRIERS = {
    _check.DTYPES[name]: np.dtype(f"u{_check.DTYPES[name].itemsize}" if name.startswith("float8") else "i2")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
}

_Memory = ctypes.c_char * 2**46  # all of it: np.ndarray takes a buffer at least as long as the array


def array(function: str, argument: str, tensor: Tensor) -> Array:
    """The tensor's memory as an array; TypeError in one sentence for a tensor that has none that NumPy could read."""
    if not tensor.is_cpu:
        raise _check.type_error(function, argument, "on the CPU, for which this build has kernels", on(tensor))
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided:
        raise _check.type_error(function, argument, "a dense tensor of a type that NumPy has", describe(tensor))
    memory: Any = _Memory.from_address(tensor.data_ptr())
    if tensor.is_contiguous():
        return np.ndarray(tensor.shape, dtype, memory)
    strides = [step * dtype.itemsize for step in tensor.stride()]
    return np.ndarray(tensor.shape, dtype, memory, 0, strides)


def optional_array(function: str, argument: str, tensor: Tensor | None) -> Array | None:
    return None if tensor is None else array(function, argument, tensor)


def tensor(result: Array) -> Tensor:
    """A tensor over the array's memory, which it keeps alive."""
    carrier = _CARRIERS.get(result.dtype)
    if carrier is None:
        return torch.from_numpy(result)
    return torch.from_numpy(result.view(carrier)).view(_TORCH_DTYPES[result.dtype])


def describe(given: Any) -> str:
    if isinstance(given, Tensor):
        kind = "" if given.layout is torch.strided else f"{str(given.layout).removeprefix('torch.')} "
        return f"{kind}{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    return _check.describe(given)


def on(tensor: Tensor) -> str:
    return f"{describe(tensor)} on {tensor.device}"


def check_tensors(function: str, like: str, **given: Any) -> None:
    """Every one a tensor, or None, on the device of the one named ``like``; without reading any."""
    device = given[like].device if isinstance(given[like], Tensor) else None
    for argument, value in given.items():
        if value is None and argument != like:
            continue
        if not isinstance(value, Tensor):
            raise _check.type_error(function, argument, "a tensor", type(value).__name__)
        if value.device != device:
            raise _check.type_error(function, argument, f"on {device} as {like}", on(value))
