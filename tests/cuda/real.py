"""Arrays on a real GPU for the tests (PYROUTE_TEST_DEVICE=real): the driver's own memory and nothing else.

Every array lies between two bands of known bytes, and a kernel that writes into one is found as on the emulated GPU.
Copies wait for all kernels before them. With PYROUTE_CUDA_DRIVER naming the emulator all of this runs on that.
PYROUTE_TEST_BAND=0 leaves bands and poison out, for compute-sanitizer: it knows what is outside or unwritten.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

POISON = 0x7F
BAND = int(os.environ.get("PYROUTE_TEST_BAND", "512"))

_driver: Any = None


def driver() -> Any:
    """libcuda with the first GPU's own context current."""
    global _driver
    if _driver is None:
        loaded = ctypes.CDLL(os.environ.get("PYROUTE_CUDA_DRIVER") or "libcuda.so.1")
        call(loaded.cuInit, 0)
        context = ctypes.c_void_p()
        call(loaded.cuDevicePrimaryCtxRetain, ctypes.byref(context), 0)
        call(loaded.cuCtxSetCurrent, context)
        _driver = loaded
    return _driver


def call(entry_point: Any, *arguments: Any) -> None:
    if result := entry_point(*arguments):
        raise RuntimeError(f"{entry_point.__name__}: CUDA error {result}")


def why_no_gpu() -> str | None:
    try:
        driver()
    except (OSError, RuntimeError) as error:
        return f"no GPU: {error}"
    return None


def write(address: int, array: np.ndarray) -> None:
    call(driver().cuMemcpyHtoD_v2, ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), _size(array.nbytes))


def read(address: int, num_bytes: int) -> bytes:
    """The bytes, once every kernel has ended."""
    call(driver().cuCtxSynchronize)
    if num_bytes == 0:
        return b""
    bytes_ = ctypes.create_string_buffer(max(num_bytes, 1))
    call(driver().cuMemcpyDtoH_v2, bytes_, ctypes.c_uint64(address), _size(num_bytes))
    return bytes_.raw[:num_bytes]


def finish() -> None:
    """Waits for every kernel; raises if one failed."""
    call(driver().cuCtxSynchronize)


def _size(num_bytes: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(num_bytes)


PROBES = "probes_sm90"  # the emulator's own kernels of Hopper's words, which a card runs too


@functools.cache
def launcher() -> Any:
    """pyroute's, which finds the probes' kernels beside its own."""
    from pyroute import _backend
    from pyroute._device import images, nvrtc

    def image(room: str, capability: int) -> bytes:
        version = _backend.cuda.driver_version()
        if room != PROBES or images.route(capability, version).how == "emulated":
            return images.image(room, capability, version)
        compiler = nvrtc.find(version // 1000)
        if compiler is None:
            raise RuntimeError("the probes need NVRTC")
        source = Path(__file__).with_name("emulator") / f"{PROBES}.cu"
        return compiler.compile(source.read_bytes(), source.name, images.options_for(images.arch(capability)))

    _backend.cuda.set_image_source(image)
    return _backend.cuda


def launch(kernel: str, args: bytes, *, blocks: int, threads: int, shared: int, cluster: int) -> str:
    """Runs a kernel of the probes; an empty string, or the sentence of its failure."""
    try:
        launcher().launch(0, 0, PROBES, kernel, blocks, threads, args, shared, cluster)
        finish()
    except RuntimeError as error:
        return str(error)
    return ""


def trap_hangs() -> None:
    """From here on Hopper's products stop where they would wait for ever, and tell where (csrc/cuda/sm90/ring.cuh)."""
    from pyroute import _backend
    from pyroute._device import images, nvrtc

    global _hangs
    words, cuda = ctypes.c_void_p(), _backend.cuda
    call(driver().cuMemHostAlloc, ctypes.byref(words), _size(4 * _HANG_WORDS), 3)  # of every context, and mapped
    _hangs = np.ctypeslib.as_array(ctypes.cast(words, ctypes.POINTER(ctypes.c_uint32)), (_HANG_WORDS // 8, 8))
    _hangs[:] = 0
    cuda.report_hangs_to(words.value)

    def image(room: str, capability: int) -> bytes:
        version = cuda.driver_version()
        compiler = nvrtc.find(version // 1000)
        if not room.startswith("sm90/") or images.route(capability, version).how == "emulated":
            return images.image(room, capability, version)
        if compiler is None:
            raise RuntimeError("trapping kernels need NVRTC")
        return images.cubin(compiler, room, images.arch(capability), "-DPYROUTE_HANG_TRAP")

    cuda.set_image_source(image)


_HANG_WORDS = 8 * 1024  # 8 for each block
_hangs = np.zeros((0, 8), np.uint32)


def told_of_hangs() -> str:
    """What trapping kernels waited for: the first blocks of those that stopped."""
    stopped = np.flatnonzero(_hangs[:, 0])
    words = [
        f"block {block}, thread {thread} waits for {('', 'full', 'empty')[what]} of stage {stage} in phase {phase}, "
        f"tile ({m}, {n})"
        for block in stopped[:4]
        for what, thread, stage, phase, m, n in [_hangs[block, :6].tolist()]
    ]
    return f"{len(stopped)} blocks hang: {'; '.join(words)}" if words else ""


class Region:
    """One allocation; ``num_bytes`` of it are used and the rest must stay poison."""

    def __init__(self, num_bytes: int, alignment: int):
        before = BAND if alignment >= 256 else BAND + (-num_bytes % 256) // alignment * alignment
        self.num_bytes, self.total = num_bytes, max(before + num_bytes + BAND, 1)
        self.base = ctypes.c_uint64()
        call(driver().cuMemAlloc_v2, ctypes.byref(self.base), _size(self.total))
        if BAND:
            call(driver().cuMemsetD8_v2, self.base, ctypes.c_ubyte(POISON), _size(self.total))
        self.address = self.base.value + before

    def check(self) -> None:
        if not BAND:
            return
        end = self.address + self.num_bytes
        bands = read(self.base.value, self.address - self.base.value) + read(end, self.base.value + self.total - end)
        if bands.strip(bytes([POISON])):
            raise AssertionError(f"a kernel wrote around an array of {self.num_bytes} bytes")

    def __del__(self) -> None:
        if self.base.value:
            driver().cuMemFree_v2(self.base)


class RealMemory:
    """The allocator, as tests/cuda/emulated.py has one."""

    device = 0

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def allocate(self, num_bytes: int, alignment: int = 256) -> tuple[int, Any]:
        region = Region(num_bytes, alignment)
        self.regions.append(region)
        return region.address, region

    def stream(self) -> int:
        return 0

    def check(self) -> None:
        """Nothing around any array was written; then the memory is forgotten, and goes with its last array."""
        for region in self.regions:
            region.check()
        self.regions.clear()
