"""tools/gpu_cases.py and gpu_patterns.py: a case that hangs or dies does not take the others along, and what is wrong
with a matrix is said in words that lead to the line."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="needs the source tree")

CASES = """
import os, signal, time
from gpu_cases import Case

def raises():
    raise ValueError("what it said")

def lost():
    raise RuntimeError("a kernel failed: the process can use this GPU no more")

def cases():
    return [
        Case("good: 0", lambda: None),
        Case("wrong: 1", lambda: "two columns"),
        Case("raises: 2", raises),
        Case("hangs: 3", lambda: time.sleep(60)),
        Case("good: 4", lambda: print("a fact")),
        Case("dies: 5", lambda: os.kill(os.getpid(), signal.SIGKILL)),
        Case("lost: 6", lost),
        Case("dies: 7", lambda: os.kill(os.getpid(), signal.SIGKILL)),
        Case("dies: 8", lambda: "never run"),
        Case("alone: 9", lambda: None if not hasattr(os, "used") else "something ran before", alone=True),
        Case("good: 10", lambda: setattr(os, "used", True)),
        Case("alone: 11", lambda: None if not hasattr(os, "used") else "something ran before", alone=True),
    ]
"""


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_what_hangs_or_dies_goes_alone(tool, monkeypatch, tmp_path, capfd):
    (tmp_path / "gpu_planted.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TOOLS.parent}")
    monkeypatch.setenv("PYROUTE_GPU_CHECK_FOLDER", str(tmp_path))
    gpu_cases = tool("gpu_cases")
    monkeypatch.setattr(gpu_cases, "TRAP_SECONDS", 3)
    start = time.monotonic()
    with pytest.raises(SystemExit, match="7 of 12 not right, first wrong: 1: two columns"):
        gpu_cases.report("gpu_planted", importlib.import_module("gpu_planted").cases(), 2)
    assert time.monotonic() - start < 60
    found = {each["name"]: (each["kind"], each["what"]) for each in json.loads((tmp_path / "planted.json").read_text())}
    hung = "not done after 2 s; with trapping kernels not done after 3 s either: not a wait of csrc/cuda/sm90/ring.cuh"
    assert found == {
        "wrong: 1": ("wrong", "two columns"),
        "raises: 2": ("raised", "ValueError: what it said"),
        "hangs: 3": ("hung", hung),
        "dies: 5": ("crashed", "its process ended with status -9"),
        "lost: 6": ("crashed", "RuntimeError: a kernel failed: the process can use this GPU no more"),
        "dies: 7": ("crashed", "its process ended with status -9"),
        "dies": ("crashed", "two of them ended their process: the others of this family were left out"),
    }
    printed = capfd.readouterr().out
    assert "a fact\n" in printed
    assert "HUNG hangs: 3\n    not done after 2 s" in printed


def test_cases_that_are_right(tool, monkeypatch, tmp_path):
    (tmp_path / "gpu_right.py").write_text(
        "from gpu_cases import Case\ndef cases():\n    return [Case(f'good: {i}', lambda: None) for i in range(3)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TOOLS.parent}")
    gpu_cases = tool("gpu_cases")
    assert gpu_cases.report("gpu_right", importlib.import_module("gpu_right").cases(), 2) == "3 cases right"
    (tmp_path / "gpu_right.py").write_text("raise ImportError('no such thing')\n")
    with pytest.raises(SystemExit, match="its process ended before the case began"):
        gpu_cases.report("gpu_right", [gpu_cases.Case("good: 0", lambda: None)], 2)


def test_ranges(tool):
    ranges = tool("gpu_patterns").ranges
    assert ranges([3, 1, 2, 2]) == "1-3"
    assert ranges([0, 8, 16, 24]) == "0-24 by 8"
    assert ranges([0, 1, 5]) == "0-1, 5"
    assert ranges([0, 3, 4, 9, 20, 22, 25, 29, 31]) == "0, 3-4, 9, 20, 22, 25 and 2 runs more"


def test_what_is_wrong_with_a_result(tool):
    difference = tool("gpu_patterns").difference
    want = np.arange(1, 256 * 256 + 1, dtype=np.float32).reshape(256, 256)
    assert difference(want.copy(), want) is None
    assert difference(-np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)) is None
    doubled = want.copy()
    doubled[64:128, 128:] *= 2
    assert difference(doubled, want, np.array([0, 100])) == (
        "8192 of 65536 wrong, first at [64, 128]: expected 16513.0 (0x46810200), got 33026.0 (0x47010200); "
        "experts 0-1; rows of a tile: 0-27, 64-99; columns of a tile: 0-127; tiles down: 0; tiles across: 1; "
        "all 2 times what was expected"
    )
    unwritten = want.copy()
    unwritten[3::8, 5] = np.frombuffer(b"\x7f" * 4, np.float32)[0]
    assert "rows of a tile: 3-123 by 8; columns of a tile: 5; tiles across: 0; all not written" in difference(
        unwritten, want
    )
    assert "all NaN" in difference(np.full((4, 4), np.nan, np.float32), want[:4, :4])
    assert "experts 1; rows of a tile: 0-3" in difference(
        np.stack([want, want * 0])[:, :4], np.stack([want] * 2)[:, :4]
    )


def test_from_where_an_operand_was_read(tool):
    patterns = tool("gpu_patterns")
    own = np.arange(1, 128 * 128 + 1).reshape(128, 128)
    axes = patterns.Axes(("row", "k"), own.shape, 16)
    assert np.array_equal(patterns.numbers_from(patterns.digits_of(own.shape)), own)
    assert patterns.misread(own, own, axes) is None
    shifted = own.copy()
    shifted[:, 32:64] = own[:, :32]
    expected = "4096 of 16384 misread: row 0-127, k 32-63 read from k-32 (4096)"
    assert patterns.misread(shifted, own, axes) == expected
    row, k = np.ogrid[:128, :128]
    swizzled = own[row, (k // 16 ^ row % 8) * 16 + k % 16]
    assert "chunk ^ {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7} by row % 8, a wrong swizzle" in patterns.misread(
        swizzled, own, axes
    )
    mixed = [digit.copy() for digit in patterns.digits_of(own.shape)]
    mixed[0][0, 0] = 9.0
    for digit in mixed:
        digit[64:] = 0
    words = patterns.misread(patterns.numbers_from(mixed), own, axes)
    assert words == (
        "8193 of 16384 misread: row 64-127, k 0-127 read as nothing (8192); row 0, k 0 read as a mixture (1)"
    )
