"""What the CUDA kernels are measured on, and the bars that they are held to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import pyroute

from ...._device.arrays import DeviceArray
from ....pytorch import _tensors, moe_forward
from ....quantization import Fp8Array
from ....router_config import RouterConfig
from ..bars import Bar, Measured, at_most, faster
from . import peers
from .clock import Clock, Column

SETS = 16  # of inputs, at most


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
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of DeepSeek-V3, or small ones that only have to run."""

    quick: bool

    @property
    def tokens(self) -> int:
        return 64 if self.quick else 8192

    @property
    def hidden(self) -> int:
        return 256 if self.quick else 7168

    @property
    def intermediate(self) -> int:
        return 128 if self.quick else 2048

    @property
    def local_experts(self) -> int:
        return 4 if self.quick else 32


def on_device(t: torch.Tensor) -> DeviceArray:
    made: DeviceArray = _tensors.array("bench", "tensor", t)
    return made


def tensor(x: Any) -> torch.Tensor:
    return _tensors.tensor(x)


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


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||; infinite for a NaN or another shape."""
    if got.shape != exact.shape or not torch.isfinite(got.float()).all():
        return float("inf")
    return float((got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))


# --- gate -------------------------------------------------------------------------------------------------------------


def gate(clock: Clock, sizes: Sizes) -> list[Problem]:
    config = RouterConfig.preset("deepseek-v3")
    tokens, experts = sizes.tokens, config.num_experts
    bias = torch.randn(experts, device=clock.device) / 100

    def ours(z: torch.Tensor) -> Callable[[], Any]:
        logits, correction = on_device(z), on_device(bias)
        return lambda: pyroute.topk_gating(logits, config, bias=correction)

    nbytes = 4 * tokens * experts + 8 * tokens * config.top_k
    logits = sets_of(lambda: torch.randn(tokens, experts, device=clock.device), nbytes, clock)
    exact = pyroute.topk_gating(logits[0].cpu().numpy(), config, bias=bias.cpu().numpy())

    def check(name: str, result: Any) -> float:
        if name == "pyroute":  # the CPU's bytes
            host = [tensor(part).cpu().numpy() for part in result]
            return 0.0 if all(a.tobytes() == b.tobytes() for a, b in zip(host, exact, strict=True)) else float("inf")
        return relative(result[0].sum(dim=1).cpu(), torch.from_numpy(exact.topk_weights.sum(axis=1)))

    columns = [Column("pyroute", [ours(z) for z in logits]), peers.eager_gate(logits, bias, config)]
    bars = (at_most("pyroute", 14e-6), at_most("pyroute", 8e-6), share_of_copy("pyroute", 0.3))
    return [Problem("gate", f"deepseek-v3 T={tokens}", nbytes, 0, columns, check, bars, 1e-3)]


# --- moves ------------------------------------------------------------------------------------------------------------


def _routed(clock: Clock, tokens: int, experts: int, top_k: int, alignment: int = 1) -> tuple[torch.Tensor, Any]:
    """Balanced random ids, and their plan on the device."""
    ids = torch.rand(tokens, experts, device=clock.device).topk(top_k, dim=1).indices.to(torch.int32)
    return ids, pyroute.plan_routes(on_device(ids), experts, alignment=alignment)


def moves(clock: Clock, sizes: Sizes) -> list[Problem]:
    tokens, hidden, top_k = sizes.tokens, sizes.hidden, 8
    experts = 16 if sizes.quick else 256
    _, plan = _routed(clock, tokens, experts, top_k)
    x = torch.randn(tokens, hidden, device=clock.device).to(torch.bfloat16)
    weights = torch.rand(tokens, top_k, device=clock.device)
    token_of, row_of = tensor(plan.row_to_token).long(), tensor(plan.token_to_row).long()
    rows = x[token_of]
    case = f"[{tokens}, {hidden}] bfloat16, {top_k} of {experts}"
    given, moved = on_device(x), on_device(rows)

    def same(exact: torch.Tensor) -> Callable[[str, Any], float]:
        return lambda name, got: relative(tensor(got) if name.startswith("pyroute") else got, exact)

    summed = (rows[row_of].float() * weights[..., None]).sum(dim=1) if sizes.quick else _sums(rows, row_of, weights)
    nbytes = x.nbytes + rows.nbytes
    by_slot = on_device(weights)
    return [
        Problem("permute", case, nbytes, 0, [
            Column("pyroute", [lambda: pyroute.permute(given, plan)]), peers.index_rows(x, token_of),
        ], same(rows), (share_of_copy("pyroute", 0.85),)),
        Problem("unpermute", case, nbytes, 0, [
            Column("pyroute", [lambda: pyroute.unpermute(moved, plan, by_slot)]),
            peers.weighted_sum(rows, row_of, weights),
        ], same(summed), (share_of_copy("pyroute", 0.85),), 8e-3),
        Problem("permute_quantize", case, x.nbytes + rows.numel() + rows.numel() // 32, 0, [
            Column("pyroute", [lambda: pyroute.permute_quantize(given, plan)]),
            Column("pyroute cast, then permute", [lambda: pyroute.permute(pyroute.quantize_fp8(given), plan)]),
            Column("pyroute permute, then cast", [lambda: pyroute.quantize_fp8(pyroute.permute(given, plan))]),
        ], _same_codes(given, plan), (
            faster("pyroute", "pyroute cast, then permute", 1.0), faster("pyroute", "pyroute permute, then cast", 3.0),
            share_of_copy("pyroute", 0.85),
        )),
    ]  # fmt: skip


def _sums(rows: torch.Tensor, row_of: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """In parts: float32 rows of every slot would fill the card."""
    parts = zip(row_of.split(512), weights.split(512), strict=True)
    return torch.cat([(rows[r].float() * w[..., None]).sum(dim=1) for r, w in parts])


def _same_codes(x: DeviceArray, plan: Any) -> Callable[[str, Any], float]:
    exact = pyroute.quantize_fp8(pyroute.permute(x, plan))

    def check(name: str, got: Any) -> float:
        pairs = ((got.codes, exact.codes), (got.scales, exact.scales))
        equal = all(torch.equal(tensor(a).view(torch.uint8), tensor(b).view(torch.uint8)) for a, b in pairs)
        return 0.0 if equal else float("inf")

    return check


# --- grouped GEMM -----------------------------------------------------------------------------------------------------


def fp8(x: torch.Tensor, block: tuple[int, int], offsets: Any = None) -> Fp8Array:
    return pyroute.quantize_fp8(on_device(x), block=block, expert_offsets=offsets)


def offsets_of(clock: Clock, experts: int, rows: int) -> torch.Tensor:
    return torch.arange(experts + 1, device=clock.device, dtype=torch.int64) * rows


@dataclasses.dataclass
class Operands:
    """Rows [E * rows, K] and weights [E, N, K] in bfloat16 and FP8."""

    a: torch.Tensor
    w: torch.Tensor
    offsets: torch.Tensor
    rows: int

    @functools.cached_property
    def a8(self) -> Fp8Array:
        return fp8(self.a, (1, 128))

    @functools.cached_property
    def w8(self) -> Fp8Array:
        return fp8(self.w, (128, 128))

    def exact(self, n: int = 64) -> torch.Tensor:
        """Some rows of the product of the bfloat16 operands, in float64."""
        expert = self.sample // self.rows
        return torch.stack(
            [self.w[e, :n].double() @ self.a[r].double() for r, e in zip(self.sample, expert, strict=True)]
        )

    @property
    def sample(self) -> torch.Tensor:
        return torch.linspace(0, self.a.shape[0] - 1, 32, device=self.a.device).long()


def operands(clock: Clock, experts: int, rows: int, n: int, k: int) -> Operands:
    a = torch.randn(experts * rows, k, device=clock.device).to(torch.bfloat16)
    w = torch.empty(experts, n, k, dtype=torch.bfloat16, device=clock.device).normal_(0, k**-0.5)
    return Operands(a, w, offsets_of(clock, experts, rows), rows)


def prefill(clock: Clock, sizes: Sizes) -> list[Problem]:
    shapes = [(2, 64, 128, 256)] if sizes.quick else [
        (experts, rows, n, k) for experts, rows in ((4, 8192), (8, 4096)) for n, k in ((4096, 7168), (7168, 2048))
    ]  # fmt: skip
    return [_gemm(clock, "prefill", *shape) for shape in shapes]


def decode(clock: Clock, sizes: Sizes) -> list[Problem]:
    shapes = [(4, 8, 128, 256)] if sizes.quick else [
        (32, rows, n, k) for rows in (4, 32) for n, k in ((4096, 7168), (7168, 2048))
    ]  # fmt: skip
    return [_gemm(clock, "decode", *shape) for shape in shapes]


def _gemm(clock: Clock, op: str, experts: int, rows: int, n: int, k: int) -> Problem:
    o = operands(clock, experts, rows, n, k)
    offsets, a16, w16 = on_device(o.offsets), on_device(o.a), on_device(o.w)
    total, exact = experts * rows, o.exact()

    def check(name: str, got: Any) -> float:
        d = tensor(got) if name.startswith("pyroute") else got
        return relative(d.reshape(total, n)[o.sample][:, :64], exact)

    columns = [
        Column("pyroute FP8", [lambda: pyroute.grouped_gemm(o.a8, o.w8, offsets)]),
        Column("pyroute bfloat16", [lambda: pyroute.grouped_gemm(a16, w16, offsets)]),
        *peers.gemm(o),
    ]
    flops, nbytes = 2 * total * n * k, experts * n * k + total * (k + 2 * n)
    deep_gemm = faster("pyroute FP8", "DeepGEMM", 1.0)
    bars = (
        (tflops("pyroute FP8", 1000), deep_gemm) if op == "prefill" else (share_of_copy("pyroute FP8", 0.8), deep_gemm)
    )
    return Problem(op, f"{experts} x {rows} x N{n} K{k}", nbytes, flops, columns, check, bars, 5e-2)


def gradients(clock: Clock, sizes: Sizes) -> list[Problem]:
    experts, rows, n, k = (2, 128, 128, 256) if sizes.quick else (4, 8192, 4096, 7168)
    o = operands(clock, experts, rows, n, k)
    grad = torch.randn(experts * rows, n, device=clock.device).to(torch.bfloat16)
    offsets, flops = on_device(o.offsets), 2 * experts * rows * n * k
    g8, along_g, along_a = fp8(grad, (1, 128)), fp8(grad, (128, 1), offsets), fp8(o.a, (128, 1), offsets)
    last = slice((experts - 1) * rows, None)
    of_a = grad[last][:32].double() @ o.w[-1, :, :64].double()
    of_w = grad[last, :64].double().T @ o.a[last].double()
    case = f"{experts} x {rows} x N{n} K{k}"

    def of_rows(name: str, got: Any) -> float:
        return relative((tensor(got) if name.startswith("pyroute") else got)[last][:32, :64], of_a)

    def of_weights(name: str, got: Any) -> float:
        return relative((tensor(got) if name.startswith("pyroute") else got)[-1, :64], of_w)

    ours_a = lambda: pyroute.grouped_gemm_dgrad(g8, o.w8, offsets, out_dtype="bfloat16")  # noqa: E731
    ours_w = lambda: pyroute.grouped_gemm_wgrad(along_g, along_a, offsets)  # noqa: E731
    return [
        Problem("dgrad", case, 0, flops, [Column("pyroute FP8", [ours_a]), *peers.dgrad(o, grad)], of_rows,
                (tflops("pyroute FP8", 1000),), 5e-2),
        Problem("wgrad", case, 0, flops, [Column("pyroute FP8", [ours_w]), *peers.wgrad(o, grad)], of_weights,
                (tflops("pyroute FP8", 800), faster("pyroute FP8", "DeepGEMM", 1.0)), 5e-2),
    ]  # fmt: skip


# --- layer ------------------------------------------------------------------------------------------------------------


def training(clock: Clock, sizes: Sizes) -> list[Problem]:
    """Forward and backward of the routed experts; FP8 weights' codes are made once an optimizer step and not timed."""
    tokens, hidden, inner, experts = sizes.tokens, sizes.hidden, sizes.intermediate, sizes.local_experts
    top_k = 2 if sizes.quick else 8
    ids, _ = _routed(clock, tokens, experts, top_k)

    def parameter(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, device=clock.device, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)
        return made.requires_grad_()

    x = torch.randn(tokens, hidden, device=clock.device).to(torch.bfloat16).requires_grad_()
    weights = torch.rand(tokens, top_k, device=clock.device).softmax(dim=1).requires_grad_()
    w_gate_up, w_down = parameter(experts, 2 * inner, hidden), parameter(experts, hidden, inner)
    upstream = torch.randn_like(x)
    given = (x, weights, w_gate_up, w_down)

    def step(forward: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            y = forward(x, ids, weights, w_gate_up, w_down)
            return y.detach(), torch.autograd.grad(y, given, upstream)

        return run

    exact = peers.grouped_mm_layer(x, ids, weights, w_gate_up, w_down).detach() if clock.real else None

    def check(name: str, got: Any) -> float:
        return relative(got[0], exact) if exact is not None else 0.0

    columns = [
        Column("pyroute FP8", [step(lambda *args: moe_forward(*args, precision="fp8"))], graph=False),
        Column("pyroute bfloat16", [step(moe_forward)], graph=False),
        peers.layer(step) if clock.real else None,
    ]
    flops = 3 * 6 * tokens * top_k * hidden * inner
    bars = (faster("pyroute FP8", "torch grouped_mm bfloat16", 1.6),)
    made = [column for column in columns if column is not None]
    return [Problem("training", f"T={tokens} E={experts} top-{top_k}", 0, flops, made, check, bars, 8e-2)]


ROWS: dict[str, Callable[[Clock, Sizes], Sequence[Problem]]] = {  # those of the CPU's table, as far as they apply
    "gate": gate,
    "permute": moves,
    "decode": decode,
    "prefill": prefill,
    "backward": gradients,
    "training": training,
}
