"""Graphs for the tests: memory on a stream of its own, and what is captured there."""

from __future__ import annotations

import ctypes

import emulated
import numpy as np
import real
from emulated import to_device

from pyroute._device.arrays import DeviceArray

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
NON_BLOCKING = 1


class Arena:
    """One allocation that is handed out from its start, on a stream of its own: what a graph works in."""

    device = 0

    def __init__(self, num_bytes: int) -> None:
        self.memory = to_device(np.full(num_bytes, emulated.POISON, np.uint8))
        self.used = self.taken = 0
        self.handle = ctypes.c_void_p()
        real.call(real.driver().cuStreamCreate, ctypes.byref(self.handle), NON_BLOCKING)

    def allocate(self, num_bytes: int):
        start = -(-self.used // 256) * 256
        self.used, self.taken = start + num_bytes, self.taken + 1
        assert self.used <= self.memory.nbytes
        return self.memory.pointer + start, self.memory

    def stream(self) -> int:
        return self.handle.value or 0

    def put(self, array) -> DeviceArray:
        """A copy of the array in the arena."""
        array = np.ascontiguousarray(array)
        address, owner = self.allocate(array.nbytes)
        given = DeviceArray(address, array.shape, array.dtype, self, owner)
        fill(given, array)
        return given


def fill(to: DeviceArray, array: np.ndarray) -> None:
    real.write(to.pointer, np.ascontiguousarray(array))


class Graph:
    """What is queued on the arena's stream inside ``with``; ``launch()`` runs it and waits.

    Captured in the global mode, PyTorch's, in which the driver refuses most: whatever loads, allocates or waits.
    """

    def __init__(self, arena: Arena, mode: int = GLOBAL) -> None:
        self.arena, self.mode, self.executable = arena, mode, ctypes.c_void_p()

    def __enter__(self) -> Graph:
        real.call(real.driver().cuStreamBeginCapture_v2, self.arena.handle, self.mode)
        return self

    def __exit__(self, *failure) -> None:
        graph = ctypes.c_void_p()
        real.call(real.driver().cuStreamEndCapture, self.arena.handle, ctypes.byref(graph))
        if failure[0] is None:
            flags = ctypes.c_uint64(0)
            real.call(real.driver().cuGraphInstantiateWithFlags, ctypes.byref(self.executable), graph, flags)

    def launch(self) -> None:
        real.call(real.driver().cuGraphLaunch, self.executable, self.arena.handle)
        real.call(real.driver().cuStreamSynchronize, self.arena.handle)
