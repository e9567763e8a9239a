"""Every operation once with races looked for: the calls that compute-sanitizer runs on a GPU, and more kernels.

A race is a launch that fails, whatever it computed: two threads at the same bytes, one of them writing, and nothing
between that orders them (tests/cuda/emulator/races.h). All of tests/cuda runs so with PYROUTE_EMULATOR_RACES=1.
"""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import to_device

import pyroute

TOOLS = emulated.ROOT / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="needs the source tree")
SEEDS = pytest.mark.parametrize("seed", range(2), indirect=True)


@pytest.fixture(autouse=True)
def races(monkeypatch):
    emulated.library()
    monkeypatch.setenv("PYROUTE_EMULATOR_RACES", "1")


def run(monkeypatch, *names: str) -> int:
    """The calls whose names begin so; how many there were."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_exact

    chosen = [call for name, call in gpu_exact.calls(small=True) if name.startswith(names)]
    for call in chosen:
        assert gpu_exact.content(call())
    return len(chosen)


@SEEDS
def test_every_operation(seed, monkeypatch):
    assert run(monkeypatch, "") > 15


@pytest.mark.parametrize("card", [80, 89, 90], indirect=True)
def test_products_on_every_card(card, monkeypatch):
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", "portable")
    assert run(monkeypatch, "gemm", "dgrad", "wgrad") == 5


def test_products_without_tensor_cores(monkeypatch):
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", "general")
    assert run(monkeypatch, "gemm fp8", "wgrad fp8") == 2


@pytest.mark.parametrize("shape", ["fp8_128_overlap", "fp8_128_pair", "fp8_192", "fp8_192_pair"])
@SEEDS
def test_shapes_of_hopper_products(shape, seed, monkeypatch, rng):
    """Two blocks share tiles, and signal into each other."""
    monkeypatch.setenv("PYROUTE_GROUPED_GEMM", f"{shape}_product")
    a = pyroute.quantize_fp8(to_device(rng.normal(size=(150, 768)).astype(np.float32)))
    b = pyroute.quantize_fp8(to_device(rng.normal(size=(2, 520, 768)).astype(np.float32)), block=(128, 128))
    emulated.launched()
    pyroute.grouped_gemm(a, b, to_device(np.array([0, 20, 150])))
    assert f"{shape}_product" in emulated.launched()


@pytest.mark.parametrize("num_experts", [80, 1030])
def test_plans_of_many_slots(num_experts, rng):
    """Counted by several blocks, whose last one adds up what the others found."""
    emulated.launched()
    plan = pyroute.plan_routes(to_device(rng.integers(-1, num_experts, (1500, 3))), num_experts)
    assert "sum_chunks" in emulated.launched()
    pyroute.permute(to_device(rng.normal(size=(1500, 4)).astype(np.float32)), plan)


@SEEDS
def test_losses_and_expert_choice(seed, rng):
    config = pyroute.RouterConfig(40, 4, "sigmoid", renormalize="sum")
    z = to_device(rng.normal(size=(70, 40)).astype(np.float32))
    gating, mask = pyroute.topk_gating(z, config), to_device(rng.random(70) < 0.8)
    sequences = to_device(rng.integers(0, 5, 70))
    pyroute.balance_loss(z, gating, config, scope="sequence", sequence_ids=sequences, token_mask=mask)
    pyroute.balance_loss(z, gating, config, token_mask=mask)
    pyroute.z_loss(z, token_mask=mask)
    pyroute.update_bias(to_device(np.zeros(40, np.float32)), gating.tokens_per_expert)
    pyroute.expert_choice_gating(z, 9, token_mask=mask)
