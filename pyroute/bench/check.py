"""``pyroute check``: every compiled backend against the NumPy fallback on this machine, for a bug report.

Ids, counts, weights, router gradients, FP8 codes and scales and moved data must have equal bytes. Grouped GEMMs, the
fallback's included, must lie within the contract's bound of float64 in every single element.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import pyroute

from .. import _backend
from .check_cases import Case, cases
from .machine import describe_machine
from .terminal import Steps, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console

Array = Any

NUM_CASES = 2 * len(pyroute.presets()) + 12 + 8 + 8 + 3


class Variant(NamedTuple):
    """One way to run the ops here: a backend, and for the cpu backend an instruction set and threads."""

    name: str
    backend: str
    isa: str = ""
    threads: int = 0

    @contextlib.contextmanager
    def selected(self) -> Iterator[None]:
        if not self.isa:
            yield
            return
        core, isa, threads = _backend.core, _backend.core.isa(), pyroute.get_num_threads()
        core.set_isa(self.isa)
        pyroute.set_num_threads(self.threads)
        try:
            yield
        finally:
            core.set_isa(isa)
            pyroute.set_num_threads(threads)


def variants() -> list[Variant]:
    """NumPy first, then each instruction set with all threads, then the best one with another number of threads."""
    found = [Variant("numpy", "numpy")]
    if _backend.HAS_CORE:
        threads = pyroute.get_num_threads()
        found += [Variant(isa, "cpu", isa, threads) for isa in _backend.core.isas()]
        other = 1 if threads > 1 else 3
        found.append(Variant(f"{other} thread{'s' if other > 1 else ''}", "cpu", _backend.core.isa(), other))
    return found


def run(seed: int, step: Steps) -> dict[str, Any]:
    """Compare everything; JSON-ready. ``failures`` holds what differs, the first one in full."""
    everyone = variants()
    table: dict[str, dict[str, dict[str, int]]] = {}
    failures: list[dict[str, Any]] = []
    for case in cases(seed):
        step(case.op)
        row = table.setdefault(case.op, {v.name: {"elements": 0, "differing": 0} for v in everyone})
        bounds = case.bounds() if case.bounds else None
        reference = None if bounds else case.run("numpy")
        for variant in everyone:
            if bounds is None and variant.backend == "numpy":
                continue  # it is the reference
            with variant.selected():
                results = case.run(variant.backend)
            for name, value in results.items():
                if bounds:
                    wrong = _outside(value, *bounds[name])
                    expected = bounds[name][0]
                else:
                    assert reference is not None
                    expected = reference[name]
                    wrong = _unequal(value, expected)
                row[variant.name]["elements"] += int(wrong.size)
                row[variant.name]["differing"] += int(wrong.sum())
                if wrong.any():
                    failures.append(_failure(case, variant, name, value, expected, wrong, seed))
    return {
        "machine": describe_machine(),
        "seed": seed,
        "cpu_backend": pyroute.backends()["cpu"]._asdict(),
        "variants": [variant.name for variant in everyone],
        "checks": [{"op": op, "variants": row} for op, row in table.items()],
        "passed": not failures,
        "failures": failures[:20],
    }


def _unequal(value: Array, expected: Array) -> Array:
    """Which elements differ in a bit; all of them where dtype or shape differ."""
    if value.dtype != expected.dtype or value.shape != expected.shape:
        return np.ones(max(1, expected.size), bool)
    width = value.dtype.itemsize
    ours, theirs = (np.ascontiguousarray(v).reshape(-1).view(np.uint8).reshape(-1, width) for v in (value, expected))
    return (ours != theirs).any(axis=1)


def _outside(value: Array, exact: Array, bound: Array) -> Array:
    """Which elements are further from float64 than they may be; NaN is."""
    if value.shape != exact.shape:
        return np.ones(max(1, exact.size), bool)
    return ~(np.abs(value.astype(np.float64) - exact) <= bound).reshape(-1)


def _failure(
    case: Case, variant: Variant, name: str, value: Array, expected: Array, wrong: Array, seed: int
) -> dict[str, Any]:
    first = int(np.flatnonzero(wrong)[0])
    same_shape = value.shape == expected.shape
    return {
        "op": case.op,
        "shape": case.shape,
        "seed": seed,
        "variant": variant.name,
        "result": name,
        "differing": int(wrong.sum()),
        "elements": int(wrong.size),
        "index": [int(i) for i in np.unravel_index(first, expected.shape)] if same_shape else None,
        "got": _element(value, first) if same_shape else f"{value.dtype} {list(value.shape)}",
        "expected": _element(expected, first) if same_shape else f"{expected.dtype} {list(expected.shape)}",
    }


def _element(array: Array, at: int) -> str:
    """A value and its bits: the last bit of a float32 hardly shows in decimal, and never in a NaN."""
    element = np.ascontiguousarray(array).reshape(-1)[at : at + 1]
    return f"{element[0]} (0x{element.tobytes()[::-1].hex()})"


def show(console: Console, report: dict[str, Any]) -> None:
    names = report["variants"]
    console.print(f"[head]pyroute {report['machine']['pyroute']} against its own contract[/]")
    show_text(
        console,
        "ok: equal bytes with the NumPy fallback, the reference; for GEMMs and the layer, with the fallback among the "
        "tested, every element within its bound of float64 (docs/numerics.md).",
    )
    console.print()
    rows = []
    for check in report["checks"]:
        counts = [check["variants"][name] for name in names]
        elements = max(count["elements"] for count in counts)
        rows.append([check["op"], *map(_cell, counts), f"{elements:,}"])
    show_table(console, ("", *names, "elements"), rows, align="<" + ">" * (len(names) + 1))
    console.print()
    if len(names) == 1:
        reason = report["cpu_backend"]["reason"]
        show_text(console, f"Only the fallback's GEMMs could be tested: the cpu backend is not available, {reason}.")
    if report["passed"]:
        total = sum(count["elements"] for check in report["checks"] for count in check["variants"].values())
        console.print(f"[good]Everything agrees[/]: {total:,} elements, seed {report['seed']}.")
    else:
        _show_failure(console, report["failures"][0])


def _cell(count: dict[str, int]) -> str:
    if count["differing"]:
        return f"[bad]{count['differing']:,} differ[/]"
    return "[good]ok[/]" if count["elements"] else "[note]ref[/]"


def _show_failure(console: Console, failure: dict[str, Any]) -> None:
    console.print("[bad]There are differences.[/] The first one:")
    where = "" if failure["index"] is None else f" at {failure['index']}"
    for label, text in (
        ("what", f"{failure['op']}, {failure['result']}{where}"),
        ("input", f"{failure['shape']}, seed {failure['seed']}"),
        ("on", failure["variant"]),
        ("got", f"{failure['got']}, expected {failure['expected']}"),
        ("in all", f"{failure['differing']:,} of {failure['elements']:,} elements"),
    ):
        console.print(f"  {label:<8} {text}", markup=False)
    console.print()
    show_text(console, "Please report it with the output of: pyroute info; pyroute check --json")
