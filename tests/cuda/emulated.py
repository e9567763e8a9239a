"""Arrays on the emulated GPU, for the tests: its memory is the host's, between inaccessible pages.

With PYROUTE_TEST_DEVICE=real they are on the first real GPU instead (tests/cuda/real.py), and the tests run unchanged.

``build()`` makes ``libcuda_emulated.so`` with CMake (again only what changed) and points ``PYROUTE_CUDA_DRIVER`` at it;
tests/cuda/conftest.py does so before the first test. ``to_device`` and ``to_host`` copy; what a kernel writes around an
array, in its slack or in the guard pages, is found.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real

from pyroute._device.arrays import DeviceArray

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"
LIBRARY = BUILD / "libcuda_emulated.so"

REAL = os.environ.get("PYROUTE_TEST_DEVICE", "emulated") == "real"

POISON = 0x7F
ALIGNMENT = 256
_libc = ctypes.CDLL(None, use_errno=True)


def build() -> str | None:
    """None, or why there is no emulator; then the tests that need it are skipped."""
    if REAL:
        return real.why_no_gpu()
    if os.environ.get("PYROUTE_CUDA_DRIVER"):
        return None
    tools = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        return "building the emulated GPU needs cmake"
    BUILD.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the test processes builds
        configure = [cmake, "-S", ROOT, "-B", BUILD, "-DPYROUTE_EMULATOR=ON", "--log-level=WARNING"]
        if not (BUILD / "CMakeCache.txt").exists() and (ninja := shutil.which("ninja", path=tools)):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", BUILD, "--target", "cuda_emulated", "--parallel"]):
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"the emulated GPU does not build:\n{made.stdout}{made.stderr}")
    seconds = time.monotonic() - start
    if seconds > 5:
        print(f"built the emulated GPU in {seconds:.0f} s", file=sys.stderr)
    os.environ["PYROUTE_CUDA_DRIVER"] = str(LIBRARY)
    return None


def library() -> ctypes.CDLL:
    """The emulator itself, for its sentences and for planting failures."""
    if REAL:
        pytest.skip("this test is about the emulator")
    emulator = ctypes.CDLL(os.environ["PYROUTE_CUDA_DRIVER"])
    emulator.pyroute_emulator_sentence.restype = ctypes.c_char_p
    emulator.pyroute_emulator_launched.restype = ctypes.c_char_p
    return emulator


def trap_hangs() -> None:
    """On a real GPU products stop where they would wait for ever; the emulator reports a deadlock by itself."""
    if REAL:
        real.trap_hangs()


def told_of_hangs() -> str:
    return real.told_of_hangs()


def restart() -> None:
    """The orders of threads from here on depend on the seed alone, and not on launches before."""
    if not REAL:
        library().pyroute_emulator_restart()


def fail_next(entry_point: str, result: int) -> None:
    """The next call of this entry point of the driver returns this CUresult."""
    library().pyroute_emulator_fail(entry_point.encode(), result)


def launched() -> list[str]:
    """The kernels that ran since the last call, in order."""
    return library().pyroute_emulator_launched(1).decode().split()


class Region:
    """Memory between two inaccessible pages, poisoned; ``body`` bytes are used and the rest must stay poison."""

    def __init__(self, num_bytes: int, *, at: str, alignment: int):
        page = mmap.PAGESIZE
        room = max(-(-num_bytes // page) * page, page)
        self.map = mmap.mmap(-1, room + 2 * page)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.room = np.frombuffer(self.map, np.uint8, room, page)
        self.room[...] = POISON
        self.start = (room - num_bytes) // alignment * alignment if at == "end" else 0
        self.num_bytes = num_bytes
        self.address = self.base + page + self.start
        for guard in (self.base, self.base + page + room):
            if _libc.mprotect(ctypes.c_void_p(guard), page, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def check(self) -> None:
        """Nothing but the body was written."""
        around = np.concatenate([self.room[: self.start], self.room[self.start + self.num_bytes :]])
        if (around != POISON).any():
            raise AssertionError(f"a kernel wrote around an array of {self.num_bytes} bytes")


class EmulatedMemory:
    """The allocator. ``at="end"`` puts arrays against the inaccessible page behind them, as far as 256 bytes allow."""

    device = 0

    def __init__(self, *, at: str = "end", alignment: int = ALIGNMENT):
        self.at, self.alignment = at, alignment
        self.regions: list[Region] = []

    def allocate(self, num_bytes: int) -> tuple[int, Any]:
        region = Region(num_bytes, at=self.at, alignment=self.alignment)
        self.regions.append(region)
        return region.address, region

    def stream(self) -> int:
        return 0

    def check(self) -> None:
        """Nothing around any array was written; then the memory is forgotten, and goes with its last array."""
        for region in self.regions:
            region.check()
        self.regions.clear()


memory: Any = real.RealMemory() if REAL else EmulatedMemory()


def to_device(array: Any, *, at: str | None = None, offset: int = 0) -> DeviceArray:
    """A copy on the emulated GPU.

    ``at="end"`` gives it no more alignment than its items have, so that its last byte is the last before the
    inaccessible page; ``offset`` moves it by that many items in an aligned allocation, as a slice of a larger array is.
    """
    array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
    itemsize = array.dtype.itemsize
    if at == "end" and REAL:
        address, owner = memory.allocate(array.nbytes, itemsize)
    elif at == "end":
        region = Region(array.nbytes, at="end", alignment=itemsize)
        memory.regions.append(region)
        address, owner = region.address, region
    else:
        address, owner = memory.allocate(array.nbytes + offset * itemsize)
        address += offset * itemsize
    if REAL:
        real.write(address, array)
    else:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
    return DeviceArray(address, array.shape, array.dtype, memory, owner)


def to_host(array: Any) -> Any:
    """A NumPy copy of a DeviceArray; of each in a tuple; anything else as it is."""
    if isinstance(array, tuple):
        items = [to_host(item) for item in array]
        return type(array)(*items) if hasattr(array, "_fields") else tuple(items)
    if not isinstance(array, DeviceArray):
        return array
    content = real.read(array.pointer, array.nbytes) if REAL else ctypes.string_at(array.pointer, array.nbytes)
    return np.frombuffer(content, array.dtype).reshape(array.shape).copy()


class _Config(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_uint32 * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p),
                ("num_attributes", ctypes.c_uint32)]  # fmt: skip


def padded(args: ctypes.Structure) -> bytes:
    """As the kernel's struct ends: at a multiple of a tensor map's 128 bytes, if it holds one."""
    maps = any(ctypes.sizeof(field[1]) == 128 for field in args._fields_)
    return bytes(args).ljust(-(-ctypes.sizeof(args) // 128) * 128 if maps else 0, b"\0")


def launch(kernel: str, args: ctypes.Structure, *, blocks: int, threads: int, shared: int = 0, cluster: int = 1) -> str:
    """Runs a kernel of the emulator's own tests; returns an empty string, or the sentence of its failure."""
    if REAL:
        return real.launch(kernel, padded(args), blocks=blocks, threads=threads, shared=shared, cluster=cluster)
    emulator = library()
    function, context = ctypes.c_void_p(), ctypes.c_void_p()
    emulator.cuInit(0)
    emulator.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    emulator.cuCtxPushCurrent_v2(context)
    if emulator.cuLibraryGetKernel(ctypes.byref(function), None, kernel.encode()):
        raise LookupError(kernel)
    emulator.cuKernelSetAttribute(8, shared, function, 0)
    attribute = (ctypes.c_uint32 * 18)(4, 0, cluster, 1, 1)
    config = _Config((blocks, 1, 1, threads, 1, 1, shared), None, ctypes.addressof(attribute), int(cluster > 1))
    given = ctypes.create_string_buffer(padded(args))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(given))
    result = emulator.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
    emulator.cuCtxPopCurrent_v2(ctypes.byref(context))
    return emulator.pyroute_emulator_sentence().decode() if result else ""
