"""The MoE layer in float64, one token and one slot at a time, with gradients by formula."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LIMITS = {"swiglu_clamp": 10.0, "swiglu_oai": 7.0}


class Layer(NamedTuple):
    """Weights as float64 values ([E, 2I, H], [E, H, I], biases or None) and what the experts do with them."""

    w_gate_up: np.ndarray
    w_down: np.ndarray
    b_gate_up: np.ndarray | None = None
    b_down: np.ndarray | None = None
    activation: str = "swiglu"
    limit: float | None = None
    alpha: float | None = None
    weight_on: str = "output"


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _gelu(v: float) -> float:
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def _gelu_slope(v: float) -> float:
    t = math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v * v)


def activation_point(layer: Layer, gate: float, up: float) -> tuple[float, float, float]:
    """The activation of one (gate, up) pair and its two partial derivatives."""
    name = layer.activation
    if name == "relu2":
        return max(gate, 0.0) ** 2, 2 * max(gate, 0.0), 0.0
    if name == "geglu":
        return _gelu(gate) * up, _gelu_slope(gate) * up, _gelu(gate)
    limit = math.inf if name == "swiglu" else LIMITS[name] if layer.limit is None else layer.limit
    alpha = 1.0 if name != "swiglu_oai" else 1.702 if layer.alpha is None else layer.alpha
    one = 1.0 if name == "swiglu_oai" else 0.0
    a, b = min(gate, limit), max(-limit, min(up, limit))
    s = _sigmoid(alpha * a)
    d_gate = (b + one) * (s + alpha * a * s * (1 - s)) if gate <= limit else 0.0
    d_up = a * s if abs(up) <= limit else 0.0
    return a * s * (b + one), d_gate, d_up


def _expert(layer: Layer, x: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden values of one expert on one row, and their slopes in gate and up."""
    z = layer.w_gate_up[expert] @ x
    if layer.b_gate_up is not None:
        z = z + layer.b_gate_up[expert]
    inner = layer.w_down.shape[2]
    up = z[inner:] if layer.activation != "relu2" else np.zeros(inner)
    points = [activation_point(layer, float(z[i]), float(up[i])) for i in range(inner)]
    hidden, d_gate, d_up = (np.array(values, np.float64) for values in zip(*points, strict=True))
    return hidden, d_gate, d_up


def forward(layer: Layer, x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
    """[T, H]: for every slot whose id is not -1, the expert's result, weighted where the layer says."""
    y = np.zeros_like(x, dtype=np.float64)
    for token, slot in np.ndindex(*topk_idx.shape):
        expert, weight = int(topk_idx[token, slot]), float(topk_weights[token, slot])
        if expert < 0:
            continue
        row = x[token] * weight if layer.weight_on == "input" else x[token]
        hidden, _, _ = _expert(layer, row, expert)
        result = layer.w_down[expert] @ hidden
        if layer.b_down is not None:
            result = result + layer.b_down[expert]
        y[token] += result if layer.weight_on == "input" else weight * result
    return y


def backward(
    layer: Layer, x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray, grad_y: np.ndarray
) -> dict[str, np.ndarray]:
    """Gradients of ``sum(forward * grad_y)``."""
    grads = {
        "x": np.zeros_like(x),
        "topk_weights": np.zeros_like(topk_weights),
        "w_gate_up": np.zeros_like(layer.w_gate_up),
        "w_down": np.zeros_like(layer.w_down),
        "b_gate_up": np.zeros(layer.w_gate_up.shape[:2]),
        "b_down": np.zeros(layer.w_down.shape[:2]),
    }
    for token, slot in np.ndindex(*topk_idx.shape):
        expert, weight = int(topk_idx[token, slot]), float(topk_weights[token, slot])
        if expert < 0:
            continue
        on_input = layer.weight_on == "input"
        row = x[token] * weight if on_input else x[token]
        hidden, d_gate, d_up = _expert(layer, row, expert)
        grad_result = grad_y[token] if on_input else weight * grad_y[token]
        grads["b_down"][expert] += grad_result
        grads["w_down"][expert] += np.outer(grad_result, hidden)
        grad_hidden = layer.w_down[expert].T @ grad_result
        grad_z = grad_hidden * d_gate
        if layer.activation != "relu2":
            grad_z = np.concatenate([grad_z, grad_hidden * d_up])
        grads["b_gate_up"][expert] += grad_z
        grads["w_gate_up"][expert] += np.outer(grad_z, row)
        grad_row = layer.w_gate_up[expert].T @ grad_z
        grads["x"][token] += grad_row * weight if on_input else grad_row
        if on_input:
            grads["topk_weights"][token, slot] = grad_row @ x[token]
        else:
            result = layer.w_down[expert] @ hidden
            if layer.b_down is not None:
                result = result + layer.b_down[expert]
            grads["topk_weights"][token, slot] = grad_y[token] @ result
    return grads
