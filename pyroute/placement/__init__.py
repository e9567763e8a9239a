"""Balance of the experts: where they live, and the rules that keep the router's choices even.

Placement is host-side integer work (Cython): every few hundred steps, for all layers of a model at once. The rules that
move the selection bias are gating's own, named here too.
"""

from ..gating_losses import update_bias
from ..gating_quantile import bias_from_histogram, bias_histogram, quantile_bias
from .experts import Placement, place_experts
from .loads import LoadAverage, LoadMetrics, load_metrics

__all__ = [
    "LoadAverage",
    "LoadMetrics",
    "Placement",
    "bias_from_histogram",
    "bias_histogram",
    "load_metrics",
    "place_experts",
    "quantile_bias",
    "update_bias",
]
