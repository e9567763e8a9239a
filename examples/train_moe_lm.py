"""Train a sparse byte-level transformer on Python's own documentation: five variants, step by step side by side.

    python examples/train_moe_lm.py            about three minutes on two cores; writes train_moe_lm.json and .png
    python examples/train_moe_lm.py --quick    a few seconds
    torchrun --nproc-per-node 2 examples/train_moe_lm.py --expert-parallel    see train_moe_lm_parallel.py

All variants start from the same weights and see the same batches; step i of each comes before step i + 1 of any, so
they share whatever the machine does meanwhile. The layers are of DeepSeek-V3's kind: sigmoid router, shared expert.

    float32         pyroute.pytorch
    eager           the same layers as transformers has them, with its own eager experts; needs transformers
    balanced        float32, with the selection bias moved after every step (balancing without an auxiliary loss)
    bfloat16        balanced, under autocast
    fp8             balanced, under autocast, every expert GEMM in DeepSeek-V3's FP8 recipe

Needs torch and rich, for the plot matplotlib: pip install ".[cli,plot]" torch transformers
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import importlib.util
import json
import math
import os
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.nn import functional

import pyroute
from pyroute.pytorch import GroupedExperts, MoELayer, SharedExpert, TopKRouter, set_precision

BALANCED = ("balanced", "bfloat16", "fp8")
FULL = {"layers": 4, "hidden": 128, "heads": 4, "experts": 64, "top_k": 6, "inner": 64, "length": 128, "batch": 16}
QUICK = {"layers": 2, "hidden": 32, "heads": 2, "experts": 8, "top_k": 2, "inner": 16, "length": 32, "batch": 4}


def english_text() -> bytes:
    """The help topics of pydoc and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        parts += filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)))
    return "\n\n".join(parts).encode("ascii", "replace")


class Batches:
    """Random windows of the text's first 95 %, the same ones for a step whoever asks; the rest is held out."""

    def __init__(self, text: bytes, length: int, batch: int) -> None:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(data) * 95 // 100
        self.train, self.held_out, self.length, self.batch = data[:cut], data[cut:], length, batch

    def of_step(self, step: int, data: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        data = self.train if data is None else data
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(0, len(data) - self.length - 1, (self.batch, 1), generator=generator)
        window = data[starts + torch.arange(self.length + 1)]
        return window[:, :-1], window[:, 1:]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions for [..., length, width]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size: dict[str, int]) -> None:
        super().__init__()
        hidden, inner = size["hidden"], size["inner"]
        config = pyroute.RouterConfig(size["experts"], size["top_k"], "sigmoid", renormalize="sum", scaling_factor=2.5)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.attention = Attention(hidden, size["heads"])
        self.moe = MoELayer(
            TopKRouter(config, hidden, selection_bias=True, bias_update_rate=0.01),
            GroupedExperts(size["experts"], hidden, inner),
            SharedExpert(hidden, 2 * inner),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.moe(self.norms[1](x))


class LanguageModel(nn.Module):
    def __init__(self, size: dict[str, int]) -> None:
        super().__init__()
        self.token = nn.Embedding(256, size["hidden"])
        nn.init.normal_(self.token.weight, std=0.5)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size["layers"])))
        self.norm = nn.RMSNorm(size["hidden"])
        self.head = nn.Linear(size["hidden"], 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.token(x))))


def transformers_layer(layer: MoELayer) -> nn.Module:
    """The same layer, weights included, as transformers' DeepSeek-V3 has it, on its eager experts."""
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    router, experts, shared = layer.router, layer.experts, layer.shared
    config = DeepseekV3Config(
        hidden_size=router.hidden_size, moe_intermediate_size=experts.intermediate_size, n_shared_experts=2,
        n_routed_experts=experts.num_experts, num_experts_per_tok=router.config.top_k, n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=router.config.scaling_factor, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    gate, up = shared.gate_up_proj[0].chunk(2)
    pairs = [
        (theirs.gate.weight, router.weight),
        (theirs.experts.gate_up_proj, experts.gate_up_proj),
        (theirs.experts.down_proj, experts.down_proj),
        (theirs.shared_experts.gate_proj.weight, gate),
        (theirs.shared_experts.up_proj.weight, up),
        (theirs.shared_experts.down_proj.weight, shared.down_proj[0]),
    ]
    with torch.no_grad():
        for to, from_ in pairs:
            to.copy_(from_)
    return theirs


def relative_rate(step: int, steps: int) -> float:
    """The learning rate: a warm-up of a twentieth, then a cosine down to a tenth."""
    return min((step + 1) / max(1, steps // 20), 0.55 + 0.45 * math.cos(math.pi * step / steps))


class Run:
    """One variant in training, and its log."""

    def __init__(self, name: str, start: LanguageModel, steps: int) -> None:
        self.name, self.model = name, copy.deepcopy(start)
        self.change_layers()
        # eps: with 1e-8 an expert's first gradients, however small, move its weights by whole steps of the rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3, betas=(0.9, 0.95), eps=1e-6, fused=True)
        rate = functools.partial(relative_rate, steps=steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.routers = [module for module in self.model.modules() if isinstance(module, TopKRouter)]
        self.loss: list[float] = []
        self.seconds: list[float] = []
        self.loads: list[list[list[int]]] = []

    def change_layers(self) -> None:
        """What makes the variant, before there is an optimizer."""
        if self.name == "eager":
            for block in self.model.blocks:
                block.moe = transformers_layer(block.moe)
        if self.name == "fp8":
            set_precision(self.model, "fp8")

    def clip_gradients(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Over everybody who trains: here nobody else."""
        return value

    def forward_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.name in ("bfloat16", "fp8")):
            logits = self.model(x)
        return functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        start = time.perf_counter()
        loss = self.forward_loss(x, y)
        loss.backward()
        self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        loads = [self.total(router.tokens_per_expert).tolist() for router in self.routers]
        for router in self.routers:
            router.update_bias(None if self.name in (*BALANCED, "expert-parallel") else 0.0)
        self.seconds.append(time.perf_counter() - start)
        self.loss.append(self.total(loss.detach()).item())
        self.loads.append(loads)

    @torch.no_grad()
    def held_out_loss(self, batches: Batches) -> float:
        self.model.eval()
        given = [batches.of_step(step, batches.held_out) for step in range(8)]
        return statistics.mean(self.total(self.forward_loss(x, y)).item() for x, y in given)

    def log(self, batches: Batches) -> dict[str, Any]:
        tokens = batches.batch * batches.length
        per_step = statistics.median(self.seconds[len(self.seconds) // 10 :])
        last = torch.tensor(self.loads[-max(1, len(self.loads) // 10) :], dtype=torch.float64).sum(0)
        relative = last / last.mean(-1, keepdim=True) if self.routers else last
        return {
            "loss": self.loss,
            "held_out_loss": self.held_out_loss(batches),
            "tokens_per_second": tokens / per_step,
            "load": relative.tolist(),
            "fullest_expert": relative.max().item() if self.routers else None,
        }


def variants() -> list[str]:
    eager = ["eager"] if importlib.util.find_spec("transformers") else []
    return ["float32", *eager, *BALANCED]


def begin(size: dict[str, int]) -> tuple[Batches, LanguageModel]:
    torch.manual_seed(0)
    return Batches(english_text(), size["length"], size["batch"]), LanguageModel(size)


def train(
    size: dict[str, int], steps: int, console: Console, batches: Batches, start: LanguageModel, runs: list[Run]
) -> dict[str, Any]:
    """All runs side by side; their logs."""
    columns = MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        for step in range(steps):
            batch = batches.of_step(step)
            for run in runs:
                run.step(*batch)
            progress.update(task, advance=1, description=f"loss {runs[0].loss[-1]:.3f}")
    return {
        "size": size,
        "steps": steps,
        "parameters": sum(p.numel() for p in start.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": {run.name: run.log(batches) for run in runs},
    }


def curve_distance(runs: dict[str, Any], a: str, b: str) -> list[float]:
    return [abs(x - y) for x, y in zip(runs[a]["loss"], runs[b]["loss"], strict=True)]


def report(log: dict[str, Any], console: Console) -> None:
    runs = log["runs"]
    table = Table(title=f"{log['parameters'] / 1e6:.1f} M parameters, {log['steps']} steps, {log['threads']} threads")
    for heading in ("variant", "loss, last tenth", "held out", "tokens/s", "fullest expert / mean"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, run in runs.items():
        tail = run["loss"][-max(1, len(run["loss"]) // 10) :]
        fullest = "" if run["fullest_expert"] is None else f"{run['fullest_expert']:.2f}"
        loss = f"{statistics.mean(tail):.4f}", f"{run['held_out_loss']:.4f}"
        table.add_row(name, *loss, f"{run['tokens_per_second']:,.0f}", fullest)
    console.print(table)
    if "eager" in runs:
        apart = curve_distance(runs, "float32", "eager")
        speed = runs["float32"]["tokens_per_second"] / runs["eager"]["tokens_per_second"]
        console.print(f"float32 and eager: losses at most {max(apart):.1e} apart, {speed:.2f} times the tokens/s")
    relative = runs["fp8"]["held_out_loss"] / runs["bfloat16"]["held_out_loss"] - 1
    console.print(f"fp8 and bfloat16: held-out losses {relative:+.2%} apart")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and 12 steps")
    parser.add_argument("--steps", type=int, help="120, or 12 with --quick")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for train_moe_lm.json and .png")
    parser.add_argument("--expert-parallel", action="store_true", help="the experts over the processes of torchrun")
    options, console = parser.parse_args(arguments), Console()
    pyroute.set_num_threads(torch.get_num_threads())
    size, steps = (QUICK if options.quick else FULL), options.steps or (12 if options.quick else 120)
    if options.expert_parallel:
        if "WORLD_SIZE" not in os.environ:
            parser.error("--expert-parallel wants torchrun --nproc-per-node N in place of python")
        import train_moe_lm_parallel

        train_moe_lm_parallel.main(size, steps, options.out)
        return
    batches, start = begin(size)
    log = train(size, steps, console, batches, start, [Run(name, start, steps) for name in variants()])
    report(log, console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train_moe_lm.json").write_text(json.dumps(log))
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot without matplotlib")
        return
    from train_moe_lm_plot import plot

    plot(log, options.out / "train_moe_lm.png")


if __name__ == "__main__":
    main()
