"""precision="fp8" in PyTorch: the core's bytes, gradients to the wide weights, codes made once a step."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
from conftest import assert_same_bytes
from test_pytorch_ops import H, numpy, problem

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import pyroute  # noqa: E402
import pyroute.pytorch as pt  # noqa: E402
from pyroute import RouterConfig  # noqa: E402
from pyroute.pytorch import GroupedExperts, MoELayer, SharedExpert, TopKRouter, _fp8_weights  # noqa: E402

CONFIG = RouterConfig(16, 4, "sigmoid", renormalize="sum", scaling_factor=2.5)
SCALES = {"fp8": "float32", "fp8_ue8m0": "ue8m0"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)
    pt.forget_fp8_weights()


@pytest.fixture
def made(monkeypatch):
    """The weights that were quantised, in order."""
    calls = []
    quantize = _fp8_weights.quantize_fp8
    monkeypatch.setattr(_fp8_weights, "quantize_fp8", lambda x, **how: calls.append(x.shape) or quantize(x, **how))
    return calls


def layer_of(**options):
    return MoELayer(
        TopKRouter(CONFIG, H), GroupedExperts(16, H, 24, precision="fp8", **options),
        SharedExpert(H, 48, precision="fp8", **options),
    )  # fmt: skip


@pytest.mark.parametrize("precision", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_precision_is_the_cores_recipe(dtype, precision):
    x, ids, weights, w_gate_up, w_down, b_gate_up, b_down = problem(dtype)
    given = (x, weights, w_gate_up, w_down, b_gate_up, b_down)
    y = pt.moe_forward(x, ids, weights, w_gate_up, w_down, b_gate_up=b_gate_up, b_down=b_down, precision=precision)
    n = [numpy(tensor) for tensor in given]
    quantised = [pyroute.quantize_fp8(w, block=(128, 128), scale_format=SCALES[precision]) for w in n[2:4]]
    want, saved = pyroute.moe_forward(
        n[0], numpy(ids), n[1], *quantised, b_gate_up=n[4], b_down=n[5], quantize_activations=SCALES[precision],
        quantize_gradients=True, return_saved=True,
    )  # fmt: skip
    assert_same_bytes(numpy(y), want)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, given, upstream)
    for mine, core, like in zip(grads, pyroute.moe_backward(numpy(upstream), saved), n, strict=True):
        assert_same_bytes(numpy(mine), core.astype(like.dtype))
    with torch.no_grad():
        direct = pt.moe_forward(
            x, ids, weights, w_gate_up, w_down, b_gate_up=b_gate_up, b_down=b_down, precision=precision
        )
    assert torch.equal(direct, y)


class Through(torch.autograd.Function):
    """A quantised value with the gradient of the value itself."""

    @staticmethod
    def forward(ctx, x, block):
        return pt.quantize_fp8(x.float(), block=block, scale_format="ue8m0").dequantize().double()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Linear(torch.autograd.Function):
    """x @ w.T as the recipe has it: what each of the three products multiplies is written out."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return Through.apply(x, (1, 128)) @ Through.apply(w, (128, 128)).T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad_x = Through.apply(grad, (1, 128)) @ Through.apply(w, (128, 128))
        return grad_x.float().double(), Through.apply(grad, (128, 1)).T @ Through.apply(x, (128, 1))


class Stored(torch.autograd.Function):
    """Rows between two steps are float32, in both directions."""

    @staticmethod
    def forward(ctx, x):
        return x.float().double()

    @staticmethod
    def backward(ctx, grad):
        return grad.float().double()


def test_straight_through_gradients_against_autograd_in_float64():
    """The layer as three products with a quantiser at each operand, in float64, expert by expert."""
    x, ids, weights, w_gate_up, w_down, *_ = problem(requires_grad=True)
    y = pt.moe_forward(x, ids, weights, w_gate_up, w_down, precision="fp8_ue8m0", weight_on="pre_down")
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weights, w_gate_up, w_down), upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weights, w_gate_up, w_down)]
    want = torch.zeros_like(wide[0])
    for e in range(w_down.shape[0]):
        tokens, slots = torch.nonzero(ids == e, as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up = Stored.apply(Linear.apply(wide[0][tokens], wide[2][e])).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up * wide[1][tokens, slots, None]
        want = want.index_add(0, tokens, Stored.apply(Linear.apply(Stored.apply(hidden), wide[3][e])))
    assert (y.double() - want).abs().max() <= 1e-5 * want.abs().max()
    # the routing weight multiplies after the down projection's dgrad in the layer and before it here: codes of the
    # same direction with another scale, so these two are equal where weights are powers of two
    grads = torch.autograd.grad(want, wide, upstream.double())
    for name, mine, theirs in zip(("x", "topk_weights", "w_gate_up", "w_down"), got, grads, strict=True):
        assert (mine.double() - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_wide_experts_and_fp8_experts_agree_to_fp8():
    layer = layer_of()
    wide = copy.deepcopy(layer)
    pt.set_precision(wide, None)
    assert [m.precision for m in (wide.experts, wide.shared, layer.experts)] == [None, None, "fp8"]
    x = torch.randn(3, 40, H)
    grads = []
    for module in (layer, wide):
        y = module(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for mine, theirs in zip(*grads, strict=True):
        assert 0.001 < (mine - theirs).norm() / theirs.norm() < 0.12


def test_weights_are_quantised_once_a_step(made):
    layer = layer_of()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for step in range(3):
        for _ in range(4):  # micro-batches
            layer(torch.randn(9, H)).square().sum().backward()
        checkpoint(layer, torch.randn(9, H), use_reentrant=False).sum().backward()
        with torch.no_grad():
            layer(torch.randn(9, H))
        assert len(made) == 4 * (step + 1)
        before = layer(torch.ones(1, H))
        optimizer.step()
        assert not torch.equal(layer(torch.ones(1, H)), before)
    assert len(made) == 16


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adam(p, foreach=False),
    ],
    ids=["SGD", "AdamW foreach", "AdamW fused", "Adam"],
)
def test_every_write_that_pytorch_counts_is_seen(optimizer, made):
    experts = layer_of().experts
    x, ids, weights, *_ = problem(requires_grad=False)

    def fresh():
        with torch.no_grad():
            got = experts(x, ids, weights)
            pt.forget_fp8_weights()
            assert torch.equal(got, experts(x, ids, weights))

    writes = [
        lambda: optimizer(experts.parameters()).step(),
        lambda: experts.load_state_dict({k: v + 1 for k, v in experts.state_dict().items()}),
        lambda: experts.reset_parameters(),
        lambda: setattr(experts.down_proj, "data", torch.randn_like(experts.down_proj)),
        lambda: experts.bfloat16().float(),
        lambda: torch.nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in experts.parameters())),
                                                    experts.parameters()),
    ]  # fmt: skip
    for write in writes:
        experts(x, ids, weights).sum().backward()
        write()
        fresh()
    experts.down_proj.data.mul_(2)  # uncounted: by hand
    pt.forget_fp8_weights()
    fresh()


def test_codes_live_as_long_as_their_weight():
    layer = layer_of()
    with torch.no_grad():
        layer(torch.randn(5, H))
    assert len(_fp8_weights._forms) == 4
    del layer
    gc.collect()
    assert len(_fp8_weights._forms) == 0
    with torch.inference_mode():
        inside = layer_of()
        inside(torch.randn(5, H))
    assert len(_fp8_weights._forms) == 0


def test_backward_after_a_write_is_pytorchs_error():
    layer = layer_of()
    y = layer(torch.randn(9, H)).sum()
    with torch.no_grad():
        layer.experts.down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_break_and_quantised_once(made):
    torch._dynamo.reset()
    layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 17):
        x = torch.randn(num_tokens, H, requires_grad=True)
        y = compiled(x)
        mine = [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]
        y = layer(x)
        theirs = [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(mine, theirs, strict=True))
    assert len(made) == 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bytes(use_reentrant):
    layer = layer_of()
    x = torch.randn(19, H, requires_grad=True)
    results = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x.grad = None
        y = forward(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_quantises_the_float32_master():
    layer = layer_of()
    x = torch.randn(9, H)
    routing = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.experts(x, routing.topk_idx, routing.topk_weights)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.experts.down_proj.grad.dtype == torch.float32
    weights = [numpy(w) for w in (layer.experts.gate_up_proj, layer.experts.down_proj)]
    want = pyroute.moe_forward(
        numpy(x.bfloat16()), numpy(routing.topk_idx), numpy(routing.topk_weights),
        *(pyroute.quantize_fp8(w, block=(128, 128)) for w in weights), quantize_activations=True,
    )  # fmt: skip
    assert_same_bytes(numpy(y), want)


def test_frozen_fp8_weights_take_part_as_they_are(made):
    x, ids, weights, w_gate_up, w_down, *_ = problem(torch.bfloat16)
    frozen = [pt.quantize_fp8(w.detach(), block=(128, 128)) for w in (w_gate_up, w_down)]
    y = pt.moe_forward(x, ids, weights, *frozen, precision="fp8")
    assert torch.equal(y, pt.moe_forward(x, ids, weights, w_gate_up, w_down, precision="fp8"))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert w_down.grad is None
    assert len(made) == 2


def test_a_wrong_precision_is_one_sentence():
    x, ids, weights, w_gate_up, w_down, *_ = problem()
    for call, function in (
        (lambda p: pt.moe_forward(x, ids, weights, w_gate_up, w_down, precision=p), "moe_forward"),
        (lambda p: GroupedExperts(4, 8, 8, precision=p), "GroupedExperts"),
        (lambda p: pt.set_precision(torch.nn.Identity(), p), "set_precision"),
    ):
        with pytest.raises(ValueError, match=rf"^{function}: precision must be one of None, 'fp8', 'fp8_ue8m0', got "):
            call("int8")
        with pytest.raises((TypeError, ValueError), match=rf"^{function}: precision must be one of None, 'fp8'"):
            call(8)
    with pytest.raises(ValueError, match=r"^moe_forward: quantize_activations must be False with precision 'fp8'"):
        pt.moe_forward(x, ids, weights, w_gate_up, w_down, precision="fp8", quantize_activations=True)
    assert "precision='fp8'" in repr(layer_of())


def test_two_runs_give_the_same_bytes():
    torch.manual_seed(0)
    x, layer = torch.randn(50, H), layer_of()
    first, second = (
        [layer(x), *torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))] for _ in range(2)
    )
    assert all(np.array_equal(numpy(a), numpy(b)) for a, b in zip(first, second, strict=True))
