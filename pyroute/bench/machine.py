"""What machine and what software this is: for ``info``, and for every table of times."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import platform
import sys
from typing import Any

import numpy as np

from .. import __version__, _backend, memory

OPTIONAL_PACKAGES = ("cupy", "torch", "transformers", "safetensors", "rich")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.lower().startswith(("model name", "hardware")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be taken without swapping, the container's limit counted."""
    available = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), available)
    group = "/sys/fs/cgroup/memory."
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max": no limit
        with open(group + "max", encoding="ascii") as file:
            limit = int(file.read())
        with open(group + "current", encoding="ascii") as file:
            used = int(file.read())
        with open(group + "stat", encoding="ascii") as lines:  # file pages count as used, but go when asked
            reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        available = min(available, limit - used + reclaimable)
    return max(0, available)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, 0 where the system does not say."""
    sizes = [0]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            sizes.append(int(file.read().strip().removesuffix("K")) * 1024)
    return max(sizes)


def optional_packages() -> dict[str, str | None]:
    """Version of each optional package that is installed, None for the others; nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in OPTIONAL_PACKAGES:
        versions[name] = _version(name)
    if versions["cupy"] is None:  # the wheels carry their CUDA version in the name
        found = [_version(name) for name in ("cupy-cuda13x", "cupy-cuda12x")]
        versions["cupy"] = next(filter(None, found), None)
    return versions


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """The facts that a time or a bug report needs beside it; JSON-ready."""
    core = _backend.core if _backend.HAS_CORE else None
    return {
        "pyroute": __version__,
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "numpy": np.__version__,
        "ml_dtypes": _version("ml_dtypes"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_available_bytes": available_memory(),
        "last_level_cache_bytes": last_level_cache(),
        "cache_limit_bytes": memory.cache_info().limit,
        "compiler": core.compiler() if core else None,
        "isa": core.isa() if core else None,
        "isas": core.isas() if core else [],
        "openmp": bool(core and core.threads_available()),
        "threads": _backend.get_num_threads(),
    }
