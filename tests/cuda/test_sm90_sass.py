"""What the compiler made of Hopper's grouped GEMM: instructions, registers, no spills. Needs nvcc and nvdisasm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FP8 = ("fp8_128", "fp8_128_pair", "fp8_192", "fp8_192_pair", "fp8_128_f32", "fp8_64", "fp8_64_f32")
BF16 = ("bf16_128", "bf16_128_f32", "bf16_64", "bf16_64_f32", "bf16_dgrad_128", "bf16_dgrad_128_f32")
WGRAD = ("fp8_wgrad", "bf16_wgrad")
PRODUCTS = FP8 + BF16 + WGRAD


def tool(name: str) -> str | None:
    """From the environment (NVDISASM=...), the PATH, or a wheel of the toolkit beside some Python."""
    wheels = Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/*/bin/{name}")
    return os.environ.get(name.upper()) or shutil.which(name) or next(map(str, wheels), None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        pytest.skip("needs nvcc and nvdisasm")
    cubin = tmp_path_factory.mktemp("sm90") / "grouped_gemm.cubin"
    command = [nvcc, "-cubin", "-gencode", "arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "-fmad=false"]
    warnings = ["-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage"]
    source = ROOT / "csrc/cuda/sm90/grouped_gemm.cu"
    made = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", *warnings, "-o", str(cubin), str(source)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\.section\s+\.text\.", listing)[1:]
    return made.stderr, {part.split(",", 1)[0]: part for part in parts}


def opcodes(text: str) -> Counter:
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_]*)", text, re.M))


def test_no_spills_and_no_warnings(compiled):
    log, _ = compiled
    assert "warning" not in log.lower(), log
    for numbers in re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log):
        assert numbers == ("0", "0", "0")


@pytest.mark.parametrize("name", PRODUCTS)
def test_instructions_of_a_product(compiled, name):
    text = compiled[1][f"{name}_product"]
    count = opcodes(text)
    fp8 = name.startswith("fp8")
    # four products to a stage, the first one of which takes no sums where each stage has its own
    assert (count["QGMMA"], count["HGMMA"]) == ((4, 0) if fp8 else (0, 4))
    assert ("RZ, !UPT" in text) == fp8
    assert count["WARPGROUP"] == 2  # ARRIVE and DEPBAR: none was added to serialise
    assert count["UTMALDG"] >= 2
    assert count["SYNCS"] > 0
    assert count["USETMAXREG"] == (0 if "_64" in name else 2)
    staged = "f32" not in name and "wgrad" not in name
    assert (count["UTMASTG"] > 0, count["STSM"]) == (staged, (12 if "192" in name else 8) if staged else 0)
    assert ("UTMALDG.2D.MULTICAST" in text) == ("pair" in name)
    assert count["LDL"] == count["STL"] == 0
    if fp8:  # scaled where it is added, not before
        assert (count["FFMA"], count["FMUL"]) == (
            (64, 64) if "wgrad" in name else (96, 6) if "192" in name else (64, 2)
        )


def highest_register(text: str) -> int:
    return max(int(register) for register in re.findall(r"\bR(\d+)\b", text))


@pytest.mark.parametrize("name", PRODUCTS)
def test_registers_of_a_product(compiled, name):
    """ptxas reports what a thread starts with, 168: the highest one in the code is what setmaxnreg must cover."""
    text = compiled[1][f"{name}_product"]
    assert highest_register(text) < 240
    if "USETMAXREG" in text:
        loader = text[text.index("USETMAXREG.DEALLOC") :]
        assert highest_register(loader[: loader.rindex("UTMALDG")]) < 24
