"""Grouped GEMM, the part that is arithmetic: which block computes what, and where operands lie in shared memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_layout(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "grouped_gemm_layout"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    made = subprocess.run(
        [*command, "-o", str(program), str(ROOT / "tests/cuda/grouped_gemm_layout.cpp")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
