"""Load traces for who has recorded none."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _check

Array = Any


def zipf_trace(
    steps: int, layers: int, num_experts: int, *, exponent: float = 0.5, drift: float = 0.05, slots: int = 2**20,
    seed: int = 0,
) -> Array:  # fmt: skip
    """Loads whose shares fall as ``rank ** -exponent``, in another order of experts for every layer, and wander.

    Parameters
    ----------
    steps, layers, num_experts : int
    exponent : float
        0 is an even load.
    drift : float
        Standard deviation that the logarithm of every share gains with each step.
    slots : int
        Token-expert pairs of a layer and step, drawn with these shares.
    seed : int

    Returns
    -------
    int64 [steps, layers, num_experts]
        The same for the same arguments.
    """
    function = "zipf_trace"
    sizes = {"steps": steps, "layers": layers, "num_experts": num_experts}
    S, L, E = (_check.integer(function, name, value, 1) for name, value in sizes.items())
    slots = _check.integer(function, "slots", slots, 0)
    s, d = (_check.real(function, n, v, minimum=0.0) for n, v in (("exponent", exponent), ("drift", drift)))
    rng = np.random.default_rng(_check.integer(function, "seed", seed, 0))
    ranks = rng.permuted(np.tile(np.arange(1, E + 1), (L, 1)), axis=1)
    logs = -s * np.log(ranks) + np.cumsum(d * rng.standard_normal((S, L, E)), axis=0)
    shares = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return rng.multinomial(slots, shares / shares.sum(axis=-1, keepdims=True))
