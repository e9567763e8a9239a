"""What only hardware can say, each fact by itself: how launches and captures begin, and what Hopper's words do; then
from where every kernel of a product reads every element of its operands (gpu_maps.py).

A probe that fails names the fact: what a kernel that relies on it makes of it is no longer a riddle.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import captured
import emulated
import gpu_maps
import gpu_patterns
import ml_dtypes
import numpy as np
import probes_sm90
import real
from gpu_cases import Case
from gpu_patterns import Axes

import pyroute
from pyroute import _backend
from pyroute._device.arrays import DeviceArray

if why := emulated.build():
    raise SystemExit(why)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def cases() -> list[Case]:
    found = [
        *(Case(f"stream: {name}", functools.partial(on_stream, handle)) for name, handle in STREAMS.items()),
        *(
            Case(f"capture: a first call, {name}", functools.partial(first_call_captured, mode), alone=True)
            for name, mode in {"global": captured.GLOBAL, "of one thread": captured.THREAD_LOCAL, "relaxed": 2}.items()
        ),
    ]
    if _backend.cuda.device_info(0)[1] != 90:
        return found
    found += [Case(f"words: {name}", run) for name, run in WORDS.items()]
    return found + gpu_maps.cases()


# --- launches ---------------------------------------------------------------------------------------------------------

STREAMS = {
    "the default": 0,
    "legacy, by its handle": 1,
    "of the thread, by its handle": 2,
    "one that does not block": -1,
}


def quantised(x: np.ndarray, codes: Any) -> str | None:
    expected = np.asarray(pyroute.quantize_fp8(x).codes)
    same = np.asarray(emulated.to_host(codes)).tobytes() == expected.tobytes()
    return None if same else "quantize_fp8 gives other bytes than on the CPU"


def on_stream(handle: int) -> str | None:
    if handle < 0:
        made = ctypes.c_void_p()
        real.call(real.driver().cuStreamCreate, ctypes.byref(made), captured.NON_BLOCKING)
        handle = made.value or 0

    class OnStream:
        device, allocate = 0, staticmethod(emulated.memory.allocate)

        def stream(self) -> int:
            return handle

    x = np.linspace(-3, 3, 64 * 256, dtype=np.float32).reshape(64, 256)
    given = emulated.to_device(x)
    here: Any = OnStream()
    return quantised(x, pyroute.quantize_fp8(DeviceArray(given.pointer, x.shape, x.dtype, here, given.owner)).codes)


def first_call_captured(mode: int) -> str | None:
    """The images load, and ask for shared memory, while a stream is captured."""
    x = np.linspace(-3, 3, 128 * 256, dtype=np.float32).reshape(128, 256)
    arena = captured.Arena(8 << 20)
    given, w = arena.put(x), arena.put(np.ones((1, 128, 256), BFLOAT16))
    wide, offsets = arena.put(np.ones((128, 256), BFLOAT16)), arena.put(np.array([0, 128]))
    with captured.Graph(arena, mode) as graph:
        codes = pyroute.quantize_fp8(given).codes
        product = pyroute.grouped_gemm(wide, w, offsets)
    graph.launch()
    return quantised(x, codes) or gpu_patterns.difference(
        emulated.to_host(product), np.full((128, 128), 256, BFLOAT16), None
    )


# --- Hopper's words ---------------------------------------------------------------------------------------------------


def tile(x: int, y: int) -> str | None:
    """The copy engine: the swizzle, zeros outside the array, and what is stored."""
    given = np.random.default_rng(1).integers(0, 255, (100, 256), dtype=np.uint8)
    out, back, sentence = probes_sm90.tile_probe(given, (x, y))
    padded = np.zeros((400, 800), np.uint8)
    padded[100:200, 100:356] = given
    box = padded[100 + y : 164 + y, 100 + x : 228 + x]
    if sentence or not np.array_equal(out, probes_sm90.swizzled(box)):
        return sentence or gpu_patterns.difference(out.reshape(64, 128), probes_sm90.swizzled(box).reshape(64, 128))
    plus_one = (np.ascontiguousarray(probes_sm90.swizzled(box)).view(np.uint32) + 1).view(np.uint8)
    places = np.arange(plus_one.size)
    stored = np.zeros_like(padded)
    stored[100 + y : 164 + y, 100 + x : 228 + x] = plus_one[places ^ ((places >> 7 & 7) << 4)].reshape(64, 128)
    return gpu_patterns.difference(back, stored[100:200, 100:356])


def words_product(kernel: str, which: int) -> str | None:
    """One warpgroup's product, 128 bytes deep: from where it reads every element of A (0) or B (1)."""
    dtype = np.dtype(ml_dtypes.float8_e4m3fn) if kernel == "e4m3" else BFLOAT16
    depth = 128 // dtype.itemsize
    shapes = ((64, depth), (128, depth))
    own = np.arange(shapes[which][0] * depth).reshape(shapes[which])

    def run(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        turned = [np.ascontiguousarray(m.T) if kernel == "bf16_transposed" else m for m in (left, right)]
        out, sentence = probes_sm90.product_probe(kernel, *(m.astype(dtype) for m in turned))
        if sentence:
            raise RuntimeError(sentence)
        return np.asarray(out)

    axes = Axes(("row of A", "depth") if which == 0 else ("row of B", "depth"), shapes[which], 16 // dtype.itemsize)
    for shift in range(0, depth, shapes[1 - which][0]):  # the other one picks
        pick = np.zeros(shapes[1 - which], np.float32)
        picked = min(len(pick), depth - shift)
        pick[np.arange(picked), np.arange(picked) + shift] = 1
        results = [
            run(digit, pick) if which == 0 else run(pick, digit) for digit in gpu_patterns.digits_of(shapes[which])
        ]
        want = np.zeros((64, 128), np.int64)
        if which == 0:
            want[:, :picked] = own[:, shift : shift + picked] + 1
        else:
            want[:picked] = own[:, shift : shift + picked].T + 1
        if what := gpu_patterns.misread(gpu_patterns.numbers_from(results), want, axes):
            return what
    return None


def cluster() -> str | None:
    """Two blocks share what each loads half of, and arrive at each other's barriers."""
    x = np.random.default_rng(2).integers(0, 255, (128, 128), dtype=np.uint8)
    size = probes_sm90.TILE
    out, _, sentence = probes_sm90.tile_probe(x, kernel="probe_cluster", blocks=4, cluster=2, tile=2 * size + 64)
    want = np.broadcast_to(probes_sm90.swizzled(x), (4, 2 * size))
    return sentence or gpu_patterns.difference(out.reshape(4, 2 * size), np.ascontiguousarray(want))


def registers() -> str | None:
    """Warpgroups of one block hand registers over; one lane of every warp is elected."""
    out = emulated.to_device(np.zeros(1, np.uint32))
    args = probes_sm90.RegistersProbeArgs(out.pointer, 0)
    sentence = emulated.launch("probe_registers", args, blocks=1, threads=384)
    count = int(emulated.to_host(out)[0])
    return sentence or (None if count == 12 else f"{count} lanes were elected in 12 warps")


def kept_bits(kernel: str, step: int) -> str | None:
    """How far below a sum's largest term a product still counts, in the same product (step 0) or a later one."""
    dtype = np.dtype(ml_dtypes.float8_e4m3fn) if kernel == "e4m3" else BFLOAT16
    depth, per_step = (128, 32) if kernel == "e4m3" else (64, 16)
    a, b = np.zeros((64, depth), np.float32), np.zeros((128, depth), np.float32)
    below = np.arange(128) % 32
    a[:, 0], b[:, 0] = 256, 256  # 2**16
    a[:, step * per_step + 1] = 1 / 64
    b[:, step * per_step + 1] = 2.0 ** (22 - np.maximum(below, 14))  # 2**(16 - below), from 14 on
    out, sentence = probes_sm90.product_probe(kernel, a.astype(dtype), b.astype(dtype))
    if sentence:
        return sentence
    kept = below[np.asarray(out)[0] > 65536]
    most = int(kept[kept >= 14].max(initial=13))
    where = "of the same product" if step == 0 else "of an earlier product"
    print(f"fact: {kernel} keeps 2**-{most} of the largest term {where}" + (" or more" if most == 13 else ""))
    return None


WORDS: dict[str, Callable[[], str | None]] = {
    **{f"a tile at {at}": functools.partial(tile, *at) for at in ((0, 0), (128, 64), (80, 90), (-16, -3), (300, 0))},
    **{
        f"{kernel}, {'AB'[which]}": functools.partial(words_product, kernel, which)
        for kernel in ("e4m3", "bf16", "bf16_transposed")
        for which in (0, 1)
    },
    "a cluster shares tiles": cluster,
    "registers are handed over": registers,
    **{
        f"bits kept, {kernel}, product {step}": functools.partial(kept_bits, kernel, step)
        for kernel in ("e4m3", "bf16")
        for step in (0, 1)
    },
}
