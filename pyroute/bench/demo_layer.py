"""The layer that the demo runs: its size on this machine, its weights, and the calls that a user would write."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import pyroute

from ..router_presets import ModelShape
from .machine import available_memory
from .terminal import Steps, UsageError, number_of_bytes

Array = Any
Activation = Any  # a name that moe_forward takes

# The default size: under a minute on two cores, less with fewer tokens. The NumPy fallback gets an eighth.
MAX_PARAMETERS = 192e6  # 0.8 GB in float32
MAX_FLOPS = 60e9  # of one forward pass
FULL_LOAD = 2048  # tokens


class Size(NamedTuple):
    """The layer that fits: the model's widths divided by ``scale``, in whole FP8 blocks."""

    scale: int
    hidden: int
    intermediate: int
    parameters: int


class Layer(NamedTuple):
    """One layer's inputs: T tokens of width H, E experts of width I."""

    x: Array  # float32 [T, H]
    router: Array  # float32 [E, H]
    bias: Array  # float32 [E]
    config: pyroute.RouterConfig
    activation: Activation
    w_gate_up: Array  # float32 [E, 2I, H], gate rows first; [E, I, H] without a gate
    w_down: Array  # float32 [E, H, I]
    w_gate_up_fp8: pyroute.Fp8Array
    w_down_fp8: pyroute.Fp8Array

    def first_tokens(self, num_tokens: int) -> Layer:
        return self._replace(x=self.x[:num_tokens])


def matrices_per_expert(shape: ModelShape) -> int:
    """Gate, up and down; no gate with relu2."""
    return 2 if shape.activation == "relu2" else 3


def layer_size(model: str, shape: ModelShape, tokens: int, *, full_size: bool, compiled: bool) -> Size:
    """The model's own size, or its widths divided by the smallest power of two that memory and a minute allow."""
    free = available_memory()
    share = min(1.0, tokens / FULL_LOAD) * (1.0 if compiled else 0.125)
    rows = tokens * shape.top_k
    scale = 1
    while True:
        hidden, intermediate = shape.hidden, shape.intermediate
        if scale > 1:
            hidden, intermediate = (max(128, round(n / scale / 128) * 128) for n in (hidden, intermediate))
        per_expert = matrices_per_expert(shape) * hidden * intermediate
        parameters = shape.num_experts * per_expert
        # float32 and FP8 weights, float32 gradients, and the rows that live at once in a backward pass
        needed = 10 * parameters + 4 * rows * (4 * hidden + 8 * intermediate) + 2**29
        if full_size and needed > free:
            raise UsageError(
                f"--full-size {model} needs {number_of_bytes(needed)} of memory for {tokens} tokens, "
                f"and {number_of_bytes(free)} are available"
            )
        quick = parameters <= share * MAX_PARAMETERS and 2 * rows * per_expert <= share * MAX_FLOPS
        if full_size or (quick and needed <= free / 2) or (hidden, intermediate) == (128, 128):
            return Size(scale, hidden, intermediate, parameters)
        scale *= 2


def make_layer(
    x: Array,
    router: Array,
    config: pyroute.RouterConfig,
    activation: Activation,
    intermediate: int,
    rng: np.random.Generator,
    backend: str | None,
    step: Steps,
) -> Layer:
    """Random expert weights, in float32 and quantised with 128x128 blocks."""

    def draw(*shape: int) -> Array:
        weights = rng.standard_normal(shape, dtype=np.float32)
        weights *= np.float32(shape[-1] ** -0.5)
        return weights

    step("drawing expert weights")
    hidden, width = x.shape[1], intermediate * (1 if activation == "relu2" else 2)
    w_gate_up = draw(config.num_experts, width, hidden)
    w_down = draw(config.num_experts, hidden, intermediate)
    step("quantising expert weights")
    gate_up_fp8, down_fp8 = (pyroute.quantize_fp8(w, block=(128, 128), backend=backend) for w in (w_gate_up, w_down))
    bias = np.zeros(config.num_experts, np.float32)
    return Layer(x, router, bias, config, activation, w_gate_up, w_down, gate_up_fp8, down_fp8)


def router_product(layer: Layer, backend: str | None) -> Array:
    """Logits [T, E]: a grouped GEMM of one group, so that a token's logits do not depend on its batch."""
    offsets = np.array([0, layer.x.shape[0]])
    return pyroute.grouped_gemm(layer.x, layer.router[None], offsets, backend=backend)


def choose_experts(layer: Layer, logits: Array, backend: str | None) -> pyroute.Gating:
    return pyroute.topk_gating(logits, layer.config, bias=layer.bias, backend=backend)


def layer_forward(layer: Layer, gating: pyroute.Gating, backend: str | None, *, fp8: bool, saved: bool = False) -> Any:
    """The whole layer: with FP8 weights and activations, or in float32."""
    return pyroute.moe_forward(
        layer.x,
        gating.topk_idx,
        gating.topk_weights,
        layer.w_gate_up_fp8 if fp8 else layer.w_gate_up,
        layer.w_down_fp8 if fp8 else layer.w_down,
        activation=layer.activation,
        weight_on=layer.config.weight_on,
        quantize_activations=fp8,
        return_saved=saved,
        backend=backend,
    )
