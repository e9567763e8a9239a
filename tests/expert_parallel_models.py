"""What the ranks run that put expert parallelism into models, meshes and data parallelism."""

from __future__ import annotations

import copy
import sys
from typing import Any

import deep_ep_stand_in
import torch
import torch.distributed as dist
from expert_parallel_ranks import Batch, Case, Collectives, batch, same, step, whole_layer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pyroute import RouterConfig
from pyroute.pytorch import (
    ExpertParallel,
    GroupedExperts,
    MoELayer,
    SharedExpert,
    TopKRouter,
    expert_parallel_parameters,
    reduce_expert_gradients,
)

CASE = Case([6, 10, 3, 5], 6, 2)


def given_to(rank: int, generator: torch.Generator) -> tuple[Batch, slice]:
    start = sum(CASE.tokens[:rank])
    return batch(CASE, generator), slice(start, start + CASE.tokens[rank])


def moe_layer() -> MoELayer:
    torch.manual_seed(3)
    router = TopKRouter(RouterConfig(6, 2, "softmax"), 40)
    return MoELayer(router, GroupedExperts(6, 40, 24), SharedExpert(40, 8))


def in_ddp() -> None:
    """Two ranks of data parallelism around the layer: the gradients of one process, divided by two."""
    one, model = moe_layer(), moe_layer()
    model.experts = ExpertParallel.from_experts(one.experts)
    names = list(expert_parallel_parameters(model))
    assert names == ["experts.gate_up_proj", "experts.down_proj"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    parallel = DistributedDataParallel(model)
    x, grad = torch.randn(2, 8, 40), torch.randn(2, 8, 40)
    y = parallel(x[dist.get_rank()])
    y.backward(grad[dist.get_rank()])
    reduce_expert_gradients(parallel, average=True)
    expected = torch.cat([one(x[rank]) for rank in range(2)])
    same("y", y, expected.view(2, 8, 40)[dist.get_rank()])
    one.zero_grad()
    one(x).backward(grad)
    for name, parameter in model.named_parameters():
        whole = one.get_parameter(name).grad / 2
        if name in names:
            same(name, parameter.grad, whole[model.experts.local_experts])
        else:  # a sum of two ranks' sums
            torch.testing.assert_close(parameter.grad, whole, rtol=1e-5, atol=1e-6)


def in_fsdp() -> None:
    """Two by two ranks: experts over one dimension of the mesh, their parameters sharded over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    generator = torch.Generator().manual_seed(1)
    whole = whole_layer(CASE, generator)
    layer = ExpertParallel.from_experts(whole, group=mesh["ep"])
    mine = layer.local_experts
    fully_shard(layer, mesh=mesh["dp"])
    given = [given_to(rank, generator)[0] for rank in range(2)]  # another batch for each group of experts
    rows = slice(0, 6) if mesh.get_local_rank("ep") == 0 else slice(6, 24)
    got = step(layer, given[mesh.get_local_rank("dp")], rows)
    results = []
    for one in given:
        whole.zero_grad()
        results.append(step(whole, one, slice(None)))
    same("y", got["y"], results[mesh.get_local_rank("dp")]["y"][rows])
    same("grad x", got["grad x"], results[mesh.get_local_rank("dp")]["grad x"][rows])
    for name, parameter in layer.named_parameters():
        mean = (results[0][f"grad {name}"] + results[1][f"grad {name}"]) / 2
        same(name, parameter.grad.full_tensor(), mean[mine])


def two_dimensions() -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    assert ExpertParallel(4, 8, 8, group=mesh["ep"]).local_experts == [[0, 1], [2, 3]][dist.get_rank()]
    assert ExpertParallel(4, 8, 8, group=dist.new_group([0, 1])).num_experts == 4
    try:
        ExpertParallel(4, 8, 8, group=mesh)
    except ValueError as error:
        return str(error)
    return ""


def checkpointed() -> list[str]:
    """The forward pass runs twice, and so do its collectives; the bytes are the same."""
    generator = torch.Generator().manual_seed(2)
    whole = whole_layer(CASE, generator)
    given, mine = given_to(dist.get_rank(), generator)
    layer = ExpertParallel.from_experts(whole)
    expected = step(layer, given, mine)
    layer.zero_grad()

    class Recomputed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any) -> Any:
            return checkpoint(self.layer, *args, use_reentrant=False)

    with Collectives() as counted:
        got = step(Recomputed(), given, mine)
    for name, value in got.items():
        same(name, value, expected[name.replace("layer.", "")])
    return counted.calls


def shared_between() -> tuple[int, int]:
    """How many collectives have been started when the shared expert runs, forward and backward."""
    generator = torch.Generator().manual_seed(4)
    whole, (given, mine) = whole_layer(CASE, generator), given_to(dist.get_rank(), generator)
    layer, beside = ExpertParallel.from_experts(whole), torch.nn.Linear(40, 40)
    started: list[int] = []

    def shared(x: torch.Tensor) -> torch.Tensor:
        started.append(len(counted.calls))
        y: torch.Tensor = beside(x)
        y.register_hook(lambda _: started.append(len(counted.calls)))
        return y

    x = given.x[mine].clone().requires_grad_()
    with Collectives() as counted:
        y = layer(x, given.ids[mine], given.weights[mine], shared)
        y.backward(given.grad[mine])
        total = len(counted.calls)
    same("y", y, layer(x, given.ids[mine], given.weights[mine]) + beside(x))
    assert total > started[1]
    return started[0], started[1]


def gradients_of_one_rank() -> list[str]:
    """Only rank 0 needs any gradient: the others take part all the same."""
    generator = torch.Generator().manual_seed(5)
    whole = whole_layer(CASE, generator).requires_grad_(False)
    given, mine = given_to(dist.get_rank(), generator)
    layer = ExpertParallel.from_experts(whole)
    x = given.x[mine].clone().requires_grad_(dist.get_rank() == 0)
    with Collectives() as counted:
        layer(x, given.ids[mine], given.weights[mine]).backward(given.grad[mine])
    if dist.get_rank() == 0:
        every = given.x.clone().requires_grad_()
        whole(every, given.ids, given.weights).backward(given.grad)
        same("grad x", x.grad, every.grad[mine])
    with Collectives() as inference:
        layer(given.x[mine], given.ids[mine], given.weights[mine])
    return counted.calls + inference.calls


def under_autocast() -> None:
    generator = torch.Generator().manual_seed(6)
    whole = whole_layer(CASE, generator)
    given, mine = given_to(dist.get_rank(), generator)
    layer = ExpertParallel.from_experts(whole)
    given = given._replace(grad=given.grad.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = step(layer, given, mine), step(whole, given, slice(None))
    for name in ("y", "grad x", "grad weights"):
        same(name, got[name], expected[name][mine])
    for name, _ in layer.named_parameters():
        same(name, got[f"grad {name}"], expected[f"grad {name}"][layer.local_experts])


def compiled(backend: str) -> tuple[int, list[str], str]:
    """Steps whose number of tokens differs between ranks and from step to step, so that every rank compiles others.

    Returns
    -------
    How many graphs were made of the layer alone, the collectives of a compiled model's steps, what fullgraph raises.
    """
    generator = torch.Generator().manual_seed(9)
    whole, graphs = whole_layer(CASE, generator), []
    layer = ExpertParallel.from_experts(whole)
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), moe_layer(), torch.nn.Tanh())
    model[1].experts = layer

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    alone, called = copy.deepcopy(layer), torch.compile(model, backend=backend)
    alone.compile(backend=counting)
    with Collectives() as counted:
        for tokens in ([3, 0], [1, 5], [0, 7]):
            case = CASE._replace(tokens=tokens)
            given, rank = batch(case, generator), dist.get_rank()
            mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
            layer.zero_grad()
            alone.zero_grad()
            eager, results = step(layer, given, mine), []
            for name, value in step(alone, given, mine).items():
                same(name, value, eager[name])
            for run in (model, called):
                model.zero_grad()
                x = given.x[mine].clone().requires_grad_()
                y = run(x)
                y.backward(given.grad[mine])
                results.append([y, x.grad, *(p.grad for p in model.parameters())])
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    try:
        torch.compile(layer, backend="eager", fullgraph=True)(given.x, given.ids, given.weights)
    except RuntimeError as error:
        return len(graphs), counted.calls, str(error)
    return len(graphs), counted.calls, ""


def initial_weights() -> list[Any]:
    """All experts as they start, whatever the random state of ranks other than 0."""
    torch.manual_seed(7 + 100 * dist.get_rank())
    layer = ExpertParallel(5, 12, 8, placement=[0, 1, 2, 3, 4, 0])
    every = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(every, layer.down_proj.detach())
    weights: list[Any] = torch.cat(every).tolist()
    return weights


def through_deep_ep(top_k: int, payload: str | None) -> float:
    """The largest difference to the other transport, relative; none at all where a token has one expert."""
    sys.modules["deep_ep"] = deep_ep_stand_in
    generator = torch.Generator().manual_seed(8)
    case = CASE._replace(top_k=top_k, dtype="bfloat16", routes="holes")
    whole = GroupedExperts(6, 128, 24, dtype=torch.bfloat16)
    given = batch(case, generator)
    x, grad = (torch.randn(24, 128, generator=generator).bfloat16() for _ in range(2))
    given = given._replace(x=x, grad=grad)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    start = sum(case.tokens[: dist.get_rank()])
    mine = slice(start, start + case.tokens[dist.get_rank()])
    options = {"payload": payload, "placement": [0, 1, 2, 3, 4, 5, 0, 1] if dist.get_world_size() == 4 else None}
    expected = step(ExpertParallel.from_experts(whole, **options), given, mine)
    got = step(ExpertParallel.from_experts(whole, transport="deep_ep", **options), given, mine)
    worst = 0.0
    for name, value in expected.items():
        if top_k == 1:
            same(name, got[name], value)
        elif value.numel():
            worst = max(worst, float((got[name].float() - value.float()).norm() / value.float().norm()))
    return worst


def call_through_deep_ep(of_rank: list[dict[str, Any]]) -> tuple[str, bool]:
    """What a call with some arguments raises, which differ between ranks; and whether the next step works."""
    sys.modules["deep_ep"] = deep_ep_stand_in
    layer = ExpertParallel(8, 128, 8, dtype=torch.bfloat16, transport="deep_ep")
    x = torch.ones(4, 128, dtype=torch.bfloat16)
    given = {"x": x, "topk_idx": torch.zeros(4, 2, dtype=torch.int64), "topk_weights": torch.ones(4, 2)}
    mine, error = given | of_rank[dist.get_rank()], ""
    try:
        with torch.set_grad_enabled(bool(mine.pop("grad", True))):
            layer(**mine)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    y = layer(**given)
    y.sum().backward()
    return error, bool(y.isfinite().all())


def refused_by_deep_ep(options: dict[str, Any], installed: bool) -> str:
    if installed:
        sys.modules["deep_ep"] = deep_ep_stand_in
    given: dict[str, Any] = {"num_experts": 8, "hidden_size": 64, "dtype": torch.bfloat16} | options
    dtype = given.pop("x", torch.bfloat16)
    try:
        layer = ExpertParallel(given.pop("num_experts"), given.pop("hidden_size"), 8, transport="deep_ep", **given)
        layer(torch.ones(2, 64, dtype=dtype), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
