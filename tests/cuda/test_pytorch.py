"""PyTorch's operations and modules on CUDA tensors: the CPU's bytes, through the device floor.

Without a GPU CPU tensors stand for CUDA tensors (tests/cuda/tensors.py): the same wrapping and the same kernels.
"""

from __future__ import annotations

import contextlib
import copy
import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import emulated  # noqa: E402
import tensors  # noqa: E402

import pyroute  # noqa: E402
import pyroute.pytorch as pt  # noqa: E402
from pyroute import RouterConfig, _check  # noqa: E402
from pyroute._device.arrays import DeviceArray  # noqa: E402
from pyroute.pytorch import _fp8_weights, _tensors  # noqa: E402

T, E, H, INNER, K = 20, 8, 64, 48, 2
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIG = RouterConfig(E, K, "sigmoid", num_groups=4, topk_groups=2, renormalize="sum", scaling_factor=2.5)


@pytest.fixture(autouse=True)
def seeded():
    if emulated.REAL and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    torch.manual_seed(20240607)
    pt.forget_fp8_weights()


@contextlib.contextmanager
def gpu():
    """Inside, tensors that ``there`` gives lie on the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        tensors.emulate(patch.setattr)
        yield
    pt.forget_fp8_weights()


def there(x):
    """A copy on the GPU of a tensor, or of each in a tuple or plan, with its own requires_grad."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone().to(tensors.DEVICE).requires_grad_(x.requires_grad)
    if isinstance(x, tuple):
        items = [there(item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return x


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [part for item in result if item is not None for part in flat(item)] if isinstance(result, tuple) else []


def same(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    a, b = (t.detach().cpu().contiguous() for t in (a, b))
    assert not a.numel() or torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def close(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    a, b = (t.detach().cpu().double() for t in (a, b))
    assert (a - b).norm() <= 6e-3 * b.norm()


def on_both(call, *given, compare=same):
    """The same call on the CPU and on the GPU, and its gradients."""
    results = []
    if not emulated.REAL:
        emulated.launched()  # of the call before
    for where in (contextlib.nullcontext(), gpu()):
        with where:
            args = [there(x) if results else x for x in given]
            parts = flat(call(*args))
            wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
            if wanted:
                smooth = [part for part in parts if part.requires_grad]
                torch.manual_seed(3)
                upstream = [torch.randn(part.shape).to(part) for part in smooth]
                parts += torch.autograd.grad(smooth, wanted, upstream)
            results.append(parts)
    assert emulated.REAL or emulated.launched()  # it did go to kernels
    host, device = results
    assert len(host) == len(device) > 0
    for a, b in zip(device, host, strict=True):
        assert a.device.type == tensors.DEVICE.type
        compare(a, b)


def logits(dtype=torch.float32):
    return torch.randn(T, E).to(dtype).requires_grad_()


def plan_of(alignment=1):
    return pt.plan_routes(torch.randint(-1, E, (T, K)), E, alignment=alignment)


# --- the way in and out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(_tensors.NUMPY_DTYPES, key=str), ids=str)
def test_every_type_crosses_without_a_copy(dtype):
    if dtype in (torch.uint16, torch.uint32, torch.uint64) and emulated.REAL:
        pytest.skip("PyTorch has few kernels for it")
    x = torch.arange(24, dtype=torch.uint8).repeat(8).view(dtype).to(tensors.DEVICE)
    with gpu():
        there = _tensors.array("f", "x", x[8:])
        assert isinstance(there, DeviceArray)
        assert there.pointer == x[8:].data_ptr()
        assert there.dtype == _tensors.NUMPY_DTYPES[dtype]
        back = _tensors.tensor(there)
    assert (back.data_ptr(), back.dtype, back.shape) == (x[8:].data_ptr(), dtype, x[8:].shape)
    assert not back._is_view()


def test_strided_tensors_are_copied_once():
    x = torch.arange(12.0).view(3, 4).to(tensors.DEVICE)
    with gpu():
        there = _tensors.array("f", "x", x.t())
        assert there.shape == (4, 3)
        same(_tensors.tensor(there), x.t().contiguous())
        assert _tensors.array("f", "x", x).pointer == x.data_ptr()


def test_results_and_workspaces_are_pytorchs_memory():
    x = torch.randn(4, 8).to(tensors.DEVICE)
    with gpu():
        there = _tensors.array("f", "x", x)
        address, owner = there.allocator.allocate(1000)
        assert address % 256 == 0
        assert owner.numel() == 1000
        made = DeviceArray(address, (10, 5), np.float32, there.allocator, owner)
        result = _tensors.tensor(made[2:4])
        assert result.data_ptr() == address + 2 * 5 * 4
        assert result.shape == (2, 5)
        assert _tensors.tensor(DeviceArray(address, (0, 5), np.float32, there.allocator, owner)).shape == (0, 5)
    del made, owner
    gc.collect()
    result.fill_(1.0)  # the tensor keeps its storage


def test_narrow_and_unsigned_ids_widen():
    ids = torch.randint(0, E, (T, K))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        on_both(lambda i: tuple(pt.plan_routes(i, E, alignment=4)), ids.to(dtype))


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gating(dtype):
    bias = torch.randn(E, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.rand(T) < 0.8
    on_both(lambda z, b, m: tuple(pt.topk_gating(z, CONFIG, bias=b, token_mask=m)), logits(dtype), bias, mask)


def test_gating_with_losses():
    sequences = torch.randint(0, 3, (T,))
    scale = torch.tensor(0.37)
    coefs = {"balance_loss_coef": 0.02, "z_loss_coef": 0.003}
    on_both(lambda z: tuple(pt.topk_gating(z, CONFIG, **coefs)), logits())
    on_both(
        lambda z, s, ids: tuple(pt.topk_gating(z, CONFIG, sequence_ids=ids, aux_loss_scale=s, **coefs)),
        logits(), scale, sequences,
    )  # fmt: skip


def test_losses_and_their_gradients():
    z = logits()
    gating = pt.topk_gating(z.detach(), CONFIG)
    on_both(lambda v, g: pt.balance_loss(v, g, CONFIG), z, gating)
    on_both(lambda v, g, s: pt.balance_loss(v, g, CONFIG, sequence_ids=s), z, gating, torch.randint(0, 3, (T,)))
    on_both(lambda v, m: pt.z_loss(v, token_mask=m), z, torch.rand(T) < 0.7)


@pytest.mark.parametrize("alignment", [1, 8, 128])
def test_plans_have_one_shape(alignment):
    """That of the fake kernel, whatever the ids, on either device."""
    for ids in (
        torch.randint(-1, E, (T, K)),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int32),
    ):
        on_both(lambda i: tuple(pt.plan_routes(i, E, alignment=alignment)), ids)
        fake = pt.plan_routes(ids.to("meta"), E, alignment=alignment)
        assert [t.shape for t in fake] == [t.shape for t in pt.plan_routes(ids, E, alignment=alignment)]


def test_values_are_looked_at_when_that_is_asked_for(monkeypatch):
    """PYROUTE_CHECK=1: ids, and the row maps of a plan that was changed."""
    plan, x = plan_of(alignment=4), torch.randn(T, H)
    for field, bad, words in (
        ("row_to_token", T, rf"permute: plan.row_to_token\[3\] must be in 0..{T - 1}, or -1, got {T}"),
        ("token_to_row", -2, r"permute: plan.token_to_row\[1, 1\] must be in 0..\d+, or -1, got -2"),
    ):
        spoiled = getattr(plan, field).clone()
        spoiled.view(-1)[3] = bad
        with gpu():
            given = there(x), there(plan._replace(**{field: spoiled}))
            pt.permute(*given)  # such an entry counts as -1
            with monkeypatch.context() as patch:
                patch.setattr(_check, "checks_gpu", True)
                with pytest.raises(ValueError, match=f"^{words}$"):
                    pt.permute(*given)
                with pytest.raises(ValueError, match=rf"topk_idx\[0, 1\] must be .*, got {E}$"):
                    pt.plan_routes(there(torch.tensor([[0, E]])), E)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_moves(dtype):
    plan = plan_of(alignment=4)
    x = torch.randn(T, H).to(dtype).requires_grad_()
    rows = torch.randn(plan.row_to_token.shape[0], H).to(dtype).requires_grad_()
    weights = torch.rand(T, K, requires_grad=True)
    on_both(pt.permute, x, plan)
    on_both(lambda r, p: pt.unpermute(r, p), rows, plan)
    on_both(lambda r, p, w: pt.unpermute(r, p, w), rows, plan, weights)
    if dtype != torch.float64:
        on_both(lambda v, p: tuple(pt.permute_quantize(v, p)), x.detach(), plan)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (16, 1)], ids=str)
def test_quantisation(block):
    x = torch.randn(40, 200, dtype=torch.float32).to(torch.bfloat16)
    on_both(lambda v: tuple(pt.quantize_fp8(v, block=block)[:2]), x)
    on_both(lambda v: tuple(pt.quantize_fp8(v, block=block, format="e5m2", scale_format="ue8m0")[:2]), x)
    q = pt.quantize_fp8(x, block=block)
    on_both(lambda codes, scales: pt.Fp8Tensor(codes, scales, block).dequantize(torch.bfloat16), q.codes, q.scales)


def offsets_of(counts):
    return torch.tensor([0, *np.cumsum(counts)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_gemm(dtype):
    offsets = offsets_of([3, 0, 10, 1, 0, 4, 1, 1])
    a = torch.randn(T, H).to(dtype).requires_grad_()
    b = torch.randn(E, INNER, H).to(dtype).requires_grad_()
    on_both(pt.grouped_gemm, a, b, offsets, compare=close)
    turned = torch.randn(E, H, INNER).to(dtype).requires_grad_()
    on_both(lambda *given: pt.grouped_gemm(*given, transposed=True), a, turned, offsets, compare=close)
    codes, scales, block = pt.quantize_fp8(b.detach(), block=(128, 128))
    on_both(
        lambda v, c, s, o: pt.grouped_gemm(v, pt.Fp8Tensor(c, s, block), o), a, codes, scales, offsets, compare=close
    )


def test_grouped_gemm_masked():
    """Counts of any integer type; rows that do not exist are left out of the comparison."""
    a, b = torch.randn(3, 5, H).bfloat16(), torch.randn(3, INNER, H).bfloat16()
    for dtype in (torch.int32, torch.int64):

        def rows(a, b, counts):
            out = pt.grouped_gemm(a, b, tokens_per_expert=counts)
            return torch.cat([out[0, :2], out[2, :5]])

        on_both(rows, a, b, torch.tensor([2, 0, 5], dtype=dtype), compare=close)


@pytest.mark.parametrize("tokens", [0, 1, T])
def test_router_logits(tokens):
    x = torch.randn(tokens, H).to(torch.bfloat16).requires_grad_()
    weight = torch.randn(E, H, requires_grad=True)
    on_both(pt.router_logits, x, weight, compare=close)


@pytest.mark.parametrize("precision", [None, "fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer(dtype, precision):
    x = torch.randn(T, H).to(dtype).requires_grad_()
    ids = torch.randint(-1, E, (T, K), dtype=torch.int32)
    weights = torch.rand(T, K).to(dtype).requires_grad_()
    experts = [torch.randn(shape).to(dtype).div_(8).requires_grad_() for shape in ((E, 2 * INNER, H), (E, H, INNER))]
    biases = [torch.randn(E, width).to(dtype).requires_grad_() for width in (2 * INNER, H)]

    def call(x, ids, weights, gate_up, down, b_gate_up, b_down):
        return pt.moe_forward(
            x, ids, weights, gate_up, down, b_gate_up=b_gate_up, b_down=b_down, precision=precision,
        )  # fmt: skip

    on_both(call, x, ids, weights, *experts, *biases, compare=close)
    with torch.no_grad():
        on_both(call, *(t.detach() for t in (x, ids, weights, *experts, *biases)), compare=close)


def test_through_the_dispatcher():
    """Under a dispatch mode the calls go the long way, to the same kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    x, plan = torch.randn(T, H), plan_of()
    with gpu():
        on = there(x), there(plan)
        want = pt.permute(*on)
        with Watch():
            got = pt.permute(*on)
    same(got, want)
    assert any("pyroute.permute" in name for name in seen)


# --- modules ----------------------------------------------------------------------------------------------------------


def model(**options):
    router = pt.TopKRouter(CONFIG, H, selection_bias=True, balance_loss_coef=0.01, z_loss_coef=0.001)
    return pt.MoELayer(router, pt.GroupedExperts(E, H, INNER, **options), pt.SharedExpert(H, INNER, gated=True))


@contextlib.contextmanager
def nothing_is_read(monkeypatch):
    """Whatever would bring a value to the host raises."""

    def refuse(name):
        def read(*_, **__):
            raise AssertionError(f"Tensor.{name} waits for the GPU")

        return read

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_training_steps(precision, monkeypatch):
    """Two steps of a layer with losses and a selection bias, without a look at any value; then the CPU's result."""
    host = model(precision=precision)
    device = copy.deepcopy(host).to(tensors.DEVICE)
    batches = [torch.randn(3, 5, H) for _ in range(2)]
    on_gpu = [there(batch) for batch in batches]

    def train(layer, batches, reading):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        pt.update_biases_after(optimizer, layer)
        outputs = []
        for batch in batches:
            optimizer.zero_grad()
            with reading:
                y = layer(batch)
                y.square().mean().backward()
            optimizer.step()
            outputs.append(y.detach())
        return outputs

    want = train(host, batches, contextlib.nullcontext())
    with gpu():
        got = train(device, on_gpu, contextlib.nullcontext() if emulated.REAL else _Again(monkeypatch))
    for a, b in zip(got, want, strict=True):
        close(a, b)
    for a, b in zip(device.parameters(), host.parameters(), strict=True):
        close(a, b)
    same(device.router.e_score_correction_bias, host.router.e_score_correction_bias)
    same(device.router.tokens_per_expert, host.router.tokens_per_expert)


class _Again:
    """``nothing_is_read`` as often as it is entered."""

    def __init__(self, monkeypatch) -> None:
        self.monkeypatch = monkeypatch

    def __enter__(self) -> None:
        self.inside = nothing_is_read(self.monkeypatch)
        self.inside.__enter__()

    def __exit__(self, *failure) -> None:
        self.inside.__exit__(*failure)


def test_results_may_be_changed_in_place():
    x, plan = torch.randn(T, H, requires_grad=True), plan_of()
    with gpu():
        given, on = there(x), there(plan)
        y = pt.permute(given, on)
        y += 1
        y.sum().backward()
    assert given.grad is not None


def test_fp8_weights_belong_to_a_stream_and_not_to_a_graph(monkeypatch):
    layer = pt.GroupedExperts(E, H, INNER, precision="fp8").to(tensors.DEVICE)
    given = [there(x) for x in (torch.randn(T, H), torch.randint(0, E, (T, K)), torch.rand(T, K))]
    made = []
    quantize = _fp8_weights.quantize_fp8
    monkeypatch.setattr(_fp8_weights, "quantize_fp8", lambda x, **how: made.append(x.shape) or quantize(x, **how))
    with gpu(), torch.no_grad():
        layer(*given), layer(*given)
        assert len(made) == 2  # two weights, once
        monkeypatch.setattr(_fp8_weights, "captures", lambda w: True)
        layer(*given)
        assert len(made) == 4
        monkeypatch.setattr(_fp8_weights, "captures", lambda w: False)
        layer(*given)
        assert len(made) == 4
        monkeypatch.setattr(_fp8_weights, "stream_of", lambda w: 7)
        layer(*given)
        assert len(made) == 6


def test_transposed_codes_are_made_once_a_step():
    """Three micro-batches, with and without: the same gradients; a write, and they are made again."""
    layer = pt.GroupedExperts(E, H, INNER, precision="fp8").to(tensors.DEVICE)
    batches = [[there(x) for x in (torch.randn(T, H), torch.randint(0, E, (T, K)), torch.rand(T, K))] for _ in range(3)]
    for x, *_ in batches:
        x.requires_grad_()

    def step():
        """Gradients, and how many transpositions of weights they took; wgrad transposes two operands a weight."""
        layer.zero_grad()
        emulated.launched()
        for batch in batches:
            layer(*batch).sum().backward()
        made = emulated.launched().count("transpose_bytes") - 4 * len(batches)
        return [p.grad.clone() for p in layer.parameters()], made

    with gpu():
        want, made = step()
        assert made == 2 * len(batches)
        pt.keep_transposed_weights()
        try:
            for again in (2, 0):
                got, made = step()
                assert made == again
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            with torch.no_grad():
                layer.down_proj.mul_(2)
            assert step()[1] == 1
        finally:
            pt.keep_transposed_weights(False)
        assert step()[1] == 2 * len(batches)


def test_no_gradient_of_the_saved_rows_is_made():
    """autograd fills the gradients of results that nobody used with zeros, unless it is told not to."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "zeros" in str(function):
                filled.append(tuple(result.shape))
            return result

    filled = []
    x = there(torch.randn(T, H, requires_grad=True))
    experts = [there(torch.randn(shape)) for shape in ((E, 2 * INNER, H), (E, H, INNER))]
    with gpu():
        y = pt.moe_forward(x, there(torch.randint(0, E, (T, K))), there(torch.rand(T, K)), *experts)
        with Watch():
            y.sum().backward()
    assert x.grad is not None
    assert (T * K, 2 * INNER) not in filled


def test_frozen_codes_are_transposed_once():
    """Of an Fp8Tensor in an FP8 layer: kept over optimizer steps until the codes are written to, or let go."""
    experts = [torch.randn(shape).div_(8) for shape in ((E, 2 * INNER, H), (E, H, INNER))]
    frozen = [there(tuple(pt.quantize_fp8(w, block=(128, 128)))) for w in experts]
    frozen = [pt.Fp8Tensor(codes, scales, (128, 128)) for codes, scales, *_ in frozen]
    ids, weights = there(torch.randint(0, E, (T, K))), there(torch.rand(T, K))
    x = there(torch.randn(T, H).to(torch.bfloat16).requires_grad_())

    def step():
        emulated.launched()
        pt.moe_forward(x, ids, weights, *frozen, precision="fp8").sum().backward()
        torch.optim.SGD([x], lr=0.0).step()
        grad, x.grad = x.grad, None
        return grad, emulated.launched().count("transpose_bytes")

    with gpu():
        want, made = step()
        assert (made, step()[1]) == (2, 2)
        pt.keep_transposed_weights()
        try:
            for again in (2, 0, 0):
                got, made = step()
                assert made == again
                same(got, want)
            frozen[1].codes.view(torch.uint8).bitwise_xor_(0x80)  # the version counter moves: signs are turned
            got, made = step()
            assert made == 1
            same(got, -want)
            kept = len(_fp8_weights._transposed)
            assert kept == 2
            pt.forget_fp8_weights()
            assert step()[1] == 2
        finally:
            pt.keep_transposed_weights(False)
        assert len(_fp8_weights._transposed) == 0
        assert step()[1] == 2


def test_devices_do_not_mix():
    with pytest.raises(TypeError, match=r"^permute: row_to_token must be on meta as x, got int32 .* on cpu$"):
        pt.permute(torch.empty(T, H, device="meta"), plan_of())


# --- on a real GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not emulated.REAL, reason="needs a real GPU")
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_a_graph_of_a_training_step_replays_other_batches(precision):
    layer = model(precision=precision).to("cuda")
    static = torch.randn(T, H, device="cuda")

    def step():
        layer.zero_grad(set_to_none=False)
        y = layer(static)
        y.square().mean().backward()
        return y

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(3):
        static.copy_(torch.randn(T, H))
        graph.replay()
        replayed = [y.clone(), *(p.grad.clone() for p in layer.parameters())]
        for a, b in zip(replayed, [step(), *(p.grad for p in layer.parameters())], strict=True):
            same(a, b)


@pytest.mark.skipif(not emulated.REAL, reason="needs a real GPU")
def test_autocast_on_the_gpu():
    a, b = torch.randn(T, H, device="cuda"), torch.randn(E, INNER, H, device="cuda")
    offsets = offsets_of([3, 0, 10, 1, 0, 4, 1, 1]).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert pt.grouped_gemm(a, b, offsets).dtype == torch.bfloat16
        assert pt.topk_gating(torch.randn(T, E, device="cuda"), CONFIG).topk_weights.dtype == torch.float32


@pytest.mark.skipif(not emulated.REAL, reason="needs a real GPU")
def test_another_stream_and_compile():
    x, plan = torch.randn(T, H, device="cuda"), there(plan_of())
    want = pt.permute(x, plan)
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        got = pt.permute(x, plan)
        torch.cuda.current_stream().synchronize()
    same(got, want)
    same(torch.compile(pt.permute, fullgraph=True)(x, plan), want)
    assert pyroute.backends()["cuda"].available
