"""Every operation on one model's layer: routers, moves and formats at decode, small batch and prefill; training.

Without bars: what a model's sizes should reach nobody knows before.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

from . import bars, problems, products, shapes

DECODE, BATCH, PREFILL = 1, 64, 4096  # tokens; a step of training has as many as prefill
MOVES = ("permute", "permute quantize", "unpermute", "unpermute backward")


def _cases(model: str, load: str, memory: int) -> Iterator[bars.Case]:
    def case(
        row: str, op: str, make: Callable[[shapes.Shape], problems.Problem], tokens: int, *, what: str = "",
        weights: bool = False,
    ) -> bars.Case:  # fmt: skip
        s = shapes.shape(model, tokens)._replace(load=load)
        s = shapes.fitting(s, memory) if weights else s
        return bars.Case(row, lambda size: make(size(s)), op=op, name=" ".join(filter(None, (op, what, s.name))))

    yield from (case("gate", "gate", problems.Gate, tokens) for tokens in (DECODE, BATCH, PREFILL))
    yield case("gate", "gate backward", problems.GateBackward, PREFILL)
    yield from (case("permute", "plan", problems.Plan, tokens) for tokens in (BATCH, PREFILL))
    for op in MOVES:
        move = functools.partial(problems.Move, op=op, dtype="bfloat16")
        yield from (case("permute", op, move, tokens, what="bfloat16") for tokens in (BATCH, PREFILL))
    for op in ("quantize", "dequantize"):
        cast = functools.partial(problems.Quantize, dtype="bfloat16", op=op)
        yield case("quantize", op, cast, PREFILL, what="bfloat16")
    for tokens in (DECODE, 8, BATCH):
        yield case("decode", "gemm", products.decode, tokens, weights=True)
    yield case("prefill", "gemm", functools.partial(products.routed, "gemm"), PREFILL, weights=True)
    for op in ("dgrad", "wgrad"):
        yield case("backward", op, functools.partial(products.routed, op), PREFILL, weights=True)
    for wide in (False, True):
        layer, what = functools.partial(products.Layer, "layer", wide=wide), "float32" if wide else "8 and 16 bits"
        for tokens in (DECODE, BATCH, PREFILL):
            yield case("layer", "layer", layer, tokens, what=what, weights=True)
    training = functools.partial(products.Layer, "training", wide=True)
    yield case("training", "training", training, PREFILL, what="float32", weights=True)


def cases(model: str, load: str, memory: int) -> list[bars.Case]:
    """Experts that fit the bytes where the operation has weights; the same number of rows for each as with all.

    Each once: fewer experts have fewer tokens too, and 8 of them may become 1.
    """
    return list({case.name: case for case in _cases(model, load, memory)}.values())


def chosen(args: argparse.Namespace) -> list[bars.Case]:
    """Those of a model, or the table's; the same list in every process."""
    return cases(args.model, args.load, args.memory) if args.model else bars.cases()
