"""Checkpoints in the layouts of released models: every byte arrives, and a bad one is a sentence about a tensor."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("safetensors")

import checkpoint_files as disk
from checkpoint_files import BFLOAT16, DEEPSEEK, E4M3, E8M0, MIXTRAL
from safetensors.numpy import save_file

import pyroute
from pyroute import Experts, Fp8Array, expert_layers, load_experts, save_experts

SIZES = (4, 256, 384)  # experts, hidden, intermediate
ODD = [(3, 256, 192), (2, 200, 96), (3, 130, 100), (2, 128, 1), (2, 64, 320)]  # intermediate % 128 != 0
INDEX = "model.safetensors.index.json"


def check_bytes(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


def expected_value(weight, scale=None, block=(128, 128)):
    """float32 values of one matrix on disk, by the format's definition."""
    value = weight.astype(np.float32)
    if scale is None:
        return value
    grid = np.repeat(np.repeat(scale.astype(np.float32), block[0], 0), block[1], 1)
    return value * grid[: value.shape[0], : value.shape[1]]


def check_layer(experts, tensors, layer, sizes, names=DEEPSEEK, kind=None, block=(128, 128)):
    """Codes byte for byte, and every value that the scales give."""
    _, _, intermediate = sizes
    for expert in range(sizes[0]):
        for i, part in enumerate(names[1]):
            place = {"layer": layer, "expert": expert, "part": part}
            weight = tensors[names[0].format(**place, kind="weight")]
            scale = tensors[names[0].format(**place, kind=kind)] if kind else None
            rows = slice(None) if i == 2 else slice(i * intermediate, (i + 1) * intermediate)
            whole = experts.down if i == 2 else experts.gate_up
            if isinstance(whole, Fp8Array):
                check_bytes(whole.codes[expert, rows], weight)
                check_bytes(whole.dequantize()[expert, rows], expected_value(weight, scale, block))
            else:
                check_bytes(whole[expert, rows], weight)


@pytest.mark.parametrize("scale_dtype", [np.dtype(np.float32), BFLOAT16, E8M0], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, *ODD], ids=str)
def test_fp8_as_deepseek_kimi_and_qwen_have_it(tmp_path, sizes, scale_dtype):
    """Scales float32 (DeepSeek-V3, Kimi K2), bfloat16 (Qwen3), ue8m0 (DeepSeek-V3.1)."""
    layers = {layer: disk.layer_tensors(layer, sizes, E4M3, scale_dtype) for layer in (3, 4)}
    disk.write(tmp_path, {**layers[3], **layers[4]}, config=disk.fp8_config(sizes[0]))
    assert expert_layers(tmp_path) == {3: sizes[0], 4: sizes[0]}
    for layer, tensors in layers.items():
        experts = load_experts(tmp_path, layer)
        assert (experts.num_experts, experts.gate_up.ndim) == (sizes[0], 3)
        check_layer(experts, tensors, layer, sizes, kind="weight_scale_inv")
    if sizes[2] % 128 == 0:
        assert experts.gate_up.block == (128, 128)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32), np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("names", [DEEPSEEK, MIXTRAL], ids=["deepseek", "mixtral"])
def test_unquantised(tmp_path, names, dtype):
    tensors = disk.layer_tensors(0, SIZES, dtype, names=names)
    disk.write(tmp_path, tensors, config={"model_type": "mixtral", "num_local_experts": 4})
    experts = load_experts(tmp_path, 0)
    if dtype == np.float16:
        assert experts.gate_up.dtype == np.float32
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    check_layer(experts, tensors, 0, SIZES, names)


def test_names_of_deepseeks_own_inference_code(tmp_path):
    names = ("layers.{layer}.ffn.experts.{expert}.{part}.{kind}", ("w1", "w3", "w2"))
    tensors = disk.layer_tensors(5, SIZES, E4M3, E8M0, names, kind="scale")
    check_layer(load_experts(disk.write(tmp_path, tensors), 5), tensors, 5, SIZES, names, "scale")


def test_exponents_as_bytes_and_other_blocks(tmp_path):
    block = (64, 32)
    tensors = disk.layer_tensors(1, SIZES, E4M3, E8M0, block=block)
    raw = {n: t.view(np.uint8) if t.dtype == E8M0 else t for n, t in tensors.items()}
    disk.write(tmp_path / "config", raw, config=disk.fp8_config(4, block))
    check_layer(load_experts(tmp_path / "config", 1), tensors, 1, SIZES, kind="weight_scale_inv", block=block)
    disk.write(tmp_path / "argument", raw)
    experts = load_experts(tmp_path / "argument", 1, block=block)
    check_layer(experts, tensors, 1, SIZES, kind="weight_scale_inv", block=block)


def merged(tensors, layer, sizes, scaled):
    """The same layer as transformers v5 keeps it in memory."""
    stem = f"model.layers.{layer}.mlp.experts."
    result = {}
    for kind, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv"))[: 1 + scaled]:
        parts = [
            np.stack([tensors[f"{stem}{e}.{part}.{kind}"].view(np.uint8) for e in range(sizes[0])])
            for part in DEEPSEEK[1]
        ]
        like = tensors[f"{stem}0.up_proj.{kind}"].dtype
        result[f"{stem}gate_up_proj{suffix}"] = np.concatenate(parts[:2], axis=1).view(like)
        result[f"{stem}down_proj{suffix}"] = parts[2].view(like)
    return result


@pytest.mark.parametrize("sizes", [SIZES, *ODD], ids=str)
@pytest.mark.parametrize("scale_dtype", [None, np.dtype(np.float32), E8M0], ids=str)
def test_merged_tensors_of_transformers(tmp_path, sizes, scale_dtype):
    tensors = disk.layer_tensors(2, sizes, E4M3 if scale_dtype else BFLOAT16, scale_dtype)
    both = merged(tensors, 2, sizes, scale_dtype is not None)
    save_file(both, tmp_path / "model.safetensors")
    experts = load_experts(tmp_path, 2)
    check_layer(experts, tensors, 2, sizes, kind="weight_scale_inv" if scale_dtype else None)
    part = load_experts(tmp_path / "model.safetensors", 2, experts=(1, 2))
    same = [w[1:2].dequantize() if scale_dtype else w[1:2] for w in experts]
    for got, want in zip(part, same, strict=True):
        check_bytes(got.dequantize() if scale_dtype else got, want)
    assert expert_layers(tmp_path) == {2: sizes[0]}


@pytest.mark.parametrize("sizes", [SIZES, *ODD], ids=str)
@pytest.mark.parametrize("scale_format", ["float32", "bfloat16", "ue8m0", None])
@pytest.mark.parametrize("names", ["deepseek", "mixtral"])
def test_written_and_read_again(tmp_path, sizes, scale_format, names):
    types = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "ue8m0": E8M0, None: None}
    layout = DEEPSEEK if names == "deepseek" else MIXTRAL
    tensors = {}
    for layer in (3, 7):
        dtype = E4M3 if scale_format else BFLOAT16
        tensors |= disk.layer_tensors(layer, sizes, dtype, types[scale_format], layout)
    disk.write(tmp_path / "a", tensors)
    layers = ((layer, load_experts(tmp_path / "a", layer)) for layer in expert_layers(tmp_path / "a"))
    save_experts(tmp_path / "b", layers, names=names, scale_format=scale_format or "float32")
    listed = json.loads((tmp_path / "b" / INDEX).read_text())
    assert listed["weight_map"].keys() == tensors.keys()
    assert listed["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    from pyroute.checkpoints.files import Checkpoint

    again = Checkpoint("test", tmp_path / "b")
    for name, tensor in tensors.items():
        check_bytes(again[name], tensor)


def test_blocks_of_a_half_multiply_as_the_halves_do(tmp_path):
    """intermediate = 192: the layer on loaded FP8 weights is the layer on weights dequantised half by half."""
    sizes = (4, 256, 192)
    tensors = disk.layer_tensors(0, sizes, E4M3, np.dtype(np.float32))
    experts = load_experts(disk.write(tmp_path, tensors), 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 256), dtype=np.float32)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(9)]).astype(np.int32)
    weights = rng.random((9, 2), dtype=np.float32)
    got = pyroute.moe_forward(x, ids, weights, *experts)
    want = pyroute.moe_forward(x, ids, weights, *(w.dequantize() for w in experts))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_some_experts_and_the_files_that_they_need(tmp_path):
    """One process of expert parallelism reads its experts' files and no other."""
    tensors = {**disk.layer_tensors(3, SIZES, E4M3, np.dtype(np.float32))}
    names = sorted(tensors)
    weight_map = {n: f"part{int(n.split('.experts.')[1].split('.')[0]) // 2}.safetensors" for n in names}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    whole = load_experts(tmp_path, 3)
    (tmp_path / "part0.safetensors").unlink()
    half = load_experts(tmp_path, 3, experts=(2, 4))
    for got, want in zip(half, whole, strict=True):
        check_bytes(got.codes, want.codes[2:])
        check_bytes(got.scales, want.scales[2:])
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight of part0\.safetensors must be in a file that"):
        load_experts(tmp_path, 3)


def test_the_result_owns_its_memory(tmp_path):
    folder = disk.write(tmp_path, disk.layer_tensors(3, SIZES, E4M3, np.dtype(np.float32)))
    experts = load_experts(folder, 3)
    before = experts.gate_up.codes.tobytes()
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert experts.gate_up.codes.tobytes() == before
    assert experts.gate_up.codes.flags.writeable


def test_several_models_in_one_checkpoint(tmp_path):
    tensors = {}
    for prefix in ("thinker.model.", "talker.model."):
        names = (DEEPSEEK[0].replace("model.", prefix), DEEPSEEK[1])
        tensors |= disk.layer_tensors(0, SIZES, BFLOAT16, names=names)
    disk.write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"prefix must be one of 'talker\.model\.', 'thinker\.model\.', which all"):
        load_experts(tmp_path, 0)
    experts = load_experts(tmp_path, 0, prefix="thinker.model.")
    check_layer(experts, tensors, 0, SIZES, (DEEPSEEK[0].replace("model.", "thinker.model."), DEEPSEEK[1]))


def test_progress_names_each_expert(tmp_path, monkeypatch):
    from pyroute.bench import terminal

    seen = []

    class Bar:
        def __init__(self, total):
            self.total = total

        def __enter__(self):
            seen.append(self.total)
            return seen.append

        def __exit__(self, *_):
            seen.append("end")

    monkeypatch.setattr(terminal, "progress", Bar)
    folder = disk.write(tmp_path, disk.layer_tensors(3, SIZES, BFLOAT16))
    load_experts(folder, 3)
    assert seen == [4, *(f"layer 3, expert {e}" for e in range(4)), "end"]
    seen.clear()
    load_experts(folder, 3, progress=False)
    assert seen == []


# --- bad files --------------------------------------------------------------------------------------------------------

NAME = "model.layers.3.mlp.experts.2.up_proj.weight"
SCALE = NAME + "_scale_inv"


@pytest.fixture
def tensors():
    return disk.layer_tensors(3, SIZES, E4M3, np.dtype(np.float32))


def shorter(tensor):
    return np.ascontiguousarray(tensor[:-1])


BAD = {
    "missing": (lambda t: t.pop(NAME), rf"^load_experts: tensor {NAME} must be in .*{INDEX}, got none of that name$"),
    "no scale": (lambda t: t.pop(SCALE), rf"^load_experts: tensor {SCALE} must be in .*, got none of that name$"),
    "last": (
        lambda t: [t.pop(n) for n in list(t) if ".experts.3." in n],
        r"^load_experts: tensor model\.layers\.3\.mlp\.experts\.3\.gate_proj\.weight must be in ",
    ),
    "shape": (
        lambda t: t.update({NAME: shorter(t[NAME])}),
        rf"^load_experts: tensor {NAME} of model-\d+-of-00003\.safetensors must be float8_e4m3fn \[384, 256\], "
        r"got float8_e4m3fn \[383, 256\]$",
    ),
    "scale shape": (
        lambda t: t.update({SCALE: shorter(t[SCALE])}),
        rf"^load_experts: tensor {SCALE} of .* must be float32, bfloat16 or ue8m0 \[3, 2\], got float32 \[2, 2\]$",
    ),
    "type": (
        lambda t: t.update({NAME: t[NAME].astype(np.float32)}),
        rf"^load_experts: tensor {NAME} of .* must be float8_e4m3fn \[384, 256\], got float32 \[384, 256\]$",
    ),
    "scale type": (
        lambda t: t.update({SCALE: t[SCALE].astype(np.int64)}),
        rf"^load_experts: tensor {SCALE} of .* must be float32, bfloat16 or ue8m0 \[3, 2\], got int64 \[3, 2\]$",
    ),
    "axes": (
        lambda t: t.update({n: w.reshape(-1) for n, w in t.items() if n.endswith("gate_proj.weight")}),
        r"experts\.0\.gate_proj\.weight of .* must be float8_e4m3fn or float8_e5m2 beside scales, of 2 axes, got ",
    ),
    "packed int4": (
        lambda t: t.update({NAME.replace(".weight", ".weight_packed"): np.zeros((3, 3), np.int32)}),
        r"up_proj\.weight_packed of .* must be weights with or without scales, .*, got 'weight_packed'$",
    ),
    "int8": (
        lambda t: t.update({n: w.view(np.int8) for n, w in t.items() if w.dtype == E4M3}),
        r"experts\.0\.gate_proj\.weight of .* must be float8_e4m3fn or float8_e5m2 beside scales, .*got int8 \[",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tensor_is_named(tmp_path, tensors, case):
    change, sentence = BAD[case]
    change(tensors)
    disk.write(tmp_path, tensors, config=disk.fp8_config(4))
    with pytest.raises(ValueError, match=sentence) as caught:
        load_experts(tmp_path, 3)
    assert "\n" not in str(caught.value)


def test_fp8_without_scales(tmp_path, tensors):
    disk.write(tmp_path, {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")})
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight of .* must be bfloat16 or float32 or float16"):
        load_experts(tmp_path, 3)


def test_a_tensor_twice(tmp_path, tensors):
    folder = disk.write(tmp_path, tensors)
    extra = folder / "model-00001-of-00003.safetensors"
    names = [n for n, f in json.loads((folder / INDEX).read_text())["weight_map"].items() if f == extra.name]
    assert NAME not in names
    save_file({**{n: tensors[n] for n in names}, NAME: tensors[NAME]}, extra)
    with pytest.raises(ValueError, match=rf"tensor {NAME} of model-.* must be in one file only, got another of that"):
        load_experts(folder, 3)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"tensor {NAME} must be in one file only, got it in model-00001"):
        load_experts(folder, 3)


@pytest.mark.parametrize("cut", [1, 1000, 10**5])
def test_a_truncated_file(tmp_path, tensors, cut):
    folder = disk.write(tmp_path, tensors)
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"file .*00002-of-00003\.safetensors must be an intact safetensors file, got"):
        load_experts(folder, 3)


HEADERS = {
    "empty": b"",
    "pickle": pickle.dumps({"weight": [1.0, 2.0]}),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "two of a name": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
    b'"data_offsets":[0,1]}}',
    "hole": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_that_is_none(tmp_path, tensors, case):
    folder = disk.write(tmp_path, tensors)
    body = HEADERS[case]
    if body.startswith(b'{"'):
        body = len(body).to_bytes(8, "little") + body + b"\0" * (2 if case == "hole" else 1)
    (folder / "model-00001-of-00003.safetensors").write_bytes(body)
    with pytest.raises(
        ValueError, match=r"^load_experts: file .* must be an intact safetensors file, got \S"
    ) as caught:
        load_experts(folder, 3)
    assert "\n" not in str(caught.value)


INDICES = {
    "no JSON": "{",
    "no map": "{}",
    "a list": "[]",
    "numbers": '{"weight_map": {"a": 3}}',
    "twice": '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    "elsewhere": '{"weight_map": {"a": "../x.safetensors"}}',
    "pickle": '{"weight_map": {"a": "pytorch_model.bin"}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", INDICES)
def test_a_bad_index(tmp_path, case):
    (tmp_path / INDEX).write_text(INDICES[case])
    with pytest.raises(ValueError, match=r"^load_experts: (file .* must be an index with|tensor a must be in a safe)"):
        load_experts(tmp_path, 3)


CONFIGS = {
    "text": ({"quantization_config": "fp8"}, r"quantization_config of .* must be a JSON object"),
    "list": ({"quantization_config": [1]}, r"quantization_config of .* must be a JSON object"),
    "text_config": ({"text_config": "x"}, r"text_config of .* must be a JSON object"),
    "nested": ({"text_config": {"quantization_config": 3}}, r"quantization_config of .* must be a JSON object"),
    "one number": ({"quantization_config": {"weight_block_size": 128}}, r"block must be a pair \(rows, cols\), got"),
    "letters": ({"quantization_config": {"weight_block_size": ["a", 1]}}, "block must be an integer"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config(tmp_path, tensors, case):
    config, sentence = CONFIGS[case]
    disk.write(tmp_path, tensors, config=config)
    with pytest.raises((ValueError, TypeError), match=f"^load_experts: {sentence}"):
        load_experts(tmp_path, 3)


def test_a_config_nested_too_deep(tmp_path, tensors):
    disk.write(tmp_path, tensors)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"^load_experts: file .*config\.json must be JSON, got "):
        load_experts(tmp_path, 3)


@pytest.mark.parametrize("shapes", [((0, 16, 16), (0, 16, 8)), ((), ())], ids=["no experts", "no axes"])
@pytest.mark.parametrize("read", [lambda path: load_experts(path, 3), pyroute.expert_layers])
def test_merged_tensors_without_experts(tmp_path, read, shapes):
    names = [f"model.layers.3.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    disk.write(tmp_path, {n: np.zeros(shape, np.float32) for n, shape in zip(names, shapes, strict=True)})
    with pytest.raises(ValueError, match=rf"^\w+: tensor {names[1]} .* with an expert, got \["):
        read(tmp_path)


def test_numbers_that_no_model_has_are_no_numbers(tmp_path, tensors):
    """int() refuses more than 4,300 digits in words of its own."""
    tensors[f"model.layers.{'9' * 5000}.mlp.experts.0.up_proj.weight"] = tensors[NAME]
    tensors[NAME.replace("experts.2", "experts.\u0663")] = tensors[NAME]
    disk.write(tmp_path, tensors)
    assert pyroute.expert_layers(tmp_path) == {3: 4}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.safetensors", "folder"), ("model.safetensors", "link"), ("config.json", "folder"), (INDEX, "folder")],
)
def test_a_file_that_cannot_be_read(tmp_path, tensors, name, kind):
    if name == "config.json":
        disk.write(tmp_path, tensors)
    if kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match=rf"^load_experts: file .*{name} must be a file that can be read, got "):
        load_experts(tmp_path, 3)


def test_a_name_of_several_lines_is_one_sentence(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a\n\x1b[1mb": "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"^load_experts: tensor a \[1mb must be in a safetensors file") as caught:
        load_experts(tmp_path, 3)
    assert str(caught.value).isprintable()


def test_pickles_are_never_read(tmp_path):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ValueError, match=r"got only pytorch_model\.bin, which can run code when read"):
        load_experts(tmp_path, 0)
    shutil.copy(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must be an intact safetensors file"):
        load_experts(tmp_path, 0)
    assert not (tmp_path / "ran").exists()


def test_bad_arguments(tmp_path, tensors):
    folder = disk.write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"layer must be one with experts in .*, got 4; they are 3\.\.3"):
        load_experts(folder, 4)
    with pytest.raises(TypeError, match="layer must be an integer"):
        load_experts(folder, "3")
    with pytest.raises(FileNotFoundError, match="path must be a file or folder that exists"):
        load_experts(folder / "nowhere", 3)
    with pytest.raises(OSError, match=r"^load_experts: path must be a file that can be read, got .*name too long"):
        load_experts(folder / ("x" * 5000), 3)
    with pytest.raises(TypeError, match="path must be a file or folder, got int"):
        load_experts(3, 3)
    with pytest.raises(ValueError, match=r"experts\[1\] must be in 3\.\.num_experts \(4\), got 5"):
        load_experts(folder, 3, experts=(2, 5))
    with pytest.raises(TypeError, match=r"experts must be a pair \(first, end\)"):
        load_experts(folder, 3, experts=[0])
    with pytest.raises(TypeError, match=r"block must be a pair \(rows, cols\)"):
        load_experts(folder, 3, block=128)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object, got list"):
        load_experts(folder, 3)


def test_what_cannot_be_written(tmp_path):
    rng = np.random.default_rng(0)
    x, down = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 384, 128), (2, 128, 192)))
    fp8 = Experts(*(pyroute.quantize_fp8(w, block=(128, 128)) for w in (x, down)))
    with pytest.raises(
        ValueError, match=r"gate_up of layer 3 must be in blocks of \(128, 128\), as down, that restart"
    ):
        save_experts(tmp_path, {3: fp8})
    plain = Experts(x, down)
    with pytest.raises(
        ValueError, match=r"gate_up of layer 3 must be of shape \[num_experts, 2 \* intermediate, hidden"
    ):
        save_experts(tmp_path, {3: Experts(x[:, :200], plain.down)})
    with pytest.raises(TypeError, match="down of layer 3 must be an Fp8Array, bfloat16 or float32, got float64"):
        save_experts(tmp_path, {3: Experts(x, x.astype(np.float64))})
    with pytest.raises(TypeError, match="gate_up of layer 3 must be float32, as down, got bfloat16"):
        save_experts(tmp_path, {3: Experts(x.astype(BFLOAT16), plain.down)})
    rounded = Experts(*(pyroute.quantize_fp8(w, block=(64, 64)) for w in plain))
    with pytest.raises(ValueError, match=r"scales of layer 3 must be bfloat16 without rounding \(scale_format\), got"):
        save_experts(tmp_path, {3: rounded}, scale_format="bfloat16")
    with pytest.raises(ValueError, match="layers must be each layer once, got 3 twice"):
        save_experts(tmp_path, [(3, plain), (3, plain)])
    with pytest.raises(ValueError, match="names must be one of 'deepseek', 'mixtral'"):
        save_experts(tmp_path, {}, names="gpt")
    assert not (tmp_path / INDEX).exists()
    save_experts(tmp_path, {3: plain})
    with pytest.raises(ValueError, match=r"path must be a folder without model\.safetensors\.index\.json"):
        save_experts(tmp_path, {4: plain})


def test_import_does_not_load_safetensors_and_its_absence_is_a_sentence(tmp_path):
    code = f"""
import sys
import pyroute
assert "safetensors" not in sys.modules
sys.modules["safetensors"] = None
try:
    pyroute.load_experts({str(tmp_path)!r}, 0)
except ImportError as error:
    assert 'needs the safetensors package: pip install "pyroute-moe[checkpoints]"' in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
