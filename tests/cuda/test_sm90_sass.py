"""What the compilers made of Hopper's grouped GEMM: which instructions, how many, in how many registers."""

from __future__ import annotations

import re
from collections import Counter

import compiled
import pytest

OVERLAP = "fp8_128_overlap"
FP8 = ("fp8_128", "fp8_128_pair", "fp8_192", "fp8_192_pair", "fp8_128_f32", "fp8_64", "fp8_64_f32")
E5M2_PAIRS = ("e5m2_e4m3", "e4m3_e5m2", "e5m2_e5m2")
E5M2 = tuple(f"{pair}_{tile}" for pair in E5M2_PAIRS for tile in ("128", "128_f32", "wgrad"))
BF16 = ("bf16_128", "bf16_128_f32", "bf16_64", "bf16_64_f32", "bf16_dgrad_128", "bf16_dgrad_128_f32")
WGRAD = ("fp8_wgrad", "bf16_wgrad")
PRODUCTS = FP8 + E5M2 + BF16 + WGRAD  # with one set of sums


def sass(name: str) -> str:
    room = "sm90/grouped_gemm" + ("_e5m2" if "e5m2" in name else "")
    return compiled.sass(room, "sm_90a")[f"{name}_product"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_instructions_of_a_product(name):
    text = sass(name)
    count = Counter(instruction.split(".")[0] for instruction in compiled.instructions(text))
    fp8 = not name.startswith("bf16")
    # four products to a stage, the first one of which takes no sums where each stage has its own
    assert (count["QGMMA"], count["HGMMA"]) == ((4, 0) if fp8 else (0, 4))
    assert ("RZ, !UPT" in text) == fp8
    assert count["WARPGROUP"] == 2  # ARRIVE and DEPBAR: none was added to serialise
    order = [instruction.split(".")[0] for instruction in compiled.instructions(text)]
    start = order.index("QGMMA" if fp8 else "HGMMA")
    until = order.index("WARPGROUP", start)  # nobody touches the sums before the wait
    assert not {"FFMA", "FADD"} & set(order[start:until])
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


@pytest.mark.parametrize("name", [*FP8, OVERLAP, *E5M2, "fp8_wgrad"])
def test_formats(name):
    formats = set(re.findall(r"QGMMA\.\S+\.F32\.(\S+)", sass(name)))
    assert formats == {name[:9].upper().replace("_", ".") if "e5m2" in name else "E4M3.E4M3"}


def test_a_stage_is_started_before_the_one_before_is_added():
    text = sass(OVERLAP)
    names = [name.split(".")[:2] for name in compiled.instructions(text)]
    count = Counter(name[0] for name in names)
    assert count["LDL"] == count["STL"] == 0
    assert (count["QGMMA"], count["FFMA"]) == (16, 320)  # started in four places, added in five
    order = [name for name in names if name[0] in ("QGMMA", "FFMA", "WARPGROUP")]
    runs = ["".join(name[1:]) if name[0] == "WARPGROUP" else name[0] for name in order]
    runs = [run for i, run in enumerate(runs) if i == 0 or run != runs[i - 1]]
    first = ["ARRIVE", "QGMMA", "ARRIVE", "QGMMA", "DEPBAR", "FFMA", "ARRIVE", "QGMMA", "DEPBAR", "FFMA"]
    assert runs[: len(first)] == first


@pytest.mark.parametrize("name", [*PRODUCTS, OVERLAP])
def test_registers_of_a_product(name):
    """ptxas reports what a thread starts with, 168: the highest one in the code is what setmaxnreg must cover."""
    text = sass(name)
    assert highest_register(text) < 240
    if "USETMAXREG" in text:
        loader = text[text.index("USETMAXREG.DEALLOC") :]
        assert highest_register(loader[: loader.rindex("UTMALDG")]) < 24
