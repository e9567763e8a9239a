"""The documents say what is: every Python block of README.md and docs/ runs as printed, every link and path leads
somewhere, every option of the command line exists.

The blocks of a page run in order, in one namespace that holds what the page takes for granted (``GIVEN``). A block of a
stack that is not installed is left out. NumPy stands for CuPy, whose arrays the tests of the CUDA floor go through.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pyroute
from pyroute.__main__ import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.is_file()]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("benches/results/*.md")]
# a block with this word needs this module
STACKS = {
    r"integrations import transformers|AutoModel|pyroute_transformers|transformers\.swap": "transformers",
    r"megatron": "megatron.core",
    r"sglang|vllm": "vllm",
    r"torch(?!titan)|transformer_engine": "torch",
    r"load_experts|save_experts": "safetensors",
}

pytestmark = pytest.mark.skipif(not PAGES, reason="needs the source tree")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of a package that is not there either
        return True


# --- what pages take for granted ------------------------------------------------------------------------------------


def routed(folder: Path) -> dict[str, object]:
    """16 tokens of width 128, routed to 2 of 8 experts, and what the operations are given."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 128), dtype=np.float32)
    gating = pyroute.topk_gating(rng.standard_normal((16, 8), dtype=np.float32), pyroute.RouterConfig(8, 2))
    plan = pyroute.plan_routes(gating.topk_idx, 8, alignment=128)
    rows = pyroute.permute(x, plan)
    weights = rng.standard_normal((8, 128, 128), dtype=np.float32)
    names = {"pyroute": pyroute, "num_experts": 8, "topk_idx": gating.topk_idx, "topk_weights": gating.topk_weights}
    names |= {"x": x, "grad_y": x, "plan": plan, "offsets": plan.expert_offsets, "counts": gating.tokens_per_expert}
    names |= {"rows": rows, "expert_out": rows, "grad_out": rows, "a": np.stack([x] * 8)}
    names |= {"weights": weights, "wide": weights, "w_gate_up": weights, "w_down": weights[:, :, :64].copy()}
    quantised = pyroute.quantize_fp8(weights, block=(128, 128))
    return names | {"weight": quantised.codes, "weight_scale_inv": quantised.scales}


def logits_and_bias(folder: Path) -> dict[str, object]:
    rng = np.random.default_rng(0)
    logits, grad = (rng.standard_normal(shape, dtype=np.float32) for shape in ((16, 256), (16, 8)))
    sequences = np.repeat(np.arange(2, dtype=np.int32), 8)
    names = {"pyroute": pyroute, "logits": logits, "grad_weights": grad, "ids": sequences}
    return names | {"bias": np.zeros(256, np.float32), "counts": np.zeros((256, 1000), np.int64)}


def checkpoint(folder: Path) -> dict[str, object]:
    if is_missing("safetensors"):
        return {}
    from checkpoint_files import E4M3, layer_tensors, write

    layers = [layer_tensors(layer, (8, 128, 128), E4M3, np.float32) for layer in (3, 4)]
    write(folder / "DeepSeek-V3", layers[0] | layers[1])
    return routed(folder) | {"Experts": pyroute.Experts}


def configuration(folder: Path) -> dict[str, object]:
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (folder / "path").mkdir()
    (folder / "path" / "config.json").write_text(json.dumps(config))
    return {"RouterConfig": pyroute.RouterConfig}


def recorded_loads(folder: Path) -> dict[str, object]:
    steps = np.random.default_rng(0).integers(1, 1000, (3, 58, 256))
    return {"steps": steps, "new_loads": steps[0].astype(float)}


def sparse_model(folder: Path) -> dict[str, object]:
    """A Mixtral of a few thousand parameters: in memory, and as a folder."""
    if is_missing("transformers"):
        return {}
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_local_experts": 4, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_key_value_heads=2, **sizes))
    model.save_pretrained(folder / "model")
    return {"AutoModelForCausalLM": AutoModelForCausalLM, "name": folder / "model", "model": model}


def torch_layer(folder: Path) -> dict[str, object]:
    if is_missing("torch"):
        return {}
    from pyroute.pytorch import GroupedExperts

    return {"model": GroupedExperts(8, 128, 64)}


def megatrons_own(folder: Path) -> dict[str, object]:
    names = routed(folder) | {"bias": None, "experts": lambda rows, counts: rows}
    if not is_missing("torch"):
        import torch

        names |= {"x": torch.randn(16, 32), "logits": torch.randn(16, 32), "bias": torch.zeros(32)}
    if is_missing("megatron.core"):
        return names
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import GroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    def sized(dots: object, **settings: object) -> object:  # the page writes ... for a model's sizes
        settings |= {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_moe_experts": 4}
        settings |= {"moe_token_dispatcher_type": "allgather", "add_bias_linear": False, "use_cpu_initialization": True}
        return TransformerConfig(**settings)

    names |= {"TransformerConfig": sized, "MoESubmodules": MoESubmodules, "GroupedMLP": GroupedMLP}
    return names | {"MoELayer": MoELayer, "groups": ProcessGroupCollection.use_mpu_process_groups()}


def readme(folder: Path) -> dict[str, object]:
    return sparse_model(folder) | {name: megatrons_own(folder).get(name) for name in ("MoESubmodules", "GroupedMLP")}


GIVEN: dict[str, Callable[[Path], dict[str, object]]] = {
    "README.md": readme,
    "docs/checkpoints.md": checkpoint,
    "docs/expert_parallel.md": lambda folder: {},
    "docs/megatron.md": megatrons_own,
    "docs/ops/gating.md": logits_and_bias,
    "docs/placement.md": recorded_loads,
    "docs/pytorch.md": torch_layer,
    "docs/routers.md": configuration,
    "docs/scaling.md": lambda folder: {},
    "docs/torchtitan.md": lambda folder: {"config": types.SimpleNamespace(override=types.SimpleNamespace())},
    "docs/transformers.md": sparse_model,
}


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    """Of torch.distributed and of Megatron, as torchrun would start it, with CuPy's names; leaves nothing behind."""
    cupy = types.ModuleType("cupy")
    cupy.asarray, cupy.zeros, cupy.ndarray = np.asarray, np.zeros, type("ndarray", (), {})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.chdir(tmp_path)
    if is_missing("torch"):
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)  # which a page does itself
    state = None
    if not is_missing("megatron.core"):
        from megatron.core import parallel_state as state

        state.initialize_model_parallel()
    yield
    for name in ("transformers", "megatron", "transformer_engine"):
        module = sys.modules.get(f"pyroute.integrations.{name}")
        if module is not None:
            module.uninstall()
    if state is not None:
        state.destroy_model_parallel()
    dist.destroy_process_group()


def assert_runs(page: Path, line: int, block: str, names: dict[str, object]) -> None:
    """A traceback shows the page and its line."""
    exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.filterwarnings("ignore")  # the stacks' own
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_run_as_printed(page, one_process, tmp_path):
    text = page.read_text()
    names = GIVEN.get(named(page), routed)(tmp_path)
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        needs = [module for words, module in STACKS.items() if re.search(words, block[1])]
        if not any(map(is_missing, needs)):
            assert_runs(page, text.count("\n", 0, block.start(1)), block[1], names)


# --- links, paths and options ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def expanded(path: str) -> list[str]:
    """``a_{b,c}.py`` is two paths, and <room> stands for any name."""
    parts = re.split(r"\{([^}]*)\}", re.sub(r"<\w+>\*?", "*", path))
    return ["".join(choice) for choice in itertools.product(*(part.split(",") for part in parts))]


PATH = re.compile(r"""(?<![\w/.-])(?: (?:tests|csrc|pyroute|docs|benches|tools|cmake)/[\w/.*<>{},-]*\w[\w*>}]*
                   | examples/\w+\.py)""", re.VERBOSE)  # fmt: skip


@pytest.mark.parametrize("page", ALL, ids=named)
def test_paths_are_there(page):
    for path in PATH.findall(page.read_text()):
        for pattern in expanded(path):
            assert any(ROOT.glob(pattern)), path


def options() -> dict[str, set[str]]:
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    return {name: {o for action in sub._actions for o in action.option_strings} for name, sub in commands.items()}


@pytest.mark.parametrize("page", ALL, ids=named)
def test_options_are_there(page):
    """Of ``pyroute bench --x``, and of ``bench --x``."""
    known = options()
    for command, rest in re.findall(rf"`(?:pyroute )?({'|'.join(known)})\b([^`\n]*)`", page.read_text()):
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert option in known[command], f"{command} {option}"


def test_every_folder_of_the_package_is_on_the_map():
    told = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {path.parent.name for path in ROOT.glob("pyroute/*/*.py")}
    assert len(folders) >= 8
    assert [name for name in sorted(folders) if f"pyroute/{name}/" not in told] == []
