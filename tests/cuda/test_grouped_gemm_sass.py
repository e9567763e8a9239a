"""What the compilers made of the portable grouped GEMM: which instructions, how many, in how many registers."""

from __future__ import annotations

from collections import Counter

import compiled
import pytest

# room: kernel less "_low" and "_dgrad", whether FP8 times FP8
E5M2 = ("e5m2_e4m3", "e4m3_e5m2", "e5m2_e5m2")
ROWS = [("bf16", "bf16"), ("fp8", "fp8"), ("mixed", "mixed"), *(("e5m2", name) for name in E5M2)]
KERNELS = [
    (room, f"grouped_gemm_{name}{op}{low}") for room, name in ROWS for op in ("", "_dgrad") for low in ("", "_low")
]
KERNELS += [(room, f"grouped_gemm_{name}_wgrad") for room, name in ROWS if room != "mixed"]
GENERAL = ("grouped_gemm_general", "grouped_gemm_few_rows", "grouped_gemm_wgrad_general")


def count(room, kernel, arch):
    names = compiled.instructions(compiled.sass(room, arch)[kernel])
    return Counter(names), Counter(name.split(".")[0] for name in names)


@pytest.mark.parametrize("arch", compiled.ARCHS)
@pytest.mark.parametrize(("room", "kernel"), KERNELS)
def test_products_of_a_stage(room, kernel, arch):
    """Each stage is unrolled, with one product of a warp for every 16 x 8 sums and 16, or 32, of the contraction."""
    names, kinds = count(f"grouped_gemm_{room}", kernel, arch)
    low = kernel.endswith("_low")
    fp8 = room in ("fp8", "e5m2")
    products = (128 if fp8 else 64) // (8 if low else 1)
    if room == "mixed" and low:
        products *= 2  # a stage of twice the depth
    if fp8 and arch == "sm_120a":
        assert (kinds["QMMA"], kinds["HMMA"]) == (products // 2, 0)
    else:
        type_of = "F32" if fp8 else "F32.BF16"
        assert (kinds["QMMA"], names[f"HMMA.16816.{type_of}"]) == (0, products)
    assert kinds["LDSM"] > 0
    assert kinds["LDGSTS"] > 0
    assert kinds["LDL"] == kinds["STL"] == 0
    if room != "bf16":  # the promotion
        assert kinds["FFMA"] >= (8 if low else 64)


@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_registers(arch):
    """One block of 256 threads on an SM, of the low tile two."""
    for room, kernel in KERNELS:
        used = compiled.resources(f"grouped_gemm_{room}", arch)[kernel]
        assert used.registers <= (128 if kernel.endswith("_low") else 255), kernel
        assert used.stack == used.local == 0, kernel
    for kernel in GENERAL:
        used = compiled.resources("grouped_gemm", arch)[kernel]
        assert used.stack == used.local == 0, kernel


@pytest.mark.parametrize("kernel", GENERAL)
def test_the_general_kernels_fuse_what_the_contract_fuses(kernel):
    """Lane by lane unrolled by four: outer products of 4 x 4, or 1 x 4, whose operands are loaded by 16 bytes."""
    names, kinds = count("grouped_gemm", kernel, "sm_90a")
    sums = 4 if kernel == "grouped_gemm_few_rows" else 16
    assert kinds["FFMA"] >= 8 * (4 + 1) * sums
    assert names["LDS.128"] >= 8 * 4
