"""Work for gpu_check.py: products whose sums are exact, and every operation on arrays that may lie anywhere."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated
import gpu_maps
import gpu_patterns
import ml_dtypes
import numpy as np
from gpu_cases import Case
from gpu_maps import PAIRS, SHAPES, TYPES

import pyroute
from pyroute import Fp8Array, RouterConfig, _backend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BOUNDED = ("gemm", "dgrad", "wgrad", "moe")  # operations whose sums may be in another order than the CPU's

Put = Callable[[np.ndarray], Any]

if why := emulated.build():
    raise SystemExit(why)


# --- exact products ---------------------------------------------------------------------------------------------------
# Operands in {-1, 0, 1} and scales that are powers of two make every partial sum a float32: whatever the order of
# summation, the tile and the instruction, there is one right answer, to the bit.


class Problem(NamedTuple):
    kind: str  # float32 or of PAIRS: of the rows or gradients, and of the weights (wgrad: rows)
    counts: list[int]  # rows per expert
    n: int
    k: int
    asked: str = ""  # of gpu_maps.SHAPES

    def __str__(self) -> str:
        rows = self.counts if len(self.counts) < 12 else f"{len(self.counts)} x {self.counts[0]}"
        return f"{self.asked} rows {rows} N {self.n} K {self.k}".lstrip()


Operation = Callable[[np.random.Generator, Problem], Iterator["Result"]]


def cases() -> list[Case]:
    """Every product of every shape, the small and common ones first; each makes its own numbers."""
    quick = os.environ.get("PYROUTE_GPU_CHECK") == "quick"
    return [
        Case(f"{operation.__name__} {p.kind}: {p}", functools.partial(checked, operation, p, seed))
        for seed, (operation, p) in enumerate(problems(emulated.REAL, quick))
    ]


def problems(real: bool, quick: bool) -> Iterator[tuple[Operation, Problem]]:
    """e5m2 but for gradients beside e4m3, which is what training has, on the small shapes alone."""
    for counts, n, k in shapes(real, quick):
        for kind in (*PAIRS, "float32"):
            for operation in (forward, masked, dgrad, wgrad):
                seldom = "e5m2" in kind and (kind != "e5m2_e4m3" or operation in (forward, masked))
                if not seldom or sum(counts) * n * k <= 2**28:
                    yield operation, Problem(kind, counts, n, k)
    yield from tails(real, quick)


def shapes(real: bool, quick: bool) -> Iterator[tuple[list[int], int, int]]:
    """Rows per expert, N and K: around the tiles' edges, and around whole waves of tiles on a large card."""
    ragged = [0, 1, 63, 64, 65, 127, 0, 128, 129, 200]
    if not real:
        yield [0, 1, 65, 130], 192, 256
        yield [129], 136, 128
        return
    yield [128], 128, 128  # one tile, one stage of FP8
    yield [128, 128], 256, 512
    yield from ((ragged, n, k) for n, k in itertools.product((64, 128, 192, 320), (128, 256, 1024)))
    yield ragged, 100, 72  # no multiple of anything
    for tiles in (1, 2, 131, 132, 133, 264, 265) if not quick else (133,):
        yield [128 * tiles - 5], 128, 512
        yield [128] * tiles, 128, 256
    yield [3000, 1, 0, 5000], 1024, 2048


def tails(real: bool, quick: bool) -> Iterator[tuple[Operation, Problem]]:
    """1 to 9 blocks of depth, of which main loops take two or four at a time, every other time the last one not whole;
    more tiles than a large card has multiprocessors, so that a block goes from one to the next, and from tiles of 128
    rows to some with 64 or fewer."""
    counts, few, wide = ([1281, 64, 961, 3, 300], [64, 1, 63] * 5, 1152) if real else ([130, 20], [33, 64], 320)
    for blocks in range(1, 10) if real and not quick else (1, 6):
        depth = 128 * blocks - (48 if blocks % 2 == 0 else 0)
        rest = blocks in (1, 3, 4, 6)  # kernels that have a loop in common with one that takes all nine
        for kind in PAIRS if rest else ("fp8", "bfloat16"):
            yield forward, Problem(kind, counts, wide, depth)
        for shape in SHAPES if rest else ("fp8_128_overlap",):
            yield forward, Problem("fp8", counts, wide, depth, shape)
        for kind in ("fp8", "bfloat16") if rest else ():
            yield forward, Problem(kind, few, wide, depth)
            yield masked, Problem(kind, [min(rows, 192) for rows in counts * 2], wide, depth)
            yield wgrad, Problem(kind, [128 * blocks - 64, 128 * blocks, 1], wide, 640 if real else 128)
        yield dgrad, Problem("fp8", counts, depth, wide)


Result = tuple[Any, np.ndarray, np.ndarray | None]  # from the device, exact, where experts' rows begin


def checked(operation: Operation, problem: Problem, seed: int) -> str | None:
    """What is wrong, with the kernel that made it."""
    for got, exact, starts in operation(np.random.default_rng(seed), problem):
        host = emulated.to_host(got)
        if what := gpu_patterns.difference(host, exact.astype(np.float32).astype(host.dtype), starts):
            return f"{_backend.cuda.last_kernel() or 'unknown kernel'}: {host.dtype} {what}"
    return None


def forward(rng: np.random.Generator, p: Problem) -> Iterator[Result]:
    offsets, segments = offsets_of(p.counts)
    (a, a_value), (b, b_value) = rows_of(rng, p, p.k), weights_of(rng, p)
    exact = np.concatenate([a_value[s] @ b_value[e].T for e, s in enumerate(segments)])
    for dtype in ("float32", "bfloat16") if not p.asked else ("bfloat16",):
        with gpu_maps.asked_for(p.asked):
            got = pyroute.grouped_gemm(a, b, emulated.to_device(offsets), out_dtype=dtype)
        yield got, exact, offsets[:-1]


def masked(rng: np.random.Generator, p: Problem) -> Iterator[Result]:
    """As much room for every expert as the largest has rows; what lies behind an expert's own is not touched."""
    counts, room = np.array(p.counts, np.int32), max(p.counts)
    a, a_value = operand(rng, small_values(rng, (len(counts), room, p.k)), types_of(p)[0], (1, 128))
    b, b_value = weights_of(rng, p)
    used = np.arange(room) < counts[:, None]
    exact = np.where(used[..., None], a_value @ b_value.transpose(0, 2, 1), 5)
    for dtype in (np.dtype(np.float32), BFLOAT16):
        out = emulated.to_device(np.full(exact.shape, 5, dtype))
        yield pyroute.grouped_gemm(a, b, tokens_per_expert=emulated.to_device(counts), out=out), exact, None


def dgrad(rng: np.random.Generator, p: Problem) -> Iterator[Result]:
    offsets, segments = offsets_of(p.counts)
    (g, g_value), (b, b_value) = rows_of(rng, p, p.n), weights_of(rng, p)
    exact = np.concatenate([g_value[s] @ b_value[e] for e, s in enumerate(segments)])
    for dtype in ("float32", "bfloat16"):
        yield pyroute.grouped_gemm_dgrad(g, b, emulated.to_device(offsets), out_dtype=dtype), exact, offsets[:-1]


def wgrad(rng: np.random.Generator, p: Problem) -> Iterator[Result]:
    """Into new memory, and onto what is there."""
    offsets, segments = offsets_of(p.counts)
    if p.kind in ("bfloat16", "float32"):
        (g, g_value), (a, a_value) = rows_of(rng, p, p.n), rows_of(rng, p, p.k)
    else:
        of_g, of_a = types_of(p)
        g, g_value = along_tokens(rng, small_values(rng, (int(offsets[-1]), p.n)), offsets, of_g)
        a, a_value = along_tokens(rng, small_values(rng, (int(offsets[-1]), p.k)), offsets, of_a)
    exact = np.stack([g_value[s].T @ a_value[s] for s in segments])
    at = emulated.to_device(offsets)
    yield pyroute.grouped_gemm_wgrad(g, a, at), exact, None
    onto = emulated.to_device(np.full(exact.shape, 3, np.float32))
    yield pyroute.grouped_gemm_wgrad(g, a, at, accumulate_into=onto), exact + 3, None


def offsets_of(counts: list[int]) -> tuple[np.ndarray, list[slice]]:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, [slice(first, last) for first, last in itertools.pairwise(offsets)]


def small_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-1, 2, shape).astype(np.float32)


def powers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp2(rng.integers(-2, 3, shape)).astype(np.float32)


def types_of(p: Problem) -> tuple[str, str]:
    return PAIRS.get(p.kind, (p.kind, p.kind))


def rows_of(rng: np.random.Generator, p: Problem, cols: int) -> tuple[Any, np.ndarray]:
    return operand(rng, small_values(rng, (sum(p.counts), cols)), types_of(p)[0], (1, 128))


def weights_of(rng: np.random.Generator, p: Problem) -> tuple[Any, np.ndarray]:
    return operand(rng, small_values(rng, (len(p.counts), p.n, p.k)), types_of(p)[1], (128, 128))


def operand(rng: np.random.Generator, x: np.ndarray, kind: str, block: tuple[int, int]) -> tuple[Any, np.ndarray]:
    """On the device, and its value in float64."""
    codes = emulated.to_device(x.astype(TYPES.get(kind, np.float32)))
    if kind in ("bfloat16", "float32"):
        return codes, x.astype(np.float64)
    scales = powers(rng, (*x.shape[:-2], -(-x.shape[-2] // block[0]), -(-x.shape[-1] // block[1])))
    wide = scales.repeat(block[0], axis=-2)[..., : x.shape[-2], :].repeat(block[1], axis=-1)[..., : x.shape[-1]]
    return Fp8Array(codes, emulated.to_device(scales), block, kind), (x * wide).astype(np.float64)


def along_tokens(rng: np.random.Generator, x: np.ndarray, offsets: np.ndarray, kind: str) -> tuple[Any, np.ndarray]:
    """In blocks of 128 rows of one expert, with as many rows of scales as an array on a GPU has."""
    counts, experts = np.diff(offsets), len(offsets) - 1
    scales = powers(rng, ((x.shape[0] + experts * 127) // 128, x.shape[1]))
    starts = np.concatenate([[0], np.cumsum(-(-counts // 128))])
    row = np.arange(x.shape[0])
    expert = np.searchsorted(offsets[1:], row, side="right")
    value = x * scales[starts[expert] + (row - offsets[expert]) // 128]
    codes = emulated.to_device(x.astype(TYPES[kind]))
    given = Fp8Array(codes, emulated.to_device(scales), (128, 1), kind, expert_offsets=emulated.to_device(offsets))
    return given, value.astype(np.float64)


# --- every operation --------------------------------------------------------------------------------------------------


def operations(put: Put, small: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls on the same inputs wherever ``put`` puts them; each gives an array or a tuple of them."""
    rng = np.random.default_rng(7)
    tokens, experts, hidden, inner, top_k = (40, 8, 256, 128, 2) if small else (2048, 64, 1024, 512, 8)
    config = RouterConfig(experts, top_k, "sigmoid", num_groups=4, topk_groups=2, renormalize="sum")
    logits, bias = put(normal(rng, tokens, experts)), put(normal(rng, experts) / 100)
    gating = pyroute.topk_gating(logits, config, bias=bias)
    ids, weights = gating.topk_idx, gating.topk_weights
    grad_weights = put(normal(rng, tokens, top_k))
    yield "topk_gating", lambda: pyroute.topk_gating(logits, config, bias=bias)
    yield (
        "topk_gating_backward",
        lambda: pyroute.topk_gating_backward(
            grad_weights, logits, gating, config, balance_loss_coef=1e-2, z_loss_coef=1e-3
        ),
    )
    plan = pyroute.plan_routes(ids, experts, alignment=16)
    yield "plan_routes", lambda: plan_parts(pyroute.plan_routes(ids, experts, alignment=16))
    x = put(normal(rng, tokens, hidden).astype(BFLOAT16))
    rows = pyroute.permute(x, plan)
    yield "permute", lambda: pyroute.permute(x, plan)
    yield "unpermute", lambda: pyroute.unpermute(rows, plan, weights)
    yield "unpermute_backward", lambda: pyroute.unpermute_backward(x, rows, plan, weights)
    yield "permute_quantize", lambda: codes_of(pyroute.permute_quantize(x, plan))
    yield "quantize_fp8", lambda: codes_of(pyroute.quantize_fp8(x))
    yield "quantize_fp8 weights", lambda: codes_of(pyroute.quantize_fp8(x, block=(128, 128)))
    offsets = plan.expert_offsets
    yield "quantize_fp8 tokens", lambda: codes_of(pyroute.quantize_fp8(rows, block=(128, 1), expert_offsets=offsets))
    yield "dequantize_fp8", lambda: pyroute.dequantize_fp8(pyroute.quantize_fp8(x), "bfloat16")

    w_gate_up = put((normal(rng, experts, 2 * inner, hidden) / 16).astype(BFLOAT16))
    w_down = put((normal(rng, experts, hidden, inner) / 16).astype(BFLOAT16))
    gate_up8, down8 = (pyroute.quantize_fp8(w, block=(128, 128)) for w in (w_gate_up, w_down))
    rows8 = pyroute.permute_quantize(x, plan)
    wide = pyroute.grouped_gemm(rows, w_gate_up, offsets)
    yield "gemm bfloat16", lambda: pyroute.grouped_gemm(rows, w_gate_up, offsets)
    yield "gemm fp8", lambda: pyroute.grouped_gemm(rows8, gate_up8, offsets)
    yield "dgrad", lambda: pyroute.grouped_gemm_dgrad(wide, gate_up8, offsets, out_dtype="bfloat16")
    yield "wgrad", lambda: pyroute.grouped_gemm_wgrad(wide, rows, offsets)
    yield (
        "wgrad fp8",
        lambda: pyroute.grouped_gemm_wgrad(
            *(pyroute.quantize_fp8(r, block=(128, 1), expert_offsets=offsets) for r in (wide, rows)), offsets
        ),
    )
    for name, given, how in (
        ("moe bfloat16", (w_gate_up, w_down), {}),
        ("moe fp8", (gate_up8, down8), {"quantize_activations": True, "quantize_gradients": True}),
    ):
        yield name, lambda given=given, how=how: layer(x, ids, weights, given, how)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def plan_parts(plan: Any) -> tuple[Any, ...]:
    return plan.tokens_per_expert, plan.expert_offsets, plan.row_to_token, plan.token_to_row


def codes_of(q: Fp8Array) -> tuple[Any, Any]:
    return q.codes, q.scales


def layer(x: Any, ids: Any, weights: Any, experts: tuple[Any, Any], how: dict[str, Any]) -> tuple[Any, ...]:
    y, saved = pyroute.moe_forward(x, ids, weights, *experts, return_saved=True, **how)
    return y, *(grad for grad in pyroute.moe_backward(x, saved) if grad is not None)


def calls(small: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    return operations(emulated.to_device, small)


def content(result: Any) -> bytes:
    return b"".join(part.tobytes() for part in host_parts(result))


def host_parts(result: Any) -> list[np.ndarray]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part.get() if hasattr(part, "get") else np.asarray(emulated.to_host(part)) for part in parts]


def repeats(times: int) -> str:
    """Every operation ``times`` times, taking turns, so that each runs into what another has left."""
    work = list(calls(small=not emulated.REAL))
    first = {name: content(call()) for name, call in work}
    for turn in range(1, times):
        for name, call in work:
            if content(call()) != first[name]:
                raise SystemExit(f"{name}: other bytes in repetition {turn}")
    return f"{len(work)} operations, {times} times each, the same bytes"


def on_cupy(cupy: Any) -> str:
    """CuPy's arrays give the CPU's bytes, products within the rounding of a bfloat16."""
    ours = operations(lambda x: put_on(cupy, x), small=True)
    host = operations(lambda x: x, small=True)
    names = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for (name, call), (_, on_host) in zip(ours, host, strict=True):
            got, want = host_parts(call()), host_parts(on_host())
            compare = close if name.startswith(BOUNDED) else same
            stream.synchronize()
            if not all(compare(a, b) for a, b in zip(got, want, strict=True)):
                raise SystemExit(f"{name}: CuPy's arrays give something else than the CPU")
            names.append(name)
    return f"{len(names)} operations on CuPy's arrays"


def put_on(cupy: Any, x: np.ndarray) -> Any:
    return cupy.asarray(x)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bytes, as far as both have rows: on a GPU there are as many as any ids could need."""
    rows = min(len(a), len(b))
    return a[:rows].tobytes() == b[:rows].tobytes()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    rows = min(len(a), len(b))
    a, b = a[:rows].astype(np.float64), b[:rows].astype(np.float64)
    return bool(np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b))
