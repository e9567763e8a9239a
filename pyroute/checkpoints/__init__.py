"""Experts from checkpoints as they are on disk, and back: safetensors only, one layer at a time."""

from .experts import Experts
from .reading import expert_layers, load_experts
from .writing import save_experts

__all__ = ["Experts", "expert_layers", "load_experts", "save_experts"]
