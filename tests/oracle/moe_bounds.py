"""How far a float32 layer may be from the float64 one: first-order error propagation, one element at a time.

A value carries an absolute error bound from step to step; every rule below is the step's own rounding plus the
propagated error of its inputs. ``U = 2**-24`` is float32's unit roundoff, bfloat16's is 2**-8. Where a value lies
within its error of a clip, either side of it may be taken, so the whole jump of the gradient is allowed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .moe import LIMITS, Layer, activation_point

U = 2.0**-24
TINY = 2.0**-120  # far above anything that underflow loses
SLOPE = 1.13  # sup of act' for silu (1.0998), a sigmoid(1.702 a) (1.0998) and tanh gelu (1.129)
CURVATURE = 0.86  # sup of act'': 0.5, 0.851, 0.8


class Bounded(NamedTuple):
    value: np.ndarray
    error: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        return np.abs(self.value) + self.error


def exact(value: np.ndarray) -> Bounded:
    return Bounded(value, np.zeros_like(value))


def rounded(x: Bounded, roundoff: float) -> Bounded:
    return Bounded(x.value, x.error + roundoff * x.magnitude + TINY)


def times(x: Bounded, y: Bounded) -> Bounded:
    error = np.abs(x.value) * y.error + np.abs(y.value) * x.error + x.error * y.error
    return rounded(Bounded(x.value * y.value, error), U)


def plus(x: Bounded, y: Bounded) -> Bounded:
    return rounded(Bounded(x.value + y.value, x.error + y.error), U)


def dot(x: Bounded, y: Bounded, constant: float) -> Bounded:
    """Sum over the last axis of x * y, off by ``constant * u * sum |x y|`` in itself."""
    propagated = np.abs(x.value) * y.error + np.abs(y.value) * x.error + x.error * y.error
    error = propagated.sum(axis=-1) + constant * U * (x.magnitude * y.magnitude).sum(axis=-1)
    return Bounded((x.value * y.value).sum(axis=-1), error + TINY)


def gemm(rows: Bounded, weights: np.ndarray) -> Bounded:
    """rows [R, K] times weights [R, N, K] (each row's own matrix), within ``4 u (|rows| @ |weights|)``."""
    value = np.einsum("rk,rnk->rn", rows.value, weights)
    error = np.einsum("rk,rnk->rn", rows.error + 4 * U * rows.magnitude, np.abs(weights))
    return Bounded(value, error + TINY)


def quantised(x: Bounded, ue8m0: bool) -> Bounded:
    """e4m3 with 1x128 blocks: half a step is 2**-4 of a normal value and 2**-10 of the scale of a subnormal one."""
    error = np.empty_like(x.value)
    for start in range(0, x.value.shape[1], 128):
        block = x.magnitude[:, start : start + 128]
        scale = block.max(axis=1, keepdims=True, initial=0) / 448 * (2 if ue8m0 else 1)
        error[:, start : start + 128] = np.maximum(2.0**-4 * block, 2.0**-10 * scale) * 1.001
    return Bounded(x.value, x.error + error + TINY)


def transposed(x: Bounded) -> Bounded:
    return Bounded(x.value.T, x.error.T)


def activation(layer: Layer, z: Bounded) -> tuple[Bounded, Bounded, Bounded]:
    """Hidden values and both slopes at pre-activations [R, P]."""
    gated = layer.activation != "relu2"
    inner = z.value.shape[1] // 2 if gated else z.value.shape[1]
    gate = Bounded(z.value[:, :inner], z.error[:, :inner])
    up = Bounded(z.value[:, inner:], z.error[:, inner:]) if gated else exact(np.zeros_like(gate.value))
    points = np.vectorize(lambda a, b: activation_point(layer, a, b), otypes=[float] * 3)
    hidden, d_gate, d_up = points(gate.value, up.value) if gate.value.size else (np.empty_like(gate.value),) * 3
    if not gated:
        slope = Bounded(d_gate, 2 * gate.error + U * np.abs(d_gate) + TINY)
        error = (np.abs(d_gate) + gate.error) * gate.error + 2 * U * np.abs(hidden) + TINY
        return Bounded(hidden, error), slope, exact(d_up)

    limit = LIMITS.get(layer.activation, np.inf) if layer.limit is None else layer.limit
    gelu = layer.activation == "geglu"
    alpha = (1.702 if layer.alpha is None else layer.alpha) if layer.activation == "swiglu_oai" else 1.0
    a = np.minimum(gate.value, limit)
    v = 1.5957691216057308 * (np.abs(a) + 0.044715 * np.abs(a) ** 3) if gelu else np.abs(alpha * a)
    factor = np.minimum(up.magnitude, limit) + (1 if layer.activation == "swiglu_oai" else 0)
    activated = np.abs(a) + gate.error  # bounds |act(gate)|, since sigmoid <= 1

    # exp is within 1.5 u and its argument within 6 u |v|; one addition, one division, one product follow. On the
    # positive side sigmoid hardly feels exp: 6 u |v| exp(-|v|) <= 2.3 u.
    decay = np.exp(-np.minimum(v, 700))
    sigmoid = np.where(a >= 0, 9 * U, (6 + 12 * v) * U * np.minimum(1, 2 * decay))
    slope = (3 if gelu else 1) * v * decay * (14 + 24 * v) * U  # v(a)' a sigmoid', relative error 14 + 24 |v|

    near_gate = np.abs(gate.value - limit) <= gate.error
    near_up = np.abs(np.abs(up.value) - limit) <= up.error
    slope_gate = np.abs(d_gate) + CURVATURE * factor * gate.error + SLOPE * factor * near_gate
    slope_up = np.abs(d_up) + SLOPE * gate.error + activated * near_up
    hidden_error = slope_gate * gate.error + slope_up * up.error + (sigmoid + 3 * U) * activated * factor
    d_gate_error = CURVATURE * factor * gate.error + SLOPE * up.error + SLOPE * factor * near_gate
    d_gate_error += (sigmoid + slope + 4 * U) * factor
    d_up_error = SLOPE * gate.error + activated * near_up + (sigmoid + 2 * U) * activated
    return Bounded(hidden, hidden_error + TINY), Bounded(d_gate, d_gate_error + TINY), Bounded(d_up, d_up_error + TINY)


def by_token(rows: Bounded, tokens: np.ndarray, num_tokens: int, terms: int) -> Bounded:
    """Sum of each token's rows, of which there are at most ``terms``."""
    value, error = np.zeros((num_tokens, rows.value.shape[1])), np.zeros((num_tokens, rows.value.shape[1]))
    np.add.at(value, tokens, rows.value)
    np.add.at(error, tokens, rows.error + terms * U * rows.magnitude)
    return Bounded(value, error + TINY)


def wgrad(
    grad: Bounded, rows: Bounded, experts: np.ndarray, num_experts: int, scale_format: str | None = None
) -> Bounded:
    """[E, N, K]: grad.T @ rows over each expert's rows, within ``4 u (|grad|.T @ |rows|)``, quantised along them."""
    values, errors = [], []
    for expert in range(num_experts):
        g, r = (Bounded(part.value[experts == expert], part.error[experts == expert]) for part in (grad, rows))
        if scale_format is not None:
            g, r = (transposed(quantised(transposed(part), scale_format == "ue8m0")) for part in (g, r))
        values.append(g.value.T @ r.value)
        propagated = np.abs(g.value).T @ r.error + g.error.T @ np.abs(r.value) + g.error.T @ r.error
        errors.append(propagated + 4 * U * (g.magnitude.T @ r.magnitude) + (TINY if g.value.size else 0))
    return Bounded(np.array(values), np.array(errors))


def layer(
    layer: Layer,
    x: np.ndarray,
    topk_idx: np.ndarray,
    topk_weights: np.ndarray,
    grad_y: np.ndarray,
    roundoff: float,
    scale_format: str | None = None,
    quantize_gradients: bool = False,
    gate_up: np.ndarray | None = None,
) -> dict[str, Bounded]:
    """Result "y", rows "gate_up" and gradients by name, each step rounding to rows of ``roundoff``.

    Rows are in slot order. With ``gate_up``, the rows that a forward pass wrote, everything after them is bounded
    from there on: worst-case bounds over the whole layer are too wide to say much about bfloat16 or FP8.
    """
    tokens, slots = np.nonzero(topk_idx >= 0)
    experts, shape = topk_idx[tokens, slots], topk_idx.shape
    num_experts, hidden_size, inner = layer.w_down.shape
    weight = exact(topk_weights[tokens, slots][:, None])
    on_input = layer.weight_on == "input"

    def store(rows: Bounded) -> Bounded:
        return rounded(rows, roundoff)

    def operand(rows: Bounded) -> Bounded:
        return rows if scale_format is None else quantised(rows, scale_format == "ue8m0")

    rows = store(times(exact(x[tokens]), weight)) if on_input else exact(x[tokens])
    first = store(gemm(operand(rows), layer.w_gate_up[experts]))
    z = first if gate_up is None else exact(gate_up)
    if layer.b_gate_up is not None:
        z = plus(z, exact(layer.b_gate_up[experts]))
    hidden, d_gate, d_up = activation(layer, z)
    weighted_hidden = hidden if on_input else times(hidden, weight)
    result = store(
        gemm(operand(store(weighted_hidden if layer.weight_on == "pre_down" else hidden)), layer.w_down[experts])
    )
    if layer.b_down is not None:
        bias = exact(layer.b_down[experts])
        result = store(plus(result, times(bias, weight) if layer.weight_on == "pre_down" else bias))
    result = times(result, weight) if layer.weight_on == "output" else result
    y = store(by_token(result, tokens, shape[0], shape[1]))

    gradient_format = scale_format if quantize_gradients else None

    def gradient(rows: Bounded) -> Bounded:
        return operand(rows) if quantize_gradients else rows

    grad = exact(grad_y[tokens])
    grad_hidden = store(gemm(gradient(grad), layer.w_down[experts].transpose(0, 2, 1)))
    weighted = grad_hidden if on_input else times(grad_hidden, weight)
    parts = [times(weighted, d_gate)] + ([times(weighted, d_up)] if layer.activation != "relu2" else [])
    grad_z = store(Bounded(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True))))
    grad_rows = store(gemm(gradient(grad_z), layer.w_gate_up[experts].transpose(0, 2, 1)))
    if on_input:
        by_slot = dot(grad_rows, exact(x[tokens]), hidden_size / 32 + 7)
        grad_rows = times(grad_rows, weight)
    else:
        by_slot = dot(grad_hidden, hidden, inner / 8 + 5)
        if layer.b_down is not None:
            by_slot = plus(by_slot, dot(grad, exact(layer.b_down[experts]), hidden_size / 8 + 5))
    grad_weights = Bounded(np.zeros(shape), np.zeros(shape))
    for whole, part in zip(grad_weights, by_slot, strict=True):
        whole[tokens, slots] = part
    ones = exact(np.ones((len(tokens), 1)))
    return {
        "y": y,
        "gate_up": first,
        "x": store(by_token(grad_rows, tokens, shape[0], shape[1])),
        "topk_weights": grad_weights,
        "w_gate_up": wgrad(grad_z, rows, experts, num_experts, gradient_format),
        "w_down": wgrad(grad, store(weighted_hidden), experts, num_experts, gradient_format),
        "b_gate_up": Bounded(*(part[:, 0] for part in wgrad(ones, grad_z, experts, num_experts))),
        "b_down": Bounded(*(part[:, 0] for part in wgrad(ones if on_input else weight, grad, experts, num_experts))),
    }
