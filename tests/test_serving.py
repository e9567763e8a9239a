"""The plug-ins for vLLM and SGLang: against their own routers where they are installed, and against stand-ins with the
protocol of their hooks, which run everywhere."""

from __future__ import annotations

import enum
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from pyroute.integrations import plugins, sglang, vllm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the stacks' own

T, E, K, VOCAB = 29, 16, 4, 11
CPU_ROUTER = "vllm.model_executor.layers.fused_moe.router.cpu_router"
TOPK = "sglang.srt.layers.moe.topk"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)


def module(monkeypatch, name, **attributes):
    made = types.ModuleType(name)
    vars(made).update(attributes)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def by_expert(result):
    weights, ids = result[:2]
    order = ids.argsort(-1)
    return weights.gather(-1, order), ids.gather(-1, order).int()


def assert_same_routing(got, want, tolerance=2e-6):
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int32
    got, want = by_expert(got), by_expert(want)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0].float(), rtol=tolerance, atol=1e-7)


def plain_routing(z, k, score, *, bias=None, groups=None, renormalize=True, scale=1.0, group_top=None):
    """The rules of both stacks in plain PyTorch."""
    z = z.double()
    scores = {"softmax": lambda: z.softmax(-1), "sigmoid": z.sigmoid}.get(
        score, lambda: torch.nn.functional.softplus(z).sqrt()
    )()
    keys = scores if bias is None else scores + bias
    if groups:
        folded = keys.unflatten(-1, (groups[0], -1))
        best = folded.topk(1 if bias is None else 2).values.sum(-1).topk(groups[1]).indices
        kept = torch.zeros(len(z), groups[0], dtype=torch.bool).scatter(1, best, True)
        keys = folded.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = keys.topk(k).indices
    weights = scores.gather(1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights) * scale, ids


def distinct(num_tokens, num_experts, dtype=torch.float32):
    """Normal logits, no two of a token equal: the stacks break ties as torch.topk likes."""
    values = torch.randn(4000).to(dtype).unique()
    return values[torch.rand(num_tokens, len(values)).argsort(-1)[:, :num_experts]]


# --- vLLM -------------------------------------------------------------------------------------------------------------


class StandInRouter:
    """The attributes and the method of vLLM 0.32's ``CPURouter``, in plain PyTorch."""

    def __init__(self, top_k, num_experts, **settings):
        defaults = {"use_grouped_topk": False, "num_expert_group": None, "topk_group": None, "renormalize": True}
        others = {"scoring_func": "softmax", "routed_scaling_factor": 1.0, "e_score_correction_bias": None}
        functions = {"custom_routing_function": None, "hash_indices_table": None}
        settings = {**defaults, **others, **functions, **settings}
        settings["_hash_indices_table"] = settings.pop("hash_indices_table")
        vars(self).update(top_k=top_k, **settings)

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        if self.custom_routing_function is not None:
            return self.custom_routing_function(hidden_states, router_logits, self.top_k, self.renormalize)
        bias, scale, groups = self.e_score_correction_bias, self.routed_scaling_factor, None
        if self.use_grouped_topk:
            groups = self.num_expert_group, self.topk_group
        elif self.scoring_func == "softmax":
            bias, scale = None, 1.0
        if self._hash_indices_table is not None:
            ids = self._hash_indices_table[input_ids]
            weights = torch.nn.functional.softplus(router_logits.double()).sqrt().gather(1, ids.long())
            return weights / weights.sum(-1, keepdim=True) * scale, ids
        return plain_routing(
            router_logits, self.top_k, self.scoring_func, bias=bias, groups=groups, renormalize=self.renormalize,
            scale=scale,
        )  # fmt: skip


@pytest.fixture(params=["installed", "stand-in"])
def cpu_router(request, monkeypatch):
    if request.param == "installed":
        real = pytest.importorskip(CPU_ROUTER, exc_type=ImportError)
        router = real.CPURouter
    else:
        parts = CPU_ROUTER.split(".")
        for i in range(1, len(parts)):
            module(monkeypatch, ".".join(parts[:i]), __path__=[])
        sys.modules["vllm"].__version__ = "0.32.0"
        router = type("CPURouter", (StandInRouter,), {"_compute_routing": StandInRouter._compute_routing})
        module(monkeypatch, CPU_ROUTER, CPURouter=router)
    yield router
    vllm.uninstall()


V4, V4_K = 256, 6  # the sizes that vLLM's kernels have for it
TABLE = torch.stack([torch.randperm(V4, generator=torch.Generator().manual_seed(i))[:V4_K] for i in range(VOCAB)]).int()
BIAS = torch.linspace(-0.3, 0.4, E)[torch.randperm(E, generator=torch.Generator().manual_seed(3))]
V4_BIAS = 8 + torch.linspace(-0.3, 0.4, V4)[torch.randperm(V4, generator=torch.Generator().manual_seed(4))]
GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
VLLM_ROUTERS = {
    "mixtral": {},
    "qwen2": {"renormalize": False},
    "softmax ignores bias and scale": {"e_score_correction_bias": BIAS, "routed_scaling_factor": 2.5},
    "deepseek-v2": {**GROUPS, "renormalize": False, "routed_scaling_factor": 16.0},
    "deepseek-v3": {
        **GROUPS, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "e_score_correction_bias": BIAS,
    },
    "kimi": {
        "use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.827, "e_score_correction_bias": BIAS,
    },
    "deepseek-v4": {
        "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "e_score_correction_bias": V4_BIAS,
    },
    "deepseek-v4, hashed": {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "hash_indices_table": TABLE},
}  # fmt: skip


@pytest.mark.parametrize("name", VLLM_ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_router(name, dtype, cpu_router):
    num_experts, top_k = (V4, V4_K) if "v4" in name else (E, K)
    router = cpu_router(top_k, num_experts, **VLLM_ROUTERS[name])
    x, z = torch.randn(T, 8), distinct(T, num_experts, dtype)
    input_ids = torch.randint(0, VOCAB, (T,))
    want = router._compute_routing(x, z.float(), None, input_ids=input_ids)
    vllm.install()
    got = router._compute_routing(x, z, None, input_ids=input_ids)
    assert_same_routing(got, want, 1e-5)
    vllm.uninstall()
    again = router._compute_routing(x, z.float(), None, input_ids=input_ids)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


def test_vllm_router_under_a_compiler(cpu_router):
    """vLLM compiles its models: one graph, and no second one for another number of tokens but the first."""
    vllm.install()
    router = cpu_router(K, E, **VLLM_ROUTERS["deepseek-v3"])
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: router._compute_routing(z, z, None), fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 9, 13):
        z = torch.randn(num_tokens, E)
        for got, want in zip(compiled(z), router._compute_routing(z, z, None), strict=True):
            assert torch.equal(got, want)


def test_vllm_leaves_a_models_own_function_alone(cpu_router):
    vllm.install()

    def own(hidden_states, gating_output, topk, renormalize):
        return torch.ones(len(gating_output), topk), torch.zeros(len(gating_output), topk, dtype=torch.int32)

    router = cpu_router(K, E, custom_routing_function=own)
    with pytest.warns(UserWarning, match="a router is left as it is: it has a routing function of its own"):
        weights, _ = router._compute_routing(torch.zeros(3, 8), torch.randn(3, E), None)
    assert torch.equal(weights, torch.ones(3, K))


def test_vllm_plugin_is_off_unless_asked_for(cpu_router, monkeypatch):
    before = cpu_router._compute_routing
    for value in (None, "0", ""):
        monkeypatch.delenv("PYROUTE_VLLM", raising=False)
        if value is not None:
            monkeypatch.setenv("PYROUTE_VLLM", value)
        plugins.vllm()
        assert cpu_router._compute_routing is before
    monkeypatch.setenv("PYROUTE_VLLM", "1")
    for _ in range(2):  # vLLM may load a plug-in more than once
        plugins.vllm()
        assert cpu_router._compute_routing is vllm.compute_routing
    vllm.uninstall()
    vllm.uninstall()
    assert cpu_router._compute_routing is before


def test_vllm_unknown_version_gets_a_warning(cpu_router, monkeypatch):
    monkeypatch.setattr(vllm, "TESTED", ("0.1",))
    with pytest.warns(UserWarning, match=r"tested with vLLM 0\.1, this is "):
        vllm.install()
    assert cpu_router._compute_routing is vllm.compute_routing


# --- SGLang -----------------------------------------------------------------------------------------------------------


class StandInHookType(enum.Enum):
    AROUND = "around"


def stand_in_registry():
    """The protocol of SGLang 0.5's ``HookRegistry`` for AROUND hooks: register by path, apply once, never take back."""

    class HookRegistry:
        hooks: list = []  # noqa: RUF012
        patched: set = set()  # noqa: RUF012

        @classmethod
        def register(cls, target, hook, hook_type, *, source=None):
            assert hook_type is StandInHookType.AROUND
            cls.hooks.append((target, hook))

        @classmethod
        def apply_hooks(cls):
            for target, hook in cls.hooks:
                if target not in cls.patched:
                    owner, _, name = target.rpartition(".")
                    original = getattr(sys.modules[owner], name)
                    around = lambda *args, h=hook, o=original, **kwargs: h(o, *args, **kwargs)  # noqa: E731
                    setattr(sys.modules[owner], name, around)
                    cls.patched.add(target)

    return HookRegistry


@pytest.fixture(params=["installed", "stand-in"])
def topk(request, monkeypatch):
    """``sglang.srt.layers.moe.topk`` and plain functions to compare with."""
    if request.param == "installed":
        real = pytest.importorskip(TOPK, exc_type=ImportError)
        importlib.import_module("sglang.srt.plugins.hook_registry")
        yield real
    else:
        for name in (TOPK, "sglang.srt.plugins.hook_registry"):
            parts = name.split(".")
            for i in range(1, len(parts)):
                module(monkeypatch, ".".join(parts[:i]), __path__=[])
        sys.modules["sglang"].__version__ = "0.5.23"
        registry = {"HookRegistry": stand_in_registry(), "HookType": StandInHookType}
        module(monkeypatch, "sglang.srt.plugins.hook_registry", **registry)
        names = ("fused_topk", "fused_topk_native", "grouped_topk", "biased_grouped_topk")
        yield module(monkeypatch, TOPK, **{name: lambda *args, **kwargs: "SGLang" for name in names})
    sglang.uninstall()


SGLANG_CALLS = {  # function, arguments, the rule in plain PyTorch
    "mixtral": ("fused_topk", {}, {"score": "softmax"}),
    "qwen2, native": ("fused_topk_native", {"renormalize": False}, {"score": "softmax", "renormalize": False}),
    "minimax-m2": (
        "fused_topk", {"scoring_func": "sigmoid", "correction_bias": BIAS}, {"score": "sigmoid", "bias": BIAS},
    ),
    "deepseek-v4": (
        "fused_topk_native",
        {"scoring_func": "sqrtsoftplus", "correction_bias": BIAS},
        {"score": "sqrtsoftplus", "bias": BIAS},
    ),
    "deepseek-v2": (
        "grouped_topk",
        {"num_expert_group": 4, "topk_group": 2, "renormalize": False, "routed_scaling_factor": 16.0},
        {"score": "softmax", "groups": (4, 2), "renormalize": False},
    ),
    "deepseek-v3, scaled": (
        "biased_grouped_topk",
        {
            "num_expert_group": 4, "topk_group": 2, "correction_bias": BIAS, "routed_scaling_factor": 2.5,
            "apply_routed_scaling_factor_on_output": True,
        },
        {"score": "sigmoid", "groups": (4, 2), "bias": BIAS, "scale": 2.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SGLANG_CALLS)
def test_sglang_functions(name, topk):
    function, arguments, rule = SGLANG_CALLS[name]
    sglang.install()
    z = torch.randn(T, E)
    given = {"hidden_states": torch.randn(T, 8), "gating_output": z, "topk": K, "renormalize": True, **arguments}
    assert_same_routing(getattr(topk, function)(**given), plain_routing(z, K, **rule))


def test_sglang_select_experts(topk):
    """The function that the hooked ones are called by."""
    if not hasattr(topk, "select_experts"):
        pytest.skip("the stand-in has none")
    z, x = torch.randn(T, E), torch.randn(T, 8)
    common = {"top_k": K, "torch_native": True}
    configs = {
        "native": topk.TopKConfig(**common),
        "V3": topk.TopKConfig(
            top_k=K, use_grouped_topk=True, num_expert_group=4, topk_group=2, correction_bias=BIAS,
            routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=True, scoring_func="sigmoid",
        ),
    }  # fmt: skip
    sglang.install()
    got = topk.select_experts(x, z, configs["native"])
    assert_same_routing(got, plain_routing(z, K, "softmax"))
    got = topk.select_experts(x, z, configs["V3"])
    assert_same_routing(got, plain_routing(z, K, "sigmoid", bias=BIAS, groups=(4, 2), scale=2.5))


def test_sglang_leaves_the_rest_alone(topk):
    sglang.install()
    z = torch.randn(T, E)
    given = {"hidden_states": z, "gating_output": z, "topk": K, "renormalize": True, "num_fused_shared_experts": 1}
    with pytest.warns(UserWarning, match="grouped_topk is left as it is: shared experts take part in the choice"):
        theirs = topk.grouped_topk(**given, num_expert_group=1, topk_group=1)
    assert theirs == "SGLang" or theirs[1].max() == E
    sglang.uninstall()
    if vars(topk).get("__file__") is None:
        assert topk.fused_topk(**given) == "SGLang"


def test_sglang_plugin_is_off_unless_asked_for(monkeypatch):
    registry = stand_in_registry()
    for part in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        module(monkeypatch, part, __path__=[], __version__="0.5.23")
    module(monkeypatch, "sglang.srt.plugins.hook_registry", HookRegistry=registry, HookType=StandInHookType)
    for value in (None, "0"):
        monkeypatch.delenv("PYROUTE_SGLANG", raising=False)
        if value is not None:
            monkeypatch.setenv("PYROUTE_SGLANG", value)
        plugins.sglang()
        assert registry.hooks == []
    monkeypatch.setenv("PYROUTE_SGLANG", "1")
    plugins.sglang()
    plugins.sglang()
    targets = [target for target, _ in registry.hooks]
    assert sorted(targets) == sorted({f"{TOPK}.{name}" for name in sglang._RULES})
    assert registry.patched == set()  # SGLang applies the hooks of all plug-ins together
    sglang.uninstall()


def test_sglang_unknown_version_gets_a_warning(topk, monkeypatch):
    monkeypatch.setattr(sglang, "TESTED", ("0.1",))
    monkeypatch.setattr(sglang, "_hooked", [])
    hooks = sys.modules["sglang.srt.plugins.hook_registry"]
    monkeypatch.setattr(hooks, "HookRegistry", stand_in_registry())
    monkeypatch.setattr(hooks, "HookType", StandInHookType)
    with pytest.warns(UserWarning, match=r"tested with SGLang 0\.1, this is "):
        sglang.register()
    assert hooks.HookRegistry.hooks


# --- the package ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_entry_points_load(group):
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    points = tomllib.loads(project.read_text())["project"]["entry-points"][group]
    assert list(points) == ["pyroute"]
    name, _, function = points["pyroute"].partition(":")
    assert callable(getattr(importlib.import_module(name), function))


def test_a_plugin_that_is_not_asked_for_imports_nothing():
    code = "import sys, pyroute.integrations.plugins as p; p.vllm(); p.sglang(); sys.exit('torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYROUTE_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
