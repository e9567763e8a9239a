"""The PyTorch ops give the core's bytes, its gradients and its errors; opcheck finds nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bytes

torch = pytest.importorskip("torch")

import pyroute  # noqa: E402
import pyroute.pytorch as pt  # noqa: E402
from pyroute import RouterConfig  # noqa: E402
from pyroute.pytorch import _tensors  # noqa: E402

T, E, H, INNER = 23, 16, 32, 24
GROUPED = RouterConfig(
    E, 4, "sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum", renormalize="sum", scaling_factor=2.5
)
CONFIGS = {
    "grouped": GROUPED,
    "softmax": RouterConfig(E, 4, renormalize="sum"),
    "post": RouterConfig(E, 3, score_stage="post"),
    "sqrtsoftplus": RouterConfig(E, 6, "sqrtsoftplus", renormalize="sum", scaling_factor=1.5),
    "clamp": RouterConfig(E, 2, renormalize="clamp", renormalize_eps=1e-12),
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
OPS = torch.ops.pyroute


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)


def numpy(tensor):
    """A copy as a NumPy array of the same type, by torch's own conversion."""
    carriers = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16), torch.float8_e4m3fn: (torch.uint8, "float8_e4m3fn")}
    if tensor.dtype in carriers:
        carrier, dtype = carriers[tensor.dtype]
        return tensor.detach().view(carrier).numpy().copy().view(np.dtype(dtype))
    return tensor.detach().numpy().copy()


def problem(dtype=torch.float32, *, requires_grad=True, dropped=True):
    """x, ids (some not routed), weights, and a layer's weights."""
    x = torch.randn(T, H).to(dtype)
    ids = torch.stack([torch.randperm(E)[:4] for _ in range(T)]).to(torch.int32)
    if dropped:
        ids[torch.rand(T, 4) < 0.2] = -1
    weights = torch.rand(T, 4)
    layer = [torch.randn(shape).to(dtype) for shape in ((E, 2 * INNER, H), (E, H, INNER), (E, 2 * INNER), (E, H))]
    for tensor in (x, weights, *layer):
        tensor.requires_grad_(requires_grad)
    return x, ids, weights, *layer


@pytest.mark.parametrize("tensor", [torch.zeros(T, E, requires_grad=True), torch.zeros(T, E, dtype=torch.bfloat16)])
def test_the_core_sends_tensors_that_numpy_cannot_hold_here(tensor):
    sentence = r"^topk_gating: logits must be an array, got Tensor \[23, 16\] \(.*; pyroute\.pytorch takes tensors\)$"
    with pytest.raises(TypeError, match=sentence):
        pyroute.topk_gating(tensor, GROUPED)


# --- tensors cross without a copy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(_tensors.NUMPY_DTYPES), key=str), ids=str)
def test_every_type_crosses_by_address_and_back(name):
    raw = torch.randint(0, 100, (6, 8, 8), dtype=torch.uint8)
    tensor = raw.view(name) if name is not torch.bool else raw > 50
    view = _tensors.array("f", "x", tensor)
    assert view.shape == tuple(tensor.shape)
    assert view.ctypes.data == tensor.data_ptr()
    back = _tensors.tensor(view)
    assert back.dtype == tensor.dtype
    assert back.data_ptr() == tensor.data_ptr()
    assert view.tobytes() == raw.numpy().tobytes() or name is torch.bool


def test_strided_and_empty_tensors_cross():
    x = torch.arange(60.0).reshape(6, 10)
    for view in (x.t(), x[::2, 3:], x[:0], x[:, :0], x.expand(2, 6, 10), x[2], x[0, 0]):
        crossed = _tensors.array("f", "x", view)
        assert np.array_equal(crossed, view.numpy())
    parameter = torch.nn.Parameter(x)
    assert _tensors.array("f", "x", parameter).ctypes.data == parameter.data_ptr()


@pytest.mark.parametrize("grad", [False, True], ids=["direct", "recorded"])
def test_a_tensor_with_the_negative_bit_has_its_own_values(grad):
    x, ids, weights, w_gate_up, w_down, *_ = problem(requires_grad=grad)
    x = x.detach()
    negative = torch._neg_view(x)  # as .conj().imag gives it
    assert negative.is_neg()
    for function in (
        lambda v: pt.moe_forward(v, ids, weights, w_gate_up, w_down),
        lambda v: pt.router_logits(v, w_down[:, :, 0]),
        lambda v: pt.permute(v, pt.plan_routes(ids, E)),
    ):
        assert torch.equal(function(negative), function(-x))


@pytest.mark.parametrize("grad", [False, True], ids=["direct", "recorded"])
def test_a_tensor_that_outlived_its_transform_is_read(grad):
    kept = []

    def loss(x):
        kept.append(x * 1)
        return x.sum()

    logits = torch.randn(3, E)
    torch.func.grad(loss)(logits)
    config = RouterConfig(E, 2)
    with torch.set_grad_enabled(grad):
        given, expected = pt.topk_gating(kept[0], config), pt.topk_gating(logits, config)
    assert torch.equal(given.topk_idx, expected.topk_idx)
    assert torch.equal(given.topk_weights, expected.topk_weights)


def test_what_cannot_cross_is_one_sentence():
    with pytest.raises(TypeError, match=r"^f: x must be on the CPU or a CUDA device, got float32 \[2\] on meta$"):
        _tensors.array("f", "x", torch.empty(2, device="meta"))
    for odd in (torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match=r"^f: x must be a dense tensor of a type that NumPy has, got "):
            _tensors.array("f", "x", odd)


# --- the core's bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["direct", "recorded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_topk_gating_is_the_cores(name, dtype, grad):
    config = CONFIGS[name]
    logits = torch.randn(T, E).to(DTYPES[dtype]).requires_grad_(grad)
    bias = torch.randn(E, dtype=torch.float64 if dtype == "float64" else torch.float32)
    mask = torch.rand(T) < 0.8
    got = pt.topk_gating(logits, config, bias=bias, token_mask=mask, balance_loss_coef=0.1, z_loss_coef=0.01)
    want = pyroute.topk_gating(numpy(logits), config, bias=numpy(bias), token_mask=numpy(mask))
    for mine, core in zip(got, want, strict=True):
        assert_same_bytes(numpy(mine), core)
    if grad:
        upstream = torch.randn_like(got.topk_weights)
        (got.topk_weights * upstream).sum().backward()
        z = pyroute.topk_gating_backward(
            numpy(upstream), numpy(logits), want, config, bias=numpy(bias), token_mask=numpy(mask),
            balance_loss_coef=0.1, z_loss_coef=0.01,
        )  # fmt: skip
        assert_same_bytes(numpy(logits.grad), z.astype(numpy(logits).dtype))


def test_replayed_ids_and_sequences_and_loss_scale():
    logits = torch.randn(T, E, requires_grad=True)
    ids = torch.randint(0, E, (T, 4))
    sequences = torch.arange(T) // 5
    replayed = pt.topk_gating(
        logits, GROUPED, topk_idx=ids, sequence_ids=sequences, balance_loss_coef=0.5, z_loss_coef=0.25,
        aux_loss_scale=torch.tensor(8.0),
    )  # fmt: skip
    assert torch.equal(replayed.topk_idx, ids.int())
    replayed.topk_weights.sum().backward()
    gating = pyroute.topk_gating(numpy(logits), GROUPED, topk_idx=numpy(ids))
    want = pyroute.topk_gating_backward(
        np.ones((T, 4), np.float32), numpy(logits), gating, GROUPED, balance_loss_coef=4.0, z_loss_coef=2.0,
        balance_loss_scope="sequence", sequence_ids=numpy(sequences),
    )  # fmt: skip
    assert_same_bytes(numpy(logits.grad), want)


def test_losses_are_the_cores_and_add_the_gradient_that_gating_adds():
    logits = torch.randn(T, E, requires_grad=True)
    gating = pt.topk_gating(logits, GROUPED)
    balance, z = pt.balance_loss(logits, gating, GROUPED), pt.z_loss(logits)
    core = pyroute.topk_gating(numpy(logits), GROUPED)
    assert float(balance.detach()) == pyroute.balance_loss(numpy(logits), core, GROUPED)
    assert float(z.detach()) == pyroute.z_loss(numpy(logits))
    apart = torch.autograd.grad(gating.topk_weights.sum() + 0.5 * balance + 0.25 * z, logits)[0]
    fused = pt.topk_gating(logits, GROUPED, balance_loss_coef=0.5, z_loss_coef=0.25).topk_weights.sum()
    together = torch.autograd.grad(fused, logits)[0]
    assert (apart - together).abs().max() <= 4 * 2.0**-24 * together.abs().max()


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_are_the_cores(dtype, alignment):
    x, ids, weights, *_ = problem(DTYPES[dtype])
    plan, core = pt.plan_routes(ids, E, alignment=alignment), pyroute.plan_routes(numpy(ids), E, alignment=alignment)
    assert plan.row_to_token.shape[0] == (T * 4 + E * (alignment - 1)) // alignment * alignment
    assert_same_bytes(numpy(plan.row_to_token)[: core.num_rows], core.row_to_token)
    assert (plan.row_to_token[core.num_rows :] == -1).all()
    for field in ("tokens_per_expert", "expert_offsets", "token_to_row"):
        assert_same_bytes(numpy(getattr(plan, field)), getattr(core, field))

    rows = pt.permute(x, plan)
    want = pyroute.permute(numpy(x), core)
    assert_same_bytes(numpy(rows)[: core.num_rows], want)
    assert not rows[core.num_rows :].any()
    y = pt.unpermute(rows, plan, weights)
    assert_same_bytes(numpy(y), pyroute.unpermute(want, core, numpy(weights)))
    upstream = torch.randn(T, H).to(DTYPES[dtype])
    grad_x, grad_weights = torch.autograd.grad(y, (x, weights), upstream)
    grad_rows, want_weights = pyroute.unpermute_backward(numpy(upstream), want, core, numpy(weights))
    assert_same_bytes(numpy(grad_x), pyroute.permute_backward(grad_rows, core))
    assert_same_bytes(numpy(grad_weights), want_weights.astype(np.float32))


@pytest.mark.parametrize(("num_tokens", "rows"), [(0, 0), (1, 4 * 8), (4, 16 * 8), (5, (20 + 16 * 7) // 8 * 8)])
def test_a_plan_has_no_more_rows_than_its_slots_can_need(num_tokens, rows):
    """A decode step touches few experts: padding for those that it cannot touch would be most of its memory."""
    ids = torch.arange(num_tokens * 4).reshape(num_tokens, 4) % E
    plan = pt.plan_routes(ids, E, alignment=8)
    assert plan.row_to_token.shape[0] == rows
    meta = pt.plan_routes(ids.to("meta"), E, alignment=8)
    assert [t.shape for t in meta] == [t.shape for t in plan]


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_fp8_is_the_cores(scale_format):
    x, ids, *_ = problem(torch.bfloat16, requires_grad=False)
    plan, core = pt.plan_routes(ids, E, alignment=4), pyroute.plan_routes(numpy(ids), E, alignment=4)
    q = pt.permute_quantize(x, plan, scale_format=scale_format)
    want = pyroute.permute_quantize(numpy(x), core, scale_format=scale_format)
    assert_same_bytes(numpy(q.codes)[: core.num_rows], want.codes)
    assert_same_bytes(numpy(q.scales)[: core.num_rows], want.scales)
    assert (q.scales[core.num_rows :] == 1.0).all()
    w = torch.randn(3, 40, 50)
    q = pt.quantize_fp8(w, block=(16, 32), scale_format=scale_format)
    want = pyroute.quantize_fp8(numpy(w), block=(16, 32), scale_format=scale_format)
    assert_same_bytes(numpy(q.codes), want.codes)
    assert_same_bytes(numpy(q.scales), want.scales)
    assert_same_bytes(numpy(q.dequantize(torch.bfloat16)), want.dequantize("bfloat16"))


def test_grouped_gemm_masked_is_the_cores():
    a, b = torch.randn(2, 5, 20), torch.randn(2, 7, 20)
    counts = torch.tensor([3, 5])
    want = pyroute.grouped_gemm(numpy(a), numpy(b), tokens_per_expert=numpy(counts))
    for out in (
        pt.grouped_gemm(a, b, tokens_per_expert=counts),
        torch.compile(pt.grouped_gemm, backend="eager", fullgraph=True)(a, b, tokens_per_expert=counts),
    ):
        assert_same_bytes(numpy(out[0, :3]), want[0, :3])
        assert_same_bytes(numpy(out[1]), want[1])
    quantised = pt.grouped_gemm(pt.quantize_fp8(a), pt.quantize_fp8(b), tokens_per_expert=counts)
    assert quantised.dtype == torch.bfloat16
    assert (quantised[1].float() - out[1]).norm() < 0.1 * out[1].norm()
    with pytest.raises(RuntimeError, match="grouped_gemm_masked: no gradient is defined"):
        pt.grouped_gemm(a.requires_grad_(), b, tokens_per_expert=counts).sum().backward()
    for wrong, match in (
        ({"expert_offsets": torch.tensor([0, 3, 5])}, "tokens_per_expert must be None together with expert_offsets"),
        ({"transposed": True}, "tokens_per_expert must be None together with transposed=True"),
        ({"tokens_per_expert": None}, "expert_offsets must be a tensor, got None"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            pt.grouped_gemm(a.detach(), b, **{"tokens_per_expert": counts, **wrong})


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_gemm_is_the_cores(dtype, fp8):
    offsets = torch.tensor([0, 3, 3, 9])
    a = torch.randn(11, H).to(DTYPES[dtype]).requires_grad_()
    b = torch.randn(3, 20, H).to(DTYPES[dtype]).requires_grad_(not fp8)
    right = pt.quantize_fp8(b, block=(16, 16)) if fp8 else b
    core = pyroute.quantize_fp8(numpy(b), block=(16, 16)) if fp8 else numpy(b)
    out = pt.grouped_gemm(a, right, offsets)
    assert_same_bytes(numpy(out), pyroute.grouped_gemm(numpy(a), core, numpy(offsets)))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    dgrad = pyroute.grouped_gemm_dgrad(numpy(upstream), core, numpy(offsets), out_dtype=dtype)
    assert_same_bytes(numpy(a.grad), dgrad)
    if not fp8:
        wgrad = pyroute.grouped_gemm_wgrad(numpy(upstream), numpy(a), numpy(offsets))
        assert_same_bytes(numpy(b.grad), wgrad.astype(numpy(b).dtype))
    wide = pt.grouped_gemm(a, right, offsets, out_dtype=torch.float32)
    assert_same_bytes(numpy(wide), pyroute.grouped_gemm(numpy(a), core, numpy(offsets), out_dtype="float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transposed_weights_are_multiplied_as_they_lie(dtype):
    offsets = torch.tensor([0, 3, 3, 9])
    a = torch.randn(11, H).to(DTYPES[dtype]).requires_grad_()
    b = torch.randn(3, H, 20).to(DTYPES[dtype]).requires_grad_()
    out = pt.grouped_gemm(a, b, offsets, transposed=True)
    want = pyroute.grouped_gemm_dgrad(numpy(a), numpy(b), numpy(offsets))
    assert_same_bytes(numpy(out), want)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert_same_bytes(numpy(a.grad), pyroute.grouped_gemm(numpy(upstream), numpy(b), numpy(offsets), out_dtype=dtype))
    wgrad = pyroute.grouped_gemm_wgrad(numpy(a), numpy(upstream), numpy(offsets))
    assert_same_bytes(numpy(b.grad), wgrad.astype(numpy(b).dtype))
    with torch.no_grad():
        assert torch.equal(pt.grouped_gemm(a, b, offsets, transposed=True), out)
    with torch.autocast("cpu", torch.bfloat16):
        assert pt.grouped_gemm(a, b, offsets, transposed=True).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"^grouped_gemm: a must be .* with transposed=True, got an Fp8Tensor$"):
        pt.grouped_gemm(pt.quantize_fp8(a.detach()), b, offsets, transposed=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives_of_the_gemm(transposed):
    offsets, experts = torch.tensor([0, 3, 3, 9]), torch.tensor([0] * 3 + [2] * 6)
    a, b = torch.randn(9, 6, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    given = (a, b.transpose(1, 2).contiguous() if transposed else b)

    def second(product):
        grads = torch.autograd.grad(product(*given).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (a, b))

    rule = "rk,rkn->rn" if transposed else "rk,rnk->rn"
    want = second(lambda a, b: torch.einsum(rule, a, b[experts]))
    for mine, theirs in zip(
        second(lambda a, b: pt.grouped_gemm(a, b, offsets, transposed=transposed)), want, strict=True
    ):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamp", "swiglu_oai", "geglu", "relu2"])
@pytest.mark.parametrize("weight_on", ["output", "pre_down", "input"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moe_layer_is_the_cores(dtype, weight_on, activation):
    x, ids, weights, w_gate_up, w_down, b_gate_up, b_down = problem(DTYPES[dtype])
    if activation == "relu2":
        w_gate_up, b_gate_up = (w[:, :INNER].detach().requires_grad_() for w in (w_gate_up, b_gate_up))
    given = (x, weights, w_gate_up, w_down, b_gate_up, b_down)
    options = {"activation": activation, "weight_on": weight_on}
    y = pt.moe_forward(x, ids, weights, w_gate_up, w_down, b_gate_up=b_gate_up, b_down=b_down, **options)
    n = [numpy(tensor) for tensor in given]
    want, saved = pyroute.moe_forward(
        n[0], numpy(ids), *n[1:4], b_gate_up=n[4], b_down=n[5], return_saved=True, **options
    )
    assert_same_bytes(numpy(y), want)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, given, upstream)
    for mine, core, like in zip(grads, pyroute.moe_backward(numpy(upstream), saved), n, strict=True):
        assert_same_bytes(numpy(mine), core.astype(like.dtype))


def test_moe_layer_with_fp8_weights_and_one_frozen():
    x, ids, weights, w_gate_up, w_down, *_ = problem(torch.bfloat16)
    quantised = pt.quantize_fp8(w_gate_up.detach(), block=(16, 16))
    y = pt.moe_forward(x, ids, weights, quantised, w_down.detach())
    core = pyroute.quantize_fp8(numpy(w_gate_up), block=(16, 16))
    n = [numpy(tensor) for tensor in (x, ids, weights)]
    want, saved = pyroute.moe_forward(*n, core, numpy(w_down), return_saved=True)
    assert_same_bytes(numpy(y), want)
    y.sum().backward()
    grads = pyroute.moe_backward(np.ones_like(want), saved)
    assert_same_bytes(numpy(x.grad), grads.x)
    assert_same_bytes(numpy(weights.grad), grads.topk_weights)
    both = [pt.quantize_fp8(w.detach(), block=(128, 128)) for w in (w_gate_up, w_down)]
    recipe = pt.moe_forward(x.detach(), ids, weights.detach(), *both, quantize_activations="ue8m0")
    core = [pyroute.quantize_fp8(numpy(w), block=(128, 128)) for w in (w_gate_up, w_down)]
    assert_same_bytes(numpy(recipe), pyroute.moe_forward(*n, *core, quantize_activations="ue8m0"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_logits_do_not_depend_on_the_batch(dtype):
    x, weight = torch.randn(T, H).to(DTYPES[dtype]), torch.randn(E, H).to(DTYPES[dtype])
    whole = pt.router_logits(x, weight)
    assert whole.dtype == torch.float32
    exact = x.double() @ weight.double().T
    bound = 4 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert ((whole.double() - exact).abs() <= bound).all()
    for t in range(T):
        assert torch.equal(pt.router_logits(x[t : t + 1], weight), whole[t : t + 1])


# --- PyTorch's own checks --------------------------------------------------------------------------------------------


def op_cases():
    x, ids, weights, w_gate_up, w_down, b_gate_up, b_down = problem()
    logits = torch.randn(T, E, requires_grad=True)
    plan = pt.plan_routes(ids, E, alignment=4)
    maps = plan.row_to_token, plan.token_to_row
    rows = pt.permute(x, plan).detach().requires_grad_()
    quantised = pt.quantize_fp8(torch.randn(E, 20, H), block=(16, 16))
    codes = quantised.codes.view(torch.uint8)  # opcheck compares inputs before and after, which float8 cannot do
    layer = (x, ids, weights, w_gate_up, None, w_down, None, b_gate_up, b_down, (1, 128), (1, 128))
    options = ("swiglu_oai", None, None, "output", "", "")
    fp8 = (*options[:-1], "fp8_ue8m0")
    plain = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in layer)
    _, kept = OPS.moe_forward_saved.default(*plain, *options)
    text = str(GROUPED)
    return {
        "topk_gating": (logits, text, torch.randn(E), None, torch.rand(T) < 0.5, None, None, 0.01, 0.001),
        "topk_gating replay": (logits, text, None, ids, None, None, torch.tensor(2.0), 0.0, 0.0),
        "topk_gating_backward": (
            torch.randn(T, 4), logits.detach(), ids, text, None, None, None, 0.01, 0.001,
        ),
        "router_loss": (logits, ids, text, None, None, 1.0, 0.5),
        "router_logits_backward": (torch.randn(T, E), x.detach(), torch.randn(E, H)),
        "moe_backward": (torch.randn(T, H), kept, *plain, *options, "x,w_down,b_down"),
        "moe_backward fp8": (torch.randn(T, H), kept, *plain, *fp8, "x,topk_weights,w_gate_up"),
        "router_logits": (x, torch.randn(E, H, requires_grad=True)),
        "plan_routes": (ids, E, 8),
        "permute": (x, *maps),
        "unpermute": (rows, *maps, weights),
        "unpermute sum": (rows, *maps, None),
        "permute_quantize": (x.detach(), *maps, "ue8m0"),
        "quantize_fp8": (x.detach(), (1, 16), "e5m2", "float32"),
        "dequantize_fp8": (codes, quantised.scales, quantised.block, torch.bfloat16),
        "grouped_gemm": (rows, None, (1, 1), w_gate_up, None, (1, 1), plan.expert_offsets, None),
        "grouped_gemm fp8": (
            rows, None, (1, 1), codes, quantised.scales, quantised.block, plan.expert_offsets, torch.bfloat16,
        ),
        "grouped_gemm_masked": (
            rows[:6].detach().view(2, 3, -1), None, (1, 1), w_gate_up[:2].detach(), None, (1, 1), torch.tensor([3, 3]),
            None,
        ),
        "grouped_gemm_dgrad": (
            rows[:, :20].detach().requires_grad_(), codes, quantised.scales, quantised.block, plan.expert_offsets,
            torch.float32,
        ),
        "grouped_gemm_wgrad": (rows, rows[:, :20].detach().requires_grad_(), None, (1, 1), plan.expert_offsets),
        "moe_forward": (*plain, *options),
        "moe_forward_saved": (*layer, *options),
        "moe_forward fp8": (*plain, *fp8),
        "moe_forward_saved fp8": (*layer, *fp8),
    }  # fmt: skip


@pytest.mark.parametrize("case", op_cases())
@pytest.mark.filterwarnings("ignore")  # PyTorch's own
def test_opcheck(case):
    torch.library.opcheck(getattr(OPS, case.split()[0]).default, op_cases()[case])


def in_float64(dtype=torch.float64):
    """Logits whose keys are far enough apart that a finite difference changes no choice."""
    order = torch.stack([torch.randperm(E) for _ in range(T)])
    return ((order - E / 2) * 0.37 + 0.05 * torch.rand(T, E)).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck_of_gating(name):
    config = CONFIGS[name]
    mask = torch.rand(T) < 0.8
    assert torch.autograd.gradcheck(lambda z: pt.topk_gating(z, config, token_mask=mask).topk_weights, in_float64())
    sequences = torch.arange(T) // 7
    gating = pt.topk_gating(in_float64().detach(), config)
    assert torch.autograd.gradcheck(
        lambda z: pt.balance_loss(z, gating, config, token_mask=mask, sequence_ids=sequences), in_float64()
    )
    assert torch.autograd.gradcheck(lambda z: pt.z_loss(z, token_mask=mask), in_float64())


def test_gradcheck_of_moves():
    _, ids, weights, *_ = problem()
    ids, weights = ids[:7], weights[:7].detach().double().requires_grad_()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    plan = pt.plan_routes(ids, E, alignment=2)
    assert torch.autograd.gradcheck(lambda v: pt.permute(v, plan), x)
    rows = torch.randn(plan.row_to_token.shape[0], 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: pt.unpermute(r, plan, w), (rows, weights))
    assert torch.autograd.gradcheck(lambda r: pt.unpermute(r, plan), rows)
    assert torch.autograd.gradgradcheck(lambda v: pt.permute(v, plan), x)


def test_a_second_derivative_is_an_error_not_a_zero():
    logits = torch.randn(T, E, requires_grad=True)
    weights = pt.topk_gating(logits, GROUPED).topk_weights
    (first,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^topk_gating_backward: no gradient is defined for it"):
        first.square().sum().backward()
    q = pt.quantize_fp8(torch.randn(4, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"^quantize_fp8: no gradient is defined for it"):
        q.scales.sum().backward()


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
def test_a_forward_mode_derivative_is_an_error_not_a_zero():
    logits, x, rows = torch.randn(T, E), torch.randn(T, H), torch.randn(T, E)
    for function, given in (
        (lambda v: pt.topk_gating(v, GROUPED).topk_weights, logits),
        (lambda v: pt.router_logits(v, torch.randn(E, H)), x),
        (lambda v: pt.quantize_fp8(v).scales, rows),
    ):
        with pytest.raises(NotImplementedError, match=r"^pyroute has no forward-mode derivatives, got a dual tensor"):
            torch.func.jvp(function, (given,), (given,))
        with torch.autograd.forward_ad.dual_level():
            assert function(given).isfinite().all()


def test_import_loads_no_compiler():
    program = (
        "import sys, torch; before = set(sys.modules); import pyroute.pytorch, pyroute.integrations._stack\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'transformers', 'safetensors'} & set(sys.modules) - before))"
    )
    root = Path(pyroute.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["direct", "recorded"])
def test_mixes_get_the_cores_sentence(grad):
    x, ids, weights, w_gate_up, w_down, *_ = problem(requires_grad=grad)
    logits = torch.randn(T, E, requires_grad=grad)
    plan = pt.plan_routes(ids, E)
    offsets = plan.expert_offsets
    bad = {
        r"^topk_gating: bias must be float32, got bfloat16$": lambda: pt.topk_gating(
            logits, GROUPED, bias=torch.zeros(E, dtype=torch.bfloat16)
        ),
        r"^topk_gating: config must be a RouterConfig, got str$": lambda: pt.topk_gating(logits, "x"),
        r"^topk_gating: logits must be ": lambda: pt.topk_gating(logits.int(), GROUPED),
        r"^grouped_gemm: b must be .*, got float16$": lambda: pt.grouped_gemm(x, w_gate_up.half(), offsets),
        r"^moe_forward: x must be .*, got float16$": lambda: pt.moe_forward(x.half(), ids, weights, w_gate_up, w_down),
        r"^moe_forward: w_down must be ": lambda: pt.moe_forward(x, ids, weights, w_gate_up, w_down.double()),
        r"^router_logits: x must be ": lambda: pt.router_logits(x.double(), x),
        r"^router_logits: weight must be ": lambda: pt.router_logits(x, x.double()),
        r"^permute: plan must be a RoutePlan of tensors, got int": lambda: pt.permute(x, 3),
    }
    for message, call in bad.items():
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match=r"^plan_routes: topk_idx\[0, 0\] must be in 0\.\.15"):
        pt.plan_routes(torch.full((2, 2), 16), E)
    with pytest.raises(ValueError, match=r"^permute: x must be of shape \[num_tokens=23, hidden\]"):
        pt.permute(x[1:], plan)


def test_devices_do_not_mix():
    x, ids, weights, w_gate_up, w_down, *_ = problem()
    away = torch.zeros(E, device="meta")
    sentence = r"^topk_gating: bias must be on cpu as logits, got float32 \[16\] on meta$"
    with pytest.raises(TypeError, match=sentence):
        pt.topk_gating(torch.randn(T, E), GROUPED, bias=away)
    with pytest.raises(TypeError, match=sentence):
        OPS.topk_gating(torch.randn(T, E), str(GROUPED), away, None, None, None, None, 0.0, 0.0)
    with pytest.raises(TypeError, match=r"^moe_forward: w_down must be on cpu as x, got "):
        pt.moe_forward(x, ids, weights, w_gate_up, w_down.to("meta"))
    with pytest.raises(TypeError, match=r"^topk_gating: bias must be a tensor, got ndarray$"):
        pt.topk_gating(torch.randn(T, E), GROUPED, bias=np.zeros(E, np.float32))


# --- one result, always ----------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes():
    x, ids, weights, w_gate_up, w_down, b_gate_up, b_down = problem(torch.bfloat16)
    given = (x, weights, w_gate_up, w_down, b_gate_up, b_down)

    def run():
        y = pt.moe_forward(x, ids, weights, w_gate_up, w_down, b_gate_up=b_gate_up, b_down=b_down)
        return [y, *torch.autograd.grad(y.float().square().sum(), given)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_meta_tensors_give_shapes():
    gating = pt.topk_gating(torch.empty(T, E, device="meta", dtype=torch.bfloat16), GROUPED)
    assert [(tuple(t.shape), t.dtype) for t in gating] == [
        ((T, 4), torch.int32), ((T, 4), torch.float32), ((E,), torch.int32),
    ]  # fmt: skip
    x, ids, weights, w_gate_up, w_down, *_ = (t.to("meta") for t in problem())
    assert pt.moe_forward(x, ids, weights, w_gate_up, w_down).shape == x.shape


def test_no_tokens():
    x = torch.empty(0, H, requires_grad=True)
    weight = torch.randn(E, H, requires_grad=True)
    gating = pt.topk_gating(pt.router_logits(x, weight), GROUPED)
    w_gate_up, w_down = torch.randn(E, 2 * INNER, H, requires_grad=True), torch.randn(E, H, INNER)
    y = pt.moe_forward(x, gating.topk_idx, gating.topk_weights, w_gate_up, w_down)
    y.sum().backward()
    assert y.shape == (0, H)
    assert not w_gate_up.grad.any()
    assert not weight.grad.any()


def test_hundred_steps_leak_no_memory():
    resource = pytest.importorskip("resource")
    x, _, _, w_gate_up, w_down, *_ = problem()

    def step():
        logits = pt.router_logits(x.repeat(20, 1), w_down[:, :, 0])
        gating = pt.topk_gating(logits, GROUPED)
        y = pt.moe_forward(x.repeat(20, 1), gating.topk_idx, gating.topk_weights, w_gate_up, w_down)
        y.square().sum().backward()

    for _ in range(20):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096  # KiB; one step keeps 1.1 MiB until its backward
