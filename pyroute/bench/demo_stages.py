"""The steps of one MoE layer as a user would call them, each timed against the machine's limits.

A share of a limit is the shortest time that the hardware allows, the larger of (least bytes / copy bandwidth) and
(operations / multiply-add peak), divided by the measured time. Least bytes are inputs read once and outputs written
once. Every call returns fresh memory, as user code without ``out=`` gets it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pyroute

from .demo_layer import Layer, choose_experts, layer_forward, router_product
from .limits import Limits
from .terminal import Steps

Array = Any

MIN_RUNS, MAX_RUNS = 3, 50
SECONDS_PER_STAGE = 0.15
SLOW = 1.0


class StageTime(NamedTuple):
    """One stage: median and best seconds, and the least that it has to move and compute."""

    name: str
    what: str
    seconds: float
    best_seconds: float
    bytes: int
    flops: int

    def as_dict(self, limits: Limits) -> dict[str, Any]:
        if not self.seconds:
            return {**self._asdict(), "gbs": None, "gflops": None, "share_of_limit": None}
        rates = {"gbs": self.bytes / self.seconds / 1e9, "gflops": self.flops / self.seconds / 1e9}
        return {**self._asdict(), **rates, "share_of_limit": limits.share(self.seconds, self.bytes, self.flops)}


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Median and best seconds of several runs after a first one, and a result; over a second, one run is enough."""
    start = time.perf_counter()
    result = work()
    first = time.perf_counter() - start
    if first > SLOW:
        return first, first, result
    times: list[float] = []
    while len(times) < MIN_RUNS or (sum(times) < SECONDS_PER_STAGE and len(times) < MAX_RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), result


class StageClock:
    """Times stages one after the other and says on the way what it is doing."""

    def __init__(self, layer: Layer, backend: str | None, step: Steps):
        self.layer, self.backend, self._step = layer, backend, step
        self.stages: list[StageTime] = []

    def time(self, name: str, what: str, work: Callable[[], Any], nbytes: int, flops: int = 0) -> Any:
        """The result of ``work``, its time noted."""
        self._step(f"timing {what}" + (" on NumPy" if self.backend == "numpy" else ""))
        seconds, best, result = timed(work)
        self.stages.append(StageTime(name, what, seconds, best, nbytes, flops))
        return result


def time_layer(layer: Layer, logits: Array, backend: str | None, step: Steps) -> list[StageTime]:
    """Every stage of the FP8 forward pass, then whole passes; with the same logits all backends choose alike."""
    clock = StageClock(layer, backend, step)
    gating, plan = _time_routing(clock, logits)
    _time_experts(clock, gating, plan)
    _time_passes(clock, gating, plan)
    found = {stage.name: stage for stage in clock.stages}
    # The activation is no call of its own: it is what the layer takes beyond its other stages, in their best runs,
    # and nothing where a neighbour's work hides it.
    others = ("plan", "permute", "gate_up", "quantize", "down", "unpermute")
    rest = max(0.0, found["forward_fp8"].best_seconds - sum(found[name].best_seconds for name in others))
    moved = 4 * plan.num_rows * (layer.w_gate_up.shape[1] + layer.w_down.shape[2])
    found["activation"] = StageTime("activation", "activation, the rest", rest, rest, moved, 0)
    return [found[name] for name in STAGES]


STAGES = (
    "router", "gate", "plan", "permute", "gate_up", "activation", "quantize", "down", "unpermute",
    "forward_fp8", "forward", "backward",
)  # fmt: skip


def _time_routing(clock: StageClock, logits: Array) -> tuple[pyroute.Gating, pyroute.RoutePlan]:
    layer, on = clock.layer, clock.backend
    (num_tokens, hidden), num_experts, k = layer.x.shape, layer.config.num_experts, layer.config.top_k
    clock.time(
        "router",
        "router product",
        lambda: router_product(layer, on),
        layer.x.nbytes + layer.router.nbytes + logits.nbytes,
        2 * num_tokens * hidden * num_experts,
    )
    gating = clock.time(
        "gate",
        f"gate: best {k} of {num_experts}",
        lambda: choose_experts(layer, logits, on),
        logits.nbytes + 8 * num_tokens * k,
    )
    plan = clock.time(
        "plan",
        "plan: sort by expert",
        lambda: pyroute.plan_routes(gating.topk_idx, num_experts, backend=on),
        12 * num_tokens * k,
    )
    return gating, plan


def _time_experts(clock: StageClock, gating: pyroute.Gating, plan: pyroute.RoutePlan) -> None:
    layer, on, offsets = clock.layer, clock.backend, plan.expert_offsets
    rows, hidden = plan.num_rows, layer.x.shape[1]
    width, intermediate = layer.w_gate_up.shape[1], layer.w_down.shape[2]
    used = np.count_nonzero(plan.tokens_per_expert) / layer.config.num_experts
    quantized = clock.time(
        "permute",
        "gather rows, to FP8",
        lambda: pyroute.permute_quantize(layer.x, plan, backend=on),
        layer.x.nbytes + _fp8_bytes(rows, hidden),
    )
    clock.time(
        "gate_up",
        "gate and up GEMM",
        lambda: pyroute.grouped_gemm(quantized, layer.w_gate_up_fp8, offsets, out_dtype="float32", backend=on),
        quantized.nbytes + int(used * layer.w_gate_up_fp8.nbytes) + 4 * rows * width,
        2 * rows * width * hidden,
    )
    hidden_rows = np.random.default_rng(0).standard_normal((rows, intermediate), dtype=np.float32)
    activated = clock.time(
        "quantize",
        "hidden rows, to FP8",
        lambda: pyroute.quantize_fp8(hidden_rows, backend=on),
        hidden_rows.nbytes + _fp8_bytes(rows, intermediate),
    )
    results = clock.time(
        "down",
        "down GEMM",
        lambda: pyroute.grouped_gemm(activated, layer.w_down_fp8, offsets, out_dtype="float32", backend=on),
        activated.nbytes + int(used * layer.w_down_fp8.nbytes) + 4 * rows * hidden,
        2 * rows * intermediate * hidden,
    )
    weights = gating.topk_weights if layer.config.weight_on == "output" else None
    clock.time(
        "unpermute",
        "unpermute, weighted",
        lambda: pyroute.unpermute(results, plan, weights, backend=on),
        results.nbytes + layer.x.nbytes,
    )


def _time_passes(clock: StageClock, gating: pyroute.Gating, plan: pyroute.RoutePlan) -> None:
    layer, on = clock.layer, clock.backend
    per_expert = layer.w_gate_up[0].size + layer.w_down[0].size
    used = int(np.count_nonzero(plan.tokens_per_expert)) * per_expert
    tokens, flops = 2 * layer.x.nbytes, 2 * plan.num_rows * per_expert
    clock.time("forward_fp8", "forward, FP8", lambda: layer_forward(layer, gating, on, fp8=True), tokens + used, flops)
    clock.time(
        "forward", "forward, float32", lambda: layer_forward(layer, gating, on, fp8=False), tokens + 4 * used, flops
    )
    y, saved = layer_forward(layer, gating, on, fp8=False, saved=True)
    clock.time(
        "backward",
        "backward, float32",
        lambda: pyroute.moe_backward(y, saved),
        2 * tokens + 4 * (used + layer.w_gate_up.size + layer.w_down.size),
        2 * flops,
    )


def _fp8_bytes(rows: int, columns: int) -> int:
    """Codes and the float32 scale of every 128."""
    return rows * columns + 4 * rows * -(-columns // 128)
