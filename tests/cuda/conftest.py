"""Tests of the CUDA floor: the public API on arrays of the emulated GPU."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # this is a package, which pytest leaves out
import emulated

reason = emulated.build()
if reason and os.environ.get("PYROUTE_EMULATOR_REQUIRED"):
    raise RuntimeError(reason)


def pytest_collection_modifyitems(items):
    if reason:
        for item in items:
            if "/cuda/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_written_around_arrays():
    emulated.restart()
    yield
    emulated.memory.check()


@pytest.fixture
def seed(request, monkeypatch):
    """The order of threads and blocks: ``@pytest.mark.parametrize("seed", ..., indirect=True)``."""
    monkeypatch.setenv("PYROUTE_EMULATOR_SEED", str(request.param))
    return request.param


@pytest.fixture
def card(request, monkeypatch):
    """The compute capability that kernels are as if compiled for: ``parametrize("card", ..., indirect=True)``."""
    monkeypatch.setenv("PYROUTE_EMULATED_ARCH", str(request.param))


@pytest.fixture
def races_allowed(monkeypatch):
    """For input that makes threads collide, offsets that are none: what is written is any of it, in its place."""
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "0")
