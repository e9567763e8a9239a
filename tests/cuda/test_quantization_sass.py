"""What the compiler made of the quantisation and activation kernels: 16 bytes an access, input loaded once."""

from __future__ import annotations

import re

import pytest
from compiled import instructions, sass

HOPPER = pytest.mark.parametrize("arch", ["sm_90a"])
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def of(room, kernel, arch):
    return instructions(sass(room, arch)[kernel])


def wide_loads(code):
    return [at for at, i in enumerate(code) if re.match(r"LDG\..*128", i)]


@HOPPER
@pytest.mark.parametrize("type", ITEM)
@pytest.mark.parametrize(("kernel", "elements"), [("row128", 16), ("tile128", 64), ("column128", 32)])
def test_input_is_loaded_once(kernel, elements, type, arch):
    """What a thread holds, before its first number is multiplied."""
    code = of("quantization", f"quantize_{kernel}_{type}_e4m3", arch)
    loads = wide_loads(code)
    assert len(loads) == elements * ITEM[type] // 16
    products = [at for at, i in enumerate(code) if i.startswith("FMUL")]
    assert max(loads) < min(products[-elements:])


@pytest.mark.parametrize(("kernel", "codes"), [("row128", 16), ("tile128", 64), ("column128", 32)])
def test_two_codes_by_one_instruction(kernel, codes):
    code = of("quantization", f"quantize_{kernel}_bfloat16_e4m3", "sm_90a")
    assert sum("E4M3" in i for i in code) == codes // 2


@HOPPER
@pytest.mark.parametrize(("kernel", "loads", "stores"), [("activate", 2, 1), ("activate_backward", 3, 3)])
def test_rows_of_the_activation_move_in_16_bytes(kernel, loads, stores, arch):
    code = of("moe", f"{kernel}_swish_bfloat16", arch)
    assert len(wide_loads(code)) == loads
    assert sum(i.startswith("STG") and i.endswith("128") for i in code) == stores


def test_hidden_rows_go_straight_to_codes():
    code = of("moe", "activate_quantize_swish_bfloat16", "sm_90a")
    assert len(wide_loads(code)) == 4
    assert sum("E4M3" in i for i in code) == 8
    assert sum(i.startswith("STG") and i.endswith("128") for i in code) == 1
