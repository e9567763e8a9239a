"""How evenly experts, or devices, are used: the numbers that papers report, and their moving average."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _check

Array = Any


class LoadMetrics(NamedTuple):
    """Of one layer a number each, of several layers float64 [L]; 0 where nothing is loaded at all."""

    max_violation: Array  # largest load over the mean, less 1 (arXiv 2408.15664): 0 at perfect balance
    variation: Array  # standard deviation over the mean
    entropy: Array  # of the shares, over log(E): 1 at perfect balance
    unused: Array  # how many have no load


def load_metrics(loads: Any) -> LoadMetrics:
    """Balance of the loads of experts or devices.

    Parameters
    ----------
    loads : real numbers [E] or [L, E], not negative
        ``tokens_per_expert`` of a gating, a sum of several, or ``Placement.device_loads``.

    Examples
    --------
    >>> load_metrics([3, 1, 0, 0]).max_violation
    2.0
    """
    x = as_loads("load_metrics", "loads", loads)
    mean = x.mean(axis=-1, keepdims=True)
    shares = x / np.where(mean > 0, mean * x.shape[-1], 1)
    logs = np.log(np.where(shares > 0, shares, 1))
    spread = x / np.where(mean > 0, mean, 1)
    used = mean[..., 0] > 0
    entropy = -(shares * logs).sum(axis=-1) / np.log(max(x.shape[-1], 2))
    found = (
        np.where(used, spread.max(axis=-1) - 1, 0.0), np.where(used, spread.std(axis=-1), 0.0),
        np.where(used & (x.shape[-1] > 1), entropy, np.where(used, 1.0, 0.0)), (x == 0).sum(axis=-1),
    )  # fmt: skip
    return LoadMetrics(*(value.item() if value.ndim == 0 else value for value in found))


class LoadAverage:
    """Exponential moving average of loads, corrected for its start: the first average is the first load.

    Parameters
    ----------
    decay : float in [0, 1)
        How much of the average a step keeps; 0 keeps the latest loads only.
    """

    def __init__(self, decay: float = 0.99):
        self.decay = _check.real("LoadAverage", "decay", decay, minimum=0.0)
        if self.decay >= 1:
            raise _check.value_error("LoadAverage", "decay", "below 1", decay)
        self._sum: Array = None
        self._weight = 0.0

    def update(self, loads: Any) -> Array:
        """Take the loads of one step, [E] or [L, E], the same shape every time; returns the average."""
        x = as_loads("LoadAverage.update", "loads", loads)
        if self._sum is not None and self._sum.shape != x.shape:
            expected = f"of shape {list(self._sum.shape)} as before"
            raise _check.value_error("LoadAverage.update", "loads", expected, list(x.shape))
        self._sum = (1 - self.decay) * x + (0.0 if self._sum is None else self.decay * self._sum)
        self._weight = 1 - self.decay + self.decay * self._weight
        return self.average

    @property
    def average(self) -> Array:
        """float64 of the loads' shape; RuntimeError before the first update."""
        if self._sum is None:
            raise RuntimeError("LoadAverage: nothing to average before the first update")
        return self._sum / self._weight


def as_loads(function: str, argument: str, loads: Any) -> Array:
    """float64 [E] or [L, E], finite and not negative, and so that every layer's sum is finite too."""
    if isinstance(loads, (list, tuple)):
        try:
            loads = np.asarray(loads, np.float64)
        except (TypeError, ValueError):
            raise _check.type_error(function, argument, "numbers", _check.describe(loads)) from None
    else:
        from .._backend import as_array

        loads = as_array(function, argument, loads, (*_check.INTEGERS, "float32", "float64"))
        loads = loads.get() if _check.is_cupy(loads) else loads
    if loads.ndim not in (1, 2) or loads.shape[-1] < 1:
        raise _check.value_error(function, argument, "of shape [E] or [L, E]", list(loads.shape))
    x = np.ascontiguousarray(loads, np.float64)
    if not (np.isfinite(x).all() and (x >= 0).all()):
        bad = x[~(np.isfinite(x) & (x >= 0))][0]
        raise _check.value_error(function, argument, "finite and not negative", float(bad))
    with np.errstate(over="ignore"):
        if not np.isfinite(x.sum(axis=-1)).all():
            raise _check.value_error(function, argument, "of a finite sum", f"values up to {x.max():g}")
    return x
