"""What every rank of the tests of edges runs: arguments, devices and gradients that differ between ranks."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pyroute.pytorch import ExpertParallel


def step(layer: Any, ids: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> float:
    """A step of four tokens with two experts each; the sum of its results."""
    x = torch.ones(4, layer.hidden_size, requires_grad=True)
    ids = torch.arange(8).view(4, 2) % layer.num_experts if ids is None else ids
    y = layer(x, ids, torch.ones(4, 2) if weights is None else weights)
    y.sum().backward()
    return float(y.detach().sum())


def construct_and_step(of_rank: list[dict[str, Any]]) -> float:
    return step(
        ExpertParallel(**{"num_experts": 8, "hidden_size": 16, "intermediate_size": 8} | of_rank[dist.get_rank()])
    )


def numpy_sizes() -> float:
    sizes = [16, np.int64(16)][dist.get_rank()]
    limit = [7, np.float32(7)][dist.get_rank()]
    return step(ExpertParallel(8, sizes, 8, activation="swiglu_clamp", limit=limit))


def meta_device() -> float:
    with torch.device("meta"):
        layer = ExpertParallel(8, 16, 8)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    return step(layer)


def meta_and_sharded() -> tuple[float, float]:
    """FSDP2 over one dimension of a mesh, the experts over the other; the same without FSDP."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    torch.manual_seed(0)
    layer = ExpertParallel(8, 16, 8, group=mesh["ep"], device="meta")
    torch.manual_seed(0)
    plain = ExpertParallel(8, 16, 8, group=mesh["ep"])
    fully_shard(layer, mesh=mesh["dp"])
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    return step(layer), step(plain)


def call_twice(ids: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[str, bool]:
    """What a call raises; and whether the next call works."""
    layer, error = ExpertParallel(200, 16, 8), ""
    try:
        step(layer, ids[dist.get_rank()], weights[dist.get_rank()])
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return error, np.isfinite(step(layer))


def said_by(function: Any) -> str:
    """What a call raises."""
    try:
        function()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def call_differently(what: str) -> tuple[str, bool]:
    """Rank 1 calls another layer, or one that it has changed since; and whether the next call works."""
    layers = [ExpertParallel(8, 16, 8), ExpertParallel(8, 16, 8)]
    mine = layers[what == "layer" and dist.get_rank() == 1]
    if dist.get_rank() == 1 and what != "layer":
        setattr(mine, *what.split("="))
    error = said_by(lambda: step(mine))
    return error, np.isfinite(step(layers[1]))


def keep() -> tuple[str, str, bool, bool]:
    """What pickling a layer raises, torch.save as well; whether a copy and its values on disk are the same layer."""
    layer, file = ExpertParallel(8, 16, 8), io.BytesIO()
    refused = said_by(lambda: pickle.dumps(layer)), said_by(lambda: torch.save(layer, io.BytesIO()))
    torch.save(layer.state_dict(), file)
    other = ExpertParallel(8, 16, 8)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    expected = step(layer)
    return *refused, step(copy.deepcopy(layer)) == expected, step(other) == expected


def half_precision() -> None:
    """Of three ranks one has no experts."""
    step(ExpertParallel(2, 16, 8).half())


def reduce_frozen() -> None:
    layer = ExpertParallel(3, 16, 8, placement=[0, 1, 2, 0])
    layer.down_proj.requires_grad_(dist.get_rank() == 0)
    step(layer)
    layer.reduce_gradients()


def end_before_construction(victim: int) -> None:
    if dist.get_rank() == victim:
        os._exit(3)
    ExpertParallel(8, 16, 8)


def fail_in_step(victim: int, backward: bool) -> None:
    """An error of the model's own on one rank, in its shared expert or between two layers' backward passes."""
    layer, mine = ExpertParallel(8, 16, 8), dist.get_rank() == victim
    x = torch.ones(4, 16, requires_grad=True)

    def shared(given: torch.Tensor) -> torch.Tensor:
        if mine and not backward:
            raise ZeroDivisionError
        return given

    y = layer(layer(x, *routes()), *routes(), shared)
    if mine and backward:
        y.grad_fn.next_functions[0][0].register_hook(fail)
    y.sum().backward()


def routes() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(8).view(4, 2), torch.ones(4, 2)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def stop_process(victim: int) -> None:
    """A step in which ``victim`` stands still with all of its threads, those that keep the store among them."""
    layer = ExpertParallel(8, 16, 8)
    step(layer)
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(layer)
