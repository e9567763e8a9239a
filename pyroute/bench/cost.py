"""``pyroute cost``: what a model costs in operations, memory, device hours and money, every assumption printed.

Operations are counted from the model's sizes (model_sizes.py), rates are measured here or stated by the user. Beside
them stand the hours that DeepSeek published for V3 (technical report, arXiv 2412.19437, table 1), and the rate that
these hours imply: what its authors reached with everything that a training run does beside multiplying.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

import pyroute

from .model_sizes import MODELS, ModelSizes
from .terminal import Steps, UsageError, number_of_bytes, show_rows, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console

NUM_STEPS = 3  # one for each type that is measured
TYPES = ("float32", "bfloat16", "fp8")
# DeepSeek-V3: 14.8e12 tokens, H800 hours of pre-training, of extending the context and of fine-tuning, at 2 dollars
PUBLISHED = {"tokens": 14.8e12, "pre_training_hours": 2.664e6, "all_hours": 2.788e6, "price": 2.0}
_SCALE_BLOCK = 128 * 128  # weights that share a float32 scale
_MEASURED_ROWS, _MEASURED_EXPERTS, _MEASURED_RUNS = 512, 2, 3


def estimate(
    name: str,
    *,
    tokens: float | None = None,
    price: float = 2.0,
    sequence: int = 4096,
    rate: float | None = None,
    measured: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that ``cost`` shows; JSON-ready. Rates are TFLOP/s, stated by the user and measured here."""
    model = sizes_of(name)
    tokens = PUBLISHED["tokens"] if tokens is None else tokens
    forward = 2.0 * model.active + model.attention_flops(sequence)
    training = 3.0 * forward * tokens
    report: dict[str, Any] = {
        "model": name,
        "parameters": {
            "total": model.total,
            "active": model.active,
            "routed_experts": model.routed_experts,
            "published_total": model.published_total,
            "published_active": model.published_active,
        },
        "flops_per_token": {
            "sequence": sequence,
            "forward": forward,
            "attention_scores": model.attention_flops(sequence),
            "training": 3.0 * forward,
            "dense_forward": 2.0 * (model.total - model.embedding) + model.attention_flops(sequence),
        },
        "weights_bytes": weights_bytes(model),
        "training": {"tokens": tokens, "flops": training, "price": price, "at": []},
    }
    at = report["training"]["at"]
    if name == "deepseek-v3":
        own = 3.0 * forward * PUBLISHED["tokens"]
        implied = own / PUBLISHED["pre_training_hours"] / 3600 / 1e12
        at.append(hours("H800, as the published hours imply", implied, training, price))
        report["published"] = {**PUBLISHED, "all_dollars": PUBLISHED["all_hours"] * PUBLISHED["price"]}
    if rate is not None:
        at.append(hours("the rate you state", rate, training, price))
    at += [hours(f"this machine's GEMM, {kind}", found, training, price) for kind, found in measured.items()]
    return report


def measure_rates(name: str, step: Steps) -> dict[str, float]:
    """TFLOP/s of this machine's grouped GEMM with the model's widths, by the type of the weights."""
    rates = {}
    for kind in TYPES:
        step(f"grouped GEMM of {name}, {kind} weights")
        rates[f"{kind} weights"] = measured_rate(sizes_of(name), kind)
    return rates


def sizes_of(name: str) -> ModelSizes:
    if name not in MODELS:
        raise UsageError(f"--model must be one of {', '.join(MODELS)}, got {name}")
    return MODELS[name]


def weights_bytes(model: ModelSizes) -> dict[str, float]:
    """Bytes of all weights: routed experts in the type named, the rest in bfloat16 where that type is FP8."""
    rest = model.total - model.routed_experts
    return {
        "float32": 4.0 * model.total,
        "bfloat16": 2.0 * model.total,
        "fp8": model.routed_experts * (1 + 4 / _SCALE_BLOCK) + 2.0 * rest,
        "experts_fp8_over_float32": (1 + 4 / _SCALE_BLOCK) / 4,
    }


def hours(what: str, tflops: float, flops: float, price: float) -> dict[str, Any]:
    """Device hours and money for so many operations at one device's rate."""
    device_hours = flops / (tflops * 1e12) / 3600
    return {"device": what, "tflops": tflops, "device_hours": device_hours, "dollars": device_hours * price}


def measured_rate(model: ModelSizes, kind: str) -> float:
    """TFLOP/s of this machine's grouped GEMM (gate and up) with the model's widths; the median of three runs."""
    rows, hidden = _MEASURED_ROWS, model.shape.hidden
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((2 * model.shape.intermediate, hidden), np.float32)
    weights: Any = np.repeat(matrix[None], _MEASURED_EXPERTS, axis=0)
    x: Any = rng.standard_normal((rows, hidden), np.float32)
    if kind == "bfloat16":
        weights, x = weights.astype(ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16)
    elif kind == "fp8":
        weights, x = pyroute.quantize_fp8(weights, block=(128, 128)), pyroute.quantize_fp8(x)
    offsets = np.linspace(0, rows, _MEASURED_EXPERTS + 1).astype(np.int64)
    times = []
    for _ in range(_MEASURED_RUNS):
        start = time.perf_counter()
        pyroute.grouped_gemm(x, weights, offsets)
        times.append(time.perf_counter() - start)
    return 2.0 * rows * matrix.size / statistics.median(times) / 1e12


def show(console: Console, report: dict[str, Any]) -> None:
    parameters, flops, training = report["parameters"], report["flops_per_token"], report["training"]
    console.print(f"[head]{report['model']}[/]  what its sizes cost")
    console.print("\n[head]Parameters[/]")
    share = parameters["active"] / parameters["total"]
    rows = [
        ("all", f"{_big(parameters['total'])}  [note]published: {_big(parameters['published_total'])}[/]"),
        ("active", f"{_big(parameters['active'])} a token, {share:.1%}  [note]published: "
                   f"{_big(parameters['published_active'])}; the embedding is read, not multiplied[/]"),
        ("experts", f"{parameters['routed_experts'] / parameters['total']:.1%} of all are routed experts"),
    ]  # fmt: skip
    show_rows(console, rows)
    console.print("\n[head]Operations a token[/]")
    ratio = flops["dense_forward"] / flops["forward"]
    scores = f"of these {flops['attention_scores'] / flops['forward']:.0%} attention over {flops['sequence']} tokens"
    show_rows(
        console,
        [
            ("forward", f"{_operations(flops['forward'])}  [note]two a parameter; {scores}[/]"),
            ("training", f"{_operations(flops['training'])}  [note]forward, and twice that backward[/]"),
            ("if dense", f"{_operations(flops['dense_forward'])} forward, {ratio:.0f} times as many"),
        ],
    )
    console.print("\n[head]Memory of the weights[/]")
    _show_memory(console, report["weights_bytes"])
    title = f"Training on {_big(training['tokens'])} tokens, {_operations(training['flops'])}"
    console.print(f"\n[head]{title}[/]")
    _show_training(console, report)


def _show_memory(console: Console, weights: dict[str, float]) -> None:
    smaller = 1 - weights["experts_fp8_over_float32"]
    rows = [(kind, number_of_bytes(weights[kind])) for kind in ("float32", "bfloat16")]
    note = f"routed experts in e4m3 with a scale for 128 x 128 ({smaller:.1%} less than float32), the rest bfloat16"
    show_rows(console, [*rows, ("fp8", f"{number_of_bytes(weights['fp8'])}  [note]{note}[/]")])


def _show_training(console: Console, report: dict[str, Any]) -> None:
    training, published = report["training"], report.get("published")
    rows = [
        (at["device"], f"{at['tflops']:.3g}", _big(at["device_hours"]), f"${_big(at['dollars'])}")
        for at in training["at"]
    ]
    if published:
        rows.append(("published, pre-training", "", _big(published["pre_training_hours"]), ""))
        rows.append(
            ("published, all of it", "", _big(published["all_hours"]),
             f"${_big(published['all_dollars'])}")
        )  # fmt: skip
    if rows:
        show_table(console, ("at the rate of", "TFLOP/s", "device hours", "cost"), rows, align="<>>>")
    text = (
        f"Assumed: {training['price']:g} dollars an hour for any device; every operation at the rate of the line, so "
        "no time for communication, attention's own kernels, optimiser, restarts or idle devices. The rate that "
        "published hours imply holds all of these. Prices of data, people and failed runs are in no line."
    )
    show_text(console, f"[note]{text}[/]", indent=2)


def _operations(n: float) -> str:
    return _big(n, "G") + "FLOP"


def _big(n: float, billion: str = "B") -> str:
    """Three digits and a power of a thousand: ``671 B``, ``2.79 M``."""
    units = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k"))
    for power, unit in units:
        if abs(n) >= 0.9995 * power:
            return f"{n / power:.3g} {unit}"
    return f"{n:.3g} "
