"""Megatron-Core on pyroute: its own functions and its own router are the oracles, and a whole layer runs on a CPU."""

from __future__ import annotations

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():  # what is missing for CUDA
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import experts, grouped_gemm_util, moe_layer, moe_utils, router
    from megatron.core.transformer.transformer_config import TransformerConfig

    from pyroute.integrations import megatron as integration
    from pyroute.integrations import transformer_engine as te

pytestmark = pytest.mark.filterwarnings("ignore")  # Megatron's own

T, E, K, H = 40, 16, 4, 24


@pytest.fixture(scope="module", autouse=True)
def groups():
    """One process of torch.distributed, as Megatron wants it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def clean():
    torch.manual_seed(20240607)
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles sums of two lines
        yield
    integration.uninstall()


@pytest.fixture
def megatron_on_cpu(monkeypatch):
    """What Megatron's own router needs to run here: a device for its buffers and a name that its import left out."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    if not hasattr(moe_utils, "te_general_gemm"):
        monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)


# --- functions --------------------------------------------------------------------------------------------------------

RULES = [  # score, pre_softmax, groups, scale, bias
    ("softmax", False, None, None, False),
    ("softmax", False, (4, 2), 2.5, True),
    ("softmax", True, None, None, False),
    ("softmax", True, (8, 2), 16.0, True),
    ("sigmoid", False, None, 2.5, True),
    ("sigmoid", False, (4, 2), 2.5, True),
    ("sigmoid", False, (8, 4), None, False),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 4, 6])
def test_topk_routing(rule, k):
    score, pre_softmax, groups, scale, has_bias = rule
    num_groups, group_topk = groups or (None, None)
    if (k == 1 and groups) or (groups == (8, 2) and k == 6):
        pytest.skip("more experts than the groups hold, or no expert of a group to rank it by")
    z = torch.randn(T, E, requires_grad=True)
    bias = torch.randn(E) if has_bias else None
    settings = (k, pre_softmax, num_groups, group_topk, scale, score, bias)
    want, want_map = moe_utils.topk_routing_with_score_function(z, *settings)
    integration.install()
    got, got_map = moe_utils.topk_routing_with_score_function(z, *settings, fused=True)
    assert torch.equal(got_map, want_map)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-8)
    weigh = torch.randn(T, E)
    grads = [torch.autograd.grad((probs * weigh).sum(), z)[0] for probs in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_and_balance_loss(score):
    z = torch.randn(T, E, requires_grad=True)
    padding = torch.arange(T) > T - 5
    integration.install()
    results = []
    for fused in (False, True):
        routing_map, scores = moe_utils.compute_routing_scores_for_aux_loss(z, K, score, fused, padding)
        counts = routing_map.sum(0)
        loss = moe_utils.switch_load_balancing_loss_func(scores, counts, T, K, E, 0.01, fused)
        results.append((routing_map, scores, loss, torch.autograd.grad(loss, z)[0]))
    assert torch.equal(results[0][0], results[1][0])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_probs", [False, True])
def test_permutation(dtype, with_probs):
    mask = torch.rand(T, E) < 0.3
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    probs = (torch.rand(T, E) + 0.1).requires_grad_()
    weigh = torch.randn(int(mask.sum()), H)
    integration.install()
    results = []
    for fused in (False, True):
        rows, permuted, places = moe_utils.permute(
            x, mask, probs if with_probs else None, num_out_tokens=int(mask.sum()), fused=fused
        )
        expert_out = rows * (permuted[:, None] if with_probs else 1.0) * weigh
        merging = None if with_probs else probs
        y = moe_utils.unpermute(expert_out, places, x.shape, probs=merging, routing_map=mask, fused=fused)
        grads = torch.autograd.grad((y * y).sum(), (x, probs))
        results.append((rows, *([permuted] if with_probs else []), y, *grads))
    assert torch.equal(results[0][0], results[1][0])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_padded_and_dropped_maps():
    """Capacity with padding, and a map padded to whole blocks: any number of experts a token, probabilities of 0."""
    probs, routing_map = te.fused_topk_with_score_function(
        torch.randn(T, E), K, False, None, None, None, "sigmoid", None
    )
    padded_map = moe_utils.pad_routing_map(routing_map.int(), 16)
    capped, capped_map = moe_utils.apply_router_token_dropping(probs, routing_map, K, 1.0, pad_to_capacity=True)
    x = torch.randn(T, H)
    integration.install()
    for p, mask in ((probs, padded_map), (capped, capped_map)):
        count = int(mask.sum())
        theirs = moe_utils.permute(x, mask, p, num_out_tokens=count)
        ours = moe_utils.permute(x, mask, p, num_out_tokens=count, fused=True)
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[0], theirs[0] * (theirs[1] != 0)[:, None])
        back = [moe_utils.unpermute(r * w[:, None], m, x.shape, fused=m.dim() == 2) for r, w, m in (ours, theirs)]
        torch.testing.assert_close(*back)


def test_chunks():
    sizes, order = torch.tensor([3, 0, 5, 1]), torch.tensor([2, 0, 3, 1])
    x, probs = torch.randn(9, 6), torch.rand(9)
    integration.install()
    theirs = moe_utils.sort_chunks_by_idxs(x, sizes, order, probs)
    ours = moe_utils.sort_chunks_by_idxs(x, sizes, order, probs, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(moe_utils.sort_chunks_by_idxs(x, sizes, order, fused=True)[0], theirs[0])


@pytest.mark.parametrize("trans_b", [False, True])
def test_gmm(trans_b):
    sizes = torch.tensor([3, 0, 7, 2])
    a = torch.randn(12, 8, requires_grad=True)
    b = torch.randn(4, 8, 5).requires_grad_()
    given = b.transpose(1, 2).contiguous() if trans_b else b
    ours = integration.gmm(a, given, sizes, trans_b)
    want = torch.cat([rows @ w for rows, w in zip(a.split(sizes.tolist()), b, strict=True)])
    torch.testing.assert_close(ours, want)
    weigh = torch.randn(12, 5)
    grads = [torch.autograd.grad((y * weigh).sum(), (a, b)) for y in (ours, want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


# --- the router -------------------------------------------------------------------------------------------------------


def config_of(**settings):
    sizes = {"num_layers": 1, "hidden_size": H, "num_attention_heads": 2, "num_moe_experts": E, "moe_router_topk": K}
    options = {"moe_ffn_hidden_size": 16, "add_bias_linear": False, "gated_linear_unit": True}
    common = {"use_cpu_initialization": True, "activation_func": torch.nn.functional.silu, "moe_router_dtype": "fp32"}
    return TransformerConfig(**{**sizes, **options, **common, "moe_router_load_balancing_type": "none", **settings})


ROUTERS = {
    "deepseek-v3": {
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_num_groups": 4,
        "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5, "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-2,
    },
    "deepseek-v2": {
        "moe_router_pre_softmax": True, "moe_router_num_groups": 8, "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 16.0, "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
    },
    "mixtral": {"moe_router_topk": 2, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2},
    "switch": {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_z_loss_coeff": 1e-3},
    "all losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-2, 2e-2, 3e-2], "moe_z_loss_coeff": 1e-3, "calculate_per_token_loss": True,
    },
    "capacity": {"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"},
    "capacity, padded": {
        "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True,
        "moe_token_dispatcher_type": "alltoall",
    },
    "bias of the logits": {"add_bias_linear": True},
    "float64 product": {"moe_router_dtype": "fp64"},
}  # fmt: skip


def run(module, x, padding=None):
    for p in module.parameters():
        p.grad = None
    x = x.detach().requires_grad_()
    probs, routing_map = module(x, padding)
    generator = torch.Generator().manual_seed(1)
    (probs.float() * torch.randn(probs.shape, generator=generator)).sum().backward()
    return probs.detach(), routing_map, {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def routers_of(groups, **settings):
    config = config_of(**settings)
    theirs = router.TopKRouter(config, groups)
    ours = integration.TopKRouter(config, groups)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    if theirs.expert_bias is not None:
        torch.nn.init.normal_(theirs.expert_bias, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        module.set_layer_number(1)
    return theirs, ours


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("padded", [False, True])
def test_router_is_megatrons(name, padded, groups, megatron_on_cpu):
    theirs, ours = routers_of(groups, **ROUTERS[name])
    if padded and theirs.enable_expert_bias:
        pytest.skip("Megatron 0.16 cannot count the load of padded batches")
    x = torch.randn(T // 2, 2, H)
    padding = (torch.rand(T // 2, 2) < 0.2) if padded else None
    for _ in range(2):  # the second adds to the counters
        want, want_map, want_grads = run(theirs, x, padding)
        got, got_map, got_grads = run(ours, x, padding)
        assert got.dtype == want.dtype
        assert torch.equal(got_map, want_map)
        torch.testing.assert_close(got, want, rtol=5e-6, atol=1e-7)
        for key, grad in want_grads.items():
            torch.testing.assert_close(got_grads[key], grad, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    counters = dict(theirs.named_buffers()), dict(ours.named_buffers())
    assert counters[0].keys() == counters[1].keys()
    for key in counters[0]:
        assert torch.equal(counters[0][key], counters[1][key]), key
    ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(x)[1], theirs.eval()(x)[1])


def test_runs_without_cuda_by_itself(groups):
    """Megatron's own constructor and product do not: this one has no fixture for them."""
    ours = integration.TopKRouter(config_of(**ROUTERS["deepseek-v3"]), groups)
    assert ours.expert_bias.dtype == torch.float32
    assert set(ours.state_dict()) == {"weight", "expert_bias"}
    assert ours.bfloat16()(torch.randn(4, 2, H, dtype=torch.bfloat16))[0].dtype == torch.float32
    assert ours.expert_bias.dtype == torch.float32  # Megatron's own care


def test_padding_is_not_counted(groups):
    ours = integration.TopKRouter(config_of(**ROUTERS["deepseek-v3"]), groups)
    ours.set_layer_number(1)
    padding = torch.arange(20).reshape(10, 2) > 14
    ours(torch.randn(10, 2, H), padding)
    assert ours.local_tokens_per_expert.sum() == 15 * K


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_is_rounded_once(dtype, groups):
    """Without moe_router_dtype the logits have the model's type; a float32 sum before that is nearer the truth."""
    ours = integration.TopKRouter(config_of(moe_router_dtype=None), groups).to(dtype)
    x = torch.randn(5, 2, H, dtype=dtype)
    logits = ours.gating(x)
    exact = x.double() @ ours.weight.double().t()
    assert logits.dtype == dtype
    assert (logits.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps
    probs, routing_map = ours(x)
    assert probs.dtype == dtype
    assert (routing_map.sum(1) == K).all()


def test_what_is_not_served_is_named_and_megatrons(groups, megatron_on_cpu):
    config = config_of(moe_router_load_balancing_type="sinkhorn", moe_router_topk=1)
    with pytest.warns(UserWarning, match="sinkhorn' is left as it is: it chooses by iteration"):
        ours = integration.TopKRouter(config, groups)
    theirs = router.TopKRouter(config, groups)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 2, H)
    for got, want in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(got, want)
    with pytest.warns(UserWarning, match="moe_enable_routing_replay is left as it is"):
        integration.TopKRouter(config_of(moe_enable_routing_replay=True), groups)


# --- the layer --------------------------------------------------------------------------------------------------------


def layer_of(groups, spec_router, **settings):
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True}
    config = config_of(moe_token_dispatcher_type="allgather", **bf16, **settings)
    submodules = moe_layer.MoESubmodules(experts=experts.GroupedMLP, router=spec_router)
    return moe_layer.MoELayer(config, submodules, layer_number=1, pg_collection=groups)


def test_a_whole_layer_on_a_cpu(groups):
    """Router, permutation and experts; against the same parameters in plain PyTorch."""
    integration.install()
    fused = {"moe_router_fusion": True, "moe_permute_fusion": True}
    layer = layer_of(groups, integration.TopKRouter, **fused, moe_router_score_function="sigmoid")
    x = torch.randn(9, 2, H, dtype=torch.bfloat16, requires_grad=True)
    y, _ = layer(x)
    probs, _ = layer.router(x)
    w1 = layer.experts.weight1.view(E, H, -1).double()
    w2 = layer.experts.weight2.view(E, -1, H).double()
    tokens = x.detach().double().reshape(-1, H)
    gate, up = torch.einsum("th,ehi->eti", tokens, w1).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up * probs.t().double()[:, :, None]
    want = torch.einsum("eti,eih->th", hidden, w2).reshape(x.shape)
    assert (y.double() - want).abs().max() < 0.02 * want.abs().max()
    y.float().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert x.grad.abs().sum() > 0


def test_fusion_switches_do_not_change_a_layer(groups, megatron_on_cpu):
    """Megatron's own router and permutation against pyroute behind the switches, same experts."""
    integration.install()
    layers = [layer_of(groups, router.TopKRouter, moe_router_fusion=f, moe_permute_fusion=f) for f in (False, True)]
    layers[1].load_state_dict(copy.deepcopy(layers[0].state_dict()))
    x = torch.randn(9, 2, H, dtype=torch.bfloat16)
    results = []
    for layer in layers:
        y, _ = layer(x)
        y.float().square().sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters())])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))


# --- install ----------------------------------------------------------------------------------------------------------


def test_install_is_idempotent_and_uninstall_takes_it_back():
    modules = (moe_utils, integration.megatron_te, grouped_gemm_util)
    before = [dict(vars(module)) for module in modules]
    integration.install()
    installed = [dict(vars(module)) for module in modules]
    integration.install()
    assert [dict(vars(module)) for module in modules] == installed
    assert moe_utils.fused_permute is not before[0].get("fused_permute")
    integration.uninstall()
    integration.uninstall()
    assert [dict(vars(module)) for module in modules] == before


def test_tensors_elsewhere_go_where_they_went(monkeypatch):
    monkeypatch.setattr(moe_utils, "fused_permute", lambda *args, **kwargs: "TransformerEngine", raising=False)
    integration.install()
    assert moe_utils.fused_permute(torch.ones(2, 3, device="meta"), None) == "TransformerEngine"
    assert torch.is_tensor(moe_utils.fused_permute(torch.ones(2, 3), torch.ones(2, 1), 2)[0])


def test_an_unknown_version_gets_a_warning(monkeypatch):
    monkeypatch.setattr(integration, "TESTED", ("0.1", "0.2"))
    with pytest.warns(UserWarning, match=r"tested with megatron-core 0\.1, 0\.2, this is 0\."):
        integration.install()
    assert moe_utils.HAVE_TE
