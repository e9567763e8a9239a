"""The activation between the two GEMMs and the experts' biases, as array code: csrc/cpu/scalar/moe.cpp in NumPy.

float32 arithmetic from float32 or bfloat16 rows, one rounding to the rows' type, one stated order of operations: the
bytes are those of every other floor. NaN results are the canonical quiet NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import elementary

Array = Any

SWISH_GATE, GELU_GATE, RELU2 = range(3)


class ActivationProgram(NamedTuple):
    """SWISH_GATE: a * sigmoid(alpha * a) * (b + up_offset), a = min(gate, limit), b = clamp(up, -limit, limit).

    GELU_GATE: gelu(gate) * up. RELU2: max(z, 0)**2.
    """

    kind: int = SWISH_GATE
    alpha: float = 1.0
    limit: float = float("inf")
    up_offset: float = 0.0

    @property
    def gated(self) -> bool:
        return self.kind != RELU2


class ExpertRows(NamedTuple):
    """Which expert each of the R rows belongs to: [E + 1] starts, and [R] tokens, negative on padding rows."""

    expert_offsets: Array
    row_to_token: Array


class _Point(NamedTuple):
    hidden: Array
    d_gate: Array
    d_up: Array | None = None
    gate_clipped: Array | None = None
    up_clipped: Array | None = None


def canonical_nan(xp: Any, v: Array) -> Array:
    return xp.where(v != v, xp.float32("nan"), v)


def _to_rows(xp: Any, v: Array, experts: ExpertRows, dtype: Any) -> Array:
    """``v`` rounded once to the rows' type, padding rows zero."""
    real = (experts.row_to_token >= 0)[:, None]
    return xp.where(real, canonical_nan(xp, v), xp.float32(0)).astype(dtype)


def _of_rows(xp: Any, bias: Array, experts: ExpertRows) -> Array:
    """``bias`` [E, N] as one float32 row for each of the R rows."""
    rows = xp.arange(experts.row_to_token.shape[0])
    expert = xp.searchsorted(experts.expert_offsets[1:], rows, side="right")
    return bias[expert].astype(xp.float32)


def _evaluate(xp: Any, gate: Array, up: Array, program: ActivationProgram) -> _Point:
    """The activation, its partial derivatives, and where the clip makes them zero. exp(-|v|) cannot overflow."""
    f32 = xp.float32
    if program.kind == RELU2:
        positive = xp.where(gate < 0, f32(0), gate)  # NaN stays
        return _Point(positive * positive, positive + positive)
    gate_clipped = up_clipped = None
    if program.kind == SWISH_GATE:
        limit = f32(program.limit)
        gate_clipped, up_clipped = gate > limit, (up > limit) | (up < -limit)
        gate = xp.where(gate_clipped, limit, gate)
        up = xp.where(up > limit, limit, up)
        up = xp.where(up < -limit, -limit, up)
        v = gate * f32(program.alpha)
        gate_slope = v
    else:  # (1 + tanh y) / 2 = sigmoid(2 y), y = sqrt(2 / pi) (gate + 0.044715 gate^3)
        c1, c3 = f32(1.5957691216057308), f32(0.0713548162726)
        square = gate * gate
        v = gate * (square * c3 + c1)
        gate_slope = gate * (square * (f32(3) * c3) + c1)
    e = elementary.exp(xp, -xp.where(v < 0, -v, v))
    reciprocal = f32(1) / (e + f32(1))
    sigmoid = xp.where(v >= 0, f32(1), e) * reciprocal
    slope = sigmoid * (xp.where(v >= 0, e, f32(1)) * reciprocal)
    # gate * dv/dgate, finite: where it passes 1000 the sigmoid's slope is exactly 0, and inf * 0 would be NaN
    gate_slope = xp.where(gate_slope > 1e3, f32(1e3), gate_slope)
    gate_slope = xp.where(gate_slope < -1e3, f32(-1e3), gate_slope)
    factor = up + f32(program.up_offset)
    activated = gate * sigmoid
    d_gate = factor * (gate_slope * slope + sigmoid)
    return _Point(activated * factor, d_gate, activated, gate_clipped, up_clipped)


def _point(xp: Any, gate_up: Array, bias: Array | None, experts: ExpertRows, program: ActivationProgram) -> _Point:
    z = gate_up.astype(xp.float32)
    if bias is not None:
        z = z + _of_rows(xp, bias, experts)
    half = z.shape[1] // 2
    return _evaluate(xp, z[:, :half], z[:, half:], program) if program.gated else _evaluate(xp, z, z, program)


def _weight_column(xp: Any, row_weights: Array | None) -> Any:
    return xp.float32(1) if row_weights is None else row_weights[:, None]


def activate(
    xp: Any,
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
) -> Array:
    """act(gate_up + bias) * row_weights, [R, I] in the type of gate_up."""
    hidden = _point(xp, gate_up, bias, experts, program).hidden
    return _to_rows(xp, hidden * _weight_column(xp, row_weights), experts, gate_up.dtype)


def activate_backward(
    xp: Any,
    gate_up: Array,
    bias: Array | None,
    experts: ExpertRows,
    row_weights: Array | None,
    program: ActivationProgram,
    grad_hidden: Array,
) -> tuple[Array, Array, Array]:
    """(hidden as the forward pass wrote it, gradient of gate_up, gradient of row_weights as if they were there)."""
    p = _point(xp, gate_up, bias, experts, program)
    grad = grad_hidden.astype(xp.float32)
    weight = _weight_column(xp, row_weights)
    hidden = _to_rows(xp, p.hidden * weight, experts, gate_up.dtype)
    weighted = grad * weight
    grad_z = weighted * p.d_gate
    if p.gate_clipped is not None:
        grad_z = xp.where(p.gate_clipped, xp.float32(0), grad_z)
    if p.d_up is not None:
        grad_up = weighted * p.d_up
        if p.up_clipped is not None:
            grad_up = xp.where(p.up_clipped, xp.float32(0), grad_up)
        grad_z = xp.concatenate([grad_z, grad_up], axis=1)
    dots = xp.where(experts.row_to_token >= 0, _sum_lanes(xp, grad * p.hidden), xp.float32(0))
    return hidden, _to_rows(xp, grad_z, experts, gate_up.dtype), canonical_nan(xp, dots)


def _sum_lanes(xp: Any, products: Array) -> Array:
    """Sum over the last axis: lane l of eight adds elements l, l + 8, ...; then the tree 4, 2, 1."""
    rows, count = products.shape
    padded = xp.zeros((rows, -(-count // 8) * 8), xp.float32)
    padded[:, :count] = products
    lanes = xp.zeros((rows, 8), xp.float32)
    for i in range(0, count, 8):
        lanes = lanes + padded[:, i : i + 8]
    for half in (4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def add_bias(xp: Any, rows: Array, bias: Array, experts: ExpertRows, row_weights: Array | None) -> Array:
    """rows + row_weights * bias of the row's expert; padding rows zero."""
    biased = rows.astype(xp.float32) + _of_rows(xp, bias, experts) * _weight_column(xp, row_weights)
    return _to_rows(xp, biased, experts, rows.dtype)


def add_bias_dots(xp: Any, rows: Array, bias: Array, experts: ExpertRows, dots: Array) -> Array:
    """dots[r] + <rows[r], bias of the row's expert>, [R] float32."""
    products = rows.astype(xp.float32) * _of_rows(xp, bias, experts)
    return canonical_nan(xp, xp.where(experts.row_to_token >= 0, dots + _sum_lanes(xp, products), dots))


def bias_grad(xp: Any, rows: Array, experts: ExpertRows, row_weights: Array | None) -> Array:
    """Sum over each expert's rows of row_weights * rows, [E, N] float32: float64 sums in row order, rounded once."""
    starts, ends = experts.expert_offsets[:-1], experts.expert_offsets[1:]
    sums = xp.zeros((starts.shape[0], rows.shape[1]), xp.float64)
    for i in range(int((ends - starts).max()) if starts.shape[0] else 0):
        active = xp.nonzero(starts + i < ends)[0]
        at = starts[active] + i
        terms = rows[at].astype(xp.float64)
        if row_weights is not None:
            terms = terms * row_weights[at].astype(xp.float64)[:, None]
        sums[active] = sums[active] + terms
    return canonical_nan(xp, sums.astype(xp.float32))
