"""pyroute itself, with ``out=`` and fresh results, on the best instruction sets or on PYROUTE_ISA."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pyroute
from pyroute import _backend

from . import Work, column

NAME = "pyroute"
_core = _backend.core if _backend.HAS_CORE else None
if _core is None:
    ISAS = ["numpy"]
elif "PYROUTE_ISA" in os.environ:  # nothing else, so that the bars are held to it
    ISAS = [_core.isa()]
else:
    ISAS = _core.isas()[::-1][:2]  # best first
BEST = ISAS[0]


def version() -> str:
    return pyroute.__version__


def set_threads(n: int) -> None:
    """Also the best instruction set, which a column may change for its own sample."""
    pyroute.set_num_threads(n)
    if _core:
        _core.set_isa(BEST)


def takes_out(function) -> bool:
    return "out" in inspect.signature(function).parameters


class Builder(NamedTuple):
    """``build(problem, name, ops)`` makes the column's Work of the functions ``ops``, which are pyroute's."""

    op: str
    names: tuple[str, ...]
    kind: str
    build: Callable[[Any, str, Any], Work | None]


BUILDERS: list[Builder] = []  # for numpy_arrays too


def ours(op: str, *names: str, kind: str = "float32"):
    """Register a builder under each name, for the best instruction set and the next."""

    def register(build):
        BUILDERS.append(Builder(op, names, kind, build))
        for name in names:
            for isa in [isa for isa in ISAS if isa != "scalar"] or ISAS:

                @column(op, name if isa == BEST else f"{name} {isa}", kind=kind)
                @functools.wraps(build)
                def built(problem, name=name, isa=isa):
                    work = build(problem, name, pyroute)
                    return work and work._replace(before=lambda: _core and _core.set_isa(isa))

        return build

    return register


def read_gating(g):
    return g.topk_weights, g.topk_idx


@ours("gate", "pyroute")
def gate(p, name, ops):
    return Work(lambda: ops.topk_gating(p.logits, p.config, bias=p.bias), read_gating)


@ours("gate backward", "pyroute")
def gate_backward(p, name, ops):
    return Work(lambda: ops.topk_gating_backward(p.grad, p.logits, p.gating, p.config, balance_loss_coef=p.balance))


@ours("plan", "pyroute", kind="exact")
def plan(p, name, ops):
    def read(made):
        return made.row_to_token, made.token_to_row, made.expert_offsets

    return Work(lambda: ops.plan_routes(p.ids, p.shape.num_experts), read)


@ours("permute", "pyroute", "pyroute fresh", kind="exact")
def permute(p, name, ops):
    if name.endswith("fresh"):
        return Work(lambda: ops.permute(p.x, p.plan))
    out = np.empty_like(p.rows)
    return Work(lambda: ops.permute(p.x, p.plan, out=out))


def read_codes(q):
    return q.codes, q.scales


@ours("permute quantize", "pyroute fresh", kind="codes")
def permute_quantize(p, name, ops):
    return Work(lambda: ops.permute_quantize(p.x, p.plan), read_codes)


@ours("unpermute", "pyroute", "pyroute fresh", kind="bfloat16")
def unpermute(p, name, ops):
    weights = p.gating.topk_weights
    if name.endswith("fresh"):
        return Work(lambda: ops.unpermute(p.rows, p.plan, weights))
    out = np.empty_like(p.x)
    return Work(lambda: ops.unpermute(p.rows, p.plan, weights, out=out))


@ours("unpermute backward", "pyroute fresh", kind="bfloat16")
def unpermute_backward(p, name, ops):
    return Work(lambda: ops.unpermute_backward(p.x, p.rows, p.plan, p.gating.topk_weights))


@ours("quantize", "pyroute fresh", kind="codes")
def quantize(p, name, ops):
    return Work(lambda: ops.quantize_fp8(p.x), read_codes)


@ours("dequantize", "pyroute fresh", kind="bfloat16")
def dequantize(p, name, ops):
    return Work(lambda: ops.dequantize_fp8(p.codes, p.dtype))


OPERANDS = (  # operation, format and tolerance of a column, its two operands
    ("gemm", "float32", "float32", lambda p, ops: (p.a, p.w32)),
    ("gemm", "bfloat16", "bfloat16", lambda p, ops: (p.a16, p.w16)),
    ("gemm", "FP8", "fp8", lambda p, ops: (p.a16, p.w8)),
    ("gemm", "FP8 both", "fp8 both", lambda p, ops: (ops.quantize_fp8(p.a), p.w8)),
    ("dgrad", "float32", "float32", lambda p, ops: (p.grad, p.w32)),
    ("dgrad", "bfloat16", "bfloat16", lambda p, ops: (p.grad16, p.w16)),
    ("dgrad", "FP8", "fp8", lambda p, ops: (p.grad16, p.w8)),
    ("wgrad", "float32", "float32", lambda p, ops: (p.grad, p.a)),
    ("wgrad", "bfloat16", "bfloat16", lambda p, ops: (p.grad16, p.a16)),
)


def product(operands):
    def build(p, name, ops):
        multiply = getattr(ops, "grouped_gemm" if p.op == "gemm" else f"grouped_gemm_{p.op}")
        left, right = operands(p, ops)
        out = multiply(left, right, p.offsets)
        return Work(lambda: multiply(left, right, p.offsets, out=out))

    return build


for op, kind, tolerance, operands in OPERANDS:
    ours(op, f"pyroute {kind}", kind=tolerance)(product(operands))


def _layer(p, kind: str, x, ops, **options):
    gate_up, down = p.weights.pair(kind)
    ids, weights = p.gating.topk_idx, p.gating.topk_weights
    if takes_out(ops.moe_forward):
        options["out"] = np.zeros_like(x)
    return Work(lambda: ops.moe_forward(x, ids, weights, gate_up, down, **options))


@ours("layer", "pyroute float32")
def layer_float32(p, name, ops):
    return _layer(p, "float32", p.x, ops) if p.wide else None


@ours("layer", "pyroute FP8", kind="fp8")
def layer_fp8(p, name, ops):
    return _layer(p, "fp8", p.x16, ops)


@ours("layer", "pyroute FP8 both", kind="fp8 both")
def layer_fp8_both(p, name, ops):
    return None if p.wide else _layer(p, "fp8", p.x16, ops, quantize_activations=True)


@ours("layer", "pyroute bfloat16", kind="bfloat16")
def layer_bfloat16(p, name, ops):
    return None if p.wide else _layer(p, "bfloat16", p.x16, ops)


@ours("training", "pyroute float32", "pyroute float32 fresh")
def training(p, name, ops):
    """Gradients into those of the step before, as a training loop has them, or into fresh arrays."""
    gate_up, down = p.weights.pair("float32")
    ids, weights = p.gating.topk_idx, p.gating.topk_weights
    kept: list[pyroute.MoeGradients] = []

    def run():
        y, saved = ops.moe_forward(p.x, ids, weights, gate_up, down, return_saved=True)
        if name.endswith("fresh"):
            return y, ops.moe_backward(p.grad_y, saved)
        gradients = ops.moe_backward(p.grad_y, saved, out=kept[0] if kept else None)
        kept[:] = [gradients]
        return y, gradients

    return Work(run, lambda result: (result[0], result[1].x, result[1].w_gate_up, result[1].w_down))
