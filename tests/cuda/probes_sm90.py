"""The kernels of emulator/probes_sm90.cu, each a step of a Hopper kernel, on the emulated GPU or a real one."""

from __future__ import annotations

import ctypes

import numpy as np
import real
from emulated import launch, to_device, to_host

UINT8, FLOAT32, BFLOAT16 = 0, 7, 9
TILE = 64 * 128


class Map(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


def encode(array, box=(128, 64), *, cols=None, swizzle=3, item_type=None, stride=None):
    """The result of the driver and the map of a DeviceArray."""
    rows, all_cols = array.shape
    itemsize = array.dtype.itemsize
    item_type = {1: UINT8, 2: BFLOAT16, 4: FLOAT32}[itemsize] if item_type is None else item_type
    buffer = (ctypes.c_uint8 * 256)()
    aligned = -(-ctypes.addressof(buffer) // 128) * 128
    result = real.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        item_type,
        2,
        ctypes.c_void_p(array.pointer),
        (ctypes.c_uint64 * 2)(cols or all_cols, rows),
        (ctypes.c_uint64 * 1)(stride or all_cols * itemsize),
        (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        swizzle,
        3,
        0,
    )
    return result, Map.from_buffer_copy(ctypes.string_at(aligned, 128))


class TileProbeArgs(ctypes.Structure):
    _fields_ = [
        ("from", Map),
        ("to", Map),
        ("out", ctypes.c_void_p),
        ("x", ctypes.c_int32),
        ("y", ctypes.c_int32),
        ("wrong", ctypes.c_uint32),
    ]


def tile_probe(x, at=(0, 0), *, kernel="probe_tile", wrong=0, blocks=1, cluster=1, cols=None, tile=TILE + 64):
    given, back = to_device(x), to_device(np.zeros_like(x))
    out = to_device(np.zeros(blocks * tile // TILE * TILE, np.uint8))
    args = TileProbeArgs(encode(given, cols=cols)[1], encode(back, cols=cols)[1], out.pointer, *at, wrong)
    sentence = launch(kernel, args, blocks=blocks, threads=64, shared=tile, cluster=cluster)
    return to_host(out), to_host(back), sentence


def swizzled(tile):
    """Rows of 128 bytes as they lie in shared memory."""
    offsets = np.arange(tile.size)
    out = np.empty(tile.size, np.uint8)
    out[offsets ^ ((offsets >> 7 & 7) << 4)] = tile.reshape(-1)
    return out


class ProductProbeArgs(ctypes.Structure):
    _fields_ = [("a", Map), ("b", Map), ("out", ctypes.c_void_p), ("wrong", ctypes.c_uint32)]


def product_probe(kernel, a, b, *, wrong=0):
    given_a, given_b = to_device(a), to_device(b)
    out = to_device(np.zeros((64, 128), np.float32))
    box = (128 // a.dtype.itemsize, 64)
    args = ProductProbeArgs(encode(given_a, box)[1], encode(given_b, box)[1], out.pointer, wrong)
    sentence = launch(f"probe_product_{kernel}", args, blocks=1, threads=128, shared=3 * TILE + 8)
    return to_host(out), sentence


class RegistersProbeArgs(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("wrong", ctypes.c_uint32)]
