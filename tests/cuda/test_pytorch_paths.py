"""Ways of calling the operations on CUDA tensors that a model takes sooner or later: the CPU's results on each.

Strided arguments, gradients of some of them, no tokens, autocast, a plan and a graph used twice, a compiled layer.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import tensors  # noqa: E402

import pyroute.pytorch as pt  # noqa: E402

from .test_pytorch import CONFIG, INNER, E, H, K, T, close, gpu, offsets_of, on_both, plan_of, same, there  # noqa: E402

EXACT = pytest.mark.parametrize("precision", [None, "fp8"])
X, IDS, WEIGHTS, GATE_UP, DOWN = range(5)
REAL = (X, WEIGHTS, GATE_UP, DOWN)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240611)
    pt.forget_fp8_weights()


def layer(tokens=T, dtype=torch.float32, wanted=REAL):
    """The arguments of a layer; those that are ``wanted`` require grad."""
    ids, weights = torch.randint(-1, E, (tokens, K), dtype=torch.int32), torch.rand(tokens, K)
    experts = [torch.randn(shape).to(dtype).div_(8) for shape in ((E, 2 * INNER, H), (E, H, INNER))]
    given = [torch.randn(tokens, H).to(dtype), ids, weights, *experts]
    for i in wanted:
        given[i].requires_grad_()
    return given


def autocast():
    return torch.autocast(tensors.DEVICE.type, torch.bfloat16)


@EXACT
@pytest.mark.parametrize("wanted", [(X,), (WEIGHTS,), (GATE_UP,), (DOWN,), (X, WEIGHTS), (GATE_UP, DOWN)], ids=str)
def test_gradients_of_some_arguments(wanted, precision):
    on_both(lambda *given: pt.moe_forward(*given, precision=precision), *layer(wanted=wanted), compare=close)


@EXACT
def test_strided_arguments_of_a_layer(precision):
    given = layer(wanted=())
    given[3:] = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in given[3:]]
    given[:3] = [x.t().contiguous().t() for x in given[:3]]
    assert not any(x.is_contiguous() for x in given)
    for i in REAL:
        given[i].requires_grad_()
    on_both(lambda *given: pt.moe_forward(*given, precision=precision), *given, compare=close)
    on_both(lambda *given: pt.moe_forward(*given, precision=precision).sum(), *given, compare=close)  # strides of 0


def test_strided_arguments_of_operations():
    plan = plan_of()
    columns = torch.randn(T, 2 * H)[:, ::2].requires_grad_()
    rows = torch.randn(H, plan.row_to_token.shape[0]).t().requires_grad_()
    weights = torch.rand(K, T).t().requires_grad_()
    on_both(pt.permute, columns, plan)
    on_both(lambda *given: pt.unpermute(*given), rows, plan, weights)
    on_both(lambda z: tuple(pt.topk_gating(z, CONFIG)), torch.randn(E, T).t().requires_grad_())
    on_both(lambda x: tuple(pt.quantize_fp8(x)[:2]), columns.detach())
    on_both(lambda x, p: tuple(pt.permute_quantize(x, p)), columns.detach(), plan)


def test_a_plan_serves_twice():
    def call(x, weights, plan):
        rows = pt.permute(x, plan)
        return pt.unpermute(rows * rows, plan, weights) + pt.unpermute(pt.permute(x, plan), plan)

    on_both(call, torch.randn(T, H, requires_grad=True), torch.rand(T, K, requires_grad=True), plan_of(alignment=4))


@EXACT
def test_no_tokens(precision):
    """Results of the right shapes, and gradients of the weights that are exactly zero."""
    with gpu():
        given = [there(x) for x in layer(0)]
        y = pt.moe_forward(*given, precision=precision)
        assert y.shape == (0, H)
        wanted = [given[i] for i in REAL]
        for x, grad in zip(wanted, torch.autograd.grad(y.sum(), wanted), strict=True):
            assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
            assert not grad.any()
        plan = pt.plan_routes(given[IDS], E)
        rows = pt.permute(given[X], plan)
        assert pt.unpermute(rows, plan, given[WEIGHTS]).shape == (0, H)
        assert pt.permute_quantize(given[X], plan).codes.shape == (0, H)
        assert pt.topk_gating(there(torch.randn(0, E)), CONFIG, balance_loss_coef=0.1).topk_idx.shape == (0, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    def cast(call):
        def inside(*given):
            with autocast():
                return call(*given)

        return inside

    for precision in (None, "fp8"):
        on_both(cast(lambda *g, p=precision: pt.moe_forward(*g, precision=p)), *layer(dtype=dtype), compare=close)
    a, b = torch.randn(T, H, requires_grad=True), torch.randn(E, INNER, H, requires_grad=True)
    on_both(cast(pt.grouped_gemm), a, b, offsets_of([3, 0, 10, 1, 0, 4, 1, 1]), compare=close)
    on_both(cast(pt.router_logits), a, torch.randn(E, H, requires_grad=True), compare=close)


def test_a_graph_is_differentiated_twice():
    with gpu():
        given = [there(x) for x in layer(wanted=(X,))]
        y = pt.moe_forward(*given).sum()
        first, *_ = torch.autograd.grad(y, given[X], retain_graph=True)
        same(torch.autograd.grad(y, given[X])[0], first)


def test_a_compiled_layer_has_the_same_bytes():
    with gpu():
        given = [there(x) for x in layer(wanted=(X,))]
        compiled = torch.compile(pt.moe_forward, backend="aot_eager", fullgraph=True)
        results = [call(*given) for call in (pt.moe_forward, compiled)]
        same(*results)
        same(*(torch.autograd.grad(y.sum(), given[X])[0] for y in results))
