"""Code compiled for AVX stays in its own folder: nothing of it can become the copy that every CPU runs.

Read off the object files of every build tree that holds the extension (``make dev``, ``pip install .``); the installed
extension itself is stripped.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDE_ISAS = ("avx2", "avx512")
BASELINE = ("pyroute_cpu.dir", "pyroute_cpu_scalar.dir")

# Every VEX and EVEX mnemonic begins with v, except those on general registers and on mask registers.
WIDE_MNEMONIC = re.compile(
    r"v\w+"
    r"|k(add|and|andn|mov|not|or|ortest|shiftl|shiftr|test|unpck|xnor|xor)[bwdq]{1,2}"
    r"|(andn|bextr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?"
)


def build_trees() -> list[Path]:
    """CMakeFiles folders of builds of the extension; sanitizers' builds have symbols and code of their own."""
    return sorted(path.parent for path in ROOT.glob("build/*/CMakeFiles/_core.dir"))


TREES = build_trees()

pytestmark = [
    pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="one instruction set only"),
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="needs nm and objdump"),
    pytest.mark.skipif(not TREES, reason="no build tree here"),
]


def objects(tree: Path, folder: str) -> list[str]:
    found = sorted(str(path) for path in (tree / folder).rglob("*.o"))
    assert found, f"{tree / folder} holds no object files"
    return found


def defined_symbols(files: list[str]) -> set[str]:
    """Names that the linker sees from outside: strong, weak and unique, not local ones."""
    lines = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--format=posix", *files], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {line.split()[0] for line in lines if len(line.split()) >= 2}


def mnemonics(files: list[str]) -> dict[str, str]:
    """Each mnemonic of the files with one line that shows it."""
    lines = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", *files], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {}
    for line in lines:
        match = re.match(r"\s+[0-9a-f]+:\t(?:(?:rep|repz|repnz|lock|bnd|data16|notrack|cs|ds)\s+)*(\w+)", line)
        if match:
            found.setdefault(match[1], line.strip())
    return found


@pytest.mark.parametrize("isa", WIDE_ISAS)
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.parent.name)
def test_wide_objects_define_nothing_outside_their_namespace(tree, isa):
    """A weak symbol of a shared header, compiled with AVX, may replace the baseline's copy when both are linked."""
    own = re.compile(rf"_Z(?:GV|TV|TI|TS)?Z*NK?7pyroute3cpu{len(isa)}{isa}")
    symbols = defined_symbols(objects(tree, f"pyroute_cpu_{isa}.dir"))
    assert any(own.match(name) for name in symbols)  # the kernel tables at least
    assert sorted(name for name in symbols if not own.match(name)) == []


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.parent.name)
def test_no_instruction_set_shares_a_symbol_with_another(tree):
    folders = [*BASELINE, *(f"pyroute_cpu_{isa}.dir" for isa in WIDE_ISAS)]
    symbols = {folder: defined_symbols(objects(tree, folder)) for folder in folders}
    for isa in WIDE_ISAS:
        wide = f"pyroute_cpu_{isa}.dir"
        for other in folders:
            assert other == wide or symbols[wide] & symbols[other] == set(), other


@pytest.mark.parametrize("folder", BASELINE)
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.parent.name)
def test_baseline_objects_hold_no_avx(tree, folder):
    found = mnemonics(objects(tree, folder))
    assert "ret" in found or "retq" in found  # something was disassembled
    assert {name: line for name, line in found.items() if WIDE_MNEMONIC.fullmatch(name)} == {}


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.parent.name)
def test_the_wide_objects_do_hold_avx(tree):
    """What the test above looks for exists where it should."""
    assert any(name.startswith("vfmadd") for name in mnemonics(objects(tree, "pyroute_cpu_avx2.dir")))
