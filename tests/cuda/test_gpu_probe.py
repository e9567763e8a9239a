"""tools/gpu_probe.py and gpu_exact.py on the emulated GPU: what holds there is found to hold, and what is planted is
found and said."""

from __future__ import annotations

import functools
import importlib
import re
import sys

import emulated
import numpy as np
import pytest

from pyroute import _backend

TOOLS = emulated.ROOT / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(TOOLS))
gpu_exact, gpu_maps, gpu_probe = map(importlib.import_module, ("gpu_exact", "gpu_maps", "gpu_probe"))

pytestmark = pytest.mark.skipif(emulated.REAL, reason="gpu_check.py runs the cases themselves")

SOME = ("stream: one", "capture: a first call, global", "words: a tile at (80, 90)", "words: bf16_transposed, B",
        "words: a cluster", "words: registers", "map of wgrad bfloat16: right", "map of wgrad fp8: left scales",
        "map of dgrad bfloat16: left", "map of masked e4m3_e5m2")  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_a_probe(name):
    chosen = [case for case in gpu_probe.cases() if case.name.startswith(name)]
    assert [case.run() for case in chosen] == [None] * len(chosen)
    assert chosen


def test_a_case_has_a_name_of_its_own():
    for cases in (gpu_probe.cases(), gpu_exact.cases()):
        assert len({case.name for case in cases}) == len(cases)
    on_a_card = [f"{operation.__name__} {p.kind}: {p}" for operation, p in gpu_exact.problems(True, False)]
    assert len(set(on_a_card)) == len(on_a_card)
    assert {case.family for case in gpu_exact.cases()} >= {"masked fp8", "dgrad e5m2_e4m3", "wgrad bfloat16"}


SM90 = emulated.ROOT / "csrc/cuda/sm90"
ENTRY = re.compile(r"^PYROUTE_(KERNEL|PRODUCT|WGRAD)\((\w+)", re.MULTILINE)


def entry_points():
    found = [found for path in SM90.glob("*.cu") for found in ENTRY.findall(path.read_text())]
    return {name if macro == "KERNEL" else f"{name}_product" for macro, name in found}


def reached(calls):
    """The entry points of Hopper's rooms that run in them."""
    emulated.launched()
    for call in calls:
        call()
    return entry_points() & set(emulated.launched())


def test_every_kernel_is_mapped():
    """On a card; here one product of each variant stands for its maps."""
    zeros = {v: np.zeros((sum(v.segments), v.size), np.float32) for v in gpu_maps.variants(True) if v.size <= 256}

    def product(v, rows):
        right = rows if v.operation == "wgrad" else np.zeros((2, v.size, v.size), np.float32)
        return gpu_maps.result(v, rows, right, {})

    assert reached(functools.partial(product, *each) for each in zeros.items()) == entry_points()


def test_every_kernel_has_exact_products():
    """On a card; here the smallest of every kind."""
    least = {}
    for operation, p in gpu_exact.problems(True, False):
        key = operation, p.kind, p.asked, sum(p.counts) <= 64 * len(p.counts)
        size = sum(p.counts) * p.n * p.k
        if p.kind != "float32" and size <= least.setdefault(key, (size, p))[0]:
            least[key] = size, p
    calls = [functools.partial(gpu_exact.checked, key[0], p, 1) for key, (_, p) in least.items()]
    assert reached(calls) == entry_points()


WGRAD = gpu_maps.Variant("wgrad", "bfloat16", (40, 60), 128)


def misplacing(monkeypatch, move):
    """Kernels read the left operand from where ``move`` puts it."""
    right = gpu_maps.result
    monkeypatch.setattr(gpu_maps, "result", lambda v, left, *rest: right(v, move(left), *rest))


def test_a_descriptor_that_advances_too_far(monkeypatch):
    def move(left):
        moved = left.copy()
        moved[:, 64:96] = left[:, 96:128]
        return moved

    misplacing(monkeypatch, move)
    assert gpu_maps.elements(WGRAD, "left").endswith(
        "3200 of 32768 misread: row 0-99, column 64-95 read from column+32 (3200)"
    )


def test_a_swizzle_that_is_not_applied(monkeypatch):
    row, column = np.ogrid[:100, :128]
    misplacing(monkeypatch, lambda left: left[row, (column // 8 ^ row % 8) * 8 + column % 8])
    assert "16-byte chunks of column exchanged: chunk ^ {1: 1, 2: 2, 3: 3" in gpu_maps.elements(WGRAD, "left")


def test_scales_of_the_next_block(monkeypatch):
    right = gpu_maps.result
    monkeypatch.setattr(
        gpu_maps, "result", lambda v, a, b, given: right(v, a, b, {k: np.roll(s, -1, -1) for k, s in given.items()})
    )
    found = gpu_maps.scales(gpu_maps.Variant("wgrad", "fp8", (128, 30), 128), "right")
    assert "column of scales 0-126 read from column of scales+1" in found


def test_an_exact_product_that_is_wrong(monkeypatch):
    def doubled(rng, p):
        for got, exact, starts in gpu_exact.forward(rng, p):
            yield got, exact * (1 + (np.arange(p.n) >= 64)), starts

    found = gpu_exact.checked(doubled, gpu_exact.Problem("fp8", [70, 130], 128, 128), 0)
    assert found.startswith(f"{_backend.cuda.last_kernel() or 'unknown kernel'}: float32 ")
    assert "columns of a tile: 64-127" in found
    assert found.endswith("all 0.5 times what was expected")
