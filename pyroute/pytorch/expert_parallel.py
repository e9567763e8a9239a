"""ExpertParallel: a layer's experts over the ranks of a process group."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _check
from . import _deep_ep as deep_ep
from . import _expert_parallel_plan as agreement
from ._expert_exchange import Agreement, Header, Ranks, refused_by_all
from ._expert_parallel_step import FromExperts, LayerOptions, Step, ToExperts
from ._expert_payload import SCALE_FORMATS, Payload
from ._expert_routes import Route, SlotMaps, slots_of
from ._replica_gradients import check_gradients, sum_over_replicas
from ._tensors import INTEGERS, describe, on, on_host
from .experts import GroupedExperts
from .grouped_gemm import autocast_float
from .moe import check_precision

Transport = Literal["torch", "deep_ep"]
NAME = "ExpertParallel"
_numbers = itertools.count()  # of layers, so that ranks that call another one than rank 0 are found


class ExpertParallel(GroupedExperts):
    """:class:`GroupedExperts` whose experts live on the ranks of a process group, each rank having tokens of its own.

    In a :class:`MoELayer` it takes the place of ``GroupedExperts``. All ranks construct it, and call it forward and
    backward, together; a rank without tokens calls it with none.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        Of the whole layer.
    group : process group or DeviceMesh of one dimension, optional
        By default all processes; without ``torch.distributed`` this one alone.
    placement : pyroute.placement.Placement of one layer, or integers [num_slots], optional
        The expert in each slot, ranks having equally many; experts with several slots are replicated and take turns.
        By default blocks of experts in order, the first ranks holding one more where they do not divide evenly.
    payload : {None, "fp8", "fp8_ue8m0"}
        What the tokens travel as going forward: their own type, or e4m3 codes with a scale for 128 columns, float32 or
        a power of two. Gradients pass straight through it and travel as they are.
    transport : {"torch", "deep_ep"}
        ``all_to_all_single`` of the group's backend, or DeepEP's kernels.
    options
        Of :class:`GroupedExperts`.

    Attributes
    ----------
    gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias
        Of this rank's slots, in order; as :class:`GroupedExperts` has them.
    local_experts : list of int
        The expert in each of this rank's slots.
    """

    takes_shared = True
    _fewest_experts = 0

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, group: Any = None, placement: Any = None,
        payload: Payload | None = None, transport: Transport = "torch", **options: Any,
    ) -> None:  # fmt: skip
        found = agreement.group_of(NAME, group)
        ranks = Ranks(found)
        self._seed: int | None = None
        error: Exception | None = None
        config: dict[str, Any] = {}
        try:
            _check.integer(NAME, "num_experts", num_experts, 1)
            _check.one_of(NAME, "payload", payload, (None, *SCALE_FORMATS))
            _check.one_of(NAME, "transport", transport, ("torch", "deep_ep"))
            slots = agreement.slots_of(NAME, placement, num_experts, ranks.size)
            if transport == "deep_ep":
                deep_ep.check(NAME, found, slots, payload, hidden_size)
            super().__init__(len(slots.of_rank(ranks.rank)), hidden_size, intermediate_size, **options)
            config = self._config(num_experts, slots, payload, transport)
        except Exception as caught:  # memory or a device that this rank lacks among them: the others must hear of it
            error = caught
        seed, self._number = agreement.agree(NAME, ranks, config, error)
        self._num_experts, self.payload, self.transport, self._ranks, self._slots = (
            num_experts, payload, transport, ranks, slots,
        )  # fmt: skip
        self.local_experts = slots.of_rank(ranks.rank)
        self._maps: dict[torch.device, SlotMaps] = {}
        self._seed = seed
        self.reset_parameters()

    @classmethod
    def from_experts(
        cls, experts: GroupedExperts, *, group: Any = None, placement: Any = None, payload: Payload | None = None,
        transport: Transport = "torch",
    ) -> ExpertParallel:  # fmt: skip
        """This rank's share of a layer that every rank has whole, with copies of its parameters."""
        if not isinstance(experts, GroupedExperts) or isinstance(experts, ExpertParallel):
            raise _check.type_error(NAME, "experts", "a GroupedExperts with all experts", describe(experts))
        like = experts.down_proj
        layer = cls(
            experts.num_experts, experts.hidden_size, experts.intermediate_size, group=group, placement=placement,
            payload=payload, transport=transport, activation=experts.activation, limit=experts.limit,
            alpha=experts.alpha, weight_on=experts.weight_on, bias=experts.down_proj_bias is not None,
            precision=experts.precision, device=like.device, dtype=like.dtype,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                whole = getattr(experts, name)
                parameter.copy_(whole[layer.local_experts])
                parameter.requires_grad_(whole.requires_grad)
        return layer.train(experts.training)

    def _config(self, num_experts: int, slots: Any, payload: Any, transport: Any) -> dict[str, Any]:
        """What has to be the same on every rank, and rank 0's seed."""
        return {
            "num_experts": num_experts, "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "placement": slots.describe(), "payload": payload, "transport": transport, "activation": self.activation,
            "limit": self.limit, "alpha": self.alpha, "weight_on": self.weight_on, "precision": self.precision,
            "bias": self.down_proj_bias is not None, "dtype": str(self.down_proj.dtype).removeprefix("torch."),
            "seed": int(torch.randint(2**62, (), device="cpu").item()), "number": next(_numbers),
        }  # fmt: skip

    @property
    def num_experts(self) -> int:
        return self._num_experts

    def reset_parameters(self) -> None:
        """Every expert as two ``torch.nn.Linear`` start, from a seed of its own: the same wherever it lives."""
        if self._seed is None or self.down_proj.is_meta:
            return
        generators = [torch.Generator().manual_seed((self._seed + expert) % 2**63) for expert in self.local_experts]
        for name, parameter in self.named_parameters(recurse=False):
            bound = (self.hidden_size if name.startswith("gate_up") else self.intermediate_size) ** -0.5
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            for expert, generator in zip(drawn, generators, strict=True):
                expert.uniform_(-bound, bound, generator=generator)
            if hasattr(parameter, "device_mesh"):  # sharded again, as FSDP does; every one of its ranks has drawn all
                from torch.distributed.tensor import distribute_tensor

                drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements, src_data_rank=None)
            with torch.no_grad():
                parameter.copy_(drawn)

    @torch._disable_dynamo  # between graphs: whatever a rank compiles, it calls the same collectives
    def forward(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, shared: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The whole layer's result for this rank's tokens.

        Parameters
        ----------
        x : float32 or bfloat16 [T, hidden_size]
            T may differ between ranks, and be 0.
        topk_idx : integer [T, top_k]
            Of the whole layer's experts; -1 is not routed.
        topk_weights : floating [T, top_k]
        shared : function of x, optional
            Its result is added; it is computed while the experts' results travel.

        Returns
        -------
        [T, hidden_size] of x's type
        """
        if self.transport == "deep_ep":
            routed = self._through_deep_ep(x, topk_idx, topk_weights)
            return routed if shared is None else routed + shared(x)
        with refused_by_all(self._ranks, self.down_proj.device):
            x, params = self._operands(x)
            route = self._route(x, topk_idx, topk_weights)
        options = LayerOptions(self.activation, self.limit, self.alpha, self.weight_on, self.precision, self.payload)
        agreed = self._agree((route.row_counts, route.slot_counts), x, topk_idx, topk_weights, params)
        step = Step(self._ranks, options, route, agreed)
        # a rank that needs no gradient takes part in the others' backward pass all the same
        anchor = torch.empty(0, device=x.device, requires_grad=True) if step.agreed.records else None
        token = ToExperts.apply(step, x, topk_weights, anchor, *params)
        beside = None if shared is None else shared(x)
        y: Tensor = FromExperts.apply(step, token, topk_weights.detach())
        return y if beside is None else y + beside

    @torch._disable_dynamo
    @torch.no_grad()
    def reduce_gradients(self, *, average: bool = False) -> None:
        """Sum the gradients of replicas, so that they stay equal: after the last backward pass of a step, on all ranks.

        Parameters
        ----------
        average : bool
            Divide the gradients by the number of ranks, as data parallelism does with those of other parameters.
        """
        parameters = dict(self.named_parameters(recurse=False))
        if (self._slots.replicas > 1).any():
            check_gradients(NAME, parameters, self._ranks)
        gradients = []
        for parameter in parameters.values():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        sum_over_replicas(gradients, self._slots, self._ranks)
        if average:
            for gradient in gradients:
                gradient /= self._ranks.size

    def _operands(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """x, weights and biases, cast as autocast casts those of :func:`moe_forward`."""
        params = [self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias]
        kind = self.down_proj.device.type
        if isinstance(x, Tensor) and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x = autocast_float(dtype, x)
            wide = 2 if self.precision else 0
            params[wide:] = [autocast_float(dtype, p) for p in params[wide:]]
        return x, params

    def _agree(
        self, counts: tuple[list[int], list[int]], x: Tensor, topk_idx: Tensor, topk_weights: Tensor, params: Any
    ) -> Agreement:
        """The one collective before anything is sent: ``counts`` of rows and slots for each rank, and what must fit."""
        header = Header(
            *counts, self._number, topk_idx.shape[1], x.dtype, self.payload, self.precision,
            torch.is_grad_enabled(), x.requires_grad, topk_weights.requires_grad,
            any(p is not None and p.requires_grad for p in params),
        )  # fmt: skip
        return header.exchange(NAME, self._ranks, x.device)

    def _through_deep_ep(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        with refused_by_all(self._ranks, self.down_proj.device):
            x, params = self._operands(x)
            ids = self._checked_ids(x, topk_idx, topk_weights)
            if x.dtype != torch.bfloat16:
                raise _check.type_error(NAME, "x", "bfloat16 with transport 'deep_ep'", describe(x))
        counts = [0] * self._ranks.size  # DeepEP tells them
        agreed = self._agree((counts, counts), x, topk_idx, topk_weights, params)
        slots = torch.where(ids >= 0, slots_of(ids, self._maps[x.device]), -1)
        group, num_slots = self._ranks.group, len(self._slots.slot_to_expert)
        assert group is not None
        weights = topk_weights.to(torch.float32)
        return deep_ep.through_deep_ep(
            group, super().forward, x, slots, weights, num_slots, self.payload, agreed.records
        )

    def _route(self, x: Any, topk_idx: Any, topk_weights: Any) -> Route:
        ids = self._checked_ids(x, topk_idx, topk_weights)
        return Route.of(ids, self._maps[x.device], once_per_rank=self.weight_on != "input")

    def _checked_ids(self, x: Any, topk_idx: Any, topk_weights: Any) -> Tensor:
        """``topk_idx``, in which a device's ids outside the experts are not routed."""
        check_precision(NAME, self.precision)
        _check.one_of(NAME, "payload", self.payload, (None, *SCALE_FORMATS))
        device = self.down_proj.device
        for name, given in (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            dense = isinstance(given, Tensor) and given.layout is torch.strided
            if not dense or given.dim() != 2 or given.device != device:
                got = on(given) if isinstance(given, Tensor) else describe(given)
                raise _check.type_error(NAME, name, f"a matrix on {device}, as the experts are", got)
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise _check.type_error(NAME, "x", "float32 or bfloat16", describe(x))
        if x.shape[1] != self.hidden_size:
            raise _check.value_error(NAME, "x", f"[num_tokens, hidden={self.hidden_size}]", list(x.shape))
        if topk_idx.dtype not in INTEGERS:
            raise _check.type_error(NAME, "topk_idx", "integers [num_tokens, top_k]", describe(topk_idx))
        if not topk_weights.dtype.is_floating_point:
            raise _check.type_error(NAME, "topk_weights", "floating [num_tokens, top_k]", describe(topk_weights))
        for name, held in self.named_parameters(recurse=False):
            if held.dtype not in (torch.float32, torch.bfloat16):  # on a rank without experts no kernel would say so
                raise _check.type_error(NAME, name, "float32 or bfloat16", describe(held))
        shape = [len(x), max(topk_idx.shape[1], 1)]
        for name, given in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if list(given.shape) != shape:
                raise _check.value_error(NAME, name, f"of shape {shape}", list(given.shape))
        if device not in self._maps:
            self._maps[device] = SlotMaps.of(self._slots, self._ranks.rank, device)
        narrow = topk_idx.dtype not in (torch.int32, torch.int64)  # compares with no number that it cannot hold
        ids = topk_idx.to(torch.int64) if narrow else topk_idx
        outside = (ids < (-1 if topk_idx.dtype.is_signed else 0)) | (ids >= self.num_experts)
        if not on_host(topk_idx):
            ids = ids.masked_fill(outside, -1)
        elif outside.any():
            other = topk_idx.flatten().tolist()[int(outside.flatten().nonzero()[0])]
            raise _check.value_error(NAME, "topk_idx", f"-1 or in 0..{self.num_experts - 1}", other)
        return ids

    def extra_repr(self) -> str:
        held = f"slots {len(self.local_experts)} of {len(self._slots.slot_to_expert)}"
        of = f"rank {self._ranks.rank} of {self._ranks.size}"
        return f"{super().extra_repr()}, {held}, {of}" + ("" if self.payload is None else f", payload='{self.payload}'")


def expert_parallel_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of every :class:`ExpertParallel` in ``model`` by their names, which differ between ranks.

    What data parallelism has to leave alone.
    """
    layers = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, ExpertParallel)]
    return {name: p for prefix, layer in layers for name, p in layer.named_parameters(prefix, recurse=False)}


def reduce_expert_gradients(model: torch.nn.Module, *, average: bool = False) -> None:
    """:meth:`ExpertParallel.reduce_gradients` of every such layer in ``model``."""
    for module in model.modules():
        if isinstance(module, ExpertParallel):
            module.reduce_gradients(average=average)
