"""ggml, llama.cpp's library, through ggml-python's bindings: mul_mat_id, its grouped product over experts."""

from __future__ import annotations

import ctypes
from typing import Any

import ggml
import numpy as np

from . import Work, column, package_version

NAME = "ggml"
TYPES = {"f32": ggml.GGML_TYPE_F32, "f16": ggml.GGML_TYPE_F16, "bf16": ggml.GGML_TYPE_BF16, "q8_0": ggml.GGML_TYPE_Q8_0}
KINDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
AS_NUMPY = {"f32": "float32", "bf16": "bfloat16"}  # the same memory
_threads = 1


def version() -> str:
    return package_version("ggml-python")


def set_threads(n: int) -> None:
    global _threads
    _threads = n


class Graph:
    """One graph over tensors whose memory NumPy owns; built with ggml's own OpenMP threads or its own pool."""

    def __init__(self, tensors: int = 64):
        size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        self._memory = ctypes.create_string_buffer(size)
        params = ggml.ggml_init_params(
            mem_size=size, mem_buffer=ctypes.cast(self._memory, ctypes.c_void_p), no_alloc=True
        )
        self.context = ggml.ggml_init(params)
        self.kept: list[Any] = []
        self.plans: dict[int, Any] = {}
        self.graph = None

    def tensor(self, kind: str, shape: tuple[int, ...], data: np.ndarray):
        """A tensor of ``shape`` in NumPy's order over ``data``."""
        sizes = (ctypes.c_int64 * len(shape))(*shape[::-1])
        made = ggml.ggml_new_tensor(self.context, TYPES.get(kind, ggml.GGML_TYPE_I32), len(shape), sizes)
        return self.place(made, data)

    def place(self, tensor, data: np.ndarray):
        tensor.contents.data = data.ctypes.data
        self.kept.append(data)
        return tensor

    def result(self, tensor) -> np.ndarray:
        """Memory for a computed float32 tensor."""
        shape = tuple(tensor.contents.ne[i] for i in range(4))[::-1]
        data = np.zeros(shape, np.float32)
        self.place(tensor, data)
        return data

    def finish(self, tensor) -> None:
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, tensor)

    def run(self) -> None:
        plan = self.plans.get(_threads)
        if plan is None:
            plan = ggml.ggml_graph_plan(self.graph, _threads, None)
            work = np.zeros(max(64, plan.work_size), np.uint8)
            plan.work_data = ctypes.cast(work.ctypes.data, type(plan.work_data))
            self.kept.append(work)
            self.plans[_threads] = plan
        if ggml.ggml_graph_compute(self.graph, ctypes.pointer(plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")


def converted(w, kind: str) -> np.ndarray:
    """FP8 weights [E, N, K] in a type of ggml, as bytes."""
    experts, outer, inner = w.shape
    row = ggml.ggml_row_size(TYPES[kind], inner)
    out = np.empty((experts, outer * row), np.uint8)
    for e in range(experts):
        values = w[e].dequantize()
        source = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        ggml.ggml_quantize_chunk(TYPES[kind], source, ctypes.c_void_p(out[e].ctypes.data), 0, outer, inner, None)
    return out


def _mul_mat_id(p, kind):
    """A token's row goes to the experts of its slots, as in the layer's first projection."""
    if p.sizes[2] % 32 and kind == "q8_0":
        return None
    g, numpy = Graph(), {"f32": lambda: p.w32, "bf16": lambda: p.w16}
    w = numpy[kind]() if kind in numpy else converted(p.w8, kind)
    weights = g.tensor(kind, p.sizes, w)
    outer = p.sizes[1]
    if p.plan is None:  # every row its own token
        order, x = np.arange(len(p.a))[:, None], p.a[:, None]
    else:
        order, x = p.plan.token_to_row, p.x16.astype(np.float32)[:, None]
    ids = (np.searchsorted(p.offsets, order, side="right") - 1).astype(np.int32)
    product = ggml.ggml_mul_mat_id(g.context, weights, g.tensor("f32", x.shape, x), g.tensor("i32", ids.shape, ids))
    out = g.result(product)
    g.finish(product)

    def read(_):
        rows = np.empty((len(p.a), outer), np.float32)
        rows[order.reshape(-1)] = out.reshape(-1, outer)
        return rows

    return Work(g.run, read)


def _layer(p, kind):
    """llama.cpp's graph: gate_up, SwiGLU, down, the weighted sum over slots."""
    if p.wide != (kind == "f32"):
        return None
    if kind in AS_NUMPY:
        own = p.weights.pair(AS_NUMPY[kind])
    else:
        own = p.weights.memo(("ggml", kind), lambda: [converted(w, kind) for w in p.weights.pair("fp8")])
    g, s = Graph(), p.shape
    gate_up = g.tensor(kind, (s.num_experts, 2 * s.intermediate, s.hidden), own[0])
    down = g.tensor(kind, (s.num_experts, s.hidden, s.intermediate), own[1])
    ids = g.tensor("i32", p.gating.topk_idx.shape, np.ascontiguousarray(p.gating.topk_idx, np.int32))
    weights = g.tensor("f32", (s.tokens, s.top_k, 1), p.gating.topk_weights)
    h = ggml.ggml_mul_mat_id(g.context, gate_up, g.tensor("f32", (s.tokens, 1, s.hidden), p.x), ids)
    g.result(h)
    h = ggml.ggml_swiglu(g.context, h)
    g.result(h)
    y = ggml.ggml_mul_mat_id(g.context, down, h, ids)
    g.result(y)
    y = ggml.ggml_mul(g.context, y, weights)
    rows = g.result(y)
    strides, total = y.contents.nb, None
    for j in range(s.top_k):
        slot = ggml.ggml_view_2d(g.context, y, s.hidden, s.tokens, strides[2], j * strides[1])
        slot.contents.data = rows.ctypes.data + j * strides[1]
        total = slot if total is None else ggml.ggml_add(g.context, total, slot)
        out = g.result(total) if j else rows
    g.finish(total)
    return Work(g.run, lambda _: out.reshape(s.tokens, s.hidden))


def _register(kind: str) -> None:
    @column("gemm", f"ggml {kind}", kind=KINDS[kind])
    def gemm(p):
        return _mul_mat_id(p, kind)

    @column("layer", f"ggml {kind}", kind=KINDS[kind])
    def layer(p):
        return _layer(p, kind)


for _kind in TYPES:
    _register(_kind)
