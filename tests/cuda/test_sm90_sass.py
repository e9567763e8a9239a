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


SCALED = FP8 + tuple(name for name in E5M2 if "wgrad" not in name)  # four blocks of 128 in a turn of the loop


@pytest.mark.parametrize("name", PRODUCTS)
def test_instructions_of_a_product(name):
    text = sass(name)
    count = Counter(instruction.split(".")[0] for instruction in compiled.instructions(text))
    fp8, steps = not name.startswith("bf16"), 4 if name in SCALED else 1
    # four products to a stage, the first one of which takes no sums where each stage has its own
    assert (count["QGMMA"], count["HGMMA"]) == ((4 * steps, 0) if fp8 else (0, 4))
    assert text.count("RZ, !UPT") == (steps if fp8 else 0)
    assert count["WARPGROUP"] == 2 * steps  # ARRIVE and DEPBAR: none was added to serialise
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
            (64, 64) if "wgrad" in name else (4 * 96, 4) if "192" in name else (4 * 64, 2)
        )


def main_loop(name: str) -> list[str]:
    (loop,) = (lines for lines in compiled.loops(sass(name)) if any("QGMMA" in line for line in lines))
    return loop


@pytest.mark.parametrize(
    ("name", "blocks", "most"),
    [(name, 4, 164 if "192" in name else 126) for name in SCALED] + [(OVERLAP, 2, 125)],
)
def test_a_block_of_128_takes_few_instructions(name, blocks, most):
    """Per warp; a scheduler has two of them, and 512 (192 columns: 768) cycles while the tensor cores work."""
    loop = main_loop(name)
    assert sum("QGMMA" in line for line in loop) == 4 * blocks
    assert len(loop) <= blocks * most
    # addresses, descriptors and the ring's place are the warp's, not the lanes'
    assert not [line for line in loop if "R2UR" in line or "WARPSYNC" in line]


@pytest.mark.parametrize("name", [*SCALED, OVERLAP])
def test_nothing_waits_for_scales_in_the_block_that_asks_for_them(name):
    """What a load brings is not touched for two blocks and more, of no less than 256 cycles each."""
    loop = main_loop(name)
    loaded = {re.search(r"\bR\d+", line)[0] for line in loop if "LDG" in line}
    assert len(loaded) == (4 if "192" in name else 3)
    waits = [i for i, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line]
    until = waits[len(waits) // 2]
    for register in loaded:
        asked = max(i for i, line in enumerate(loop) if re.search(rf"LDG\S* {register}\b", line))
        assert not [line for line in loop[asked + 1 : until] if re.search(rf",.*\b{register}\b", line)]


@pytest.mark.parametrize("name", [*SCALED, OVERLAP])
def test_the_next_stage_is_asked_for_before_this_one_is_added(name):
    loop = main_loop(name)
    waits = [i for i, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line]
    for first, end in zip(waits, [*waits[1:], len(loop)], strict=True):
        asked = next(i for i in range(first, end) if "TRYWAIT" in loop[i])
        assert sum("FFMA" in line for line in loop[asked:end]) >= 24


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
