"""Where the experts of a layer are among the names of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

SCALES = ("weight_scale_inv", "scale")  # the second in DeepSeek's own inference code

_BLOCK = (
    r"(?P<prefix>.*?)layers\.(?P<layer>[0-9]{1,9})\.(?P<block>mlp|block_sparse_moe|feed_forward|ffn|moe)\.experts\."
)
_ONE = re.compile(_BLOCK + r"(?P<expert>[0-9]{1,9})\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>\w+)\Z")
_ALL = re.compile(_BLOCK + r"(?P<part>gate_up_proj|down_proj)(?P<kind>\w*)\Z")

# in the order gate, up, down
SPELLINGS = {"deepseek": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


class Place(NamedTuple):
    """One layer's experts."""

    prefix: str  # before "layers.", with its dot
    layer: int
    stem: str  # up to and with "experts."
    parts: tuple[str, ...]  # names of gate, up and down, or of gate_up and down where all experts are one tensor
    kinds: frozenset[str]  # what follows those: weight, weight_scale_inv, ...
    numbers: frozenset[int]  # of experts; empty where all are one tensor

    @property
    def merged(self) -> bool:
        return not self.numbers


def places(names: Iterable[str]) -> list[Place]:
    """Every layer with experts, by prefix and number."""
    found: dict[tuple[str, int, str], tuple[set[str], set[str], set[int]]] = {}
    for name in names:
        match = _ONE.match(name) or _ALL.match(name)
        if match is None:
            continue
        stem = name[: match.end("block")] + ".experts."
        key = (match["prefix"], int(match["layer"]), stem)
        parts, kinds, numbers = found.setdefault(key, (set(), set(), set()))
        parts.add(match["part"])
        kinds.add(match["kind"])
        if match.re is _ONE:
            numbers.add(int(match["expert"]))
    result = []
    for (prefix, layer, stem), (parts, kinds, numbers) in sorted(found.items()):
        spelling: tuple[str, ...] = ("gate_up_proj", "down_proj")
        if numbers:
            spelling = max(SPELLINGS.values(), key=lambda names: len(parts & set(names)))
        result.append(Place(prefix, layer, stem, spelling, frozenset(kinds), frozenset(numbers)))
    return result
