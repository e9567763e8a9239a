"""The cases of ``pyroute check``: every op on small and awkward inputs, each a function of the backend's name.

A case returns arrays by name. Where the contract promises equal bytes they are compared with the NumPy fallback's; a
grouped GEMM is compared with float64, element by element. Inputs depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import pyroute

Array = Any
Results = dict[str, Array]
Bounds = dict[str, tuple[Array, Array]]  # value in float64, largest error of each element

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UNIT = 2.0**-24


class Case(NamedTuple):
    """One op on one input; ``bounds`` is None where bytes must be equal."""

    op: str
    shape: str
    run: Callable[[str], Results]
    bounds: Callable[[], Bounds] | None = None


def cases(seed: int) -> Iterator[Case]:
    """Every case, cheap ones first; arrays are made when a case is reached."""
    rng = np.random.default_rng(seed)
    for name in pyroute.presets():
        yield from _gating_cases(rng, name)
    for num_tokens, num_experts, k, alignment in ((0, 4, 2, 1), (1, 1, 1, 1), (61, 13, 3, 1), (200, 64, 8, 16)):
        yield from _route_cases(rng, num_tokens, num_experts, k, alignment)
    for rows, columns in ((1, 1), (7, 130), (65, 257), (128, 512)):
        yield from _fp8_cases(rng, rows, columns)
    for kind in ("float32", "bfloat16", "float8", "float8 weights"):
        yield from _gemm_cases(rng, kind)
    for activation, weight_on in (("swiglu", "output"), ("swiglu_oai", "pre_down"), ("relu2", "input")):
        yield from _layer_cases(rng, activation, weight_on)


def _gating_cases(rng: np.random.Generator, name: str) -> Iterator[Case]:
    config = pyroute.RouterConfig.preset(name)
    num_tokens, k = 37, config.top_k
    logits = rng.normal(0, 2, (num_tokens, config.num_experts)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    logits[2] = 0.0
    logits[3, :: config.num_experts] = np.nan
    logits[4, 0] = -np.inf
    bias = rng.normal(0, 0.05, config.num_experts).astype(np.float32)
    mask = rng.random(num_tokens) < 0.9
    grad = rng.normal(size=(num_tokens, k)).astype(np.float32)
    shape = f"{name}: {num_tokens} tokens, {config.num_experts} experts"

    def choose(backend: str) -> Results:
        plain = pyroute.topk_gating(logits, config, token_mask=mask, backend=backend)
        biased = pyroute.topk_gating(logits, config, bias=bias, backend=backend)
        half = pyroute.topk_gating(logits.astype(BFLOAT16), config, backend=backend)
        replayed = pyroute.topk_gating(logits, config, topk_idx=biased.topk_idx, backend=backend)
        found = {"plain": plain, "with bias": biased, "bfloat16": half, "replayed": replayed}
        return {f"{field} {what}": getattr(g, field) for what, g in found.items() for field in g._fields}

    finite = np.nan_to_num(logits, neginf=-9.0)  # a NaN logit makes a loss NaN on every backend, right or wrong

    def differentiate(backend: str) -> Results:
        gating = pyroute.topk_gating(logits, config, token_mask=mask, backend=backend)
        gradient = pyroute.topk_gating_backward(grad, logits, gating, config, token_mask=mask, backend=backend)
        everything = pyroute.topk_gating_backward(
            grad, finite, gating, config, balance_loss_coef=0.01, z_loss_coef=0.001, token_mask=mask, backend=backend
        )
        loss = pyroute.balance_loss(finite, gating, config, token_mask=mask, backend=backend)
        return {
            "grad_logits": gradient,
            "grad_logits with losses": everything,
            "balance_loss": np.array(loss),
            "z_loss": np.array(pyroute.z_loss(finite, token_mask=mask, backend=backend)),
            "bias": pyroute.update_bias(bias, gating.tokens_per_expert, backend=backend),
        }

    yield Case("gating: choice and weights", shape, choose)
    yield Case("gating: gradients, losses", shape, differentiate)


def _route_cases(rng: np.random.Generator, num_tokens: int, num_experts: int, k: int, alignment: int) -> Iterator[Case]:
    ids = rng.integers(-1, num_experts, (num_tokens, k)).astype(np.int32)
    weights = rng.random((num_tokens, k)).astype(np.float32)
    hidden = 70
    x = rng.normal(size=(num_tokens, hidden)).astype(np.float32)
    plan = pyroute.plan_routes(ids, num_experts, alignment=alignment, backend="numpy")
    rows = rng.normal(size=(plan.num_rows, hidden)).astype(np.float32)
    shape = f"{num_tokens} tokens, {num_experts} experts, top {k}, alignment {alignment}"

    def make_plan(backend: str) -> Results:
        made = pyroute.plan_routes(ids, num_experts, alignment=alignment, backend=backend)
        return {
            "tokens_per_expert": made.tokens_per_expert,
            "expert_offsets": made.expert_offsets,
            "row_to_token": made.row_to_token,
            "token_to_row": made.token_to_row,
        }

    def move(backend: str) -> Results:
        fp8 = pyroute.permute_quantize(x, plan, backend=backend)
        return {
            "permute": pyroute.permute(x, plan, backend=backend),
            "permute bfloat16": pyroute.permute(x.astype(BFLOAT16), plan, backend=backend),
            "permute_quantize codes": fp8.codes,
            "permute_quantize scales": fp8.scales,
            "unpermute": pyroute.unpermute(rows, plan, backend=backend),
            "unpermute weighted": pyroute.unpermute(rows, plan, weights, backend=backend),
            "unpermute bfloat16": pyroute.unpermute(rows.astype(BFLOAT16), plan, weights, backend=backend),
        }

    def move_back(backend: str) -> Results:
        grad_rows, grad_weights = pyroute.unpermute_backward(x, rows, plan, weights, backend=backend)
        return {
            "permute_backward": pyroute.permute_backward(rows, plan, backend=backend),
            "grad_rows": grad_rows,
            "grad_topk_weights": grad_weights,
        }

    yield Case("routes: plan", shape, make_plan)
    yield Case("routes: permute, unpermute", shape, move)
    yield Case("routes: gradients", shape, move_back)


def _fp8_cases(rng: np.random.Generator, rows: int, columns: int) -> Iterator[Case]:
    x = (rng.normal(size=(rows, columns)) * 10.0 ** rng.uniform(-6, 6, (rows, 1))).astype(np.float32)
    awkward = x.reshape(-1)[:: max(1, x.size // 9)]
    awkward[...] = np.resize(np.array([0, -0.0, np.nan, np.inf, 1e-42, 448, 449], np.float32), awkward.size)
    shape = f"{rows} x {columns}"

    def quantize(backend: str) -> Results:
        results: Results = {}
        for block in ((1, 128), (128, 128), (128, 1)):
            for kind in ("e4m3", "e5m2"):
                q = pyroute.quantize_fp8(x, block=block, format=kind, backend=backend)
                name = f"{kind} {block[0]}x{block[1]}"
                results |= {f"codes {name}": q.codes, f"scales {name}": q.scales}
        q = pyroute.quantize_fp8(x.astype(BFLOAT16), scale_format="ue8m0", backend=backend)
        return results | {"codes ue8m0": q.codes, "scales ue8m0": q.scales}

    q = pyroute.quantize_fp8(x, backend="numpy")

    def dequantize(backend: str) -> Results:
        return {
            dtype: pyroute.dequantize_fp8(q, dtype, backend=backend) for dtype in ("float32", "bfloat16", "float16")
        }

    yield Case("FP8: codes and scales", shape, quantize)
    yield Case("FP8: back to floats", shape, dequantize)


def _gemm_cases(rng: np.random.Generator, kind: str) -> Iterator[Case]:
    num_rows, inner, outer = 43, 200, 70
    offsets = np.array([0, 0, 5, 6, 30, 41])  # an empty expert, and two rows that belong to none
    experts = len(offsets) - 1
    a: Any
    b: Any
    grad: Any
    a, b, grad = (
        rng.normal(size=size).astype(np.float32)
        for size in ((num_rows, inner), (experts, outer, inner), (num_rows, outer))
    )
    if kind == "bfloat16":
        a, b, grad = a.astype(BFLOAT16), b.astype(BFLOAT16), grad.astype(BFLOAT16)
    if kind.startswith("float8"):
        b = pyroute.quantize_fp8(b, block=(128, 128), backend="numpy")
    if kind == "float8":
        a, grad = (pyroute.quantize_fp8(value, backend="numpy") for value in (a, grad))
    shape = f"{kind}: {num_rows} rows, {experts} experts of {outer} x {inner}"
    float32 = {"out_dtype": "float32"}

    def segments() -> Iterator[tuple[int, slice]]:
        for e in range(experts):
            yield e, slice(offsets[e], offsets[e + 1])

    def bound(results: Callable[[Array, Array, Array], Array]) -> tuple[Array, Array]:
        exact = [_float64(value) for value in (a, b, grad)]
        return results(*exact), 4 * UNIT * results(*(np.abs(value) for value in exact)) + UNIT * 2.0**-126

    def forward(a: Array, b: Array, _: Array) -> Array:
        out = np.zeros((num_rows, outer))
        for e, rows in segments():
            out[rows] = a[rows] @ b[e].T
        return out

    def dgrad(_: Array, b: Array, grad: Array) -> Array:
        out = np.zeros((num_rows, inner))
        for e, rows in segments():
            out[rows] = grad[rows] @ b[e]
        return out

    def wgrad(a: Array, _: Array, grad: Array) -> Array:
        return np.stack([grad[rows].T @ a[rows] for _, rows in segments()])

    yield Case(
        "GEMM: forward",
        shape,
        lambda backend: {"out": pyroute.grouped_gemm(a, b, offsets, backend=backend, **float32)},
        lambda: {"out": bound(forward)},
    )
    yield Case(
        "GEMM: gradients",
        shape,
        lambda backend: {
            "grad_a": pyroute.grouped_gemm_dgrad(grad, b, offsets, backend=backend, **float32),
            "grad_b": pyroute.grouped_gemm_wgrad(grad, a, offsets, backend=backend),
        },
        lambda: {"grad_a": bound(dgrad), "grad_b": bound(wgrad)},
    )


def _float64(x: Array) -> Array:
    return (x.dequantize("float32") if isinstance(x, pyroute.Fp8Array) else x).astype(np.float64)


def _layer_cases(rng: np.random.Generator, activation: Any, weight_on: Any) -> Iterator[Case]:
    num_tokens, hidden, intermediate, experts, k = 40, 136, 72, 6, 2
    width = intermediate * (1 if activation == "relu2" else 2)
    x, grad = (rng.normal(size=(num_tokens, hidden)).astype(np.float32) for _ in range(2))
    ids = rng.integers(-1, experts, (num_tokens, k)).astype(np.int32)
    weights = rng.random((num_tokens, k)).astype(np.float32)
    w_gate_up, w_down = (
        (rng.normal(size=size) * size[-1] ** -0.5).astype(np.float32)
        for size in ((experts, width, hidden), (experts, hidden, intermediate))
    )

    def run(backend: str) -> Results:
        y, saved = pyroute.moe_forward(
            x, ids, weights, w_gate_up, w_down, activation=activation, weight_on=weight_on, return_saved=True,
            backend=backend,
        )  # fmt: skip
        gradients = pyroute.moe_backward(grad, saved)
        names = ("x", "topk_weights", "w_gate_up", "w_down")
        return {"y": y} | {f"gradient of {name}": getattr(gradients, name) for name in names}

    def bounds() -> Bounds:
        # Rounding in sums of this length moves an element by a few 1e-6 of its row's largest; a mistake by far more.
        return {
            name: (value.astype(np.float64), 1e-4 * np.abs(value).max(axis=-1, keepdims=True) + 0 * value)
            for name, value in run("numpy").items()
        }

    shape = f"{activation}, weights on {weight_on}: {num_tokens} tokens, {experts} experts of {hidden} x {intermediate}"
    yield Case("layer: forward, backward", shape, run, bounds)
