"""FP8 experts of transformers on pyroute, beside its own FP8 code with the kernel it has no CPU version of in torch."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import transformers_families as tiny  # noqa: E402
from transformers.integrations import finegrained_fp8 as fp8  # noqa: E402

from pyroute.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def installed():
    integration.install()
    yield
    integration.uninstall()


def quantise(x, block):
    """Codes and scales of [..., rows, cols] in blocks, the last ones partial."""
    rows, cols = x.shape[-2:]
    padded = torch.nn.functional.pad(x.float(), (0, -cols % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scales = blocks.abs().amax(dim=(-3, -1)) / 448
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (blocks / scales[..., :, None, :, None]).flatten(-2, -1).flatten(-3, -2)[..., :rows, :cols]
    return codes.to(E4M3), scales


def dequantised(codes, scales, block):
    rows, cols = codes.shape[-2:]
    grid = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return codes.float() * grid[..., :rows, :cols]


def matmul(x, weight, scales, block_size, output_dtype=None, activation_scale=None):
    """What ``finegrained-fp8``'s kernel computes for one matrix: rows quantised by 128 columns, products in float32."""
    assert activation_scale is None
    rows = dequantised(*quantise(x, (1, block_size[1])), (1, block_size[1]))
    if scales.dtype == torch.float8_e8m0fnu:  # rows as the weights: powers of two
        row_scales = quantise(x, (1, block_size[1]))[1]
        row_scales = torch.exp2(torch.ceil(torch.log2(row_scales)))
        padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block_size[1]))
        blocks = padded.unflatten(-1, (-1, block_size[1])) / row_scales[..., None]
        rows = dequantised(blocks.flatten(1)[:, : x.shape[1]].to(E4M3), row_scales, (1, block_size[1]))
    return (rows @ dequantised(weight, scales, block_size).T).to(x.dtype)


@pytest.fixture
def their_kernel(monkeypatch):
    kernel = fp8.FineGrainedFP8(matmul=matmul, batched_matmul=None, grouped_matmul=None)
    monkeypatch.setattr(fp8, "_FINEGRAINED_FP8", kernel)


def fp8_model(family, intermediate=256, scale_fmt="float"):
    """A tiny model whose experts, and only they, are transformers' FP8Experts."""
    sizes = {
        "moe_intermediate_size": intermediate,
        "intermediate_size": intermediate,
        "hidden_size": 256,
        "head_dim": 32,
    }
    before, tiny.SIZES = tiny.SIZES, {**tiny.SIZES, **sizes}
    try:
        model = tiny.tiny_model(family)
    finally:
        tiny.SIZES = before
    plain = {name: m for name, m in model.named_modules() if name.endswith(".experts")}
    assert plain
    keep = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    config = transformers.FineGrainedFP8Config(modules_to_not_convert=keep, scale_fmt=scale_fmt)
    fp8.replace_with_fp8_linear(model, keep, config)
    for name, old in plain.items():
        module = model.get_submodule(name)
        assert type(module) is fp8.FP8Experts
        halves = [quantise(h, (128, 128)) for h in old.gate_up_proj.data.chunk(2, dim=1)]
        down = quantise(old.down_proj.data, (128, 128))
        tensors = {
            "gate_up_proj": torch.cat([h[0].view(torch.uint8) for h in halves], 1).view(E4M3),
            "gate_up_proj_scale_inv": torch.cat([h[1] for h in halves], 1),
            "down_proj": down[0], "down_proj_scale_inv": down[1],
        }  # fmt: skip
        for key, tensor in tensors.items():
            if scale_fmt == "ue8m0" and key.endswith("scale_inv"):
                tensor = torch.exp2(torch.ceil(torch.log2(tensor))).to(torch.float8_e8m0fnu)
            expected = getattr(module, key)
            assert (expected.shape, expected.dtype) == (tensor.shape, tensor.dtype)
            setattr(module, key, torch.nn.Parameter(tensor, requires_grad=expected.requires_grad))
    return model.eval()


def assert_close(got, want, name, bound, floor=0.0):
    assert got.shape == want.shape, name
    assert (got - want).abs().max() <= bound * want.abs().max() + floor, name


def run(model, ids):
    model.zero_grad(set_to_none=True)
    y = model(input_ids=ids).logits
    y.square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Logits: a value between two codes falls the other way now and then, and a code is 1/16 of its value. Gradients: that
# of a routing weight is taken at the rows before they are quantised, theirs after: 1/32 of each value, less of their
# sum. What comes to the experts' input has no such difference: 1e-5 where the experts are alone.
LOGITS, GRADIENTS = 2e-3, 8e-2


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v4", "minimax_m3_vl"])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_a_model_with_fp8_experts(family, scale_fmt, their_kernel):
    """Forward as transformers' FP8 eager; gradients of everything that is not FP8 too."""
    model = fp8_model(family, scale_fmt=scale_fmt)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    model.set_experts_implementation("eager")
    logits, gradients = run(model, ids)
    model.set_experts_implementation("pyroute")
    again, others = run(model, ids)
    assert_close(again, logits, "logits", LOGITS)
    names = {n for n in gradients if ".experts." not in n}
    assert names == {n for n in others if ".experts." not in n}
    floor = 1e-7 * float(max(g.abs().max() for g in gradients.values()))  # for those that are zero but for rounding
    for name in names:
        assert_close(others[name], gradients[name], name, GRADIENTS, floor)


def experts_call(module, forward, num_tokens=9, sentinels=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, 256, generator=generator).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 2, generator=generator).requires_grad_()
    if sentinels:
        ids[::2, 1] = 8
    y = forward(module, x, ids, weights)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weights))]


def check_experts(got, want):
    """The result, and the gradients of tokens and of routing weights."""
    narrow = 4e-2 if got[0].dtype == torch.bfloat16 else 1e-5  # their rows are rounded to bfloat16 before codes
    for mine, theirs, name in zip(got, want, ("y", "x", "weights"), strict=True):
        assert_close(mine.float(), theirs.float(), name, GRADIENTS if name == "weights" else narrow)


def experts_of(model):
    return next(m for m in model.modules() if isinstance(m, fp8.FP8Experts))


@pytest.mark.parametrize("intermediate", [384, 96, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_a_block_cuts(intermediate, dtype, their_kernel):
    """At 96 and 64 gate and up are a block each, cut short; as one matrix they are blocked for each half."""
    module = experts_of(fp8_model("deepseek_v3", intermediate))
    eager = fp8.FP8Experts.forward.__wrapped__

    def by_halves(self, x, ids, weights):
        """Their loop on gate and up apart, as on disk: their own matrix of both is not cut where up begins."""
        twin = copy.copy(self)
        twin.linear = lambda rows, w, s, activation_scale=None: (
            torch.cat(
                [fp8.FP8Experts.linear(self, rows, *part) for part in zip(w.chunk(2), s.chunk(2), strict=True)], -1
            )
            if w.shape[0] == 2 * intermediate and s.shape[0] == 2 * -(-intermediate // 128)
            else fp8.FP8Experts.linear(self, rows, w, s)
        )
        return eager(twin, x, ids, weights)

    got = experts_call(module, integration.fp8_experts_forward, dtype=dtype)
    check_experts(got, experts_call(module, by_halves, dtype=dtype))


def test_sentinel_ids_are_not_routed(their_kernel):
    module = experts_of(fp8_model("deepseek_v3"))
    eager = fp8.FP8Experts.forward.__wrapped__
    got = experts_call(module, integration.fp8_experts_forward, sentinels=True)
    check_experts(got, experts_call(module, eager, sentinels=True))
    assert not got[2][::2, 1].any()


def test_weights_are_frozen():
    module = experts_of(fp8_model("deepseek_v3"))
    assert module.gate_up_proj.requires_grad  # transformers leaves it so
    experts_call(module, integration.fp8_experts_forward)
    assert all(p.grad is None for p in module.parameters())


def test_what_is_not_covered_says_so():
    module = experts_of(fp8_model("deepseek_v3"))
    module.activation_scheme = "static"
    with pytest.raises(NotImplementedError, match="FP8Experts on pyroute: scales of activations must be dynamic"):
        experts_call(module, integration.fp8_experts_forward)
    module.activation_scheme = "dynamic"
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(8, 512, 128, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"weights must be float8_e4m3fn, got torch\.int8"):
        experts_call(module, integration.fp8_experts_forward)


def test_uninstall_takes_it_back_from_both_registries():
    assert "pyroute" in fp8.ALL_FP8_EXPERTS_FUNCTIONS
    integration.install()
    integration.uninstall()
    integration.uninstall()
    assert "pyroute" not in fp8.ALL_FP8_EXPERTS_FUNCTIONS
