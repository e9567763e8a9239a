"""``--expert-parallel`` of train_moe_lm.py: experts over the processes of torchrun, beside the same model on one.

Every process reads its share of a batch's sequences and holds its share of every layer's experts; tokens travel to
their experts and back. Attention, routers and shared experts are on all of them, and their gradients are summed. The
expert gradients need no sum: all tokens of the batch came to them.

``balanced`` is trained beside it by every process on whole batches, as without torchrun. The losses differ by rounding
alone: products of half a batch may round otherwise, and so does a sum of sums.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import distributed as dist
from torch import nn
from torch.nn import functional
from train_moe_lm import Run, begin, curve_distance, train

from pyroute.pytorch import ExpertParallel, expert_parallel_parameters, reduce_expert_gradients


class ParallelRun(Run):
    """One process's part of a variant that all of them train."""

    def change_layers(self) -> None:
        for block in self.model.blocks:
            block.moe.experts = ExpertParallel.from_experts(block.moe.experts)

    def forward_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """This process's share of the mean over all tokens."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        logits = self.model(x[mine])
        return functional.cross_entropy(logits.flatten(0, 1), y[mine].flatten(), reduction="sum") / y.numel()

    def clip_gradients(self) -> None:
        """By the norm of the whole model's gradient, of which every process has its experts' part and all the rest."""
        reduce_expert_gradients(self.model)  # of experts that several processes hold; here none
        experts = expert_parallel_parameters(self.model)
        squares = torch.zeros(2)
        for name, parameter in self.model.named_parameters():
            if name not in experts:
                dist.all_reduce(parameter.grad)
            squares[int(name in experts)] += parameter.grad.square().sum()
        norm = (squares[0] + self.total(squares[1])).sqrt()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, norm)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value


def main(size: dict[str, int], steps: int, out: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    console = Console(quiet=rank > 0)
    batches, start = begin(size)
    runs = [Run("balanced", start, steps), ParallelRun("expert-parallel", start, steps)]
    log = train(size, steps, console, batches, start, runs) | {"processes": world}
    if rank == 0:
        apart = max(curve_distance(log["runs"], "balanced", "expert-parallel"))
        found = log["runs"]["expert-parallel"]
        held, rate = found["held_out_loss"], found["tokens_per_second"]
        console.print(f"expert-parallel over {world} processes: held-out loss {held:.4f}, {rate:,.0f} tokens/s")
        console.print(f"losses at most {apart:.1e} from those of one process, in {steps} steps")
        out.mkdir(parents=True, exist_ok=True)
        (out / "train_moe_lm_parallel.json").write_text(json.dumps(log))
    dist.destroy_process_group()
