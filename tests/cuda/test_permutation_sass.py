"""What the compiler made of the moves: accesses of 16 bytes, and what is meant to be in flight is loaded together."""

from __future__ import annotations

import re

import pytest
from compiled import ARCHS, instructions, sass

TYPES = ("float32", "bfloat16", "float16", "float64")
EVERYWHERE = pytest.mark.parametrize("arch", ARCHS)


def of(kernel, arch):
    return instructions(sass("permutation", arch)[kernel])


def wide_loads(code):
    return [i for i in code if re.match(r"LDG\..*128", i)]


def assert_wide_stores(code):
    stores = [i for i in code if i.startswith("STG")]
    assert stores
    assert all(".128" in i for i in stores), stores


@EVERYWHERE
def test_rows_move_in_16_bytes(arch):
    code = of("permute_16", arch)
    assert len(wide_loads(code)) == 4
    assert_wide_stores(code)


@EVERYWHERE
@pytest.mark.parametrize("kernel", [f"unpermute_{type}" for type in TYPES])
def test_eight_rows_are_loaded_before_the_first_is_used(kernel, arch):
    """And the sum leaves in one store."""
    code = of(kernel, arch)
    assert_wide_stores(code)
    assert len(wide_loads(code)) == 9  # one of them for a token with one routed slot
    first_product = code.index("DMUL" if kernel.endswith("64") else "FMUL")
    assert len(wide_loads(code[:first_product])) >= 8


@EVERYWHERE
@pytest.mark.parametrize("kernel", [f"unpermute_backward_{type}" for type in TYPES])
def test_four_pieces_of_both_operands_are_loaded_together(kernel, arch):
    assert len(wide_loads(of(kernel, arch))) == 8


def test_pairs_are_cast_by_one_instruction():
    code = of("permute_quantize_bfloat16", "sm_90a")
    assert sum("E4M3" in i for i in code) == 16
    assert any(i.startswith("REDUX") for i in code)


def test_the_last_block_sees_what_the_others_wrote():
    """sum_chunks: a fence before the count and one after it, which empties the first-level cache; no read past it."""
    code = of("sum_chunks", "sm_90a")
    fences = [i for i in code if re.match(r"MEMBAR\..*GPU", i)]
    assert len(fences) == 2
    assert code.count("CCTL.IVALL") == 2
    assert not any("CONSTANT" in i for i in code)  # loads by the way of read-only data


@pytest.mark.parametrize("kernel", ["plan_routes_small", "count_routes", "place_routes", "place_routes_wide"])
def test_tables_are_not_read_as_read_only_data(kernel):
    assert not any(i.startswith("LDG") and "CONSTANT" in i for i in of(kernel, "sm_90a"))
