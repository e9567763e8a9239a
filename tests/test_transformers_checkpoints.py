"""pyroute.load_experts against transformers' own loading of the same folder, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

import checkpoint_files as disk  # noqa: E402
import transformers_families as tiny  # noqa: E402

import pyroute  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def check_bytes(array, tensor):
    assert list(array.shape) == list(tensor.shape)
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    assert array.tobytes() == tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def check_model(model, folder):
    """Both matrices of every layer; how many layers there were."""
    layers = pyroute.expert_layers(folder)
    modules = {
        int(name.split("layers.")[1].split(".")[0]): module
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and name.endswith("experts")
    }
    assert modules.keys() == layers.keys()
    for layer, module in modules.items():
        gate_up, down = pyroute.load_experts(folder, layer)
        check_bytes(gate_up, module.gate_up_proj)
        check_bytes(down, module.down_proj)
    return len(layers)


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen3_moe", "glm4_moe", "minimax_m2", "olmoe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_that_transformers_saved(tmp_path, family, dtype):
    model = tiny.tiny_model(family).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert check_model(again, tmp_path) == 2


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_experts_that_pyroute_wrote(tmp_path, family):
    """transformers loads a folder whose experts come from save_experts."""
    model = tiny.tiny_model(family).bfloat16()
    model.save_pretrained(tmp_path / "a")
    layers = pyroute.expert_layers(tmp_path / "a")
    pyroute.save_experts(tmp_path / "b", {i: pyroute.load_experts(tmp_path / "a", i) for i in layers})
    from safetensors.torch import load_file, save_file

    rest = {n: t for n, t in load_file(tmp_path / "a" / "model.safetensors").items() if ".experts." not in n}
    save_file(rest, tmp_path / "b" / "rest.safetensors", {"format": "pt"})
    index = tmp_path / "b" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(rest, "rest.safetensors")
    index.write_text(json.dumps(listed))
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


def fp8_folder(folder, scale_dtype, intermediate):
    """A tiny DeepSeek-V3 whose experts, and only they, are FP8 on disk."""
    sizes = (8, 256, intermediate)
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    known = {**tiny.SIZES, "head_dim": None, "num_key_value_heads": 4, "hidden_size": 256}
    known["moe_intermediate_size"] = intermediate
    wanted = DeepseekV3Config()
    config = DeepseekV3Config(**{n: v for n, v in known.items() if hasattr(wanted, n) and v is not None})
    model = DeepseekV3ForCausalLM._from_config(config).bfloat16()
    model.save_pretrained(folder)
    from safetensors.torch import load_file, save_file

    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." not in n}
    kept = sorted({n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight") or "_proj_" in n})
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "rest.safetensors", {"format": "pt"})
    experts = disk.layer_tensors(0, sizes, disk.E4M3, scale_dtype) | disk.layer_tensors(
        1, sizes, disk.E4M3, scale_dtype
    )
    disk.write(folder, experts)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(tensors, "rest.safetensors")
    index.write_text(json.dumps(listed))
    saved = json.loads((folder / "config.json").read_text())
    quantised = disk.fp8_config(8)["quantization_config"] | {"modules_to_not_convert": [*kept, "lm_head"]}
    if scale_dtype == disk.E8M0:
        quantised["scale_fmt"] = "ue8m0"
    (folder / "config.json").write_text(json.dumps(saved | {"quantization_config": quantised}))
    return DeepseekV3ForCausalLM


@pytest.fixture
def without_accelerate(monkeypatch):
    """FP8 checkpoints ask for accelerate, whose device maps play no part on one CPU."""
    from transformers.quantizers import quantizer_finegrained_fp8 as quantizer

    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    return quantizer


@pytest.mark.parametrize("scale_dtype", [np.dtype(np.float32), disk.BFLOAT16, disk.E8M0], ids=str)
def test_fp8_dequantised_by_transformers(tmp_path, without_accelerate, scale_dtype):
    """On a machine without a GPU transformers dequantises to bfloat16; so does ours, to the bit."""
    model_class = fp8_folder(tmp_path, scale_dtype, 128)
    model = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer in (0, 1):
        module = model.model.layers[layer].mlp.experts
        experts = pyroute.load_experts(tmp_path, layer)
        check_bytes(experts.gate_up.dequantize("bfloat16"), module.gate_up_proj)
        check_bytes(experts.down.dequantize("bfloat16"), module.down_proj)


@pytest.mark.parametrize("intermediate", [128, 96])
@pytest.mark.parametrize("scale_dtype", [np.dtype(np.float32), disk.E8M0], ids=str)
def test_fp8_as_transformers_keeps_it(tmp_path, without_accelerate, monkeypatch, scale_dtype, intermediate):
    """Codes are its bytes; scales are its scales, also where a block is cut by the end of gate (96).

    It refuses a width like 192, whose halves have more blocks than it allots.
    """
    monkeypatch.setattr(without_accelerate.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model_class = fp8_folder(tmp_path, scale_dtype, intermediate)
    model = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer in (0, 1):
        module = model.model.layers[layer].mlp.experts
        assert type(module).__name__ == "FP8Experts"
        gate_up, down = pyroute.load_experts(tmp_path, layer)
        check_bytes(gate_up.codes, module.gate_up_proj)
        check_bytes(down.codes, module.down_proj)
        check_bytes(down.scales, module.down_proj_scale_inv.float())
        halves = module.gate_up_proj_scale_inv.detach().float().numpy().reshape(8, 2, -(-intermediate // 128), -1)
        for half in (0, 1):
            mine = gate_up.scales.reshape(8, 2, -1, halves.shape[-1])[:, half]
            rows = np.arange(mine.shape[1]) * gate_up.block[0] // 128
            assert np.array_equal(mine, halves[:, half][:, rows])
