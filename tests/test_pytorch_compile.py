"""The ops under torch.compile, torch.export, autocast, checkpointing and threads."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402

import pyroute.pytorch as pt  # noqa: E402
from pyroute import RouterConfig  # noqa: E402

E, H, INNER = 16, 32, 24
CONFIG = RouterConfig(
    E, 4, "sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum", renormalize="sum", scaling_factor=2.5
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own


class Layer(torch.nn.Module):
    """Every op once, alignment and masks included."""

    def __init__(self, config=CONFIG):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        shapes = {"router": (E, H), "w_gate_up": (E, 2 * INNER, H), "w_down": (E, H, INNER)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator) / 4))
        self.config = config

    def forward(self, x):
        logits = pt.router_logits(x, self.router)
        gating = pt.topk_gating(logits, self.config, balance_loss_coef=0.01, z_loss_coef=0.001)
        plan = pt.plan_routes(gating.topk_idx, E, alignment=8)
        rows = pt.permute(x, plan)
        gate, up = pt.grouped_gemm(rows, self.w_gate_up, plan.expert_offsets).chunk(2, dim=-1)
        results = pt.grouped_gemm(torch.nn.functional.silu(gate) * up, self.w_down, plan.expert_offsets)
        by_hand = pt.unpermute(results, plan, gating.topk_weights)
        layer = pt.moe_forward(x, gating.topk_idx, gating.topk_weights, self.w_gate_up, self.w_down)
        q = pt.permute_quantize(x.detach(), plan)
        return by_hand + layer + pt.z_loss(logits).float() + q.dequantize().sum() * 1e-3


def run(function, layer, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.fixture(autouse=True)
def own_cache():
    """A cached graph of an earlier build calls an operation with the arguments that it had then."""
    inductor = pytest.importorskip("torch._inductor.utils")
    with inductor.fresh_cache():
        yield


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_dynamic_tokens_is_one_graph(backend):
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counted)
    for num_tokens in (
        17,
        40,
        65,
    ):  # inductor writes other sums for up to 4096 elements, and compiles anew between them
        x = torch.randn(num_tokens, H)
        assert_close(run(compiled, layer, x), run(layer, layer, x))
    assert len(graphs) == 1
    with torch.no_grad():
        assert_close([compiled(x)], [layer(x)])


def test_compile_sees_another_config():
    torch._dynamo.reset()
    x = torch.randn(9, H)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    first = compiled(x)
    layer.config = RouterConfig(E, 2, renormalize="sum")
    assert_close([compiled(x)], [layer(x)])
    assert not torch.equal(compiled(x), first)


def test_export_with_dynamic_tokens():
    layer = Layer()
    shapes = {"x": {0: torch.export.Dim("num_tokens", min=2, max=4096)}}
    program = torch.export.export(layer, (torch.randn(9, H),), dynamic_shapes=shapes)
    for num_tokens in (2, 31):
        x = torch.randn(num_tokens, H)
        assert_close([program.module()(x)], [layer(x)])


def test_autocast_casts_the_gemms_and_not_the_router():
    layer = Layer()
    x = torch.randn(9, H)
    gating = pt.topk_gating(pt.router_logits(x, layer.router), CONFIG)
    weights = layer.w_gate_up, layer.w_down
    with torch.autocast("cpu", torch.bfloat16):
        logits = pt.router_logits(x, layer.router)
        y = pt.moe_forward(x, gating.topk_idx, gating.topk_weights, *weights)
        rows = pt.grouped_gemm(x, layer.w_gate_up, torch.tensor([0] * E + [9]))
        y.sum().backward()
        with torch.no_grad():
            again = pt.moe_forward(x, gating.topk_idx, gating.topk_weights, *weights)
    assert logits.dtype == torch.float32
    assert rows.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, pt.moe_forward(x.bfloat16(), *gating[:2], *(w.bfloat16() for w in weights)))
    assert torch.equal(y, again)
    assert layer.w_down.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):  # the core has no float16: float32 holds it
        assert pt.moe_forward(x.half(), *gating[:2], *weights).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bytes(use_reentrant):
    layer = Layer()
    x = torch.randn(19, H)
    plain = run(layer, layer, x)
    x = x.detach().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    again = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_selective_checkpointing_replays_the_ids():
    """The gate's results are kept, everything else is computed again: a bias that moved meanwhile changes nothing."""
    bias = torch.zeros(E)
    layer = Layer()

    def forward(x):
        gating = pt.topk_gating(pt.router_logits(x, layer.router), CONFIG, bias=bias)
        return pt.moe_forward(x, gating.topk_idx, gating.topk_weights, layer.w_gate_up, layer.w_down)

    x = torch.randn(19, H)
    plain = run(forward, layer, x)
    x = x.detach().requires_grad_()
    y = checkpoint(
        forward, x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(pt.OPS_TO_SAVE),
    )  # fmt: skip
    bias += 100 * torch.rand(E)
    y.square().sum().backward()
    again = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_jit_trace_records_the_op():
    traced = torch.jit.trace(lambda z: pt.topk_gating(z, CONFIG)[:2], torch.randn(5, E), check_trace=False)
    z = torch.randn(7, E)
    assert torch.equal(traced(z)[0], pt.topk_gating(z, CONFIG).topk_idx)
