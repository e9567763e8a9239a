"""What every rank of the expert-parallel tests runs, and the single process that it is held against."""

from __future__ import annotations

import collections
import os
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pyroute.pytorch import ExpertParallel, GroupedExperts, dequantize_fp8, quantize_fp8

H, INNER = 40, 24


class Case(NamedTuple):
    """One step of all ranks: what their tokens are, and the layer that they go through."""

    tokens: list[int]  # of each rank
    num_experts: int
    top_k: int
    routes: str = "random"  # or "one", "few", "holes", "none"
    slots: list[int] | None = None
    bias: bool = False
    dtype: str = "float32"
    activation: str = "swiglu"
    weight_on: str = "output"
    precision: str | None = None
    payload: str | None = None
    weights: str = "float32"


class Batch(NamedTuple):
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    grad: torch.Tensor


def batch(case: Case, generator: torch.Generator) -> Batch:
    """All ranks' tokens, one after the other."""
    T, E, k = sum(case.tokens), case.num_experts, case.top_k
    x = torch.randn(T, H, generator=generator).to(getattr(torch, case.dtype))
    ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :k]
    if ids.shape[1] < k or case.routes == "few":  # with repeats
        ids = torch.randint(0, min(E, 2) if case.routes == "few" else E, (T, k), generator=generator)
    if case.routes == "one":
        ids = torch.full((T, k), E - 1)
    if case.routes == "holes":
        ids = torch.where(torch.rand(T, k, generator=generator) < 0.4, -1, ids)
    if case.routes == "none":
        ids = torch.full((T, k), -1)
    weights = torch.rand(T, k, generator=generator).to(getattr(torch, case.weights))
    grad = torch.randn(T, H, generator=generator).to(x.dtype)
    return Batch(x, ids.to(torch.int32), weights, grad)


def whole_layer(case: Case, generator: torch.Generator) -> GroupedExperts:
    layer = GroupedExperts(
        case.num_experts, H, INNER, activation=case.activation, weight_on=case.weight_on, bias=case.bias,
        precision=case.precision, dtype=getattr(torch, case.dtype),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def step(layer: Any, given: Batch, rows: slice) -> dict[str, torch.Tensor]:
    """Result and gradients of some of the batch's tokens."""
    x, weights = (t[rows].clone().requires_grad_() for t in (given.x, given.weights))
    y = layer(x, given.ids[rows], weights)
    y.backward(given.grad[rows])
    grads = {f"grad {name}": p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, "grad weights": weights.grad, **grads}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().reshape(-1).clone().view(torch.uint8)


def same(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype, name
    assert got.shape == expected.shape, name
    if not torch.equal(bits(got), bits(expected)):
        raise AssertionError(
            f"{name}: {int((got != expected).sum())} of {got.numel()} differ, by {(got - expected).abs().max()}"
        )


class Collectives:
    """Counts the calls of ``torch.distributed`` and the bytes that this rank sends, while it is entered."""

    NAMES = ("all_to_all_single", "all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "barrier")

    def __enter__(self) -> Collectives:
        self.calls: list[str] = []
        self.sent: dict[str, int] = collections.Counter()
        self._real = {name: getattr(dist, name) for name in self.NAMES}
        for name, real in self._real.items():
            setattr(dist, name, self._counted(name, real))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)

    def _counted(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name == "all_to_all_single":
                self.sent[len(self.calls)] += args[1].nbytes
            return real(*args, **kwargs)

        return call


def check_case(case: Case, seed: int) -> list[str]:
    """The case on this group against one process, to the byte; the collectives of the step."""
    generator = torch.Generator().manual_seed(seed)
    whole, given = whole_layer(case, generator), batch(case, generator)
    rank = dist.get_rank()
    start = sum(case.tokens[:rank])
    mine = slice(start, start + case.tokens[rank])
    layer = ExpertParallel.from_experts(whole, placement=case.slots, payload=case.payload)
    with Collectives() as counted:
        got = step(layer, given, mine)
    expected = step(whole, given, slice(None))
    for name in ("y", "grad x", "grad weights"):
        same(f"{name} of {case}", got[name], expected[name][mine])
    for name, _ in layer.named_parameters():
        same(f"{name} of {case}", got[f"grad {name}"], expected[f"grad {name}"][layer.local_experts])
    return counted.calls


def check_cases(cases: list[tuple[Case, int]]) -> list[list[str]]:
    return [check_case(case, seed) for case, seed in cases]


def turns(case: Case, ids: torch.Tensor) -> torch.Tensor:
    """The slot that serves each route, by the rule as it is documented: replicas in turn, from the rank's number on."""
    assert case.slots is not None
    rank_of = [rank for rank, count in enumerate(case.tokens) for _ in range(count)]
    seen: dict[tuple[int, int], int] = collections.Counter()
    result = torch.full_like(ids, -1)
    for token, row in enumerate(ids.tolist()):
        for place, expert in enumerate(row):
            if expert >= 0:
                replicas = [slot for slot, held in enumerate(case.slots) if held == expert]
                turn = seen[rank_of[token], expert] + rank_of[token]
                seen[rank_of[token], expert] += 1
                result[token, place] = replicas[turn % len(replicas)]
    return result


def check_replicas(case: Case, seed: int) -> None:
    """Everything but the replicas' gradients to the byte; those are the sum, in the order of slots, of what one process
    has for the tokens of each slot.
    """
    assert case.slots is not None
    generator = torch.Generator().manual_seed(seed)
    whole, given = whole_layer(case, generator), batch(case, generator)
    start = sum(case.tokens[: dist.get_rank()])
    mine = slice(start, start + case.tokens[dist.get_rank()])
    layer = ExpertParallel.from_experts(whole, placement=case.slots)
    got = step(layer, given, mine)
    expected = step(whole, given, slice(None))
    for name in ("y", "grad x", "grad weights"):
        same(f"{name} of {case}", got[name], expected[name][mine])
    layer.reduce_gradients()
    slot_of = turns(case, given.ids)
    of_slot = []
    for slot in range(len(case.slots)):
        whole.zero_grad()
        only = given._replace(ids=torch.where(slot_of == slot, given.ids, -1))
        of_slot.append(step(whole, only, slice(None)))
    for name, parameter in layer.named_parameters():
        for local, expert in enumerate(layer.local_experts):
            terms = [of_slot[s][f"grad {name}"][expert] for s, held in enumerate(case.slots) if held == expert]
            total = terms[0].float()
            for term in terms[1:]:
                total = total + term.float()
            assert parameter.grad is not None
            same(f"{name} of {case}", parameter.grad[local], total.to(parameter.dtype))


def check_all_replicas(cases: list[tuple[Case, int]]) -> None:
    for case, seed in cases:
        check_replicas(case, seed)


def die_in_step(victim: int, call: int, tokens: list[int]) -> None:
    """A second step in which ``victim`` ends without a word instead of its ``call``-th collective."""
    case = Case(tokens, 8, 2)
    generator = torch.Generator().manual_seed(0)
    whole, given = whole_layer(case, generator), batch(case, generator)
    start = sum(case.tokens[: dist.get_rank()])
    mine = slice(start, start + case.tokens[dist.get_rank()])
    layer = ExpertParallel.from_experts(whole)
    step(layer, given, mine)
    if dist.get_rank() == victim:
        real, left = dist.all_to_all_single, iter(range(call - 1))

        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                os._exit(3)
            return real(*args, **kwargs)

        dist.all_to_all_single = dying
    step(layer, given, mine)
    step(layer, given, mine)


def stop_in_step(victim: int) -> None:
    """A step in which ``victim`` never arrives, though its process lives."""
    case = Case([3] * dist.get_world_size(), 4, 1)
    generator = torch.Generator().manual_seed(0)
    layer = ExpertParallel.from_experts(whole_layer(case, generator))
    if dist.get_rank() == victim:
        time.sleep(3600)
    step(layer, batch(case, generator), slice(0, 3))


def construct(of_rank: list[dict[str, Any]]) -> None:
    """A layer with some options, which differ between ranks."""
    given = {"num_experts": 8, "hidden_size": 16, "intermediate_size": 8} | of_rank[dist.get_rank()]
    given = {name: plan() if callable(plan) else plan for name, plan in given.items()}
    ExpertParallel(**given)


def call(of_rank: list[dict[str, Any]]) -> tuple[str, bool]:
    """What a call with some arguments raises, which differ between ranks; and whether the next call works."""
    layer = ExpertParallel(8, 16, 8)
    x, ids = torch.ones(4, 16), torch.zeros(4, 2, dtype=torch.int64)
    given = {"x": x, "topk_idx": ids, "topk_weights": torch.ones(4, 2)} | of_rank[dist.get_rank()]
    error = ""
    try:
        with torch.set_grad_enabled(bool(given.pop("grad", True))):
            layer(**given)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return error, bool(layer(x, ids, torch.ones(4, 2)).isfinite().all())


def check_payload(case: Case, seed: int) -> None:
    """Against one process whose x went through the codes and back: to the byte with wide experts.

    FP8 experts of the same scales read the codes themselves, so their result is that of x; only the gradient of
    gate_up_proj, which is made of what arrived, is not x's.
    """
    generator = torch.Generator().manual_seed(seed)
    whole, given = whole_layer(case, generator), batch(case, generator)
    start = sum(case.tokens[: dist.get_rank()])
    mine = slice(start, start + case.tokens[dist.get_rank()])
    got = step(layer := ExpertParallel.from_experts(whole, payload=case.payload), given, mine)
    coded = case.precision == case.payload
    scales = "ue8m0" if case.payload == "fp8_ue8m0" else "float32"
    sent = dequantize_fp8(quantize_fp8(given.x, scale_format=scales), given.x.dtype)
    expected = step(whole, given if coded else given._replace(x=sent), slice(None))
    for name in ("y", "grad x", "grad weights"):
        same(f"{name} of {case}", got[name], expected[name][mine])
    for name, _ in layer.named_parameters():
        if not (coded and name == "gate_up_proj"):
            same(f"{name} of {case}", got[f"grad {name}"], expected[f"grad {name}"][layer.local_experts])


def check_payloads(cases: list[tuple[Case, int]]) -> None:
    for case, seed in cases:
        check_payload(case, seed)


def bytes_of_dispatch(payload: str | None, hidden: int, top_k: int) -> int:
    """What this rank sends before its experts run: headers, routes and tokens."""
    layer = ExpertParallel(8, hidden, 8, payload=payload)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.rand(64, 8, generator=generator).argsort(dim=1)[:, :top_k]
    with Collectives() as counted, torch.no_grad():
        layer(torch.randn(64, hidden), ids, torch.ones(64, top_k))
    return sum(sent for call, sent in counted.sent.items() if call <= 3)
