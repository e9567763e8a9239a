"""``pyroute info``: what is installed, which backends can run, and why the others cannot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .. import _backend
from .limits import Limits, measure_limits
from .machine import describe_machine, optional_packages
from .terminal import number_of_bytes, show_rows, show_text

if TYPE_CHECKING:
    from rich.console import Console


def collect(*, with_limits: bool = False) -> dict[str, Any]:
    """Everything that ``info`` shows; JSON-ready."""
    return {
        "machine": describe_machine(),
        "backends": {name: info._asdict() for name, info in _backend.backends().items()},
        "pyroute_isa": os.environ.get("PYROUTE_ISA"),
        "optional_packages": optional_packages(),
        "limits": measure_limits().as_dict() if with_limits else None,
    }


def show(console: Console, facts: dict[str, Any]) -> None:
    machine = facts["machine"]
    console.print(f"[head]pyroute {machine['pyroute']}[/]  expert routing for Mixture-of-Experts models")
    for title, rows in (
        ("Machine", _machine_rows(machine)),
        ("Backends", _backend_rows(facts)),
        ("Optional packages", _package_rows(facts["optional_packages"])),
    ):
        console.print(f"\n[head]{title}[/]")
        show_rows(console, rows)
    if facts["limits"]:
        console.print()
        show_limits(console, Limits(**facts["limits"]))


def show_limits(console: Console, limits: Limits) -> None:
    """The measured limits: printed with every table of times."""
    console.print("[head]Limits of this machine, measured just now[/]")
    plural = "s" if limits.threads > 1 else ""
    rows = []
    for name, all_threads, one_thread, unit, what in (
        ("multiply-add", limits.fma_gflops, limits.fma_gflops_one_thread, "GFLOP/s", f"float32, {limits.isa}"),
        ("read", limits.read_gbs, limits.read_gbs_one_thread, "GB/s", number_of_bytes(limits.buffer_bytes) + " buffer"),
        ("write", limits.write_gbs, limits.write_gbs_one_thread, "GB/s", "nothing read"),
        ("copy", limits.copy_gbs, limits.copy_gbs_one_thread, "GB/s", "read and write counted"),
    ):
        if all_threads is None:
            rows.append((name, "not measured: the compiled backend is not there"))
            continue
        one = f", {one_thread:.4g} on one" if limits.threads > 1 and one_thread is not None else ""
        rows.append((name, f"{all_threads:.4g} {unit} on {limits.threads} thread{plural}{one}  [note]{what}[/]"))
    show_rows(console, rows)
    if limits.steadiness < 0.8:
        note = "[bad]The machine is busy[/]: runs of one probe differ by more than a fifth. Trust no time."
        show_text(console, note, indent=2)


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    from rich.markup import escape

    cache, cores = machine["last_level_cache_bytes"], machine["cores"]
    memory = f"{number_of_bytes(machine['memory_available_bytes'])} available"
    return [
        ("CPU", f"{escape(machine['cpu'])}, {cores} core{'s' if cores > 1 else ''}"),
        ("memory", memory + (f", last cache {cache / 2**20:.3g} MiB" if cache else "")),
        ("system", escape(machine["platform"])),
        ("Python", f"{machine['python']}, NumPy {machine['numpy']}, ml_dtypes {machine['ml_dtypes']}"),
    ]


def _backend_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from rich.markup import escape

    rows = []
    for name, info in facts["backends"].items():
        if not info["available"]:
            rows.append((name, f"[note]not available:[/] {escape(info['reason'])}"))
            continue
        rows.append((name, f"[good]available[/]  {escape(info['device'])}"))
        if info["kernels"]:
            rows.append(("", f"kernels: {escape(info['kernels'])}"))
        if name == "cpu":
            rows += [("", text) for text in _cpu_details(facts)]
    return rows


def _cpu_details(facts: dict[str, Any]) -> list[str]:
    machine, asked = facts["machine"], facts["pyroute_isa"]
    here = ", ".join(machine["isas"])
    if asked is not None and asked != machine["isa"]:
        isa = f"[bad]PYROUTE_ISA={asked} is not one of {here}[/]: {machine['isa']} is used"
    elif asked is not None:
        isa = f"the one of {here} that PYROUTE_ISA asks for"
    elif len(machine["isas"]) > 1:
        isa = f"the best of {here}; PYROUTE_ISA={machine['isas'][-2]} takes another"
    else:
        isa = f"the only instruction set that this CPU has of pyroute's: {here}"
    if machine["openmp"]:
        threads = f"threads: {machine['threads']}, from OpenMP; OMP_NUM_THREADS=1 changes it"
    else:
        threads = "threads: 1, built without OpenMP"
    kept = number_of_bytes(machine["cache_limit_bytes"])
    memory = f"freed results: up to {kept} are kept for the next call; PYROUTE_CACHE_LIMIT=0 keeps none"
    return [isa, threads, memory, f"compiler: {machine['compiler']}"]


def _package_rows(packages: dict[str, str | None]) -> list[tuple[str, str]]:
    return [(name, version or "[note]not installed[/]") for name, version in packages.items()]
