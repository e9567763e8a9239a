"""The two ways in which files keep the experts of a layer: a matrix each, or all in two tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from .. import _check
from ..quantization import Fp8Array
from .experts import Experts, common_rows, join_scales
from .files import Checkpoint
from .names import SCALES, Place

Array = Any

_FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def read_apart(
    checkpoint: Checkpoint, place: Place, chosen: tuple[int, int], block: tuple[int, int], progress: bool
) -> Experts:
    """A matrix for each expert and projection."""
    scale = next((kind for kind in SCALES if kind in place.kinds), None)
    kinds = ["weight", scale] if scale else ["weight"]
    _check_kinds(checkpoint, place, kinds)
    first, end = chosen
    names = [[f"{place.stem}{e}.{part}" for part in place.parts] for e in range(first, end)]
    gate = checkpoint[f"{names[0][0]}.weight"]
    dtype = _weight_type(checkpoint, f"{names[0][0]}.weight", gate, 2, scale is not None)
    intermediate, hidden = gate.shape
    matrices = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    up, down = np.empty((end - first, 2, *matrices[0]), dtype), np.empty((end - first, *matrices[2]), dtype)
    grids = [_grid(shape, block) for shape in matrices]
    halves, scales = (np.empty((end - first, *shape), np.float32) for shape in ((2, *grids[0]), grids[2]))
    with _progress(end - first, progress) as step:
        for e, parts in enumerate(names):
            step(f"layer {place.layer}, expert {first + e}")
            for name, out in zip(parts, (up[e, 0], up[e, 1], down[e]), strict=True):
                out[...] = _matrix(checkpoint, f"{name}.weight", gate.dtype, out.shape)
            for name, out in zip(parts if scale else (), (halves[e, 0], halves[e, 1], scales[e]), strict=False):
                out[...] = _scales(checkpoint, f"{name}.{scale}", out.shape)
    checkpoint.check_duplicates(f"{name}.{kind}" for parts in names for name in parts for kind in kinds)
    return _experts(up.reshape(end - first, 2 * intermediate, hidden), down, halves, scales, block, scale is not None)


def _progress(total: int, wanted: bool) -> Any:
    from ..bench import terminal  # a bar where standard error is a terminal and rich is there

    return terminal.progress(total) if wanted else contextlib.nullcontext(lambda what: None)


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _matrix(checkpoint: Checkpoint, name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
    tensor = checkpoint[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise checkpoint.error(name, f"{dtype} {list(shape)}", _check.describe(tensor))
    return tensor


def _scales(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Array:
    """Scales as float32; uint8 holds their exponents."""
    scales = checkpoint[name]
    if scales.dtype == np.uint8:
        scales = scales.view(_check.DTYPES["float8_e8m0fnu"])
    if scales.dtype.name not in ("float32", "bfloat16", "float8_e8m0fnu") or scales.shape != shape:
        raise checkpoint.error(name, f"float32, bfloat16 or ue8m0 {list(shape)}", _check.describe(scales))
    return scales.astype(np.float32)


def _weight_type(checkpoint: Checkpoint, name: str, tensor: Array, axes: int, scaled: bool) -> Any:
    """The type of the result: that of the tensor, which has scales or has none, or float32 for float16."""
    allowed = tuple(_FORMATS) if scaled else ("bfloat16", "float32", "float16")
    if tensor.dtype.name not in allowed or tensor.ndim != axes:
        kind = f"{' or '.join(allowed)} {'beside' if scaled else 'without'} scales"
        raise checkpoint.error(name, f"{kind}, of {axes} axes", _check.describe(tensor))
    return np.dtype(np.float32) if tensor.dtype == np.float16 else tensor.dtype


def _check_kinds(checkpoint: Checkpoint, place: Place, known: list[str]) -> None:
    """Anything else beside the weights (packed int4, biases) would be lost in silence."""
    other = sorted(place.kinds - {*known, "activation_scale", "input_scale"})
    if other:
        starts = [place.stem + part for part in place.parts] if place.merged else [place.stem]
        name = next(name for name in checkpoint.files if name.startswith(tuple(starts)) and name.endswith(other[0]))
        expected = "weights with or without scales, which is all that is read of experts"
        raise checkpoint.error(name, expected, f"'{other[0]}'")


def _experts(gate_up: Array, down: Array, halves: Array, scales: Array, block: tuple[int, int], fp8: bool) -> Experts:
    if not fp8:
        return Experts(gate_up, down)
    intermediate, format = gate_up.shape[1] // 2, _FORMATS[gate_up.dtype.name]
    joined = join_scales(halves, intermediate, block[0])
    rows = common_rows(intermediate, block[0])
    return Experts(
        Fp8Array(gate_up, joined, (rows, block[1]), format),  # type: ignore[arg-type]
        Fp8Array(down, scales, block, format),  # type: ignore[arg-type]
    )


def merged_experts(checkpoint: Checkpoint, place: Place) -> int:
    """How many experts the merged tensors of a layer hold: at least one."""
    name = place.stem + place.parts[-1]
    shape = checkpoint[name].shape
    if len(shape) != 3 or shape[0] == 0:
        raise checkpoint.error(name, "of shape [num_experts, hidden, intermediate], with an expert", list(shape))
    return int(shape[0])


def read_merged(
    checkpoint: Checkpoint, place: Place, chosen: tuple[int, int], block: tuple[int, int], progress: bool
) -> Experts:
    """Two tensors for all experts: [num_experts, 2 * intermediate, hidden] and [num_experts, hidden, intermediate]."""
    up_name, down_name = (place.stem + part for part in place.parts)
    fp8 = "_scale_inv" in place.kinds
    kinds = ["", "_scale_inv"] if fp8 else [""]
    _check_kinds(checkpoint, place, kinds)
    gate_up, down = checkpoint[up_name], checkpoint[down_name]
    dtype = _weight_type(checkpoint, up_name, gate_up, 3, fp8)
    num_experts, width, hidden = gate_up.shape
    intermediate = width // 2
    if width % 2:
        raise checkpoint.error(up_name, "of shape [num_experts, 2 * intermediate, hidden]", list(gate_up.shape))
    _matrix(checkpoint, down_name, gate_up.dtype, (num_experts, hidden, intermediate))
    part, (first, end) = slice(*chosen), chosen
    rows, cols = _grid((intermediate, hidden), block)
    halves = scales = np.empty(0, np.float32)
    with _progress(1, progress) as step:
        step(f"layer {place.layer}, {end - first} experts")
        weights = np.array(gate_up[part], dtype), np.array(down[part], dtype)
        if fp8:
            halves = _scales(checkpoint, up_name + "_scale_inv", (num_experts, 2 * rows, cols))[part]
            grid = _grid((hidden, intermediate), block)
            scales = _scales(checkpoint, down_name + "_scale_inv", (num_experts, *grid))[part]
    checkpoint.check_duplicates(name + kind for name in (up_name, down_name) for kind in kinds)
    return _experts(*weights, halves.reshape(end - first, 2, -1, cols), scales, block, fp8)
