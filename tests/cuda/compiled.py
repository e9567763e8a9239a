"""What the compilers made of a .cu file, for tests of registers, spills and instructions. No GPU is needed.

Code comes out of the fatbins that the build made, else from NVRTC. The tools that read it, ``cuobjdump`` and
``nvdisasm``, come from their wheels (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), the PATH, or CUOBJDUMP=, NVDISASM=.
What is missing skips the test with a word about it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from pyroute._device import images, nvrtc

ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
SOURCES = images._sources() / "cuda"
ROOMS = sorted(str(path.relative_to(SOURCES).with_suffix("")) for path in SOURCES.rglob("*.cu"))

HAS_FATBINS = (images._KERNELS / "architectures").is_file()

_folder = tempfile.TemporaryDirectory(prefix="pyroute-cubins-")


class Resources(NamedTuple):
    """Of one kernel; bytes but for the registers."""

    registers: int
    stack: int
    shared: int
    local: int


def archs_of(room: str) -> tuple[str, ...]:
    return ("sm_90a",) if room.startswith("sm90/") else ARCHS


def tool(name: str) -> str:
    wheels = Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/*/bin/{name}")
    found = os.environ.get(name.upper()) or shutil.which(name) or next(map(str, wheels), None)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def compiler() -> nvrtc.Compiler:
    found = nvrtc.find(sys.maxsize)
    if found is None:
        pytest.skip("needs NVRTC")
    return found


@functools.cache
def cubin(room: str, arch: str) -> Path:
    """The code of ``csrc/cuda/<room>.cu`` for an architecture, in a file."""
    folder = Path(_folder.name) / room.replace("/", "-")
    made = folder / f"{Path(room).name}.{arch}.cubin"
    fatbin = images._KERNELS / f"{room}.fatbin"
    if HAS_FATBINS and not made.exists():
        folder.mkdir(exist_ok=True)
        # one file per architecture, named after it
        subprocess.run([tool("cuobjdump"), "-xelf", "all", str(fatbin)], cwd=folder, check=True, capture_output=True)
    if not made.exists():
        folder.mkdir(exist_ok=True)
        made.write_bytes(images.cubin(compiler(), room, arch))
    return made


@functools.cache
def resources(room: str, arch: str) -> dict[str, Resources]:
    """By kernel."""
    command = [tool("cuobjdump"), "-res-usage", str(cubin(room, arch))]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {name: Resources(*map(int, numbers)) for name, *numbers in re.findall(line, text)}


@functools.cache
def sass(room: str, arch: str) -> dict[str, str]:
    """The disassembly of each kernel."""
    command = [tool("nvdisasm"), "-c", str(cubin(room, arch))]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"\.section\s+\.text\.", listing)[1:]
    return {part.split(",", 1)[0]: part for part in parts}


def instructions(text: str) -> list[str]:
    """The instructions of a kernel in order, with their suffixes: ``LDG.E.128``."""
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", text, re.M)


def loops(text: str) -> list[list[str]]:
    """The lines of every innermost loop of a kernel, branches and operands included."""
    lines, labels, found = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L\S+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L\S+?)\)", instruction[1])
            if back and (first := labels.get(back[1])) is not None and not any(first <= at for at, _ in found):
                found.append((first, len(lines)))
    return [lines[first:end] for first, end in found]
