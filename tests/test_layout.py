"""The house rules that a program can check: rooms and floors, sizes, headers that ISA files may use, clean imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("gating", "permutation", "quantization", "grouped_gemm", "moe")
ISAS = ("scalar", "avx2", "avx512")

PYTHON_LINES = 400
KERNEL_LINES = 500

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


def python_files() -> list[Path]:
    return sorted((ROOT / "pyroute").rglob("*.py"))


def native_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_its_name_on_every_floor(room):
    places = [
        f"pyroute/{room}.py",
        f"pyroute/_array/{room}.py",
        f"csrc/{room}.h",
        f"csrc/cpu/{room}.h",
        f"csrc/cpu/{room}.cpp",
        *(f"csrc/cpu/{isa}/{room}.cpp" for isa in ISAS),
        f"csrc/bindings/{room}.cpp",
        f"tests/oracle/{room}.py",
        f"tests/test_{room}.py",
        f"benches/bench_{room}.py",
        f"docs/ops/{room}.md",
    ]
    assert [place for place in places if not (ROOT / place).is_file()] == []


def test_top_level_holds_what_the_house_names():
    for name in (
        "pyproject.toml",
        "CMakeLists.txt",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
    ):
        assert (ROOT / name).is_file(), name
    assert len((ROOT / "CMakeLists.txt").read_text().splitlines()) < 150


def test_file_sizes():
    limits = [(path, PYTHON_LINES) for path in (*python_files(), *(ROOT / "pyroute").rglob("*.pyx"))] + [
        (path, KERNEL_LINES) for path in native_files()
    ]
    lengths = [(str(path.relative_to(ROOT)), len(path.read_text().splitlines()), limit) for path, limit in limits]
    assert [entry for entry in lengths if entry[1] > entry[2]] == []


def test_function_sizes():
    too_long = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
                if lines > 60:
                    too_long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert too_long == {}


def test_public_functions_are_documented():
    import pyroute

    for name in pyroute.__all__:
        thing = getattr(pyroute, name)
        if callable(thing):
            assert thing.__doc__, name


def test_isa_files_include_types_only():
    """An inline standard-library function compiled with AVX2 could be the copy that the linker keeps for every CPU."""
    allowed_system = {"stdint.h", "string.h", "stddef.h", "immintrin.h", "math.h"}
    for isa in ISAS:
        for path in sorted((ROOT / "csrc/cpu" / isa).glob("*")):
            for include in re.findall(r"#include <(.*?)>", path.read_text()):
                assert include in allowed_system, f"{path.relative_to(ROOT)} includes <{include}>"


def test_floor_zero_uses_only_what_cupy_has():
    """Array code calls xp.<name>; np.<name> there would leave the GPU."""
    for path in sorted((ROOT / "pyroute/_array").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"ml_dtypes", "numpy"}, path.name


def test_the_oracles_import_nothing_of_pyroute():
    for path in sorted((ROOT / "tests/oracle").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "pyroute" for name in names), path.name


def test_every_test_asserts_something():
    words = ("assert", "raises", "check", "expect")
    empty = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = {
                    getattr(c.func, "attr", getattr(c.func, "id", ""))
                    for c in ast.walk(node)
                    if isinstance(c, ast.Call)
                }
                if "Assert(" not in ast.dump(node) and not any(w in c for c in calls for w in words):
                    empty.append(f"{path.name}:{node.name}")
    assert empty == []
