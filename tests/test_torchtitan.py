"""torchtitan on pyroute: its own router, experts and layer are the oracles."""

from __future__ import annotations

import importlib
import warnings

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtitan.models.common.moe", exc_type=ImportError)
    from torchtitan.config.override import OverrideConfig, apply_overrides
    from torchtitan.models.common import moe
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    from pyroute.integrations import torchtitan as integration

pytestmark = pytest.mark.filterwarnings("ignore")  # torchtitan's own

E, K, D, INNER = 16, 4, 24, 40

ROUTERS = {
    "deepseek-v3": {"num_expert_groups": 4, "num_limited_groups": 2, "route_norm": True, "route_scale": 2.5},
    "kimi": {"route_norm": True, "route_scale": 2.827},
    "qwen3": {"score_func": "softmax", "route_norm": True},
    "softmax, groups": {"score_func": "softmax", "num_expert_groups": 8, "num_limited_groups": 4},
    "sigmoid": {},
    "one expert": {"top_k": 1, "route_norm": True},
    "round robin": {"_debug_force_load_balance": True, "route_norm": True},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)
    yield
    integration.uninstall()


def router_config(bias=False, **settings):
    gate = Linear.Config(in_features=D, out_features=E, bias=bias)
    return moe.TokenChoiceTopKRouter.Config(**{"num_experts": E, "top_k": K, "gate": gate, **settings})


def layer_config(**settings):
    inner = moe.GroupedExperts.Config(dim=D, hidden_dim=INNER, num_experts=E)
    dispatcher = LocalTokenDispatcher.Config(num_experts=E, top_k=K)
    routed = moe.RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher)
    return moe.MoE.Config(num_experts=E, routed_experts=routed, router=router_config(**settings))


def built(config):
    module = config.build()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def by_expert(weights, ids):
    order = ids.argsort(-1)
    return weights.gather(-1, order), ids.gather(-1, order)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("bias", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_router_is_torchtitans(name, bias, dtype):
    theirs = built(router_config(bias=name == "kimi", **ROUTERS[name])).to(dtype)
    ours = integration.TopKRouter.Config(**vars_of(theirs)).build()
    ours.to(dtype).load_state_dict(theirs.state_dict())
    x = torch.randn(3, 11, D, dtype=dtype)
    expert_bias = None if bias is None else bias * torch.randn(E)
    results = []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        weights, ids, scores = module(given, expert_bias)
        generator = torch.Generator().manual_seed(1)
        weights, ids = by_expert(weights, ids)
        loss = (weights * torch.randn(weights.shape, generator=generator)).sum()
        loss = loss + (scores * torch.randn(scores.shape, generator=generator)).sum()
        grads = torch.autograd.grad(loss, (given, *module.parameters()))
        results.append((ids, weights, scores, *grads))
    assert torch.equal(results[0][0], results[1][0])
    tolerance = {"rtol": 1e-4, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)
    empty = ours(x[:0], expert_bias)
    assert [t.shape for t in empty] == [(0, 11, theirs.top_k), (0, 11, theirs.top_k), (0, 11, E)]


def vars_of(router):
    """The configuration that a router was built of."""
    names = ("num_experts", "num_expert_groups", "num_limited_groups", "top_k", "score_func", "route_norm")
    settings = {name: getattr(router, name) for name in (*names, "route_scale", "_debug_force_load_balance")}
    return {**settings, "gate": Linear.Config(in_features=D, out_features=E, bias=router.gate.bias is not None)}


def test_bfloat16_is_routed_in_float32():
    """On a CPU torchtitan's own autocast to float32 does nothing, and its logits are bfloat16."""
    ours = built(integration.TopKRouter.Config(**vars_of(built(router_config())))).bfloat16()
    x = torch.randn(2, 9, D, dtype=torch.bfloat16)
    weights, ids, scores = ours(x)
    exact = torch.sigmoid(x.double() @ ours.gate.weight.double().t())
    assert weights.dtype == scores.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(by_expert(weights, ids)[1], exact.topk(K).indices.sort(-1).values)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [[3, 0, 7, 2] * 4, [0] * 15 + [48], [0] * 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(counts, dtype):
    theirs = built(moe.GroupedExperts.Config(dim=D, hidden_dim=INNER, num_experts=E)).to(dtype)
    ours = integration.GroupedExperts.Config(dim=D, hidden_dim=INNER, num_experts=E).build().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    counts = torch.tensor(counts)
    results = []
    x = torch.randn(int(counts.sum()), D, dtype=dtype)
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        y = module(given, counts)
        y.float().square().sum().backward()
        results.append((y, given.grad, *(p.grad for p in module.parameters())))
        assert y.dtype == dtype
    for want, got in zip(*results, strict=True):
        scale = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * scale)


def test_rows_past_the_last_expert_are_zero():
    ours = built(integration.GroupedExperts.Config(dim=D, hidden_dim=INNER, num_experts=E))
    y = ours(torch.full((9, D), torch.nan).index_fill(0, torch.arange(3), 1.0), torch.tensor([3] + [0] * 15))
    assert y[:3].isfinite().all()
    assert not y[3:].any()


def run(layer, x):
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in layer.parameters())]


def assert_same_layer(want, got):
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, rtol=3e-2, atol=3e-2 * float(a.abs().max()))


def test_the_override_replaces_router_and_experts():
    config = layer_config(**ROUTERS["deepseek-v3"])
    layer = built(config)
    overridden = layer_config(**ROUTERS["deepseek-v3"])
    overridden.shared_experts = None
    targets = [f"pyroute.integrations.torchtitan.{name}" for name in ("router", "experts")]
    replaced = apply_overrides(OverrideConfig(imports=targets), overridden)
    assert len(replaced) == 2
    ours = overridden.build()
    assert type(ours.router) is integration.TopKRouter
    assert type(ours.routed_experts.inner_experts) is integration.GroupedExperts
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 13, D)
    assert_same_layer(run(layer, x), run(ours, x))
    assert torch.equal(layer.tokens_per_expert_E, ours.tokens_per_expert_E)


def test_install_serves_models_that_are_there():
    layer = built(layer_config(**ROUTERS["deepseek-v3"]))
    x = torch.randn(2, 13, D)
    before = run(layer, x)
    originals = moe.TokenChoiceTopKRouter.forward, moe.GroupedExperts._grouped_mm
    integration.install()
    assert moe.TokenChoiceTopKRouter.forward is integration.route
    integration.install()
    assert_same_layer(before, run(layer, x))
    integration.uninstall()
    integration.uninstall()
    assert (moe.TokenChoiceTopKRouter.forward, moe.GroupedExperts._grouped_mm) == originals
    assert all(torch.equal(a, b) for a, b in zip(before, run(layer, x), strict=True))


def test_what_is_not_served_is_named_and_torchtitans():
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours = built(integration.TopKRouter.Config(**vars_of(built(router_config()))))
    theirs = built(router_config())
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        module.gate.__class__ = Doubled
    x = torch.randn(2, 5, D)
    with pytest.warns(UserWarning, match="a router is left as it is: its gate, a Doubled, is not a plain linear map"):
        got = ours(x)
    assert all(torch.equal(a, b) for a, b in zip(got, theirs(x), strict=True))


def test_subclasses_keep_their_own_product():
    class Low(moe.GroupedExperts):
        def _grouped_mm(self, *, A, B_t, offs):
            return torch.zeros(A.shape[0], B_t.shape[-1], dtype=A.dtype)

    integration.install()
    experts = Low(moe.GroupedExperts.Config(dim=D, hidden_dim=INNER, num_experts=E))
    for p in experts.parameters():
        torch.nn.init.ones_(p)
    assert not experts(torch.ones(4, D), torch.tensor([4] + [0] * 15)).any()


def test_an_unknown_version_gets_a_warning(monkeypatch):
    monkeypatch.setattr(integration, "TESTED", ("0.1", "0.2"))
    with pytest.warns(UserWarning, match=r"tested with torchtitan 0\.1, 0\.2, this is 0\."):
        integration.install()
    assert moe.TokenChoiceTopKRouter.forward is integration.route


def test_import_patches_nothing():
    from torchtitan.config.override import _REGISTRY

    forward = moe.TokenChoiceTopKRouter.forward
    for name in ("router", "experts"):
        _REGISTRY.pop(f"pyroute.integrations.torchtitan.{name}")
    importlib.reload(integration)
    assert moe.TokenChoiceTopKRouter.forward is forward
    assert forward is not integration.route


def test_shared_experts_stay():
    config = layer_config()
    linear = lambda a, b: Linear.Config(in_features=a, out_features=b)  # noqa: E731
    config.shared_experts = FeedForward.Config(w1=linear(D, 8), w2=linear(8, D), w3=linear(D, 8))
    layer = built(config)
    x = torch.randn(1, 6, D)
    before = run(layer, x)
    integration.install()
    assert_same_layer(before, run(layer, x))
