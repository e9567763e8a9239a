"""What an expert-parallel step costs beyond its transfers: ``python benches/expert_parallel_overhead.py --ranks 4``.

On every rank, in turn within each repetition: the step, the same transfers alone (``all_to_all_single`` of the same
bytes with the same splits, one after the other), and the experts alone on the rows that arrived. The overhead is what
the step takes beyond the experts, over the transfers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pyroute.pytorch import ExpertParallel, moe
from pyroute.pytorch._expert_parallel_step import LayerOptions
from pyroute.pytorch._expert_routes import Arrived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("ranks", 2),
        ("tokens", 1024),
        ("hidden", 2048),
        ("inner", 64),
        ("experts", 32),
        ("top-k", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--payload", choices=("fp8", "fp8_ue8m0"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile() as store:
        path = f"{store.name}.group"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "pyroute.pytorch"])
        ranks = [context.Process(target=run, args=(options, rank, path)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


def run(options: Any, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    torch.manual_seed(rank)
    dtype = getattr(torch, options.dtype)
    layer = ExpertParallel(options.experts, options.hidden, options.inner, payload=options.payload, dtype=dtype)
    x = torch.randn(options.tokens, options.hidden, dtype=dtype).requires_grad_(options.backward)
    ids = torch.rand(options.tokens, options.experts).argsort(dim=1)[:, : options.top_k].to(torch.int32)
    weights = torch.rand(options.tokens, options.top_k).requires_grad_(options.backward)
    grad = torch.randn(options.tokens, options.hidden, dtype=dtype)

    def step() -> None:
        with torch.set_grad_enabled(options.backward):
            y = layer(x, ids, weights)
            if options.backward:
                y.backward(grad)

    transfers = recorded(step)
    replay(transfers)
    alone = experts_alone(layer, options, transfers)
    parts: dict[str, Callable[[], None]] = {"step": step, "transfers": lambda: replay(transfers), "experts": alone}
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.repeats):
        for name, part in parts.items():
            dist.barrier()
            begin = time.perf_counter()
            part()
            dist.barrier()  # the slowest rank's time
            times[name].append(time.perf_counter() - begin)
    took = {name: statistics.median(found) for name, found in times.items()}
    overhead = [(s - e) / t - 1 for s, t, e in zip(times["step"], times["transfers"], times["experts"], strict=True)]
    text = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in took.items())
    sent = sum(send.nbytes for _, send, _ in transfers)
    if rank == 0:
        spread = ", ".join(f"{q:+.1%}" for q in statistics.quantiles(overhead, n=4))
        print(f"{text}, sent {sent / 2**20:.1f} MiB by rank 0, overhead (quartiles) {spread}", flush=True)
    dist.destroy_process_group()


Transfer = tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]


def recorded(step: Callable[[], None]) -> list[Transfer]:
    """The buffers and splits of all transfers of a step."""
    found: list[Transfer] = []
    real = dist.all_to_all_single

    def record(received: torch.Tensor, send: torch.Tensor, *splits: Any, **options: Any) -> Any:
        found.append((torch.empty_like(received), send.clone(), splits))
        return real(received, send, *splits, **options)

    dist.all_to_all_single = record
    step()
    dist.all_to_all_single = real
    return found


def replay(transfers: list[Transfer]) -> None:
    for received, send, splits in transfers:
        dist.all_to_all_single(received, send, *splits)


def experts_alone(layer: ExpertParallel, options: Any, transfers: list[Transfer]) -> Callable[[], None]:
    """This rank's experts on the rows that arrive, which several of them may share."""
    here = transfers[1][0].view(torch.int32)[:, : options.top_k]
    arrived = Arrived.of(here, int((here >= 0).sum()), False)
    weights = [layer.gate_up_proj.detach().clone(), layer.down_proj.detach().clone()]
    rows, grad = (torch.randn(len(here), options.hidden, dtype=weights[0].dtype) for _ in range(2))
    of_experts = LayerOptions(layer.activation, None, None, "output", None, None).of_experts
    sums = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def run() -> None:
        x, x_row = arrived.slots_of(rows, None)
        given = (x, arrived.local_slot, arrived.weights, weights[0], None, weights[1], None, None, None, *of_experts)
        if not options.backward:
            moe.moe_kernel(*given, x_row=x_row)
            return
        _, gate_up = moe.saved_kernel(*given, x_row=x_row)
        grad_y, _ = arrived.slots_of(grad, None)
        wanted = "x,topk_weights,w_gate_up,w_down"
        grads = moe.backward_kernel(grad_y, gate_up, *given, wanted, x_row=x_row)
        for total, found in zip(sums, grads[2:4], strict=True):
            total += found

    return run


if __name__ == "__main__":
    main()
