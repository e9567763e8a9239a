"""The experts and the layer around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._activation import Activation, activation_program
from .._moe_arguments import WeightOn
from .moe import Precision, check_precision, moe_forward
from .router import TopKRouter


class GroupedExperts(nn.Module):
    """All experts of a layer in two parameters, applied to the tokens that chose them.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
    activation, limit, alpha
        As in :func:`pyroute.moe_forward`: "swiglu", "swiglu_clamp" (DeepSeek-V4), "swiglu_oai" (gpt-oss), "geglu",
        "relu2".
    weight_on : {"output", "pre_down", "input"}
        Where a token's weight multiplies.
    bias : bool
        Biases on both projections (gpt-oss).
    precision : {None, "fp8", "fp8_ue8m0"}
        None: that of the parameters. Else DeepSeek-V3's FP8 recipe, as in :func:`moe_forward`; the parameters are the
        wide master weights. :func:`set_precision` changes it.

    Attributes
    ----------
    gate_up_proj : [num_experts, 2 * intermediate_size, hidden_size]
        Gate rows first, as transformers keeps them; [num_experts, intermediate_size, hidden_size] for "relu2".
    down_proj : [num_experts, hidden_size, intermediate_size]
    gate_up_proj_bias, down_proj_bias
    """

    takes_shared = False  # whether forward adds a shared expert's result itself
    _fewest_experts = 1

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, activation: Activation = "swiglu",
        limit: float | None = None, alpha: float | None = None, weight_on: WeightOn = "output", bias: bool = False,
        precision: Precision | None = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            _check.integer(type(self).__name__, name, size, self._fewest_experts if name == "num_experts" else 1)
        _check.one_of(type(self).__name__, "weight_on", weight_on, ("output", "pre_down", "input"))
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.limit, self.alpha, self.weight_on = activation, limit, alpha, weight_on
        self.precision = check_precision(type(self).__name__, precision)
        gated = activation_program(type(self).__name__, activation, limit, alpha).gated
        width = (1 + gated) * intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(width, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(width) if bias else None
        self.down_proj_bias = parameter(hidden_size) if bias else None
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return int(self.down_proj.shape[0])

    def reset_parameters(self) -> None:
        """Every expert as two ``torch.nn.Linear`` start."""
        for projection, size in (("gate_up_proj", self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, projection), getattr(self, f"{projection}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(size), 1 / math.sqrt(size))

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """``x`` [T, hidden_size], ids and weights [T, top_k], to [T, hidden_size]; -1 is not routed."""
        return moe_forward(
            x, topk_idx, topk_weights, self.gate_up_proj, self.down_proj, b_gate_up=self.gate_up_proj_bias,
            b_down=self.down_proj_bias, activation=self.activation, limit=self.limit, alpha=self.alpha,
            weight_on=self.weight_on, precision=self.precision,
        )  # fmt: skip

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}, activation='{self.activation}'"
        sizes += "" if self.weight_on == "output" else f", weight_on='{self.weight_on}'"
        return sizes + ("" if self.precision is None else f", precision='{self.precision}'")


class SharedExpert(GroupedExperts):
    """An expert that every token visits; several shared experts are one of their widths' sum.

    Parameters
    ----------
    hidden_size, intermediate_size : int
    gated : bool
        Multiply the result by ``sigmoid(gate @ x)`` (Qwen2-MoE, Qwen3-Next).
    options
        Of :class:`GroupedExperts`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, gated: bool = False, **options: Any) -> None:
        super().__init__(1, hidden_size, intermediate_size, **options)
        like = self.down_proj
        bound = 1 / math.sqrt(hidden_size)
        gate = torch.empty(1, hidden_size, device=like.device, dtype=like.dtype).uniform_(-bound, bound)
        self.gate = nn.Parameter(gate) if gated else None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x`` [T, hidden_size] to the same shape."""
        everyone = torch.zeros((x.shape[0], 1), dtype=torch.int32, device=x.device)
        if self.gate is None:
            return super().forward(x, everyone, torch.ones_like(everyone, dtype=torch.float32))
        return super().forward(x, everyone, torch.sigmoid(nn.functional.linear(x, self.gate)))


def set_precision(model: nn.Module, precision: Precision | None) -> None:
    """The ``precision`` of every :class:`GroupedExperts` and :class:`SharedExpert` in ``model``."""
    check_precision("set_precision", precision)
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.precision = precision


class MoELayer(nn.Module):
    """Router, experts and shared expert: a sparse layer in place of a dense feed-forward one.

    Parameters
    ----------
    router : TopKRouter
    experts : GroupedExperts
        With the router's number of experts, hidden size and ``config.weight_on``.
    shared : Module, optional
        Its result for [T, hidden_size] is added.

    Examples
    --------
    >>> config = pyroute.RouterConfig(64, 6, "sigmoid", renormalize="sum", scaling_factor=2.5)
    >>> layer = MoELayer(
    ...     TopKRouter(config, 512, selection_bias=True), GroupedExperts(64, 512, 128), SharedExpert(512, 256)
    ... )
    >>> layer(torch.randn(2, 16, 512)).shape
    torch.Size([2, 16, 512])
    """

    def __init__(self, router: TopKRouter, experts: GroupedExperts, shared: nn.Module | None = None) -> None:
        super().__init__()
        config = router.config
        mine = (experts.num_experts, experts.hidden_size, experts.weight_on)
        theirs = (config.num_experts, router.hidden_size, config.weight_on)
        if mine != theirs:
            expected = "of the router's num_experts, hidden_size and weight_on {}, {}, '{}'".format(*theirs)
            raise _check.value_error("MoELayer", "experts", expected, "{}, {}, '{}'".format(*mine))
        self.router, self.experts, self.shared = router, experts, shared

    def forward(
        self, x: Tensor, *, topk_idx: Tensor | None = None, token_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``x`` [..., hidden_size] to the same shape; the arguments are :meth:`TopKRouter.forward`'s."""
        routing = self.router(x, topk_idx=topk_idx, token_mask=token_mask, sequence_ids=sequence_ids)
        tokens = x.reshape(-1, x.shape[-1])
        given = (tokens, routing.topk_idx, routing.topk_weights)
        if self.shared is None:
            y = self.experts(*given)
        elif getattr(self.experts, "takes_shared", False):
            y = self.experts(*given, self.shared)
        else:
            y = self.experts(*given) + self.shared(tokens)
        return y.reshape(x.shape)
