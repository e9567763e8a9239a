"""JAX: routers, moves and layers as its users write them, compiled by XLA; products by jax.lax.ragged_dot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ...machine import cores
from . import Work, column, package_version

NAME = "jax"


def version() -> str:
    return package_version("jax")


def set_threads(n: int) -> None:
    if n != cores():
        raise NotImplementedError("XLA's threads are set before the process starts: measured on all cores only")


def ready(function, *inputs):
    """A compiled function on arrays that are in JAX's memory; a call waits for its result."""
    compiled, placed = jax.jit(function), [jnp.asarray(x) for x in inputs]
    return lambda: jax.block_until_ready(compiled(*placed))


def array(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


@column("gate", "jax jit")
def gate(p):
    c = p.config
    if p.formula == "softmax":

        def route(logits):
            weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), c.top_k)
            return weights / weights.sum(axis=-1, keepdims=True), ids

        return Work(ready(route, p.logits), lambda found: tuple(map(np.asarray, found)))
    if p.formula != "grouped sigmoid":
        return None

    def route_grouped(logits, bias):
        scores = jax.nn.sigmoid(logits)
        keys = (scores + bias).reshape(len(logits), c.num_groups, -1)
        best = jax.lax.top_k(keys, 2)[0].sum(axis=-1)
        groups = jax.lax.top_k(best, c.topk_groups)[1]
        kept = jax.nn.one_hot(groups, c.num_groups, dtype=bool).any(axis=1)
        ids = jax.lax.top_k(jnp.where(kept[:, :, None], keys, 0).reshape(logits.shape), c.top_k)[1]
        weights = jnp.take_along_axis(scores, ids, axis=1)
        return c.scaling_factor * weights / (weights.sum(axis=-1, keepdims=True) + 1e-20), ids

    return Work(ready(route_grouped, p.logits, p.bias), lambda found: tuple(map(np.asarray, found)))


@column("permute", "jax take", kind="exact")
def permute(p):
    return Work(ready(lambda x, rows: x[rows], p.x, p.plan.row_to_token), array)


@column("unpermute", "jax take, sum", kind="bfloat16")
def unpermute(p):
    def combine(rows, slots, weights):
        return jnp.einsum("tkh,tk->th", rows[slots], weights.astype(rows.dtype))

    return Work(ready(combine, p.rows, p.plan.token_to_row, p.gating.topk_weights), array)


@column("quantize", "jax jit", kind="codes")
def quantize(p):
    def e4m3(x):
        blocks = x.astype(jnp.float32).reshape(len(x), -1, 128)
        scales = jnp.maximum(jnp.abs(blocks).max(axis=-1, keepdims=True), 1e-12) / 448.0
        return (blocks / scales).astype(jnp.float8_e4m3fn).reshape(x.shape), scales[..., 0]

    return Work(ready(e4m3, p.x), lambda found: (np.asarray(found[0]).view(np.uint8), np.asarray(found[1])))


def product(p, kind: str):
    rows, weights = (p.a, p.w32) if kind == "float32" else (p.a16, p.w16)

    def multiply(a, w, counts):
        return jax.lax.ragged_dot(a, w.transpose(0, 2, 1), counts, preferred_element_type=a.dtype)

    return Work(ready(multiply, rows, weights, p.counts.astype(np.int32)), array)


def experts(x, ids, weights, gate_up, down):
    """Rows sorted by expert, two ragged products with SwiGLU between them, and their weighted sum."""
    order = jnp.argsort(ids.reshape(-1), stable=True)
    counts = jnp.bincount(ids.reshape(-1), length=gate_up.shape[0])
    rows = x[order // ids.shape[1]]
    gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up.transpose(0, 2, 1), counts), 2, axis=-1)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down.transpose(0, 2, 1), counts)
    out = out * weights.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(x).at[order // ids.shape[1]].add(out)


def layer(p, kind: str):
    if p.wide != (kind == "float32"):
        return None
    x = p.x if kind == "float32" else p.x16
    return Work(ready(experts, x, p.gating.topk_idx, p.gating.topk_weights, *p.weights.pair(kind)), array)


def _register(kind: str) -> None:
    @column("gemm", f"jax ragged_dot {kind}", kind=kind)
    def gemm(p):
        return product(p, kind)

    @column("layer", f"jax ragged_dot {kind}", kind=kind)
    def experts_forward(p):
        return layer(p, kind)


for _kind in ("float32", "bfloat16"):
    _register(_kind)


@column("training", "jax ragged_dot float32")
def training(p):
    def loss(x, weights, gate_up, down, ids, grad_y):
        y = experts(x, ids, weights, gate_up, down)
        return (y * grad_y).sum(), y

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    run = ready(gradients, p.x, p.gating.topk_weights, *p.weights.pair("float32"), p.gating.topk_idx, p.grad_y)
    return Work(run, lambda found: (array(found[1]), *(array(found[0][i]) for i in (0, 2, 3))))
