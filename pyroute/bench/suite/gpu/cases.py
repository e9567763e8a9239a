"""What the CUDA kernels are measured on, and the bars that they are held to."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

import pyroute

from ....pytorch import moe_forward
from ....router_config import RouterConfig
from .. import peers, shapes
from ..bars import Bar, Measured, at_most, faster
from .clock import Clock, Column
from .peers import columns
from .problems import Gate, Layer, Moves, Products, fp8, on_device, tensor, worst_row

SETS = 16  # of inputs, at most
Peers = Sequence[peers.Peer]


@dataclasses.dataclass
class Problem:
    """One row's work, ready to run."""

    op: str
    case: str
    nbytes: int  # read and written at least
    flops: int
    columns: list[Column]
    check: Callable[[str, Any], float]  # the error of a column's result
    bars: tuple[Bar, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The table's, of DeepSeek-V3; or those of a ``model`` under a ``load``; or small ones that only have to run."""

    quick: bool = False
    model: str = ""
    load: str = "random"

    @property
    def own(self) -> bool:
        """Whether the caller chose what is measured, for which there are no bars."""
        return bool(self.model) or self.load != "random"

    def bars(self, *bars: Bar) -> tuple[Bar, ...]:
        return () if self.own else bars

    @property
    def layer(self) -> shapes.Shape:
        s = shapes.shape(self.model or "deepseek-v3", 8192)._replace(load=self.load)
        return shapes.small(s)._replace(hidden=256, intermediate=128) if self.quick else s

    @property
    def local(self) -> shapes.Shape:
        """The layer with 32 of its experts at most, to which all slots go: what one device works on."""
        s, most = self.layer, 4 if self.quick else 32
        if s.num_experts <= most:
            return s
        config = RouterConfig(most, min(s.top_k, most), "softmax", renormalize="sum")
        return s._replace(num_experts=most, config=config, of_experts=s.num_experts)

    def products(self, *table: tuple[int, int]) -> list[tuple[int, int]]:
        """N and K of the products to measure: the table's, or both of the caller's layer."""
        s = self.layer
        return [(2 * s.intermediate, s.hidden), (s.hidden, s.intermediate)] if self.own else list(table)


def share_of_copy(ours: str, at_least: float) -> Bar:
    """The time of a copy of as many bytes, at the rate measured in the same run, over ours."""

    def value(m: Measured, p: Problem) -> float | None:
        return p.nbytes / m.copy_gbs / 1e9 / m.seconds[ours] if ours in m.seconds else None

    return Bar(f"{ours} : copy bandwidth", at_least, value)


def tflops(ours: str, at_least: float) -> Bar:
    def value(m: Measured, p: Problem) -> float | None:
        return p.flops / m.seconds[ours] / 1e12 if ours in m.seconds else None

    return Bar(f"{ours}, TFLOP/s", at_least, value, "TFLOP/s")


def sets_of(make: Callable[[], Any], num_bytes: int, clock: Clock) -> list[Any]:
    """Inputs that together are four times the second-level cache, so that a call finds none of its own there."""
    return [make() for _ in range(max(1, min(SETS, -(-4 * clock.cache_bytes // num_bytes))))]


# --- gate -------------------------------------------------------------------------------------------------------------


def gate(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    s = sizes.layer
    config, (tokens, experts) = s.config, (s.tokens, s.num_experts)
    nbytes = 4 * tokens * experts + 8 * tokens * config.top_k
    wanted = torch.from_numpy(shapes.preference(s)).to(clock.device)
    logits = sets_of(lambda: torch.randn(tokens, experts, device=clock.device) + wanted, nbytes, clock)
    chosen_by_bias = config.score == "sigmoid" and config.renormalize == "sum"
    g = Gate(logits, torch.randn(experts, device=clock.device) / 100 if chosen_by_bias else None, config)
    bias = None if g.bias is None else on_device(g.bias)

    def ours(z: torch.Tensor) -> Callable[[], Any]:
        given = on_device(z)
        return lambda: pyroute.topk_gating(given, config, bias=bias)

    def check(name: str, got: Any) -> float:
        if name != "pyroute":
            return g.error(*got)
        host = [tensor(part).cpu().numpy() for part in got]  # the CPU's bytes
        return 0.0 if all(a.tobytes() == b.tobytes() for a, b in zip(host, g.exact, strict=True)) else float("inf")

    bars = sizes.bars(at_most("pyroute", 14e-6), at_most("pyroute", 8e-6), share_of_copy("pyroute", 0.3))
    made = [Column("pyroute", [ours(z) for z in logits], kind="exact"), *columns("gate", g, everyone)]
    return [Problem("gate", s.name, nbytes, 0, made, check, bars)]


# --- moves ------------------------------------------------------------------------------------------------------------


def ids_of(clock: Clock, s: shapes.Shape) -> torch.Tensor:
    return torch.from_numpy(shapes.gating(s).topk_idx).to(clock.device)


def moves(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    s = sizes.layer
    tokens, hidden, top_k, experts = s.tokens, s.hidden, s.top_k, s.num_experts
    ids = ids_of(clock, s)
    x = torch.randn(tokens, hidden, device=clock.device).to(torch.bfloat16)
    m = Moves(x, ids, torch.rand(tokens, top_k, device=clock.device), experts)
    given, moved, by_slot, slots = on_device(x), on_device(m.rows), on_device(m.weights), on_device(ids)
    plan, nbytes = m.plan, x.nbytes + m.rows.nbytes
    case = f"{s.name} [{tokens}, {hidden}] bfloat16, {top_k} of {experts}"
    return [
        Problem("permute", case, nbytes, 0, [
            Column("pyroute", [lambda: pyroute.permute(given, plan)], kind="exact", read=tensor),
            Column("pyroute, plan included", [lambda: pyroute.permute(given, pyroute.plan_routes(slots, experts))],
                   kind="exact", read=tensor),
            *columns("permute", m, everyone),
        ], lambda name, got: worst_row(got, m.rows), sizes.bars(share_of_copy("pyroute", 0.85))),
        Problem("unpermute", case, nbytes, 0, [
            Column("pyroute", [lambda: pyroute.unpermute(moved, plan, by_slot)], read=tensor),
            *columns("unpermute", m, everyone),
        ], lambda name, got: worst_row(got, m.sums), sizes.bars(share_of_copy("pyroute", 0.85))),
        Problem("permute_quantize", case, x.nbytes + m.rows.numel() + m.rows.numel() // 32, 0, [
            Column("pyroute", [lambda: pyroute.permute_quantize(given, plan)], kind="exact"),
            Column("pyroute cast, then permute", [lambda: pyroute.permute(pyroute.quantize_fp8(given), plan)],
                   kind="exact"),
            Column("pyroute permute, then cast", [lambda: pyroute.quantize_fp8(pyroute.permute(given, plan))],
                   kind="exact"),
        ], _same_codes(given, plan), sizes.bars(
            faster("pyroute", "pyroute cast, then permute", 1.0), faster("pyroute", "pyroute permute, then cast", 3.0),
            share_of_copy("pyroute", 0.85),
        )),
    ]  # fmt: skip


def _same_codes(x: Any, plan: Any) -> Callable[[str, Any], float]:
    exact = pyroute.quantize_fp8(pyroute.permute(x, plan))

    def check(name: str, got: Any) -> float:
        pairs = ((got.codes, exact.codes), (got.scales, exact.scales))
        equal = all(torch.equal(tensor(a).view(torch.uint8), tensor(b).view(torch.uint8)) for a, b in pairs)
        return 0.0 if equal else float("inf")

    return check


# --- grouped GEMM -----------------------------------------------------------------------------------------------------


def operands(clock: Clock, experts: int, rows: int, n: int, k: int) -> Products:
    a = torch.randn(experts * rows, k, device=clock.device).to(torch.bfloat16)
    w = torch.empty(experts, n, k, dtype=torch.bfloat16, device=clock.device).normal_(0, k**-0.5)
    return Products(a, w, rows)


def prefill(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    if sizes.quick:
        work = [(2, 128, n, k) for n, k in sizes.products((128, 256))]
    else:
        segments = [(4, 8192), (8, 4096)]
        work = [(*one, *nk) for one in segments for nk in sizes.products((4096, 7168), (7168, 2048))]
    return [_gemm(clock, "prefill", *one, sizes, everyone) for one in work]


def decode(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    if sizes.quick:
        work = [(4, 8, n, k) for n, k in sizes.products((128, 256))]
    else:
        work = [(32, rows, *nk) for rows in (4, 32) for nk in sizes.products((4096, 7168), (7168, 2048))]
    return [_gemm(clock, "decode", *one, sizes, everyone) for one in work]


def _gemm(clock: Clock, op: str, experts: int, rows: int, n: int, k: int, sizes: Sizes, everyone: Peers) -> Problem:
    p = operands(clock, experts, rows, n, k)
    offsets, a16, w16 = on_device(p.offsets), on_device(p.a), on_device(p.w)
    made = [
        Column("pyroute FP8", [lambda: pyroute.grouped_gemm(p.a8, p.w8, offsets)], kind="fp8", read=tensor),
        Column("pyroute FP8, cast included", [lambda: pyroute.grouped_gemm(pyroute.quantize_fp8(a16), p.w8, offsets)],
               kind="fp8", read=tensor),
        Column("pyroute bfloat16", [lambda: pyroute.grouped_gemm(a16, w16, offsets)], read=tensor),
        *columns("gemm", p, everyone),
    ]  # fmt: skip
    flops, nbytes = 2 * experts * rows * n * k, experts * n * k + experts * rows * (k + 2 * n)
    held = tflops("pyroute FP8", 1000) if op == "prefill" else share_of_copy("pyroute FP8", 0.8)
    bars = sizes.bars(held, faster("pyroute FP8", "DeepGEMM", 1.0))
    case = f"{sizes.model} {experts} x {rows} x N{n} K{k}".lstrip()
    return Problem(op, case, nbytes, flops, made, lambda name, got: p.error(got), bars)


def tiles(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    """prefill's products by every kernel that can be asked for: what a GPU's default should be."""
    problems = []
    for problem in prefill(clock, sizes, ()):
        ours = problem.columns[0]
        others = [Column(f"{ours.name}, {tile}", [_asking(tile, call) for call in ours.calls], kind=ours.kind,
                         read=ours.read) for tile in TILES]  # fmt: skip
        problems.append(dataclasses.replace(problem, op="tiles", columns=[ours, *others], bars=()))
    return problems


TILES = ("fp8_128_overlap", "fp8_128_pair", "fp8_192", "fp8_192_pair")  # csrc/cuda/sm90/arguments.h


def _asking(tile: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def asked() -> Any:
        before = os.environ.get("PYROUTE_GROUPED_GEMM")
        os.environ["PYROUTE_GROUPED_GEMM"] = f"{tile}_product"
        try:
            return call()
        finally:
            del os.environ["PYROUTE_GROUPED_GEMM"]
            if before is not None:
                os.environ["PYROUTE_GROUPED_GEMM"] = before

    return asked


def gradients(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    experts, rows = (2, 128) if sizes.quick else (4, 8192)
    n, k = sizes.products((128, 256) if sizes.quick else (4096, 7168))[0]
    p = operands(clock, experts, rows, n, k)
    offsets, flops = on_device(p.offsets), 2 * experts * rows * n * k
    case = f"{sizes.model} {experts} x {rows} x N{n} K{k}".lstrip()
    g8, along_g, along_a = fp8(p.grad, (1, 128)), *(fp8(x, (128, 1), offsets) for x in (p.grad, p.a))
    of_a = lambda: pyroute.grouped_gemm_dgrad(g8, p.w8, offsets, out_dtype="bfloat16")  # noqa: E731
    ours = functools.partial(Column, "pyroute FP8", kind="fp8", read=tensor)
    of_w = lambda: pyroute.grouped_gemm_wgrad(along_g, along_a, offsets)  # noqa: E731
    return [
        Problem("dgrad", case, 0, flops, [ours([of_a]), *columns("dgrad", p, everyone)],
                lambda name, got: p.error_of_rows(got), sizes.bars(tflops("pyroute FP8", 1000))),
        Problem("wgrad", case, 0, flops, [ours([of_w]), *columns("wgrad", p, everyone)],
                lambda name, got: p.error_of_weights(got),
                sizes.bars(tflops("pyroute FP8", 800), faster("pyroute FP8", "DeepGEMM", 1.0))),
    ]  # fmt: skip


# --- layer ------------------------------------------------------------------------------------------------------------


def layer_inputs(clock: Clock, sizes: Sizes) -> tuple[Layer, str, int]:
    """With their name, and the operations of a forward pass."""
    s = sizes.local
    tokens, hidden, inner, experts, top_k = s.tokens, s.hidden, s.intermediate, s.num_experts, s.top_k
    ids = ids_of(clock, s)

    def parameter(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, device=clock.device, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)
        return made.requires_grad_()

    x = torch.randn(tokens, hidden, device=clock.device).to(torch.bfloat16).requires_grad_()
    weights = torch.rand(tokens, top_k, device=clock.device).softmax(dim=1).requires_grad_()
    p = Layer(x, ids, weights, parameter(experts, 2 * inner, hidden), parameter(experts, hidden, inner))
    return p, f"{s.name} top-{top_k}", 6 * tokens * top_k * hidden * inner


def in_fp8(*given: torch.Tensor) -> torch.Tensor:
    return moe_forward(*given, precision="fp8")


def layer(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    p, case, flops = layer_inputs(clock, sizes)
    w8 = [fp8(w.detach(), (128, 128)) for w in (p.w_gate_up, p.w_down)]
    x, weights, ids = (on_device(t.detach()) for t in (p.x, p.weights, p.ids))
    codes = lambda: pyroute.moe_forward(x, ids, weights, *w8, quantize_activations=True)  # noqa: E731
    made = [
        Column("pyroute FP8", [codes], kind="fp8 layer", read=tensor),
        _ours("pyroute bfloat16", p.forward(moe_forward)),
        *columns("layer", p, everyone),
    ]
    bars = sizes.bars(faster("pyroute FP8", ("vLLM FP8", "torch grouped_mm bfloat16"), 1.0))
    return [Problem("layer", case, 0, flops, made, lambda name, got: p.error(got), bars)]


def training(clock: Clock, sizes: Sizes, everyone: Peers) -> list[Problem]:
    """Forward and backward of the routed experts; FP8 weights' codes are made once an optimizer step and not timed."""
    p, case, flops = layer_inputs(clock, sizes)
    made = [
        _ours("pyroute FP8", p.step(in_fp8), kind="fp8 layer"),
        _ours("pyroute bfloat16", p.step(moe_forward)),
        *columns("training", p, everyone),
    ]
    bars = sizes.bars(faster("pyroute FP8", "torch grouped_mm bfloat16", 1.6))
    return [Problem("training", case, 0, 3 * flops, made, lambda name, got: p.error_of_step(got), bars)]


def _ours(name: str, made: Any, kind: str = "bfloat16") -> Column:
    return Column(name, made.calls, kind=kind, read=made.read, graph=made.graph)


ROWS: dict[str, Callable[[Clock, Sizes, Peers], Sequence[Problem]]] = {  # of the CPU's table, as far as they apply
    "gate": gate,
    "permute": moves,
    "decode": decode,
    "prefill": prefill,
    "backward": gradients,
    "layer": layer,
    "training": training,
    "tiles": tiles,  # last: they are the least tried, and a kernel that fails takes the GPU away
}
