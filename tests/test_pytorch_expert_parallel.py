"""ExpertParallel over gloo: every byte that a single process would compute."""

from __future__ import annotations

import random

import numpy as np
import pytest
from processes import run_ranks, values

torch = pytest.importorskip("torch")

import expert_parallel_ranks as ranks  # noqa: E402
from expert_parallel_ranks import Case  # noqa: E402

from pyroute.pytorch import dequantize_fp8, quantize_fp8  # noqa: E402


def random_case(world: int, seed: int) -> Case:
    draw = random.Random(seed)
    tokens = [draw.choice([0, 1, 5, 17, 33]) for _ in range(world)]
    return Case(
        tokens, num_experts=draw.choice([1, 3, 7, 8]), top_k=draw.choice([1, 2, 4]),
        routes=draw.choice(["random", "random", "one", "few", "holes", "none"]), bias=draw.random() < 0.4,
        dtype=draw.choice(["float32", "bfloat16"]), weight_on=draw.choice(["output", "output", "pre_down", "input"]),
        activation=draw.choice(["swiglu", "swiglu_clamp", "swiglu_oai", "geglu", "relu2"]),
        precision=draw.choice([None, None, None, "fp8", "fp8_ue8m0"]),
        weights=draw.choice(["float32", "float32", "bfloat16"]),
    )  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_random_steps_have_the_bytes_of_one_process(world, tmp_path):
    cases = [(random_case(world, 100 * world + i), i) for i in range(50)]
    cases.append((Case([13] * world, 7, 2), 50))  # 7 experts, which 2, 3 and 4 ranks do not divide
    cases.append((Case([9, 0, 0, 4][:world], 2, 2, routes="one"), 51))  # ranks without tokens, and without experts
    counted = values(run_ranks(world, ranks.check_cases, cases, store=tmp_path / "store"))
    for step in range(len(cases)):
        calls = [rank[step] for rank in counted]
        assert calls == calls[:1] * world, cases[step]
        assert 4 <= len(calls[0]) <= 7


SLOTS = {
    1: [0, 1, 2, 0],
    2: [0, 1, 1, 2],
    3: [2, 0, 1, 2, 2, 0],
    4: [0, 1, 2, 2, 2, 2, 1, 2],  # on two ranks twice
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_replicated_experts_take_turns_and_sum_their_gradients(world, tmp_path):
    shapes = [([11, 5, 0, 8], "random"), ([3, 0, 21, 1], "holes"), ([6, 6, 6, 6], "one"), ([0, 0, 0, 0], "random")]
    cases = [
        (Case(tokens[:world], 3, k, routes, SLOTS[world], bias=k == 3, dtype=dtype, weight_on=on), seed)
        for seed, (tokens, routes) in enumerate(shapes)
        for k, dtype, on in ((2, "float32", "output"), (3, "bfloat16", "pre_down"), (1, "float32", "input"))
    ]
    done = values(run_ranks(world, ranks.check_all_replicas, cases, store=tmp_path / "store"))
    assert done == [None] * world


@pytest.mark.parametrize("world", [1, 3])
def test_fp8_payload(world, tmp_path):
    cases = [
        (
            Case(
                [9, 0, 14][:world], 7, k, bias=k == 2, dtype=dtype, weight_on=on, precision=precision, payload=payload
            ),
            i,
        )
        for i, (k, dtype, on) in enumerate(
            [(2, "float32", "output"), (3, "bfloat16", "pre_down"), (1, "float32", "input")]
        )
        for payload in ("fp8", "fp8_ue8m0")
        for precision in (None, payload)
        if precision
        or on != "input"  # what is multiplied by the weight before it is quantised has no x to compare with
    ]
    assert values(run_ranks(world, ranks.check_payloads, cases, store=tmp_path / "store")) == [None] * world


@pytest.mark.parametrize(("hidden", "top_k"), [(7168, 8), (2048, 4)])
def test_fp8_payload_sends_a_quarter_of_the_bytes(hidden, top_k, tmp_path):
    sent = {
        payload: values(run_ranks(2, ranks.bytes_of_dispatch, payload, hidden, top_k, store=tmp_path / str(payload)))
        for payload in (None, "fp8", "fp8_ue8m0")
    }
    for rank in range(2):
        assert sent["fp8_ue8m0"][rank] < sent["fp8"][rank] <= 0.27 * sent[None][rank]


def test_codes_are_quantised_to_themselves():
    """Why FP8 experts read of a payload what they would have made of x: for every mantissa, and for blocks."""
    amax = (np.arange(2**23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    scale = amax / np.float32(448)
    assert np.array_equal(np.float32(448) * scale / np.float32(448), scale)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2000, 300, generator=generator) * torch.logspace(-30, 30, 2000)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        once = quantize_fp8(wide.to(dtype))
        again = quantize_fp8(dequantize_fp8(once, dtype))
        assert torch.equal(again.codes.view(torch.uint8), once.codes.view(torch.uint8))
        assert torch.equal(again.scales, once.scales)
        powers = quantize_fp8(wide.to(dtype), scale_format="ue8m0")  # a smaller scale may do; the values stay
        values = dequantize_fp8(powers, dtype)
        assert torch.equal(dequantize_fp8(quantize_fp8(values, scale_format="ue8m0"), dtype), values)
