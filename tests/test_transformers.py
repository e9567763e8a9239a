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


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in tiny.EXPERTS_ONLY])
def test_model_on_pyroute_is_the_model(family):
    model = tiny.tiny_model(family)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    logits, gradients = run(model, ids)
    generates = type(model).__name__.endswith("ForCausalLM")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, **options) if generates else None
    model.set_experts_implementation("pyroute")
    assert {module.config._experts_implementation for module in tiny.experts_of(model)} == {"pyroute"}
    again, others = run(model, ids)
    assert_close(again, logits, "logits")
    assert others.keys() == gradients.keys()
    # gradients that are zero but for rounding are held against the model's largest
    floor = 1e-8 * float(max(g.abs().max() for g in gradients.values()))
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, name, floor)
    if generates:
        assert torch.equal(model.generate(ids, **options), tokens)
    assert tiny.line(family, tiny.experts_of(model)[0], model) in DOCS.read_text()


@pytest.mark.parametrize("family", sorted(tiny.EXPERTS_ONLY))
def test_experts_alone(family):
    module = tiny.tiny_experts(family)
    eager = type(module).forward.__wrapped__
    results = (tiny.call_experts(module, forward) for forward in (integration.experts_forward, eager))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, family)
    assert tiny.line(family, module) in DOCS.read_text()


def test_the_table_lists_the_families_of_this_version():
    listed = re.findall(r"^\| (\w+) \| (?:`|experts)", DOCS.read_text(), re.MULTILINE)
    if transformers.__version__.startswith(integration.TESTED):
        assert sorted(listed) == FAMILIES


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
    assert integration.NAME in integration._interface()._global_mapping  # and installed it all the same


def test_a_model_outside_the_interface_is_left_alone():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

    sizes = {k: v for k, v in tiny.SIZES.items() if hasattr(Llama4TextConfig(), k) and k != "head_dim"}
    model = Llama4ForCausalLM._from_config(Llama4TextConfig(**sizes, intermediate_size_mlp=48)).eval()
    ids = torch.randint(3, 60, (1, 5))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.set_experts_implementation("pyroute")
        assert torch.equal(model(input_ids=ids).logits, before)


def test_import_patches_nothing():
    """The module is imported here; what is registered is what the fixture installed."""
    integration.uninstall()
    module = importlib.reload(integration)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "pyroute" not in ALL_EXPERTS_FUNCTIONS
    assert module.NAME == "pyroute"
