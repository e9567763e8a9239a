"""TopKRouter, GroupedExperts, SharedExpert, MoELayer: against PyTorch in float64, through conversions and training."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import pyroute  # noqa: E402
from pyroute import RouterConfig  # noqa: E402
from pyroute.pytorch import (  # noqa: E402
    GroupedExperts,
    MoELayer,
    SharedExpert,
    TopKRouter,
    balance_loss,
    set_aux_loss_scale,
    topk_gating,
    update_biases_after,
    z_loss,
)

E, K, H, INNER = 16, 4, 32, 24
V3 = RouterConfig(
    E, K, "sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum", renormalize="sum", scaling_factor=2.5
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)


def layer_of(config=V3, *, shared=False, gated=False, router=None, **experts):
    options = {"weight_on": config.weight_on, **experts}
    return MoELayer(
        TopKRouter(config, H, **(router or {"selection_bias": True})),
        GroupedExperts(config.num_experts, H, INNER, **options),
        SharedExpert(H, 2 * INNER, gated=gated) if shared else None,
    )


def activated(experts, z):
    """The activation by its formula."""
    if experts.activation == "relu2":
        return torch.relu(z).square()
    gate, up = z.chunk(2, dim=-1)
    if experts.activation == "geglu":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if experts.activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    limit = {"swiglu_clamp": 10.0, "swiglu_oai": 7.0}[experts.activation] if experts.limit is None else experts.limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if experts.activation == "swiglu_clamp":
        return torch.nn.functional.silu(gate) * up
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def reference(layer, x, topk_idx):
    """The layer in plain PyTorch, token by token and slot by slot, for the ids that it chose."""
    router, experts, config = layer.router, layer.experts, layer.router.config
    tokens = x.reshape(-1, H)
    logits = tokens @ router.weight.T
    if router.bias is not None:
        logits = logits + router.bias
    scores = torch.sigmoid(logits) if config.score == "sigmoid" else torch.softmax(logits, dim=-1)
    if config.score == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(logits).sqrt()
    weights = scores.gather(1, topk_idx)
    if config.score_stage == "post":
        weights = torch.softmax(logits.gather(1, topk_idx), dim=-1)
    if config.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * config.scaling_factor

    def expert(e, row, part=experts):
        z = part.gate_up_proj[e] @ row + (0 if part.gate_up_proj_bias is None else part.gate_up_proj_bias[e])
        bias = 0 if part.down_proj_bias is None else part.down_proj_bias[e]
        return part.down_proj[e] @ activated(part, z) + bias

    rows = []
    for t, token in enumerate(tokens):
        y = torch.zeros_like(token)
        for j in range(config.top_k):
            e, w = int(topk_idx[t, j]), weights[t, j]
            y = y + (expert(e, w * token) if config.weight_on == "input" else w * expert(e, token))
        if layer.shared is not None:
            gate = 1.0 if layer.shared.gate is None else torch.sigmoid(layer.shared.gate @ token)
            y = y + gate * expert(0, token, layer.shared)
        rows.append(y)
    return torch.stack(rows).reshape(x.shape)


LAYERS = {
    "deepseek-v3": lambda: layer_of(shared=True),
    "deepseek-v4": lambda: layer_of(
        RouterConfig(E, K, "sqrtsoftplus", renormalize="sum", scaling_factor=1.5), activation="swiglu_clamp", limit=0.5
    ),
    "gpt-oss": lambda: layer_of(
        RouterConfig(E, K, score_stage="post"), router={"bias": True}, activation="swiglu_oai", bias=True
    ),
    "qwen2-moe": lambda: layer_of(RouterConfig(E, K), shared=True, gated=True),
    "llama4": lambda: layer_of(RouterConfig(E, 1, "sigmoid", weight_on="input"), shared=True),
    "megatron": lambda: layer_of(RouterConfig(E, K, renormalize="sum", weight_on="pre_down"), activation="geglu"),
    "nemotron": lambda: layer_of(V3, activation="relu2"),
}


@pytest.mark.parametrize("family", LAYERS)
def test_layer_against_float64(family):
    layer = LAYERS[family]()
    x = torch.randn(3, 7, H, requires_grad=True)
    routing = layer.router(x)
    y = layer(x)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, *layer.parameters()), upstream)

    exact = copy.deepcopy(layer).double()
    wide = x.detach().double().requires_grad_()
    want_y = reference(exact, wide, routing.topk_idx.long())
    want = torch.autograd.grad(want_y, (wide, *exact.parameters()), upstream.double())
    # a few hundred float32 operations deep; each sum is within its bound of tests/test_moe.py
    assert (y.double() - want_y).abs().max() <= 4e-6 * want_y.abs().max()
    for name, a, b in zip(["x", *(n for n, _ in layer.named_parameters())], got, want, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max(), name


@pytest.mark.parametrize("family", LAYERS)
def test_a_bfloat16_layer_routes_in_float32(family):
    layer = LAYERS[family]().to(torch.bfloat16)
    x = torch.randn(11, H, dtype=torch.bfloat16, requires_grad=True)
    routing = layer.router(x)
    assert routing.logits.dtype == routing.topk_weights.dtype == torch.float32
    exact = x.double() @ layer.router.weight.double().T
    if layer.router.bias is not None:
        exact = exact + layer.router.bias.double()
    assert (routing.logits.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all()
    want = reference(copy.deepcopy(layer).double(), x.detach().double(), routing.topk_idx.long())
    assert (y.double() - want).abs().max() <= 0.03 * want.abs().max()


def test_router_is_the_core_for_every_argument():
    router = TopKRouter(V3, H, selection_bias=True, balance_loss_coef=0.1, z_loss_coef=0.01)
    router.e_score_correction_bias.normal_()
    x, mask = torch.randn(2, 9, H), torch.rand(2, 9) < 0.7
    routing = router(x, token_mask=mask)
    logits = routing.logits.detach().numpy()
    bias = router.e_score_correction_bias.numpy()
    want = pyroute.topk_gating(logits, V3, bias=bias, token_mask=mask.reshape(-1).numpy())
    for mine, core in zip(routing, want, strict=False):
        assert np.array_equal(mine.detach().numpy(), core)
    table = torch.randint(0, E, (50, K))  # a hash-routed layer: ids by token id
    tokens = torch.randint(0, 50, (2, 9))
    hashed = router(x, topk_idx=table[tokens])
    assert torch.equal(hashed.topk_idx, table[tokens].reshape(-1, K).int())
    assert torch.allclose(hashed.topk_weights.sum(-1), torch.tensor(2.5))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_losses_join_the_gradient_in_training_only(scope):
    router = TopKRouter(V3, H, balance_loss_coef=0.1, z_loss_coef=0.01, balance_loss_scope=scope)
    x = torch.randn(3, 8, H)
    upstream = torch.randn(24, K)

    def gradient():
        return torch.autograd.grad((router(x).topk_weights * upstream).sum(), router.weight)[0]

    logits = router.logits(x.reshape(-1, H))
    gating = topk_gating(logits, V3)
    sequences = torch.arange(3).repeat_interleave(8) if scope == "sequence" else None
    main = (gating.topk_weights * upstream).sum()
    losses = 0.1 * balance_loss(logits, gating, V3, sequence_ids=sequences) + 0.01 * z_loss(logits)
    (without,) = torch.autograd.grad(main, router.weight, retain_graph=True)
    for scale in (1.0, 64.0):
        set_aux_loss_scale(router, scale)
        (want,) = torch.autograd.grad(main + scale * losses, router.weight, retain_graph=True)
        assert (gradient() - want).abs().max() <= 1e-5 * want.abs().max()
        assert (want - without).abs().max() > 1e-4 * want.abs().max()
    router.eval()
    assert torch.equal(gradient(), without)


def test_the_bias_and_the_scale_stay_float32():
    router = TopKRouter(V3, H, selection_bias=True)
    router.e_score_correction_bias.uniform_(8.0, 8.1)  # bfloat16 has steps of 1/16 here
    before = router.e_score_correction_bias.clone()
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: torch.nn.Sequential(m).to("cpu", torch.bfloat16)[0],
        lambda m: m.float(),
        lambda m: m.double().float(),
    ):
        router = convert(router)
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, before)
        assert router.aux_loss_scale.dtype == torch.float32
        assert router.tokens_per_expert.dtype == torch.int64
    saved = router.bfloat16().state_dict()
    assert set(saved) == {"weight", "e_score_correction_bias"}
    other = TopKRouter(V3, H, selection_bias=True, dtype=torch.bfloat16)
    other.load_state_dict(saved)
    assert torch.equal(other.e_score_correction_bias, before)
    with torch.device("meta"):
        empty = TopKRouter(V3, H, selection_bias=True)
    assert empty.bfloat16().e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant", "compiled", "compiled, not reentrant"])
@pytest.mark.filterwarnings("ignore")
def test_recompute_does_not_count_twice(how):
    torch._dynamo.reset()
    layer = layer_of()

    def forward(x):
        if how == "plain":
            return layer(x)
        return checkpoint(layer, x, use_reentrant=how == "reentrant")

    called = torch.compile(forward, backend="aot_eager") if "compiled" in how else forward
    if how == "compiled":
        called = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    total = torch.zeros(E, dtype=torch.int64)
    for num_tokens in (10, 13):
        x = torch.randn(num_tokens, H, requires_grad=True)
        total += layer.router.eval()(x).tokens_per_expert
        layer.train()
        called(x).square().sum().backward()
    assert torch.equal(layer.router.tokens_per_expert, total)
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert torch.equal(layer.router.tokens_per_expert, total)


def test_bias_update_is_the_cores_after_each_step():
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = update_biases_after(optimizer, torch.nn.Sequential(layer))
    bias = layer.router.e_score_correction_bias
    for _ in range(3):
        before = bias.clone()
        for _ in range(2):  # micro-batches
            layer(torch.randn(9, H)).sum().backward()
        loads = layer.router.tokens_per_expert.clone()
        assert loads.sum() == 2 * 9 * K
        optimizer.step()
        assert np.array_equal(bias.numpy(), pyroute.update_bias(before.numpy(), loads.numpy()))
        assert not layer.router.tokens_per_expert.any()
    assert bias.any()
    handle.remove()
    optimizer.step()


def test_balancing_evens_the_load():
    """The rule that DeepSeek-V3 was trained with, on a router that starts out lopsided."""
    config = RouterConfig(E, 2, "sigmoid", renormalize="sum")
    router = TopKRouter(config, H, selection_bias=True, bias_update_rate=0.01)
    with torch.no_grad():
        router.weight[:2] += 0.3
    x = torch.randn(2048, H) + 0.3

    def spread():
        loads = router(x).tokens_per_expert.float()
        return float(loads.max() / loads.mean())

    first = spread()
    for _ in range(200):
        router.tokens_per_expert.zero_()
        router(x)
        router.update_bias()
    assert first > 4
    assert spread() < 1.5


def test_gradients_reach_every_parameter_under_autocast():
    layer = layer_of(shared=True, gated=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(5, H))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


def test_float64_is_routed_in_float64():
    router = TopKRouter(V3, H, selection_bias=True).double()
    routing = router(torch.randn(5, H, dtype=torch.float64))
    assert routing.logits.dtype == routing.topk_weights.dtype == torch.float64
    mixed = TopKRouter(V3, H, selection_bias=True).half()
    assert mixed(torch.randn(5, H, dtype=torch.float16)).logits.dtype == torch.float32


def test_wrong_arguments_are_one_sentence():
    wrong = {
        r"^TopKRouter: config must be a RouterConfig, got int": lambda: TopKRouter(3, H),
        r"^TopKRouter: hidden_size must be at least 1, got 0$": lambda: TopKRouter(V3, 0),
        r"^TopKRouter: balance_loss_scope must be ": lambda: TopKRouter(V3, H, balance_loss_scope="global"),
        r"^GroupedExperts: activation must be ": lambda: GroupedExperts(E, H, INNER, activation="relu"),
        r"^GroupedExperts: weight_on must be ": lambda: GroupedExperts(E, H, INNER, weight_on="down"),
        r"^SharedExpert: intermediate_size must be at least 1": lambda: SharedExpert(H, 0),
        r"^MoELayer: experts must be of the router's num_experts, hidden_size and weight_on 16, 32, 'output', got 8": (
            lambda: MoELayer(TopKRouter(V3, H), GroupedExperts(8, H, INNER))
        ),
        r"^TopKRouter: x must be \[num_sequences, length, hidden_size\]": lambda: TopKRouter(
            V3, H, balance_loss_coef=0.1, balance_loss_scope="sequence"
        )(torch.randn(5, H)),
        r"^router_logits: weight must be of shape \[num_experts, hidden=31\]": lambda: TopKRouter(V3, H)(
            torch.randn(5, 31)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_repr_names_the_rule():
    text = repr(layer_of(activation="swiglu_oai"))
    assert "num_experts=16,top_k=4,score=sigmoid" in text
    assert "activation='swiglu_oai'" in text


DOCS = Path(__file__).resolve().parent.parent / "docs" / "pytorch.md"


@pytest.mark.skipif(not DOCS.is_file(), reason="needs the source tree")
def test_the_examples_of_the_documentation_run():
    for text in (DOCS.read_text(), (DOCS.parent.parent / "README.md").read_text()):
        example = next(e for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "pyroute.pytorch" in e)
        names = {"pyroute": pyroute}
        exec(compile(example, "documentation", "exec"), names)
        x = torch.randn(3, 512)
        assert names["layer"](x).shape == x.shape
