"""Expert parallelism past one machine, as a model: bytes, messages and times of a layer and of a training step.

A model with stated assumptions, in closed form: no random numbers, and nothing measured here unless you put it in.
"""

from .cluster import H800, Cluster, Link
from .step import LayerTime, StepTime, Training, layer_time, step_time
from .traces import zipf_trace
from .traffic import Layer, Traffic, layer_traffic

__all__ = [
    "H800",
    "Cluster",
    "Layer",
    "LayerTime",
    "Link",
    "StepTime",
    "Traffic",
    "Training",
    "layer_time",
    "layer_traffic",
    "step_time",
    "zipf_trace",
]
