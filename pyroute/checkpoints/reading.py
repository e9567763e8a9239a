"""load_experts and expert_layers."""

from __future__ import annotations

import json
from typing import Any

from .. import _check, router_models
from .experts import Experts
from .files import Checkpoint
from .layouts import merged_experts, read_apart, read_merged
from .names import Place, places


def expert_layers(path: Any) -> dict[int, int]:
    """The layers of a checkpoint that have experts, with how many; reads an index or headers, no weights.

    Parameters
    ----------
    path : str or path
        As in :func:`load_experts`.

    Returns
    -------
    dict from the layer's number to its number of experts, in order
        Of the layers under the first prefix, where a checkpoint holds several models.
    """
    checkpoint = Checkpoint("expert_layers", path)
    found = places(checkpoint.files)
    first = found[0].prefix if found else ""
    return {
        place.layer: len(place.numbers) or merged_experts(checkpoint, place) for place in found if place.prefix == first
    }


def load_experts(
    path: Any, layer: int, *, experts: tuple[int, int] | None = None, prefix: str | None = None,
    block: tuple[int, int] | None = None, progress: bool = True,
) -> Experts:  # fmt: skip
    """The experts of one layer from safetensors files, as they are on disk.

    Read are DeepSeek-V3, R1, V3.1, Kimi K2, Qwen3-FP8 and every other checkpoint with a matrix per expert and
    projection (``...layers.3.mlp.experts.7.gate_proj.weight``, with ``weight_scale_inv`` beside FP8 codes), the names
    of Mixtral (``block_sparse_moe.experts.7.w1.weight``), and the two merged tensors that transformers v5 keeps in
    memory (``experts.gate_up_proj``). FP8 codes are copied byte for byte; scales in float32, bfloat16 or ue8m0 become
    float32 without rounding, and so do float16 weights.

    Parameters
    ----------
    path : str or path
        A folder with ``model.safetensors.index.json`` or with safetensors files, an index, or one file.
    layer : int
    experts : (int, int), optional
        Only those from the first number to before the second: one process of expert parallelism.
    prefix : str, optional
        What stands before ``layers.`` where a checkpoint holds several models: ``"thinker.model."``.
    block : (int, int), optional
        Rows and columns of a block of scales; by default the ``weight_block_size`` of a config.json beside the files,
        (128, 128) without one.
    progress : bool
        Show a bar on standard error if that is a terminal and rich is installed.

    Returns
    -------
    Experts
        ``gate_up`` and ``down``, for :func:`pyroute.moe_forward`.

    Raises
    ------
    ValueError, TypeError
        One sentence with the name of the tensor and of its file: missing, twice, of another shape or type than the
        first expert's, a file that is truncated or no safetensors file. Nothing is ever unpickled.
    ImportError
        Without the safetensors package: ``pip install "pyroute-moe[checkpoints]"``.

    Notes
    -----
    Files are mapped, so memory holds one layer and what the system caches. A layer of DeepSeek-V3 is 11.3 GB.

    Examples
    --------
    >>> for layer in pyroute.expert_layers("DeepSeek-V3"):
    ...     gate_up, down = pyroute.load_experts("DeepSeek-V3", layer)
    """
    _check.integer("load_experts", "layer", layer, 0)
    checkpoint = Checkpoint("load_experts", path)
    place = _find(checkpoint, layer, prefix)
    config = _config(checkpoint)
    num_experts = _num_experts(checkpoint, place, config)
    first, end = _range(experts, num_experts)
    read = read_merged if place.merged else read_apart
    return read(checkpoint, place, (first, end), _block(block, config), progress)


def _find(checkpoint: Checkpoint, layer: int, prefix: str | None) -> Place:
    everywhere = places(checkpoint.files)
    found = [p for p in everywhere if p.layer == layer and prefix in (None, p.prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        prefixes = ", ".join(repr(p.prefix) for p in found)
        expected = f"one of {prefixes}, which all have a layer {layer} with experts"
        raise _check.value_error("load_experts", "prefix", expected, repr(prefix))
    layers = sorted({p.layer for p in everywhere if prefix in (None, p.prefix)})
    got = f"{layer}; they are {layers[0]}..{layers[-1]}" if layers else f"{layer}; none has"
    raise _check.value_error("load_experts", "layer", f"one with experts in {checkpoint.listing}", got)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json beside the files; empty without one."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    file = folder / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _check.value_error("load_experts", f"file {file}", "JSON", str(error)) from None
    except OSError as error:
        raise _check.unreadable("load_experts", f"file {file}", error) from None
    if not isinstance(config, dict):
        raise _check.value_error("load_experts", f"file {file}", "a JSON object", type(config).__name__)
    for part in (config, config.get("text_config") or {}):
        for name in ("text_config", "quantization_config"):
            if not isinstance(part.get(name) or {}, dict):
                raise _check.value_error("load_experts", f"{name} of {file}", "a JSON object", repr(part[name]))
    return config


def _num_experts(checkpoint: Checkpoint, place: Place, config: dict[str, Any]) -> int:
    """As many as there are, without a gap, and no fewer than the model has."""
    if place.merged:
        return merged_experts(checkpoint, place)
    found = len(place.numbers)
    for number in range(max(found, router_models.num_experts_of(config) or 0)):
        if number not in place.numbers:
            raise checkpoint.missing(f"{place.stem}{number}.{place.parts[0]}.weight")
    return found


def _range(experts: Any, num_experts: int) -> tuple[int, int]:
    if experts is None:
        return 0, num_experts
    if not isinstance(experts, tuple) or len(experts) != 2:
        raise _check.type_error("load_experts", "experts", "a pair (first, end)", _check.describe(experts))
    first = _check.integer("load_experts", "experts[0]", experts[0], 0, num_experts - 1, "num_experts - 1")
    return first, _check.integer("load_experts", "experts[1]", experts[1], first + 1, num_experts, "num_experts")


def _block(block: Any, config: dict[str, Any]) -> tuple[int, int]:
    if block is None:
        text = config.get("text_config") or {}
        quantised = config.get("quantization_config") or text.get("quantization_config") or {}
        block = quantised.get("weight_block_size") or (128, 128)
        block = tuple(block) if isinstance(block, list) else block
    if not isinstance(block, tuple) or len(block) != 2:
        raise _check.type_error("load_experts", "block", "a pair (rows, cols)", _check.describe(block))
    rows, cols = (_check.integer("load_experts", "block", extent, 1) for extent in block)
    return rows, cols
