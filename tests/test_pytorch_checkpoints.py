"""Checkpoints as modules: trainable in a wider type, FP8 as they are on disk, through conversions and compilers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import checkpoint_files as disk  # noqa: E402

import pyroute  # noqa: E402
from pyroute.pytorch import Fp8Experts, GroupedExperts, MoELayer, TopKRouter, load_experts  # noqa: E402

SIZES = (6, 256, 192)


@pytest.fixture
def fp8_folder(tmp_path):
    return disk.write(tmp_path, disk.layer_tensors(3, SIZES, disk.E4M3, np.dtype(np.float32)))


def inputs(num_tokens=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, SIZES[1], generator=generator)
    ids = torch.stack([torch.randperm(SIZES[0], generator=generator)[:2] for _ in range(num_tokens)])
    return x, ids, torch.rand(num_tokens, 2, generator=generator)


def test_fp8_module_is_the_core_to_the_byte(fp8_folder):
    module = load_experts(fp8_folder, 3)
    assert isinstance(module, Fp8Experts)
    assert module.down_proj.dtype == torch.float8_e4m3fn
    x, ids, weights = inputs()
    core = pyroute.load_experts(fp8_folder, 3)
    for quantize in (False, True):
        module.quantize_activations = quantize
        want = pyroute.moe_forward(x.numpy(), ids.numpy(), weights.numpy(), *core, quantize_activations=quantize)
        assert np.array_equal(module(x, ids, weights).numpy(), want)


def test_gradients_flow_through_frozen_weights(fp8_folder):
    frozen = load_experts(fp8_folder, 3)
    trained = load_experts(fp8_folder, 3, dtype=torch.float32)
    assert isinstance(trained, GroupedExperts)
    assert not list(frozen.parameters())
    assert [p.requires_grad for p in trained.parameters()] == [True, True]
    results = []
    for module in (frozen, trained):
        x, ids, weights = inputs()
        x.requires_grad_()
        weights.requires_grad_()
        module(x, ids, weights).square().sum().backward()
        results.append((x.grad, weights.grad))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.parameters())


@pytest.mark.parametrize("convert", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_conversions_leave_codes_and_scales(fp8_folder, convert):
    module = load_experts(fp8_folder, 3)
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in module.state_dict().items()}
    convert(module)
    assert module.down_proj.dtype == torch.float8_e4m3fn
    assert module.down_proj_scale_inv.dtype == torch.float32
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name]), name


def test_state_dict_round_trip(fp8_folder):
    module = load_experts(fp8_folder, 3)
    other = load_experts(fp8_folder, 3)
    for buffer in other.buffers():
        buffer.view(torch.uint8).zero_()
    other.load_state_dict(module.state_dict())
    x, ids, weights = inputs()
    assert torch.equal(other(x, ids, weights), module(x, ids, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_values_are_rounded_once(fp8_folder, dtype):
    module = load_experts(fp8_folder, 3, dtype=dtype)
    core = pyroute.load_experts(fp8_folder, 3)
    for got, want in zip(module.parameters(), core, strict=True):
        assert torch.equal(got, torch.from_numpy(want.dequantize()).to(dtype))


def test_unquantised_weights_keep_their_type(tmp_path):
    tensors = disk.layer_tensors(0, SIZES, disk.BFLOAT16)
    disk.write(tmp_path, tensors)
    module = load_experts(tmp_path, 0, activation="swiglu_clamp", limit=7.0)
    assert (type(module), module.down_proj.dtype, module.limit) == (GroupedExperts, torch.bfloat16, 7.0)
    raw = tensors["model.layers.0.mlp.experts.5.down_proj.weight"]
    assert module.down_proj[5].detach().view(torch.int16).numpy().tobytes() == raw.tobytes()


def test_in_a_layer_and_compiled(fp8_folder):
    router = TopKRouter(pyroute.RouterConfig(SIZES[0], 2), SIZES[1])
    layer = MoELayer(router, load_experts(fp8_folder, 3))
    x = torch.randn(2, 5, SIZES[1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_bad_arguments(fp8_folder):
    with pytest.raises(TypeError, match=r"load_experts: dtype must be torch\.float32, torch\.bfloat16 or None, got"):
        load_experts(fp8_folder, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match="activation must be a gated one without biases"):
        load_experts(fp8_folder, 3, dtype=torch.float32, activation="relu2")
    with pytest.raises(TypeError, match="Fp8Experts: gate_up must be an Fp8Tensor, got Tensor"):
        Fp8Experts(torch.zeros(1), torch.zeros(1))
