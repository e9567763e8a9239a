"""TransformerEngine's functions by name: against plain PyTorch in float64, dense maps, gradients, its own layouts."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch._dynamo.testing")

import pyroute  # noqa: E402
from pyroute.integrations import transformer_engine as te  # noqa: E402

T, E, K = 37, 16, 4

RULES = {  # score, use_pre_softmax, groups, scale, bias
    "softmax after": ("softmax", False, None, None, False),
    "softmax after, groups, bias ignored": ("softmax", False, (4, 2), 2.5, True),
    "softmax before": ("softmax", True, None, 0.0, False),
    "softmax before, groups, bias ignored": ("softmax", True, (8, 2), 16.0, True),
    "sigmoid": ("sigmoid", False, None, None, False),
    "sigmoid, bias": ("sigmoid", True, None, 2.5, True),
    "sigmoid, groups, bias": ("sigmoid", False, (4, 2), 2.5, True),
    "sigmoid, groups": ("sigmoid", False, (8, 4), None, False),
    "sqrtsoftplus, bias": ("sqrtsoftplus", False, None, 1.5, True),
    "sqrtsoftplus, groups": ("sqrtsoftplus", False, (2, 1), None, False),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)


def scores_of(z, score):
    if score == "sqrtsoftplus":
        return torch.nn.functional.softplus(z).sqrt()
    return torch.sigmoid(z) if score == "sigmoid" else torch.softmax(z, -1)


def reference(z, k, pre_softmax, groups, scale, score, bias):
    """The rule in plain PyTorch: what is ranked, what weighs."""
    softmax_after = score == "softmax" and not pre_softmax
    scores = z if softmax_after else scores_of(z, score)
    keys = scores + bias if bias is not None and score != "softmax" else scores
    if groups:
        folded = keys.unflatten(-1, (groups[0], -1))
        rank = folded.topk(k // groups[1]).values.sum(-1)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(groups[1]).indices, True)
        keys = folded.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    ids = keys.topk(k).indices
    weights = scores.gather(-1, ids)
    if softmax_after:
        weights = weights.softmax(-1)
    if score != "softmax" and k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * (scale or 1.0)
    return torch.zeros_like(z).scatter(-1, ids, weights), torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, True)


def logits_of(*leading, dtype=torch.float64):
    """Normal, and no two of a token equal: plain PyTorch breaks ties as it likes."""
    values = torch.randn(200).to(dtype).unique()
    places = torch.rand(*leading, len(values)).argsort(-1)[..., :E]
    return values[places]


def arguments(name, dtype=torch.float64, leading=(T,)):
    score, pre_softmax, groups, scale, has_bias = RULES[name]
    z = logits_of(*leading, dtype=dtype)
    bias = torch.randn(E) if has_bias else None
    return z, pre_softmax, groups, scale, score, bias


def call(z, pre_softmax, groups, scale, score, bias, k=K, **options):
    num_groups, group_topk = groups or (None, None)
    return te.fused_topk_with_score_function(z, k, pre_softmax, num_groups, group_topk, scale, score, bias, **options)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("leading", [(T,), (3, 5), (0,)])
def test_the_rule(name, leading):
    given = arguments(name, leading=leading)
    probs, routing_map = call(*given)
    want, want_map = reference(given[0], K, *given[1:])
    assert torch.equal(routing_map, want_map)
    torch.testing.assert_close(probs, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computed_in_float32_whatever_the_type(name, dtype):
    given = arguments(name, dtype)
    probs, routing_map = call(*given)
    wide, wide_map = call(given[0].float(), *given[1:])
    assert probs.dtype == dtype
    assert torch.equal(routing_map, wide_map)
    assert torch.equal(probs, wide.to(dtype))
    want, want_map = reference(given[0].double(), K, *given[1:])
    assert torch.equal(routing_map, want_map)
    torch.testing.assert_close(wide, want.float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_gradients(name):
    given = arguments(name, leading=(7,))
    z = given[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: call(z, *given[1:])[0], z)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = z.detach().to(dtype).requires_grad_()
        call(narrow, *given[1:])[0].float().square().sum().backward()
        exact = narrow.detach().double().requires_grad_()
        reference(exact, K, *given[1:])[0].to(dtype).float().square().sum().backward()
        assert narrow.grad.dtype == dtype
        tolerance = 5e-6 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(narrow.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_one_expert_a_token_is_not_renormalised(score):
    z = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    probs, _ = call(z, True, None, None, score, None, k=1)
    torch.testing.assert_close(probs.sum(-1), scores_of(z, score).max(-1).values)
    probs.sum().backward()
    assert z.grad.abs().max() > 0.01


def test_experts_of_excluded_groups_are_never_chosen():
    """Not even where what is left of the kept ones is -inf: five experts of two groups with two finite logits each."""
    z = torch.full((1, 16), -torch.inf)
    z[0, [4, 5, 8, 9]] = torch.tensor([0.0, 0.0, 1.0, -3.0])
    z[0, 0] = torch.nan
    _, routing_map = call(z, False, (4, 2), None, "softmax", None, k=5)
    assert routing_map[0].nonzero().flatten().tolist() == [4, 5, 6, 8, 9]
    negative = torch.full((16,), -5.0)
    _, routing_map = call(z.nan_to_num(neginf=-9.0), False, (4, 2), None, "sigmoid", negative, k=5)
    assert routing_map[0].nonzero().flatten().tolist() == [4, 5, 6, 8, 9]


def test_ties_go_to_the_lower_expert():
    _, routing_map = call(torch.zeros(2, 8), False, (4, 2), None, "softmax", None)
    assert routing_map.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("num_experts", [5, 8, 20])
def test_bitmaps_and_given_ids(num_experts):
    z = torch.randn(2, 3, num_experts)
    probs, bytemap = call(z, False, None, None, "sigmoid", None)
    for number in ("bitmap_u8", 1, types.SimpleNamespace(__int__=1)):
        if not isinstance(number, (str, int)):
            number = np.int64(1)  # anything that converts, as an enum does
        _, bitmap = call(z, False, None, None, "sigmoid", None, routing_map_format=number)
        want = np.packbits(bytemap.numpy(), axis=-1, bitorder="little")
        assert bitmap.dtype == torch.uint8
        assert np.array_equal(bitmap.numpy(), want)
    ids = torch.empty(6, K, dtype=torch.int16)
    again, given = call(z, False, None, None, "sigmoid", None, topk_indices=ids)
    assert given is ids
    assert torch.equal(again, probs)
    flat = torch.zeros(6, num_experts, dtype=torch.bool).scatter(1, ids.long(), True)
    assert torch.equal(flat, bytemap.flatten(0, 1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_for_the_balance_loss(score, dtype):
    z = logits_of(T, dtype=dtype).requires_grad_()
    routing_map, scores = te.fused_compute_score_for_moe_aux_loss(z, K, score)
    exact = z.detach().double().requires_grad_()
    want = scores_of(exact, score)
    want = want / (want.sum(-1, keepdim=True) + 1e-20)
    assert scores.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(routing_map, torch.zeros(T, E, dtype=torch.bool).scatter(1, want.topk(K).indices, True))
    torch.testing.assert_close(scores, want.to(scores.dtype), rtol=3e-6, atol=1e-9)
    weigh = torch.randn(T, E)
    (scores * weigh).sum().backward()
    (want * weigh).sum().backward()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=tolerance, atol=1e-7)


def test_scores_gradcheck():
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        assert torch.autograd.gradcheck(lambda z, s=score: te.fused_compute_score_for_moe_aux_loss(z, 2, s)[1], z)


@pytest.mark.parametrize("tokens", [T, torch.tensor(T)])
def test_balance_loss(tokens):
    probs = torch.rand(T, E, dtype=torch.float64, requires_grad=True)
    counts = torch.randint(0, 9, (E,), dtype=torch.int32)
    loss = te.fused_moe_aux_loss(probs, counts, tokens, E, K, 0.01)
    torch.testing.assert_close(loss, (probs.sum(0) * counts).sum() * (E * 0.01 / (K * T * T)), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda p: te.fused_moe_aux_loss(p, counts, tokens, E, K, 0.01), probs)
    assert te.fused_moe_aux_loss(probs.bfloat16(), counts, tokens, E, K, 0.01).dtype == torch.bfloat16
    balanced = te.fused_moe_aux_loss(torch.full((T, E), 1 / E), torch.full((E,), T * K / E), T, E, K, 0.01)
    assert balanced == pytest.approx(0.01, rel=1e-5)


# --- permutation ------------------------------------------------------------------------------------------------------


def mask_of(num_tokens=T, num_experts=E, share=0.3):
    return torch.rand(num_tokens, num_experts) < share


def pairs(mask):
    """(expert, token) by expert, then token: the rows."""
    return mask.t().nonzero().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(T, E), (0, E), (5, 1), (300, 64)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_permute_by_a_mask(dtype, shape, share):
    mask = mask_of(*shape, share)
    x = (100 * torch.rand(shape[0], 24)).to(dtype)
    order = pairs(mask)
    for routing_map in (mask, mask.int(), mask.to(torch.uint8)):
        rows, row_id_map = te.moe_permute(x, routing_map, len(order) or None)
        assert torch.equal(rows, x[[t for _, t in order]].reshape(-1, 24))
    ids = torch.where(mask, torch.arange(shape[1], dtype=torch.int32), -1)
    layout = pyroute.plan_routes(ids.numpy(), shape[1]).to_te_row_id_map("mask")
    assert row_id_map.dtype == torch.int32
    assert np.array_equal(row_id_map.numpy(), layout)
    padded, _ = te.moe_permute(x, mask, len(order) + 3)
    assert torch.equal(padded[: len(order)], rows)
    assert not padded[len(order) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype):
    mask, x, probs = mask_of(), torch.randn(T, 24, dtype=dtype), torch.rand(T, E)
    rows, permuted, row_id_map = te.moe_permute_with_probs(x, probs, mask, int(mask.sum()))
    assert torch.equal(permuted, torch.stack([probs[t, e] for e, t in pairs(mask)]))
    back = te.moe_unpermute(rows, row_id_map, restore_shape=x.shape)
    counts = mask.sum(1, keepdim=True)
    torch.testing.assert_close(back.float(), x.float() * counts, rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=0)
    weighted = te.moe_unpermute(rows, row_id_map, probs, x.shape)
    want = x.double() * (probs * mask).double().sum(1, keepdim=True)
    assert weighted.dtype == dtype
    torch.testing.assert_close(weighted.double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
    assert torch.equal(te.moe_unpermute(rows, row_id_map, None, x.shape, "mask", probs), weighted)


def test_permutation_gradients():
    mask = mask_of(6, 5, 0.5)
    mask[2] = False
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    probs = (torch.rand(6, 5, dtype=torch.float64) + 0.1).requires_grad_()
    count = int(mask.sum())
    row_id_map = te.moe_permute(x, mask, count)[1]
    rows = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: te.moe_permute(x, mask, count + 2)[0], x)
    assert torch.autograd.gradcheck(lambda x, p: te.moe_permute_with_probs(x, p, mask, count)[:2], (x, probs))
    assert torch.autograd.gradcheck(lambda r, p: te.moe_unpermute(r, row_id_map, p, x.shape), (rows, probs))
    assert torch.autograd.gradcheck(lambda r: te.moe_unpermute(r, row_id_map, None, x.shape), rows)
    counts = mask.sum(0)
    padded = lambda x, p: te.moe_permute_and_pad_with_probs(x, p, mask, counts, 4)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(padded, (x, probs))


def test_a_probability_of_zero_is_a_zero_row():
    """How Megatron pads a routing map."""
    mask, probs = mask_of(), torch.rand(T, E) + 0.1
    probs[torch.rand(T, E) < 0.2] = 0.0
    x = torch.randn(T, 8).requires_grad_()
    rows, permuted, _ = te.moe_permute_with_probs(x, probs, mask, int(mask.sum()))
    want = torch.stack([x[t] * (probs[t, e] != 0) for e, t in pairs(mask)])
    assert torch.equal(rows, want)
    assert (permuted == 0).any()
    rows.sum().backward()
    assert torch.equal(x.grad[:, 0], (mask & (probs != 0)).sum(1).float())


@pytest.mark.parametrize("align", [1, 4, 16])
def test_padded_permutation(align):
    mask, probs, x = mask_of(), torch.rand(T, E) + 0.1, torch.randn(T, 8)
    mask[:, 3] = False
    counts = mask.sum(0)
    rows, permuted, row_id_map, pad_offsets, padded = te.moe_permute_and_pad_with_probs(x, probs, mask, counts, align)
    assert padded.tolist() == [-(-n // align) * align for n in counts.tolist()]
    assert (pad_offsets is None) == (align == 1)
    starts = padded.cumsum(0) - padded
    assert rows.shape[0] == int(padded.sum()) == permuted.shape[0]
    for e in range(E):
        tokens = mask[:, e].nonzero().flatten()
        first, last = int(starts[e]), int(starts[e]) + int(padded[e])
        assert torch.equal(rows[first : first + len(tokens)], x[tokens])
        assert torch.equal(permuted[first : first + len(tokens)], probs[tokens, e])
        assert not rows[first + len(tokens) : last].any()
        assert not permuted[first + len(tokens) : last].any()
    assert torch.equal(row_id_map, te.moe_permute(x, mask)[1])
    y = te.moe_unpermute(rows, row_id_map, probs, x.shape, pad_offsets=pad_offsets)
    torch.testing.assert_close(y, x * (probs * mask).sum(1, keepdim=True))


@pytest.mark.parametrize("cut", [0, 7])
def test_permute_by_an_index(cut):
    x, ids = torch.randn(T, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, E, (T, K), dtype=torch.int32)
    order = torch.argsort(ids.flatten().long(), stable=True)[: T * K - cut]
    rows, row_id_map = te.moe_permute(x, ids, T * K - cut if cut else 0, map_type="index")
    assert torch.equal(rows, x[order // K])
    layout = np.full(T * K, -1, np.int32)
    layout[(order % K) * T + order // K] = np.arange(len(order))
    assert np.array_equal(row_id_map.numpy(), layout)
    probs = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    y = te.moe_unpermute(rows, row_id_map, probs, map_type="index")
    kept = torch.zeros(T * K).index_fill(0, order, 1.0).reshape(T, K)
    torch.testing.assert_close(y, x * (probs * kept).sum(1, keepdim=True))
    weights = torch.randn(T, 8)
    grads = torch.autograd.grad((y * weights).sum(), (x, probs))
    torch.testing.assert_close(grads[0], weights * (probs * kept).sum(1, keepdim=True).double(), check_dtype=False)
    torch.testing.assert_close(grads[1], kept * (x * weights).sum(1, keepdim=True), check_dtype=False)
    one, its_map = te.moe_permute(x, ids[:, :1], 0, map_type="index")
    assert torch.equal(te.moe_unpermute(one, its_map, map_type="index"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rest", [0, 5])
def test_chunks(dtype, rest):
    sizes, order = torch.tensor([3, 0, 5, 1, 4]), torch.tensor([2, 4, 1, 0, 3], dtype=torch.int32)
    x, probs = torch.randn(13 + rest, 6, dtype=dtype, requires_grad=True), torch.rand(13 + rest, requires_grad=True)
    for t in (x, probs):
        chunks = (*t.split([*sizes.tolist(), rest]),)
        want = torch.cat([*(chunks[i] for i in order.tolist()), chunks[-1]])
        got = te.moe_sort_chunks_by_index_with_probs(x, probs, sizes, order)[0 if t is x else 1]
        assert torch.equal(got, want)
        weights = torch.randn(want.shape)
        grads = [torch.autograd.grad((y * weights).sum(), t)[0] for y in (got, want)]
        assert torch.equal(*grads)
    assert torch.equal(te.moe_sort_chunks_by_index(x, sizes, order), te.moe_sort_chunks_by_index_with_probs(
        x, probs, sizes.int(), order.long()
    )[0])  # fmt: skip


def test_compiles_without_a_break():
    def layer(x, z, bias):
        probs, routing_map = te.fused_topk_with_score_function(z, K, False, 4, 2, 2.5, "sigmoid", bias)
        rows, permuted, row_id_map = te.moe_permute_with_probs(x, probs, routing_map, z.shape[0] * K)
        return te.moe_unpermute(rows * permuted[:, None], row_id_map, restore_shape=x.shape)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (9, 13, 17, 21):
        given = [torch.randn(num_tokens, 8), torch.randn(num_tokens, E)]
        results = []
        for function in (layer, compiled):
            x, z = (t.clone().requires_grad_() for t in given)
            y = function(x, z, torch.zeros(E))
            y.square().sum().backward()
            results.append((y, x.grad, z.grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2  # the second is for any number of tokens


@pytest.mark.parametrize(
    ("function", "given", "words"),
    [
        (te.fused_topk_with_score_function, (torch.zeros(2, 8), 2, False, None, None, None, "tanh", None), "score_fun"),
        (te.fused_topk_with_score_function, (torch.zeros(2, 8), 9, False, None, None, None, "sigmoid", None), "top_k"),
        (te.fused_topk_with_score_function, (torch.zeros(2, 8), 2, 0, 3, 1, None, "softmax", None), "num_groups"),
        (te.fused_topk_with_score_function, (torch.zeros(2, 8), 2, 0, 0, 0, 0, "softmax", None, "bits"), "routing_map"),
        (te.fused_topk_with_score_function, (torch.zeros(2, 8), 2, 0, 0, 0, 0, "softmax", None, 7), "routing_map_for"),
        (te.moe_permute, (torch.zeros(3, 4), torch.ones(2, 5), 6), "routing_map must be"),
        (te.moe_permute, (torch.zeros(2, 4), torch.ones(2, 5), 6), "num_out_tokens must be at least the 10 rows"),
        (te.moe_permute, (torch.zeros(2, 4), torch.ones(2, 5), 6, -1, "masks"), "map_type"),
        (te.moe_unpermute, (torch.zeros(2, 4), torch.ones(3, 11), None, (2, 4)), "row_id_map must be"),
        (te.moe_sort_chunks_by_index, (torch.zeros(3, 4), torch.tensor([2, 2]), torch.tensor([0, 1])), "split_sizes"),
        (te.moe_sort_chunks_by_index, (torch.zeros(3, 4), torch.tensor([2, 1]), torch.tensor([0, 0])), "sorted_index"),
    ],
)
def test_bad_input_is_one_sentence(function, given, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        function(*given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["two_kernel", "fused_atomic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantile_balancing_adds_to_the_histogram(mode, dtype):
    """By the definition of its kernel: floor((cutoff - score - lower) * bins / (upper - lower)), kept inside."""
    z, bias = torch.randn(50, 16).to(dtype), 0.1 * torch.randn(16)
    bounds, before = (
        torch.tensor([bias.min() - 0.5, bias.max() + 0.5]),
        torch.randint(0, 9, (16, 20), dtype=torch.int32),
    )
    s = z.float().sigmoid()
    needed = (s + bias).topk(5).values[:, 4:] - s
    bins = ((needed - bounds[0]) * (20 / (bounds[1] - bounds[0]))).floor().long().clamp(0, 19)
    expected = before + torch.nn.functional.one_hot(bins, 20).sum(0).int()
    quantiles = {"qb_histogram": before.clone(), "qb_bin_bounds": bounds, "qb_histogram_mode": mode}
    got = te.fused_topk_with_score_function(z, 4, False, None, None, 2.5, "sigmoid", bias, **quantiles)
    without = te.fused_topk_with_score_function(z, 4, False, None, None, 2.5, "sigmoid", bias)
    assert all(torch.equal(a, b) for a, b in zip(got, without, strict=True))
    assert (quantiles["qb_histogram"] - expected).abs().sum() <= 2  # PyTorch's sigmoid may round across a bin's bound
    assert (quantiles["qb_histogram"].sum(1) == before.sum(1) + 50).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qb_histogram_mode": None}, "qb_histogram_mode must be one of 'two_kernel', 'fused_atomic', got None"),
        ({"qb_histogram": None}, "qb_histogram must be int32"),
        ({"qb_histogram": torch.zeros(7, 4, dtype=torch.int32)}, "qb_histogram must be int32"),
        ({"qb_histogram": torch.zeros(8, 4)}, "qb_histogram must be int32"),
        ({"qb_bin_bounds": None}, "qb_bin_bounds must be float32"),
        ({"qb_bin_bounds": torch.tensor([1.0, -1.0])}, "bounds must be a lower number and a higher one"),
        (
            {"score_function": "softmax", "use_pre_softmax": True},
            "qb_histogram must be given with score_function 'sigm",
        ),
        ({"expert_bias": None}, "qb_histogram must be given with score_function 'sigmoid', an expert_bias"),
        ({"num_groups": 4, "group_topk": 2}, "no groups"),
    ],
)
def test_quantile_balancing_refused(change, words):
    given = {
        "logits": torch.zeros(2, 8), "topk": 2, "use_pre_softmax": False, "num_groups": None, "group_topk": None,
        "scaling_factor": None, "score_function": "sigmoid", "expert_bias": torch.zeros(8),
        "qb_histogram": torch.zeros(8, 4, dtype=torch.int32), "qb_bin_bounds": torch.tensor([-1.0, 1.0]),
        "qb_histogram_mode": "two_kernel", **change,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        te.fused_topk_with_score_function(**given)
    assert "\n" not in str(caught.value)


# --- a stand-in for the package, whose extension needs CUDA to be imported --------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """Modules with the names that TransformerEngine 2.20 has its functions under."""
    package = types.ModuleType("transformer_engine")
    package.__version__ = "2.20.2"
    modules = {"transformer_engine": package}
    for name in ("pytorch", "pytorch.router", "pytorch.permutation"):
        modules[f"transformer_engine.{name}"] = types.ModuleType(name)
    for function in te.FUNCTIONS:
        name = function.__name__
        home = modules["transformer_engine.pytorch." + ("router" if name.startswith("fused") else "permutation")]
        theirs = lambda *args, name=name, **kwargs: f"TransformerEngine's {name}"  # noqa: E731
        setattr(home, name, theirs)
        if name.startswith("moe"):
            setattr(modules["transformer_engine.pytorch"], name, theirs)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    te.uninstall()


def test_install_serves_tensors_on_the_cpu_and_no_others(stand_in):
    before = {name: dict(vars(module)) for name, module in stand_in.items()}
    te.install()
    after = {name: dict(vars(module)) for name, module in stand_in.items()}
    te.install()
    assert {name: dict(vars(module)) for name, module in stand_in.items()} == after
    module = stand_in["transformer_engine.pytorch.permutation"]
    assert stand_in["transformer_engine.pytorch"].moe_permute is not before["transformer_engine.pytorch"]["moe_permute"]
    assert torch.equal(module.moe_permute(torch.ones(2, 3), torch.ones(2, 1, dtype=torch.bool), 2)[0], torch.ones(2, 3))
    elsewhere = torch.ones(2, 3, device="meta")
    assert module.moe_permute(elsewhere, elsewhere, 2) == "TransformerEngine's moe_permute"
    te.uninstall()
    te.uninstall()
    assert {name: dict(vars(module)) for name, module in stand_in.items()} == before


def test_an_unknown_version_gets_a_warning(stand_in):
    stand_in["transformer_engine"].__version__ = "3.1.0"
    with pytest.warns(UserWarning, match=r"tested with TransformerEngine 2\.20, this is 3\.1\.0"):
        te.install()
    assert te._bindings  # and installed it all the same


def test_install_without_the_package_says_so():
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("TransformerEngine is installed")
    with pytest.raises(ImportError, match="transformer_engine"):
        te.install()
