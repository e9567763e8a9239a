"""What the demo finds out about a layer: who uses its experts, how balance comes, bytes, and errors."""

from __future__ import annotations

from typing import Any

import numpy as np

import pyroute

from ..router_presets import ModelShape
from .demo_layer import Layer, choose_experts, layer_forward, matrices_per_expert
from .demo_text import Text, TextStates
from .terminal import Steps

Array = Any

BIAS_STEPS = 300
# About a hundredth of the scores' spread; from there linearly down to 0, so that loads settle instead of swinging.
FIRST_BIAS_STEP = {"sigmoid": 2e-3, "sqrtsoftplus": 4e-3, "softmax": 4e-2}  # softmax: divided by num_experts
ERROR_ROWS = 64
SHOWN_EXPERTS, SHOWN_WORDS = 8, 7
MOST = 0.5
COMMON_WORD = 0.01  # words that make up more of the text (the, is, of) tell nothing about an expert


def expert_use(gating: pyroute.Gating, text: Text, states: TextStates) -> dict[str, Any]:
    """The load of every expert, and the words of which some of them drew most."""
    size, load = len(text.vocabulary), gating.tokens_per_expert
    seen = np.bincount(states.ids, minlength=size)
    telling = seen <= len(states.ids) * COMMON_WORD
    token_words = np.repeat(states.ids, gating.topk_idx.shape[1])
    experts = gating.topk_idx.reshape(-1)
    candidates = []
    for expert in range(len(load)):
        drawn = np.bincount(token_words[experts == expert], minlength=size)
        share = drawn / np.maximum(seen, 1)
        rank = np.where(telling & (drawn >= 2) & (share >= MOST), share * np.sqrt(drawn), 0)
        best = [int(word) for word in np.argsort(-rank, kind="stable")[:SHOWN_WORDS] if rank[word] > 0]
        words = [{"word": text.vocabulary[w], "drawn": int(drawn[w]), "seen": int(seen[w])} for w in best]
        candidates.append((float(rank[best].sum()), expert, words))

    examples: list[dict[str, Any]] = []
    shown: set[Any] = set()
    for _, expert, words in sorted(candidates, key=lambda c: -c[0]):
        names = {entry["word"] for entry in words}
        if len(examples) < SHOWN_EXPERTS and len(names & shown) <= 1:  # different experts, different words
            examples.append({"expert": expert, "tokens": int(load[expert]), "words": words})
            shown |= names
    return {"tokens_per_expert": load.tolist(), "examples": examples}


def imbalance(tokens_per_expert: Array) -> dict[str, float]:
    """Load of the busiest expert over the mean, and the coefficient of variation: 1 and 0 at perfect balance."""
    load = tokens_per_expert.astype(np.float64)
    return {"max_over_mean": float(load.max() / load.mean()), "variation": float(load.std() / load.mean())}


def balance(
    layer: Layer, logits: Array, before: pyroute.Gating, backend: str | None, step: Steps
) -> tuple[dict[str, Any], Layer]:
    """Aux-loss-free balancing: route, move each expert's bias by one step, route again."""
    config = layer.config
    rate = FIRST_BIAS_STEP[config.score] / (config.num_experts if config.score == "softmax" else 1)
    curve = [imbalance(before.tokens_per_expert)]
    load = before.tokens_per_expert
    for i in range(BIAS_STEPS):
        if i % (BIAS_STEPS // 10) == 0:
            step(f"balancing, step {i} of {BIAS_STEPS}")
        bias = pyroute.update_bias(layer.bias, load, rate * (1 - i / BIAS_STEPS), backend=backend)
        layer = layer._replace(bias=bias)
        load = choose_experts(layer, logits, backend).tokens_per_expert
        curve.append(imbalance(load))
    return {"steps": BIAS_STEPS, "first_rate": rate, "before": curve[0], "after": curve[-1], "curve": curve}, layer


def memory(layer: Layer, shape: ModelShape) -> dict[str, Any]:
    """Bytes of the expert weights here, and what the model's own layer takes."""
    fp8 = (layer.w_gate_up_fp8, layer.w_down_fp8)
    float32 = layer.w_gate_up.nbytes + layer.w_down.nbytes
    scales = sum(w.scales.nbytes for w in fp8)
    full = shape.num_experts * matrices_per_expert(shape) * shape.hidden * shape.intermediate
    width = (matrices_per_expert(shape) - 1) * shape.intermediate
    row_blocks = -(-width // 128) + -(-shape.intermediate // 128)  # of gate_up, and columns of down
    blocks = shape.num_experts * row_blocks * -(-shape.hidden // 128)
    total = sum(w.nbytes for w in fp8)
    return {
        "float32_bytes": float32,
        "bfloat16_bytes": float32 // 2,
        "fp8_bytes": total,
        "fp8_scale_bytes": scales,
        "fp8_over_float32": total / float32,
        "full_size": {"float32_bytes": 4 * full, "bfloat16_bytes": 2 * full, "fp8_bytes": full + 4 * blocks},
    }


def errors(layer: Layer, logits: Array, backend: str | None) -> dict[str, Any]:
    """Distance of sampled rows from a float64 layer with the unrounded weights, relative to the row's length."""
    gating = choose_experts(layer, logits, backend)
    num_tokens = layer.x.shape[0]
    sample = np.unique(np.linspace(0, num_tokens - 1, min(ERROR_ROWS, num_tokens)).astype(np.int64))
    exact = _float64_rows(layer, gating, sample)

    def worst(y: Array) -> dict[str, float]:
        lengths = np.linalg.norm(exact, axis=1)
        distances = np.linalg.norm(y[sample].astype(np.float64) - exact, axis=1) / lengths
        return {"worst_row": float(distances.max()), "median_row": float(np.median(distances))}

    return {
        "rows": len(sample),
        "float32": worst(layer_forward(layer, gating, backend, fp8=False)),
        "fp8": worst(layer_forward(layer, gating, backend, fp8=True)),
    }


def _float64_rows(layer: Layer, gating: pyroute.Gating, sample: Array) -> Array:
    """The layer in plain float64, token by token and expert by expert."""
    rows = np.zeros((len(sample), layer.x.shape[1]))
    for i, token in enumerate(sample):
        for expert, weight in zip(gating.topk_idx[token], gating.topk_weights[token].astype(np.float64), strict=True):
            x = layer.x[token].astype(np.float64)
            if layer.config.weight_on == "input":
                x, weight = x * weight, 1.0
            pre = layer.w_gate_up[expert].astype(np.float64) @ x
            rows[i] += weight * (layer.w_down[expert].astype(np.float64) @ _activate(pre, layer.activation))
    return rows


def _activate(pre: Array, activation: str) -> Array:
    if activation == "relu2":
        return np.maximum(pre, 0) ** 2
    gate, up = np.split(pre, 2)
    alpha = 1.0
    if activation == "swiglu_clamp":
        gate, up = np.minimum(gate, 10), np.clip(up, -10, 10)
    elif activation == "swiglu_oai":
        gate, up, alpha = np.minimum(gate, 7), np.clip(up, -7, 7) + 1, 1.702
    elif activation == "geglu":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    return gate / (1 + np.exp(-alpha * gate)) * up
