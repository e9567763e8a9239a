"""Training steps: the same bytes in every run, no memory left behind, and no dispatcher where nobody watches."""

from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")

import pyroute  # noqa: E402
from pyroute.pytorch import GroupedExperts, MoELayer, SharedExpert, TopKRouter, topk_gating  # noqa: E402


def layer_and_optimizer():
    torch.manual_seed(0)
    config = pyroute.RouterConfig(8, 2, "sigmoid", renormalize="sum")
    router = TopKRouter(config, 32, selection_bias=True, balance_loss_coef=1e-2, z_loss_coef=1e-3)
    layer = MoELayer(router, GroupedExperts(8, 32, 16), SharedExpert(32, 16))
    return layer, torch.optim.AdamW(layer.parameters(), lr=1e-2)


def train(layer, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(2, 9, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        layer.router.update_bias()


def test_two_runs_give_the_same_bytes():
    states = []
    for _ in range(2):
        layer, optimizer = layer_and_optimizer()
        train(layer, optimizer, 10)
        states.append(layer.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_hundred_steps_leave_no_tensor_behind():
    layer, optimizer = layer_and_optimizer()
    train(layer, optimizer, 3)
    before = live_tensors()
    train(layer, optimizer, 100)
    assert live_tensors() <= before


def test_recorded_without_the_dispatcher_or_by_it():
    """The same bytes, and a node of our own where only the kernel would see the call."""
    config = pyroute.RouterConfig(8, 2, "sigmoid", renormalize="sum")
    grads, names = [], []
    for watched in (False, True):
        logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=watched):
            weights = topk_gating(logits, config).topk_weights
        names.append(type(weights.grad_fn).__name__)
        (weights * torch.arange(2.0)).sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)
    assert names[0] != names[1]
