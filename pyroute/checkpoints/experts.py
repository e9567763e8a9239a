"""The experts of one layer as the core takes them, and how gate and up share one grid of scales."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..quantization import Fp8Array

Array = Any


class Experts(NamedTuple):
    """The weights of one layer's experts, for :func:`pyroute.moe_forward`.

    Attributes
    ----------
    gate_up : Fp8Array, bfloat16 or float32 [num_experts, 2 * intermediate, hidden]
        Gate rows first. Where ``intermediate`` is no multiple of a block's rows, the two halves are blocked apart on
        disk; then the array has blocks of the largest height that divides both, with the same codes and scales.
    down : Fp8Array, bfloat16 or float32 [num_experts, hidden, intermediate]
    """

    gate_up: Any
    down: Any

    @property
    def num_experts(self) -> int:
        return int(self.down.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.gate_up.nbytes + self.down.nbytes)


def common_rows(intermediate: int, rows: int) -> int:
    """The height of blocks that fit gate and up, each cut into blocks of ``rows``, when one stands on the other."""
    return math.gcd(intermediate, rows)


def join_scales(halves: Array, intermediate: int, rows: int) -> Array:
    """Scales of gate and up, [..., 2, ceil(intermediate / rows), cols], repeated for blocks of ``common_rows``."""
    fine = common_rows(intermediate, rows)
    if fine != rows:
        halves = np.repeat(halves, rows // fine, axis=-2)[..., : intermediate // fine, :]
    *lead, _, num_rows, cols = halves.shape
    return np.ascontiguousarray(halves).reshape(*lead, 2 * num_rows, cols)


def split_scales(gate_up: Fp8Array, rows: int) -> Array | None:
    """The inverse: [num_experts, 2, ceil(intermediate / rows), cols], or None where a block has several scales."""
    num_experts, width, _ = gate_up.shape
    intermediate, fine = width // 2, gate_up.block[0]
    if width % 2 or intermediate % fine or rows % fine:
        return None
    halves = gate_up.scales.reshape(num_experts, 2, intermediate // fine, -1)
    coarse = halves[:, :, :: rows // fine]
    again = np.repeat(coarse, rows // fine, axis=2)[:, :, : halves.shape[2]]
    same = again.view(np.uint32) == halves.view(np.uint32)
    return coarse if same.all() else None
