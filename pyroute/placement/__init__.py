"""Where experts live: replicas of the heavy ones, and which device holds what, from measured loads.

Host-side integer work (Cython): every few hundred steps, for all layers of a model at once.
"""

from .experts import Placement, place_experts
from .loads import LoadAverage, LoadMetrics, load_metrics

__all__ = ["LoadAverage", "LoadMetrics", "Placement", "load_metrics", "place_experts"]
