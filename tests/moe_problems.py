"""Layers to test with: random weights of every kind, and ids with unrouted slots, duplicates and empty experts."""

import functools

import numpy as np
from oracle import moe as oracle
from oracle import moe_bounds as bounds

import pyroute
from pyroute import _backend

BF16 = _backend.BFLOAT16
# mixed: float32 rows, bfloat16 weights and biases; fp8: quantised activations; fp8_training: and gradients
KINDS = ("float32", "bfloat16", "mixed", "fp8_weights", "fp8", "fp8_training")
ACTIVATIONS = ("swiglu", "swiglu_clamp", "swiglu_oai", "geglu", "relu2")
WEIGHT_ON = ("output", "pre_down", "input")
NAMES = pyroute.MoeGradients._fields


def fp8(values):
    return pyroute.quantize_fp8(values, block=(128, 128), backend="numpy")


class Problem:
    """One layer with its inputs; ``arguments`` and ``options`` are those of moe_forward."""

    def __init__(
        self, kind="float32", activation="swiglu", weight_on="output", bias=False,
        sizes=(11, 3, 5, 21, 13), seed=0, limit=None, alpha=None, scale_format="float32", scale=1.0,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        tokens, top_k, self.num_experts, hidden, inner = sizes
        width = inner if activation == "relu2" else 2 * inner
        self.dtype = np.dtype(BF16 if kind in ("bfloat16", "fp8", "fp8_training") else np.float32)
        stored = {"float32": np.float32, "fp8_weights": np.float32}.get(kind, BF16)
        self.x = (rng.normal(size=(tokens, hidden)) * scale).astype(self.dtype)
        self.grad_y = rng.normal(size=(tokens, hidden)).astype(self.dtype)
        self.topk_idx = rng.integers(-1, self.num_experts - 1, size=(tokens, top_k))  # the last expert has no token
        if top_k > 1 and tokens > 2:
            self.topk_idx[1, :2] = 0  # one expert in two slots
            self.topk_idx[2] = -1  # a token that goes nowhere
        self.topk_weights = rng.random((tokens, top_k), dtype=np.float32) + np.float32(0.1)
        w_gate_up = (rng.normal(size=(self.num_experts, width, hidden)) / np.sqrt(hidden) * 2).astype(stored)
        w_down = (rng.normal(size=(self.num_experts, hidden, inner)) / np.sqrt(inner)).astype(stored)
        self.weights = [w_gate_up, w_down]
        if kind.startswith("fp8"):
            self.weights = [fp8(w) for w in self.weights]
        self.biases = [None, None]
        if bias:
            self.biases = [rng.normal(size=(self.num_experts, extent)).astype(stored) for extent in (width, hidden)]
        self.scale_format = scale_format if kind in ("fp8", "fp8_training") else None
        self.options = {
            "b_gate_up": self.biases[0], "b_down": self.biases[1], "activation": activation,
            "weight_on": weight_on, "limit": limit, "alpha": alpha, "quantize_activations": self.scale_format or False,
            "quantize_gradients": kind == "fp8_training",
        }  # fmt: skip

    @property
    def arguments(self):
        return (self.x, self.topk_idx, self.topk_weights, *self.weights)

    def forward(self, backend, **options):
        return pyroute.moe_forward(*self.arguments, **self.options, **options, backend=backend)

    def gradients(self, backend, **options):
        _, saved = self.forward(backend, return_saved=True, **options)
        return pyroute.moe_backward(self.grad_y, saved)

    def layer(self):
        """The same layer in float64."""
        wide = [w.dequantize() if isinstance(w, pyroute.Fp8Array) else w for w in self.weights]
        values = [None if array is None else array.astype(np.float64) for array in (*wide, *self.biases)]
        names = ("activation", "limit", "alpha", "weight_on")
        return oracle.Layer(*values, *(self.options[name] for name in names))

    def inputs(self):
        return self.x.astype(np.float64), self.topk_idx, self.topk_weights.astype(np.float64)

    def bounds(self, gate_up=None):
        roundoff = 2.0**-8 if self.dtype == BF16 else 2.0**-24
        grad_y = self.grad_y.astype(np.float64)
        formats = self.scale_format, self.options["quantize_gradients"]
        return bounds.layer(self.layer(), *self.inputs(), grad_y, roundoff, *formats, gate_up)

    @functools.cached_property
    def expected(self):
        """Float64 results and their bounds by name, derived twice."""
        layer, bounded = self.layer(), self.bounds()
        values = {"y": oracle.forward(layer, *self.inputs())}
        values |= oracle.backward(layer, *self.inputs(), self.grad_y.astype(np.float64))
        for name, value in values.items():
            np.testing.assert_allclose(bounded[name].value, value, rtol=1e-10, atol=1e-10)
        return bounded

    def slot_rows(self, rows, plan):
        """Rows in expert order as float64 rows in the order of the routed slots."""
        return rows[plan.token_to_row[self.topk_idx >= 0]].astype(np.float64)


@functools.cache
def problem_of(*key):
    """``Problem(*key)``, once for all floors."""
    return Problem(*key)
