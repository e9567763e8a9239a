"""Every MoE family of transformers on pyroute's experts: logits, gradients and generated tokens as with its own."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import transformers_families as tiny  # noqa: E402

from pyroute.integrations import transformers as integration  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs" / "transformers.md"
FAMILIES = tiny.families()
OUTSIDE = tiny.outside_families()

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(autouse=True)
def installed():
    integration.install()
    yield
    integration.uninstall()


def assert_close(got, want, name, floor=0.0):
    """Within 5e-5 of the largest entry, which a swapped expert, a lost weight or a wrong activation is not."""
    assert got.shape == want.shape, name
    assert (got - want).abs().max() <= 5e-5 * want.abs().max() + floor, name


def run(model, ids):
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids)
    y = out.logits if hasattr(out, "logits") else out.last_hidden_state
    generator = torch.Generator().manual_seed(1)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *OUTSIDE) if f not in tiny.EXPERTS_ONLY])
def test_model_on_pyroute_is_the_model(family):
    """Once with its experts on pyroute, once with everything that can be."""
    model = tiny.tiny_model(family)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    logits, gradients = run(model, ids)
    generates = type(model).__name__.endswith("ForCausalLM")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, **options) if generates else None
    if family in FAMILIES:
        model.set_experts_implementation("pyroute")
        assert {module.config._experts_implementation for module in tiny.experts_of(model)} == {"pyroute"}
        check_same(model, ids, logits, gradients)
    module = tiny.experts_of(model)[0]
    swapped = integration.swap(model)
    check_same(model, ids, logits, gradients)
    if generates:
        assert torch.equal(model.generate(ids, **options), tokens)
    assert tiny.line(family, module, model, swapped) in DOCS.read_text()
    integration.restore(model)
    assert not any(hasattr(type(m), "_pyroute_original") for m in model.modules())
    assert torch.equal(run(model, ids)[0], logits)


def check_same(model, ids, logits, gradients):
    again, others = run(model, ids)
    assert_close(again, logits, "logits")
    assert others.keys() == gradients.keys()
    # gradients that are zero but for rounding are held against the model's largest
    floor = 1e-8 * float(max(g.abs().max() for g in gradients.values()))
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, name, floor)


@pytest.mark.parametrize("family", sorted(tiny.EXPERTS_ONLY))
def test_experts_alone(family):
    module = tiny.tiny_experts(family)
    eager = type(module).forward.__wrapped__
    results = (tiny.call_experts(module, forward) for forward in (integration.experts_forward, eager))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, family)
    swapped = integration.swap(tiny.tiny_router(family))
    assert tiny.line(family, module, None, swapped) in DOCS.read_text()


def test_the_table_lists_the_families_of_this_version():
    listed = re.findall(r"^\| (\w+) \| (?:`|experts)", DOCS.read_text(), re.MULTILINE)
    if transformers.__version__.startswith(integration.TESTED):
        assert sorted(listed) == sorted((*FAMILIES, *OUTSIDE))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v4"])
def test_a_bfloat16_model(family):
    model = tiny.tiny_model(family).bfloat16()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        exact = copy.deepcopy(model).float()(input_ids=ids).logits
        model.set_experts_implementation("pyroute")
        after = model(input_ids=ids).logits
    assert after.dtype == before.dtype
    own = (before.float() - exact).abs().max()
    assert (after.float() - exact).abs().max() <= 2 * own


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_sentinel_ids_are_not_routed(family):
    module = tiny.tiny_experts(family)
    module._is_expert_parallel = True
    x = torch.randn(5, 32)
    ids = torch.tensor([[0, 1], [8, 2], [3, 8], [8, 8], [4, 5]])
    weights = torch.rand(5, 2).requires_grad_()
    y = integration.experts_forward(module, x, ids, weights)
    assert ids.max() == 8
    y.sum().backward()
    assert not weights.grad[ids == 8].any()
    assert weights.grad[ids < 8].all()
    assert not y[3].any()
    only = torch.where(ids == 8, 0.0, weights.detach())
    want = integration.experts_forward(module, x, ids.clamp(max=7), only)
    assert_close(y, want, "sentinel")
    with pytest.raises(ValueError, match=r"topk_idx\[1, 0\] must be in 0\.\.7"):
        integration.experts_forward(module, x, ids + 2, weights)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiles_without_a_break(family):
    torch._dynamo.reset()
    module = tiny.tiny_experts(family)
    compiled = torch.compile(
        lambda *args: integration.experts_forward(module, *args), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for _ in range(2):  # before and after the module's activation is known
        for num_tokens in (5, 9):
            x, ids = torch.randn(num_tokens, 32), torch.randint(0, 8, (num_tokens, 2))
            weights = torch.rand(num_tokens, 2)
            assert_close(compiled(x, ids, weights), integration.experts_forward(module, x, ids, weights), family)


def test_install_is_idempotent_and_uninstall_takes_it_back():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = dict(ALL_EXPERTS_FUNCTIONS)
    integration.install()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
    integration.uninstall()
    integration.uninstall()
    assert "pyroute" not in ALL_EXPERTS_FUNCTIONS
    model = tiny.tiny_model("mixtral")
    with pytest.raises(ValueError, match="pyroute"):
        model.set_experts_implementation("pyroute")
    integration.install()
    model.set_experts_implementation("pyroute")
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


def test_an_unknown_version_gets_a_warning(monkeypatch):
    monkeypatch.setattr(integration, "TESTED", ("4.0", "4.1"))
    with pytest.warns(UserWarning, match=r"tested with transformers 4\.0, 4\.1, this is 5\."):
        integration.install()
    assert integration.NAME in integration._interfaces()[0]._global_mapping  # and installed it all the same


def built(family, **options):
    """A model as users build it: by its class's from_config, which applies what is registered."""
    model_class = tiny.candidates(family)[0]
    torch.manual_seed(0)
    return model_class._from_config(tiny.tiny_config(model_class, family), **options).float().eval()


def routers_of(model):
    return [m for m in model.modules() if type(m).__name__.endswith("Router")]


def test_routers_by_the_class_swap_of_transformers():
    """Models that are built afterwards have them, record their logits, and leave nothing behind."""
    from transformers.monkey_patching import get_patch_mapping

    ids = torch.randint(3, 60, (2, 7))
    plain = built("mixtral")
    want = plain(input_ids=ids, output_router_logits=True)
    before = get_patch_mapping()
    integration.install(routers=["mixtral", "llama4"])
    integration.install(routers=["mixtral"])
    assert get_patch_mapping().keys() - before.keys() == {"MixtralTopKRouter", "Llama4TextMoe"}
    model = built("mixtral", experts_implementation="pyroute")
    model.load_state_dict(plain.state_dict())
    assert all(hasattr(type(router), "_pyroute_original") for router in routers_of(model))
    got = model(input_ids=ids, output_router_logits=True)
    assert_close(got.logits, want.logits, "logits")
    assert len(got.router_logits) == 2
    assert_close(torch.stack(got.router_logits), torch.stack(want.router_logits), "router logits")
    assert_close(got.aux_loss, want.aux_loss, "aux loss")
    integration.uninstall()
    integration.uninstall()
    assert get_patch_mapping() == before
    after = built("mixtral")
    assert not any(hasattr(type(router), "_pyroute_original") for router in routers_of(after))
    assert len(after(input_ids=ids, output_router_logits=True).router_logits) == 2
    integration.install()
    assert len(model(input_ids=ids, output_router_logits=True).router_logits) == 2


def test_routers_of_a_family_that_is_none():
    with pytest.raises(ValueError, match="install: routers must be model types of transformers, got 'mistral9'"):
        integration.install(routers=["mistral9"])


def test_what_cannot_be_exchanged_is_named_and_left():
    from transformers import SwitchTransformersConfig, SwitchTransformersModel

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    sizes |= {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    model = SwitchTransformersModel(SwitchTransformersConfig(vocab_size=64, num_experts=4, **sizes)).eval()
    classes = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match="SwitchTransformersSparseMLP is left as it is: it drops tokens by capacity"):
        swapped = integration.swap(model)
    assert swapped.swapped == {}
    assert swapped.left.keys() == {"SwitchTransformersSparseMLP", "SwitchTransformersTop1Router"}
    assert [type(module) for module in model.modules()] == classes
    model = tiny.tiny_model("phimoe")
    with pytest.warns(UserWarning, match="PhimoeTopKRouter is left as it is: its code gives other experts or weights"):
        swapped = integration.swap(model)
    assert "experts" in swapped.swapped.values()
    assert not any(hasattr(type(router), "_pyroute_original") for router in routers_of(model))


def test_swap_takes_one_part_alone():
    model = tiny.tiny_model("mixtral")
    assert list(integration.swap(model, routers=False).swapped) == ["MixtralExperts"]
    integration.restore(model)
    assert list(integration.swap(model, experts=False).swapped) == ["MixtralTopKRouter"]
    assert model.config._experts_implementation == "eager"
    assert integration.swap(model, experts=False) == ({}, {})  # the second time there is nothing left to do


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe", "deepseek_v4"])
def test_routers_in_bfloat16(family):
    """The types of the class's own results, and its choice wherever that is not a matter of rounding."""
    model = tiny.tiny_model(family).bfloat16()
    router = routers_of(model)[-1]
    original = type(router).forward
    hidden = tiny.SIZES["hidden_size"]
    x = torch.randn(64, hidden).bfloat16()
    extra = (torch.arange(64) % 60,) if "Hash" in type(router).__name__ else ()
    want = original(router, x, *extra)
    integration.swap(model)
    got = router(x, *extra)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert [t.shape for t in got] == [t.shape for t in want]
    assert_close(got[0].float(), want[0].float(), "logits", floor=1e-6)
    same = (got[2].sort(-1)[0] == want[2].sort(-1)[0]).all(-1)
    assert same.float().mean() > 0.9
    mine, theirs = (t[1].float().gather(1, t[2].argsort(-1))[same] for t in (got, want))
    assert (mine - theirs).abs().max() <= 2**-7 * theirs.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2", "gpt_oss"])
def test_routers_compile_without_a_break(family):
    torch._dynamo.reset()
    model = tiny.tiny_model(family)
    integration.swap(model)
    router = routers_of(model)[0]
    arguments = (torch.zeros(8),) if family == "minimax_m2" else ()
    compiled = torch.compile(lambda x: router(x, *arguments), fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 9):
        x = torch.randn(num_tokens, tiny.SIZES["hidden_size"])
        for got, want in zip(compiled(x), router(x, *arguments), strict=True):
            assert_close(got, want, family)


def test_a_rule_is_looked_for_once():
    """In one layer of many that are alike, and not again."""
    from pyroute.integrations.transformers import routers

    model = tiny.tiny_model("deepseek_v3")
    routers._rules.clear()
    integration.swap(model)
    assert len(routers._rules) == 1
    integration.restore(model)
    routers_of(model)[0].routed_scaling_factor = 3.25
    integration.swap(model)
    rules = [routers.rule_of(router).config.scaling_factor for router in routers_of(model)]
    assert rules == [3.25, 2.5]


def test_import_patches_nothing():
    """The module is imported here; what is registered is what the fixture installed."""
    integration.uninstall()
    module = importlib.reload(integration)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "pyroute" not in ALL_EXPERTS_FUNCTIONS
    assert module.NAME == "pyroute"
