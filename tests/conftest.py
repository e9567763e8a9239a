"""Fixtures: one test body runs on every floor that this machine has, over memory that bites."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest

import pyroute
from pyroute import _backend

# Freed and fresh memory holds 0x7f bytes (3.4e38 as float32) instead of convenient zeros; set for child processes here
# and by the Makefile for the test process itself.
os.environ.setdefault("MALLOC_PERTURB_", "128")

_core = _backend.core if _backend.HAS_CORE else None
if _core:
    _core.set_memory_fill(0x7F)  # recycled memory likewise
CPU_FLOORS = [f"cpu-{isa}" for isa in _core.isas()] if _core else []
FLOORS = ["numpy", *CPU_FLOORS]


@pytest.fixture(scope="session", autouse=True)
def away_from_the_source_tree():
    """Child interpreters import what this one imports: a source tree as working directory would come first."""
    before = os.getcwd()
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    yield
    os.chdir(before)


class Floor:
    """A backend, with the instruction set for the cpu backend."""

    def __init__(self, name: str):
        self.name = name
        self.backend, _, self.isa = name.partition("-")

    def __repr__(self) -> str:
        return self.name


@pytest.fixture(params=FLOORS)
def floor(request):
    """Every floor in turn: pass ``backend=floor.backend`` to the op under test."""
    chosen = Floor(request.param)
    if chosen.isa:
        before = _core.isa()
        _core.set_isa(chosen.isa)
        yield chosen
        _core.set_isa(before)
    else:
        yield chosen


@pytest.fixture(params=CPU_FLOORS)
def cpu_floor(request):
    """The compiled floors only."""
    chosen = Floor(request.param)
    before = _core.isa()
    _core.set_isa(chosen.isa)
    yield chosen
    _core.set_isa(before)


@pytest.fixture(params=[1, 2, 3, 5, 16])
def threads(request):
    before = pyroute.get_num_threads()
    pyroute.set_num_threads(request.param)
    yield request.param
    pyroute.set_num_threads(before)


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)


_libc = ctypes.CDLL(None, use_errno=True)
_guard_pages: list[mmap.mmap] = []


def guarded(array: np.ndarray, *, at: str = "end") -> np.ndarray:
    """A copy of ``array`` that touches an inaccessible page at its end (or start): one byte too far is a SIGSEGV."""
    page = mmap.PAGESIZE
    body = -(-max(array.nbytes, 1) // page) * page
    region = mmap.mmap(-1, body + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (address, address + page + body):
        if _libc.mprotect(ctypes.c_void_p(guard), page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    _guard_pages.append(region)  # the mapping outlives the arrays over it
    offset = page + (body - array.nbytes if at == "end" else 0)
    copy = np.frombuffer(region, dtype=np.uint8, count=array.nbytes, offset=offset)
    copy = copy.view(array.dtype).reshape(array.shape) if array.size else array.copy()
    copy[...] = array
    return copy


def poison(shape, dtype) -> np.ndarray:
    """Memory for ``out=`` that holds 0x7f bytes: 3.4e38 as float32, NaN as e4m3, far out of range as an index."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).reshape(-1)[...] = 0x7F
    return array


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bytes: NaN equals only the same NaN, -0 differs from +0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_bytes(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.tobytes() != b.tobytes():
        width = a.dtype.itemsize
        x = np.ascontiguousarray(a).view(np.uint8).reshape(-1, width)
        y = np.ascontiguousarray(b).view(np.uint8).reshape(-1, width)
        wrong = np.flatnonzero((x != y).any(axis=1))
        where = np.unravel_index(wrong[0], a.shape)
        raise AssertionError(f"{wrong.size} of {a.size} items differ, first at {where}: {a[where]!r} != {b[where]!r}")
