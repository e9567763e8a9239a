"""``pyroute demo``: one MoE layer reads a text on this machine, measured. All of it is what a user could write."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

import pyroute

from ..router_presets import model_shape
from . import demo_facts
from .demo_layer import Layer, choose_experts, layer_size, make_layer, router_product
from .demo_stages import STAGES, time_layer
from .demo_text import read_text, text_states
from .limits import measure_limits
from .machine import describe_machine
from .terminal import Steps, UsageError

Array = Any

TOKENS, TOKENS_NUMPY = 4096, 1024  # by default
NUMPY_FLOPS = 1e9  # the NumPy comparison reads a slice of the text: one forward pass of it costs this much
NUM_STEPS = 6 + 10 + 3 * (len(STAGES) - 1)  # of the progress bar; the activation is not timed alone


class Options(NamedTuple):
    """The command's arguments."""

    model: str = "deepseek-v3"
    tokens: int | None = None
    full_size: bool = False
    seed: int = 0
    backend: str | None = None


def run(options: Options, step: Steps) -> dict[str, Any]:
    """Everything that the demo reports, JSON-ready."""
    start = time.perf_counter()
    backends = pyroute.backends()
    if options.backend is not None and not backends[options.backend].available:
        raise UsageError(f"backend '{options.backend}' is not available: {backends[options.backend].reason}")
    backend = options.backend or ("cpu" if backends["cpu"].available else "numpy")
    tokens = options.tokens or (TOKENS if backend == "cpu" else TOKENS_NUMPY)
    text = read_text()
    if tokens > len(text.ids):
        raise UsageError(f"--tokens must be at most {len(text.ids)}, the words of the text, got {tokens}")
    shape, config = model_shape(options.model), pyroute.RouterConfig.preset(options.model)
    size = layer_size(options.model, shape, tokens, full_size=options.full_size, compiled=backend == "cpu")

    step("measuring this machine's limits")
    limits = measure_limits(quick=tokens <= 512)
    step("reading the text")
    states = text_states(text, tokens, size.hidden, config.num_experts, options.seed)
    rng = np.random.default_rng(options.seed + 1)
    layer = make_layer(states.hidden, states.router, config, shape.activation, size.intermediate, rng, backend, step)
    step("routing")
    logits = router_product(layer, backend)
    first = choose_experts(layer, logits, backend)
    balance, layer = demo_facts.balance(layer, logits, first, backend, step)
    stages = time_layer(layer, logits, backend, step)
    step("comparing with float64")
    errors = demo_facts.errors(layer, logits, backend)
    return {
        "machine": describe_machine(),
        "limits": limits.as_dict(),
        "settings": {
            **options._asdict(),
            **size._asdict(),
            "backend": backend,
            "tokens": tokens,
            "model_hidden": shape.hidden,
            "model_intermediate": shape.intermediate,
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "num_groups": config.num_groups,
            "router": str(config),
        },
        "text": {
            "source": "pydoc_data.topics",
            "words": len(text.ids),
            "vocabulary": len(text.vocabulary),
            "beginning": " ".join(text.vocabulary[word] for word in text.ids[:12]),
        },
        "experts": demo_facts.expert_use(first, text, states),
        "balance": balance,
        "stages": [stage.as_dict(limits) for stage in stages],
        "memory": demo_facts.memory(layer, shape),
        "error": errors,
        "numpy": None if backend == "numpy" else beside_numpy(layer, logits, backend, step),
        "seconds": time.perf_counter() - start,
    }


def beside_numpy(layer: Layer, logits: Array, backend: str, step: Steps) -> dict[str, Any]:
    """The same calls on the NumPy fallback, over the first tokens of the text."""
    per_token = 2 * layer.config.top_k * (layer.w_gate_up[0].size + layer.w_down[0].size)
    tokens = min(layer.x.shape[0], max(64, int(NUMPY_FLOPS / per_token)))
    part, part_logits = layer.first_tokens(tokens), logits[:tokens]
    ours, theirs = (choose_experts(part, part_logits, on) for on in (backend, "numpy"))
    fast, slow = (time_layer(part, part_logits, on, step) for on in (backend, "numpy"))
    return {
        "tokens": tokens,
        "same_ids": bool(np.array_equal(ours.topk_idx, theirs.topk_idx)),
        "same_weights": ours.topk_weights.tobytes() == theirs.topk_weights.tobytes(),
        "stages": [
            {"name": a.name, "what": a.what, "seconds": a.seconds, "numpy_seconds": b.seconds}
            for a, b in zip(fast, slow, strict=True)
        ],
    }
