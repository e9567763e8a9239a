"""Arrays on a GPU: CuPy's as they are, and ``DeviceArray`` for memory that another library allocates (PyTorch's)."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _check

Array = Any


class Allocator(Protocol):
    """Where new arrays come from, and the stream that work on them is queued on."""

    device: int

    def allocate(self, num_bytes: int) -> tuple[int, Any]:
        """The address of this many bytes, a multiple of 256, and the object that keeps them."""

    def stream(self) -> int:
        """The current stream of the device, as the driver's handle."""


class DeviceArray:
    """A C-contiguous array in a GPU's memory: an address with a shape and a dtype. It does no arithmetic.

    ``owner`` keeps the memory alive; ``allocator`` is where arrays beside this one come from.
    """

    __slots__ = ("allocator", "dtype", "owner", "pointer", "shape")

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: Any, allocator: Allocator, owner: Any):
        self.pointer, self.shape, self.dtype = pointer, shape, np.dtype(dtype)
        self.allocator, self.owner = allocator, owner

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return int(self.size * self.dtype.itemsize)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory with other axes; one extent may be -1."""
        if -1 in shape:
            known = math.prod(extent for extent in shape if extent != -1)
            shape = tuple(self.size // known if extent == -1 else extent for extent in shape)
        if math.prod(shape) != self.size:
            raise ValueError(f"DeviceArray: {list(self.shape)} has other than {math.prod(shape)} items")
        return DeviceArray(self.pointer, shape, self.dtype, self.allocator, self.owner)

    def view(self, dtype: Any) -> DeviceArray:
        """The same bytes as items of the same size."""
        if np.dtype(dtype).itemsize != self.dtype.itemsize:
            raise ValueError(f"DeviceArray: {self.dtype} has other items than {np.dtype(dtype)}")
        return DeviceArray(self.pointer, self.shape, dtype, self.allocator, self.owner)

    def overlaps(self, other: DeviceArray) -> bool:
        """Whether a byte of this one is one of the other's."""
        if not self.nbytes or not other.nbytes:
            return False
        return self.pointer < other.pointer + other.nbytes and other.pointer < self.pointer + self.nbytes

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """One or a run of the first axis; shares memory."""
        extent = self.shape[0]
        if isinstance(index, int):
            if not -extent <= index < extent:  # also how iteration ends
                raise IndexError(f"DeviceArray: index {index} is out of range for {extent} items")
            index %= extent
            start, stop, step = index, index + 1, 1
        else:
            start, stop, step = index.indices(extent)
        if step != 1:
            raise ValueError("DeviceArray: a slice has to be contiguous")
        rest = self.shape[1:]
        pointer = self.pointer + start * math.prod(rest) * self.dtype.itemsize
        shape = rest if isinstance(index, int) else (max(stop - start, 0), *rest)
        return DeviceArray(pointer, shape, self.dtype, self.allocator, self.owner)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} on device {self.allocator.device})"


class Place(NamedTuple):
    """The device and the stream of a call."""

    device: int
    stream: int


def is_device(x: object) -> bool:
    """Whether ``x`` lies on a GPU, in either of the two forms."""
    return isinstance(x, DeviceArray) or _check.is_cupy(x)


def contiguous(x: Array) -> Array:
    """``x``, or a C-contiguous copy."""
    if isinstance(x, DeviceArray):
        return x
    with x.device:
        return sys.modules["cupy"].ascontiguousarray(x)


def device_of(x: Array) -> int:
    """The number of the GPU that ``x`` lies on."""
    return int(x.allocator.device if isinstance(x, DeviceArray) else x.device.id)


def place(x: Array) -> Place:
    """Where work on ``x`` is queued: its device, and that library's current stream there."""
    if isinstance(x, DeviceArray):
        return Place(x.allocator.device, x.allocator.stream())
    return Place(x.device.id, sys.modules["cupy"].cuda.get_current_stream(x.device.id).ptr)


def pointer(x: Array | None) -> int:
    """The address of an array; 0 for None."""
    if x is None:
        return 0
    return x.pointer if isinstance(x, DeviceArray) else int(x.data.ptr)


def host_copy(x: Array) -> Any:
    """A NumPy copy, once the work queued on the current stream is done; None while that is captured into a graph."""
    from .. import _cuda

    content = _cuda.read(*place(x), pointer(x), x.nbytes)
    return None if content is None else np.frombuffer(content, x.dtype).reshape(x.shape)


def empty(beside: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array that is not filled, of ``beside``'s kind and on its device."""
    if not isinstance(beside, DeviceArray):
        with beside.device:
            return sys.modules["cupy"].empty(shape, dtype)
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    address, owner = beside.allocator.allocate(num_bytes)
    return DeviceArray(address, tuple(shape), dtype, beside.allocator, owner)


def workspace(beside: Array, num_bytes: int) -> Array:
    """Bytes for a kernel to work in, from the same allocator; they may be freed once the kernel is queued."""
    return empty(beside, (max(num_bytes, 1),), np.uint8)
