"""Tensors as the core's arrays over the same memory, and back.

On the CPU: a NumPy array made over the tensor's address, 1 us for every dtype and layout, whether or not it requires
grad. ``Tensor.numpy`` costs 2 us after ``detach`` and has no bfloat16 or float8, which take two views and 6 us; DLPack
13. Such an array does not keep the memory alive: it lives as long as one call, whose arguments hold the tensors.

On a GPU: a ``DeviceArray`` that holds the tensor. Results and workspaces come from PyTorch's caching allocator, and the
kernels are queued on its current stream, to which a block of this allocator belongs. A block that is freed goes to the
next request of the same stream, whose work is queued behind: that is why a workspace may go as soon as its kernel is
queued, and why nothing needs ``record_stream``. A tensor made on another stream is the caller's to wait for and to
record, as with every operation of PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _backend, _check
from .._device.arrays import DeviceArray

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

DEVICE_TYPES = ("cuda",)  # where memory has addresses that the CUDA kernels take

_Memory = ctypes.c_char * 2**46  # all of it: np.ndarray takes a buffer at least as long as the array


class TensorMemory:
    """The memory and the current stream of one GPU as PyTorch has them; a ``pyroute._device.arrays.Allocator``."""

    __slots__ = ("_on", "device")

    def __init__(self, on: torch.device) -> None:
        self._on, self.device = on, on.index

    def allocate(self, num_bytes: int) -> tuple[int, Tensor]:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._on)
        return memory.data_ptr(), memory

    def stream(self) -> int:
        stream: int = torch._C._cuda_getCurrentRawStream(self.device)
        return stream


def on_host(tensor: Tensor) -> bool:
    """Whether NumPy can read the tensor's memory."""
    return tensor.is_cpu


def array(function: str, argument: str, tensor: Tensor) -> Array:
    """The tensor's memory as an array; TypeError in one sentence for a tensor that has none that could be read."""
    host = on_host(tensor)
    if not host and tensor.device.type not in DEVICE_TYPES:
        raise _check.type_error(function, argument, "on the CPU or a CUDA device", on(tensor))
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided:
        raise _check.type_error(function, argument, "a dense tensor of a type that NumPy has", describe(tensor))
    if not host:
        return _device_array(tensor, dtype)
    memory: Any = _Memory.from_address(tensor.data_ptr())
    if tensor.is_contiguous():
        return np.ndarray(tensor.shape, dtype, memory)
    strides = [step * dtype.itemsize for step in tensor.stride()]
    return np.ndarray(tensor.shape, dtype, memory, 0, strides)


def _device_array(tensor: Tensor, dtype: Any) -> DeviceArray:
    """Contiguous: a strided tensor is copied first, on its stream."""
    tensor = tensor.detach().contiguous()
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), dtype, _memory(tensor.device), tensor)


@functools.cache
def _memory(device: torch.device) -> TensorMemory:
    return TensorMemory(device)


def stream_of(tensor: Tensor) -> int:
    """The stream that work on the tensor is queued on; 0 on the CPU."""
    return 0 if on_host(tensor) else _memory(tensor.device).stream()


def captures(tensor: Tensor) -> bool:
    """Whether work on the tensor becomes part of a graph instead of being done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def optional_array(function: str, argument: str, tensor: Tensor | None) -> Array | None:
    return None if tensor is None else array(function, argument, tensor)


def ids_array(function: str, argument: str, tensor: Tensor) -> Array:
    """Ids, which a GPU's kernels take as int32 or int64: narrow types widen, unsigned wide ones become int64."""
    if not on_host(tensor) and tensor.dtype in INTEGERS and tensor.dtype not in (torch.int32, torch.int64):
        tensor = tensor.to(torch.int32 if tensor.dtype.itemsize < 4 else torch.int64)
    return array(function, argument, tensor)


def int32_array(function: str, argument: str, tensor: Tensor) -> Array:
    """Counts, which a GPU's kernels take as int32; other integers are converted there."""
    if not on_host(tensor) and tensor.dtype in INTEGERS:
        tensor = tensor.to(torch.int32)
    return array(function, argument, tensor)


def float32_array(function: str, argument: str, tensor: Tensor) -> Array:
    """What is used as float32 whatever floating type it has; on a GPU it is rounded here."""
    if not on_host(tensor) and tensor.dtype in _ROUNDED:
        tensor = tensor.to(torch.float32)
    return array(function, argument, tensor)


INTEGERS = tuple(getattr(torch, name) for name in _check.INTEGERS)
_ROUNDED = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e8m0fnu)


def tensor(result: Array) -> Tensor:
    """A tensor over the array's memory, which it keeps alive."""
    if isinstance(result, DeviceArray):
        return _device_tensor(result)
    carrier = _CARRIERS.get(result.dtype)
    if carrier is None:
        return torch.from_numpy(result)
    return torch.from_numpy(result.view(carrier)).view(_TORCH_DTYPES[result.dtype])


def reinterpret(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix.view(dtype)``, also for one without elements, whose strides may be none that such a view can have."""
    if matrix.numel():
        return matrix.view(dtype)
    return matrix.new_empty((len(matrix), matrix.shape[1] * matrix.itemsize // dtype.itemsize), dtype=dtype)


def empty_beside(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape that is not filled; on the CPU over recycled memory, whose pages are there already."""
    return tensor(_backend.empty(shape, NUMPY_DTYPES[like.dtype])) if on_host(like) else like.new_empty(shape)


def _device_tensor(result: DeviceArray) -> Tensor:
    """Over the storage of the tensor that owns the memory; no view of it, so that autograd lets it be changed."""
    storage = result.owner.untyped_storage()
    start = (result.pointer - storage.data_ptr()) // result.dtype.itemsize if result.size else 0
    like = torch.empty(0, dtype=_TORCH_DTYPES[result.dtype], device=result.owner.device)
    return like.set_(storage, start, result.shape)


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
