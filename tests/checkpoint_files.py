"""Small checkpoints in the layouts of released models, written by hand with the safetensors library."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DEEPSEEK = ("model.layers.{layer}.mlp.experts.{expert}.{part}.{kind}", ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = ("model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.{kind}", ("w1", "w3", "w2"))


def scales_of(rng, shape, dtype):
    """Positive scales that the type holds exactly."""
    exponents = rng.integers(-12, 3, shape)
    if dtype == E8M0:
        return (exponents + 127).astype(np.uint8).view(E8M0)
    return ((1 + rng.integers(0, 128, shape) / 128) * 2.0**exponents).astype(dtype)


def matrix(rng, shape, dtype):
    if dtype == E4M3:
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        codes[codes & 127 == 127] = 0  # NaN has a test of its own
        return codes.view(E4M3)
    return rng.standard_normal(shape).astype(dtype)


def layer_tensors(layer, sizes, dtype, scale_dtype=None, names=DEEPSEEK, kind="weight_scale_inv", block=(128, 128)):
    """All tensors of one layer by name; sizes are (num_experts, hidden, intermediate)."""
    rng = np.random.default_rng(layer)
    num_experts, hidden, intermediate = sizes
    tensors = {}
    for expert in range(num_experts):
        for i, part in enumerate(names[1]):
            shape = (hidden, intermediate) if i == 2 else (intermediate, hidden)
            place = {"layer": layer, "expert": expert, "part": part}
            tensors[names[0].format(**place, kind="weight")] = matrix(rng, shape, dtype)
            if scale_dtype is not None:
                grid = tuple(-(-extent // size) for extent, size in zip(shape, block, strict=True))
                tensors[names[0].format(**place, kind=kind)] = scales_of(rng, grid, scale_dtype)
    return tensors


def write(folder, tensors, num_files=3, config=None):
    """Tensors dealt to sharded files, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    weight_map = {name: files[i % num_files] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_config(num_experts, block=(128, 128), **extra):
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return {"model_type": "deepseek_v3", "n_routed_experts": num_experts, "quantization_config": quantised, **extra}
