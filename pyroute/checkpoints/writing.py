"""save_experts: experts of layers in the layout of DeepSeek-V3 or Mixtral."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _check
from ..quantization import Fp8Array
from .experts import Experts, split_scales
from .files import INDEX, library
from .names import SPELLINGS

Array = Any

_BLOCKS = {"deepseek": "mlp", "mixtral": "block_sparse_moe"}
_SCALES = {"float32": "float32", "bfloat16": "bfloat16", "ue8m0": "float8_e8m0fnu"}


def save_experts(
    path: Any, layers: Mapping[int, Experts] | Iterable[tuple[int, Experts]], *, prefix: str = "model.",
    names: str = "deepseek", scale_format: str = "float32",
) -> None:  # fmt: skip
    """Write experts as released checkpoints have them: what :func:`load_experts` and transformers read.

    Every layer becomes a file, written when its turn comes, so ``layers`` may be a generator; the index comes last. An
    FP8 checkpoint also needs the ``quantization_config`` of docs/checkpoints.md in its config.json.

    Parameters
    ----------
    path : str or path
        A folder, made if need be, without an index in it.
    layers : mapping or pairs from the layer's number to its Experts
        float32, bfloat16 or FP8, [num_experts, 2 * intermediate, hidden] and [num_experts, hidden, intermediate].
    prefix : str
        Before ``layers.``.
    names : {"deepseek", "mixtral"}
        ``mlp.experts.7.gate_proj.weight`` or ``block_sparse_moe.experts.7.w1.weight``.
    scale_format : {"float32", "bfloat16", "ue8m0"}
        The type of the scales on disk; ValueError if one of them would change.
    """
    _check.one_of("save_experts", "names", names, tuple(SPELLINGS))
    _check.one_of("save_experts", "scale_format", scale_format, tuple(_SCALES))
    if not isinstance(path, (str, os.PathLike)):
        raise _check.type_error("save_experts", "path", "a folder", _check.describe(path))
    package, folder = library("save_experts"), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        raise _check.value_error("save_experts", "path", f"a folder without {INDEX}", str(folder))
    weight_map: dict[str, str] = {}
    total = 0
    for layer, experts in layers.items() if isinstance(layers, Mapping) else layers:
        _check.integer("save_experts", "layer", layer, 0)
        stem = f"{prefix}layers.{layer}.{_BLOCKS[names]}.experts."
        tensors = _tensors(layer, experts, stem, SPELLINGS[names], scale_format)
        file = f"model-layer-{layer:05}.safetensors"
        if file in weight_map.values():
            raise _check.value_error("save_experts", "layers", "each layer once", f"{layer} twice")
        package.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    part = folder / (INDEX + ".part")  # renamed when it is whole: a reader never sees half an index
    part.write_text(json.dumps(index, indent=2), encoding="utf-8")
    part.replace(folder / INDEX)


def _tensors(layer: int, experts: Any, stem: str, parts: tuple[str, ...], scale_format: str) -> dict[str, Array]:
    gate_up, down = _checked(layer, experts)
    intermediate = down.shape[2]
    codes = [w.codes if isinstance(w, Fp8Array) else w for w in (gate_up, down)]
    scales: tuple[Array, ...] | None = None
    if isinstance(gate_up, Fp8Array):
        halves = split_scales(gate_up, down.block[0])
        if halves is None or gate_up.block[1] != down.block[1]:
            expected = f"in blocks of {down.block}, as down, that restart at row {intermediate}, where up begins"
            raise _check.value_error("save_experts", f"gate_up of layer {layer}", expected, f"{gate_up.block}")
        cast = [_cast(layer, s, scale_format) for s in (halves, down.scales)]
        scales = (cast[0][:, 0], cast[0][:, 1], cast[1])
    weights = (codes[0][:, :intermediate], codes[0][:, intermediate:], codes[1])
    tensors = {}
    for e in range(down.shape[0]):
        for i, part in enumerate(parts):
            tensors[f"{stem}{e}.{part}.weight"] = np.ascontiguousarray(weights[i][e])
            if scales is not None:
                tensors[f"{stem}{e}.{part}.weight_scale_inv"] = np.ascontiguousarray(scales[i][e])
    return tensors


def _checked(layer: int, experts: Any) -> tuple[Any, Any]:
    """Both matrices of a layer, of one kind and of shapes that fit."""
    if not isinstance(experts, tuple) or len(experts) != 2:
        raise _check.type_error("save_experts", f"layer {layer}", "Experts", _check.describe(experts))
    gate_up, down = experts
    for name, w in (("gate_up", gate_up), ("down", down)):
        dtype = w.dtype.name if isinstance(w, np.ndarray) else None
        if not isinstance(w, Fp8Array) and dtype not in ("float32", "bfloat16"):
            expected = "an Fp8Array, bfloat16 or float32"
            raise _check.type_error("save_experts", f"{name} of layer {layer}", expected, _check.describe(w))
    kinds = [w.format if isinstance(w, Fp8Array) else w.dtype.name for w in (gate_up, down)]
    if kinds[0] != kinds[1]:
        raise _check.type_error("save_experts", f"gate_up of layer {layer}", f"{kinds[1]}, as down", kinds[0])
    num_experts, hidden, intermediate = down.shape if down.ndim == 3 else (0, 0, 0)
    if gate_up.shape != (num_experts, 2 * intermediate, hidden):
        expected = f"of shape [num_experts, 2 * intermediate, hidden] beside down {list(down.shape)}"
        raise _check.value_error("save_experts", f"gate_up of layer {layer}", expected, list(gate_up.shape))
    return gate_up, down


def _cast(layer: int, scales: Array, scale_format: str) -> Array:
    cast = scales.astype(_check.DTYPES[_SCALES[scale_format]])
    same = cast.astype(np.float32) == scales
    if not (same | np.isnan(scales)).all():
        bad = scales[~same].flat[0]
        expected = f"{scale_format} without rounding (scale_format)"
        raise _check.value_error("save_experts", f"scales of layer {layer}", expected, bad)
    return cast
