"""What the compiler made of gating's forward kernels: wide loads, short loops, IEEE arithmetic, few registers.

At 8192 tokens of 256 experts the kernel is bound by instructions, not by bytes (docs/cuda.md), so that what a token
costs is held here: the picks, which are a loop, and the scores, which are a run without a branch.
"""

from __future__ import annotations

import re

import pytest
from compiled import instructions, resources, sass

HOPPER = "sm_90a"
# experts of a lane, blocks of 256 threads on an SM (gating.cu)
KERNELS = {
    "topk_gating_8x1": (1, 4),
    "topk_gating_8x2": (2, 4),
    "topk_gating_8x4": (4, 3),
    "topk_gating_8x8": (8, 3),
    "topk_gating_16x8": (8, 3),
    "topk_gating_32x8": (8, 4),
    "topk_gating_32x16": (16, 2),
}
EVERY = pytest.mark.parametrize("kernel", KERNELS)


def loops(text: str) -> list[list[str]]:
    """The instructions between a label and a branch back to it."""
    found: list[list[str]] = []
    lines = text.splitlines()
    labels = {line[:-1].strip(): at for at, line in enumerate(lines) if re.match(r"\s*\.L\S+:$", line)}
    for at, line in enumerate(lines):
        target = re.search(r"\bBRA `\((\.L\w+)\)", line)
        if target and labels.get(target[1], at) < at:
            found.append(instructions("\n".join(lines[labels[target[1]] : at + 1])))
    return found


def straight_runs(text: str) -> list[list[str]]:
    """The instructions between branches and labels."""
    runs: list[list[str]] = [[]]
    for line in text.splitlines():
        if re.match(r"\s*\.L\S+:$", line):
            runs.append([])
        runs[-1] += instructions(line)
        if re.search(r"\b(BRA|BRX|CALL|EXIT)\b", line):
            runs.append([])
    return runs


@EVERY
def test_as_many_blocks_as_are_launched_fit_an_sm(kernel):
    used = resources("gating", HOPPER)[kernel]
    assert used.registers * 256 * KERNELS[kernel][1] <= 65536
    assert used.stack == used.local == 0


@EVERY
def test_logits_and_bias_are_loaded_16_bytes_at_once(kernel):
    items = KERNELS[kernel][0]
    wide = [i for i in instructions(sass("gating", HOPPER)[kernel]) if re.match(r"LDG\..*128", i)]
    assert len(wide) >= (2 * items // 4 if items >= 4 else 0)


def picks(kernel: str) -> list[list[str]]:
    """The loops that write an id for one maximum over a token's lanes: with a bias or groups, and by logits."""
    return [
        body
        for body in loops(sass("gating", HOPPER)[kernel])
        if "STS" in body and sum(i.startswith("REDUX") for i in body) == 1 and len(body) < 400
    ]


@pytest.mark.parametrize("kernel", ["topk_gating_32x8", "topk_gating_32x16"])
def test_a_pick_is_one_maximum_and_one_vote(kernel):
    """And what a lane does that has given both its experts away: six instructions for each that it looks at."""
    found = picks(kernel)
    assert len(found) >= 2
    for body in found:
        assert sum(i.startswith("VOTE") for i in body) == 1
        assert len(body) <= 36 + 8 * KERNELS[kernel][0]


@EVERY
def test_scores_in_range_are_30_instructions_an_expert(kernel):
    items = KERNELS[kernel][0]
    runs = [run for run in straight_runs(sass("gating", HOPPER)[kernel]) if run.count("MUFU.RCP") == items]
    assert runs
    if items >= 4:
        assert min(len(run) for run in runs) <= 30 * items


@EVERY
def test_arithmetic_is_ieee(kernel):
    """Quotients test their range and have a slow path; sums keep subnormal numbers."""
    code = instructions(sass("gating", HOPPER)[kernel])
    assert "FCHK" in code
    assert code.count("FADD.FTZ") < 0.05 * code.count("FADD")
    assert "MUFU.EX2" not in code
    assert "MUFU.LG2" not in code
