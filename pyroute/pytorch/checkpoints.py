"""Experts from checkpoints as modules: trainable in a wider type, or FP8 as they are on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._activation import Activation, activation_program
from .._moe_arguments import WeightOn
from ..checkpoints import load_experts as load
from ..quantization import Fp8Array, ScaleFormat
from ._tensors import NUMPY_DTYPES, tensor
from .experts import GroupedExperts
from .moe import moe_forward
from .quantization import Fp8Tensor

# Integers of the same width, which Module.to(dtype) leaves alone.
_CARRIERS = {1: torch.uint8, 4: torch.int32}


class Fp8Experts(nn.Module):
    """Experts whose weights stay FP8 codes and scales: :class:`GroupedExperts` that is not trained itself.

    Gradients flow through it to x and to the weights of the router. ``.to(dtype)`` and ``.half()`` leave codes and
    scales as they are.

    Parameters
    ----------
    gate_up : Fp8Tensor [num_experts, 2 * intermediate_size, hidden_size]
    down : Fp8Tensor [num_experts, hidden_size, intermediate_size]
    activation, limit, alpha, weight_on
        As in :class:`GroupedExperts`.
    quantize_activations : bool or {"float32", "ue8m0"}
        Quantise the rows of both products in blocks of 1 x 128 too, as DeepSeek-V3 is served.

    Attributes
    ----------
    gate_up_proj, down_proj : float8
    gate_up_proj_scale_inv, down_proj_scale_inv : float32
    """

    def __init__(
        self, gate_up: Fp8Tensor, down: Fp8Tensor, *, activation: Activation = "swiglu", limit: float | None = None,
        alpha: float | None = None, weight_on: WeightOn = "output", quantize_activations: bool | ScaleFormat = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, given in (("gate_up", gate_up), ("down", down)):
            if not isinstance(given, Fp8Tensor):
                raise _check.type_error("Fp8Experts", name, "an Fp8Tensor", _check.describe(given))
        activation_program("Fp8Experts", activation, limit, alpha)
        self.activation, self.limit, self.alpha, self.weight_on = activation, limit, alpha, weight_on
        self.quantize_activations = quantize_activations
        self.blocks = (gate_up.block, down.block)
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            self.register_buffer(name, weight.codes)
            self.register_buffer(f"{name}_scale_inv", weight.scales)

    @property
    def num_experts(self) -> int:
        return int(self.down_proj.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.down_proj.shape[1])

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """``x`` [T, hidden_size], ids and weights [T, top_k], to [T, hidden_size]; -1 is not routed."""
        return moe_forward(
            x, topk_idx, topk_weights,
            Fp8Tensor(self.gate_up_proj, self.gate_up_proj_scale_inv, self.blocks[0]),
            Fp8Tensor(self.down_proj, self.down_proj_scale_inv, self.blocks[1]),
            activation=self.activation, limit=self.limit, alpha=self.alpha, weight_on=self.weight_on,
            quantize_activations=self.quantize_activations,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Experts:
        super()._apply(lambda t: fn(t.view(_CARRIERS[t.element_size()])).view(t.dtype), recurse)
        return self

    def extra_repr(self) -> str:
        codes = str(self.down_proj.dtype).removeprefix("torch.")
        return f"{self.num_experts}, {self.hidden_size}, {self.down_proj.shape[2]}, {codes}"


def load_experts(
    path: Any, layer: int, *, dtype: torch.dtype | None = None, experts: tuple[int, int] | None = None,
    prefix: str | None = None, block: tuple[int, int] | None = None, progress: bool = True, **options: Any,
) -> GroupedExperts | Fp8Experts:  # fmt: skip
    """:func:`pyroute.load_experts` as a module.

    Parameters
    ----------
    path, layer, experts, prefix, block, progress
        As there.
    dtype : torch.float32 or torch.bfloat16, optional
        Of a trainable :class:`GroupedExperts`; FP8 weights are dequantised, each value rounded once. None keeps what is
        on disk: :class:`Fp8Experts` for FP8, GroupedExperts for anything else.
    options
        Of those classes: ``activation``, ``limit``, ``alpha``, ``weight_on``, ...

    Examples
    --------
    >>> layer.experts = pyroute.pytorch.load_experts("DeepSeek-V3", 3, dtype=torch.bfloat16)
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise _check.type_error("load_experts", "dtype", "torch.float32, torch.bfloat16 or None", str(dtype))
    weights = load(path, layer, experts=experts, prefix=prefix, block=block, progress=progress)
    if dtype is None and isinstance(weights.down, Fp8Array):
        return Fp8Experts(*(Fp8Tensor(tensor(w.codes), tensor(w.scales), w.block) for w in weights), **options)
    gate_up, down = (_dense(w, dtype) for w in weights)
    num_experts, hidden_size, intermediate_size = down.shape
    with torch.device("meta"):  # nothing is drawn at random for parameters that come from disk
        module = GroupedExperts(num_experts, hidden_size, intermediate_size, **options)
    if module.gate_up_proj.shape != gate_up.shape or module.gate_up_proj_bias is not None:
        expected = "a gated one without biases, as checkpoints of two projections have it"
        raise _check.value_error("load_experts", "activation", expected, repr(module.activation))
    module.gate_up_proj, module.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    return module


def _dense(weight: Any, dtype: torch.dtype | None) -> Tensor:
    if isinstance(weight, Fp8Array):
        return tensor(weight.dequantize(NUMPY_DTYPES[dtype]))
    return tensor(weight).to(dtype or tensor(weight).dtype)
