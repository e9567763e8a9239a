"""A layer, forward and backward, captured into a graph once and replayed with other inputs.

While a stream is captured nothing runs, so code that reads a result on the host, waits, or allocates outside the
caller's memory fails or replays something stale. On a real GPU the driver itself refuses the first two.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import emulated
import numpy as np
import pytest
import real
from captured import Arena, Graph, fill
from conftest import assert_same_bytes
from emulated import to_device, to_host

import pyroute
from pyroute import RouterConfig

T, E, H, INNER, K = 24, 8, 96, 64, 2


def inputs(seed: int, dtype) -> dict[str, np.ndarray]:
    """A batch: other logits send other tokens to other experts."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E)).astype(np.float32)
    if seed == 2:
        logits[:, 0] += 20  # one crowded expert, and others without tokens
    return {
        "logits": logits,
        "x": rng.normal(size=(T, H)).astype(dtype),
        "grad_y": rng.normal(size=(T, H)).astype(dtype),
    }


def weights_of(dtype, quantised: bool):
    rng = np.random.default_rng(99)
    wide = [rng.normal(0, 0.1, size=shape).astype(dtype) for shape in ((E, 2 * INNER, H), (E, H, INNER))]
    if not quantised:
        return wide
    return [pyroute.quantize_fp8(w, block=(128, 128)) for w in wide]


def put_weight(arena: Arena, w):
    if not isinstance(w, pyroute.Fp8Array):
        return arena.put(w)
    return pyroute.Fp8Array(arena.put(w.codes), arena.put(w.scales), w.block)


def train_step(given, weights, config, how):
    """Router, layer, and the gradients of both."""
    gating = pyroute.topk_gating(given["logits"], config)
    y, saved = pyroute.moe_forward(given["x"], gating.topk_idx, gating.topk_weights, *weights, return_saved=True, **how)
    grads = pyroute.moe_backward(given["grad_y"], saved)
    grad_logits = pyroute.topk_gating_backward(
        grads.topk_weights, given["logits"], gating, config, balance_loss_coef=1e-2, z_loss_coef=1e-3
    )
    return gating.topk_idx, gating.topk_weights, y, grads.x, grads.w_gate_up, grads.w_down, grad_logits


CASES = {
    "float32": (np.float32, False, {}),
    "fp8": ("bfloat16", True, {"quantize_activations": True, "quantize_gradients": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_replays_other_routings(case):
    name, quantised, how = CASES[case]
    dtype = np.dtype(name) if name != "bfloat16" else pyroute._backend.BFLOAT16
    config = RouterConfig(E, K, "sigmoid", renormalize="sum")
    arena = Arena(64 << 20)
    given = {name: arena.put(array) for name, array in inputs(0, dtype).items()}
    weights = [put_weight(arena, w) for w in weights_of(dtype, quantised)]
    train_step(given, weights, config, how)  # kernels are loaded at their first use
    real.call(real.driver().cuCtxSynchronize)

    before = arena.taken
    with Graph(arena) as graph:
        results = train_step(given, weights, config, how)
    assert arena.taken > before
    for seed in (0, 1, 2):
        for name, array in inputs(seed, dtype).items():
            fill(given[name], array)
        graph.launch()
        replayed = [to_host(part) for part in results]
        eager_given = {name: to_device(array) for name, array in inputs(seed, dtype).items()}
        eager_weights = [put_weight(EAGER, w) for w in weights_of(dtype, quantised)]
        for a, b in zip(replayed, train_step(eager_given, eager_weights, config, how), strict=True):
            assert_same_bytes(a, to_host(b))


@pytest.mark.parametrize("quantised", [False, True])
def test_a_captured_decoding_step_replays_other_counts(quantised):
    """The masked layout: same shapes, other rows that exist; those that do not keep what they held."""
    room, config = 20, {"dtype": pyroute._backend.BFLOAT16, "quantised": quantised}
    arena, rng = Arena(16 << 20), np.random.default_rng(5)
    w = put_weight(arena, weights_of(**config)[0])
    rows, counts = arena.put(rng.normal(size=(E, room, H)).astype(config["dtype"])), arena.put(np.zeros(E, np.int32))
    out = arena.put(np.zeros((E, room, 2 * INNER), config["dtype"]))

    def step():
        given = pyroute.quantize_fp8(rows) if quantised else rows
        return pyroute.grouped_gemm(given, w, tokens_per_expert=counts, out=out)

    step()
    real.call(real.driver().cuCtxSynchronize)
    with Graph(arena) as graph:
        step()
    for exist in ([0, 20, 3, 1, 0, 0, 7, 19], [0] * E, [20] * E):
        array = rng.normal(size=(E, room, H)).astype(config["dtype"])
        held = rng.normal(size=(E, room, 2 * INNER)).astype(config["dtype"])
        for to, what in ((rows, array), (counts, np.array(exist, np.int32)), (out, held)):
            fill(to, what)
        graph.launch()
        given, eager = to_device(array), to_device(held)
        pyroute.grouped_gemm(
            pyroute.quantize_fp8(given) if quantised else given, put_weight(EAGER, weights_of(**config)[0]),
            tokens_per_expert=to_device(np.array(exist, np.int32)), out=eager,
        )  # fmt: skip
        assert_same_bytes(to_host(out), to_host(eager))
        for e, count in enumerate(exist):
            assert_same_bytes(to_host(out)[e, count:], held[e, count:])


class Eager:
    put = staticmethod(to_device)


EAGER = Eager()


def capture_out_of_reach(case: str) -> None:
    """A captured step whose memory the host cannot touch meanwhile: reading it ends the process."""
    name, quantised, how = CASES[case]
    dtype = np.dtype(name) if name != "bfloat16" else pyroute._backend.BFLOAT16
    config = RouterConfig(E, K, "sigmoid", renormalize="sum")
    arena = Arena(64 << 20)
    given = {name: arena.put(array) for name, array in inputs(0, dtype).items()}
    weights = [put_weight(arena, w) for w in weights_of(dtype, quantised)]
    train_step(given, weights, config, how)
    pages = arena.memory.owner.room
    protect = ctypes.CDLL(None).mprotect
    address, size = ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.nbytes)
    with Graph(arena) as graph:
        assert protect(address, size, 0) == 0
        train_step(given, weights, config, how)
        assert protect(address, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    graph.launch()
    print("nothing was read")


@pytest.mark.skipif(emulated.REAL, reason="on a real GPU every read of its memory ends the process")
@pytest.mark.parametrize("case", CASES)
def test_the_host_reads_no_memory_of_the_gpu(case):
    here = os.path.dirname(os.path.abspath(__file__))
    code = f"import test_graph_capture as t; t.capture_out_of_reach({case!r})"
    folders = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(pyroute.__file__))]
    made = dict(os.environ, PYTHONPATH=os.pathsep.join(folders))
    done = subprocess.run([sys.executable, "-c", code], env=made, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "nothing was read\n"), done.stderr


def test_a_step_waits_for_nothing():
    emulator = emulated.library()
    config = RouterConfig(E, K)
    given = {name: to_device(array) for name, array in inputs(0, np.float32).items()}
    weights = [to_device(w) for w in weights_of(np.float32, False)]
    train_step(given, weights, config, {})
    waiting = ("cuStreamSynchronize", "cuCtxSynchronize", "cuMemAlloc_v2", "cuLibraryLoadData")
    before = [emulator.pyroute_emulator_calls(name.encode()) for name in waiting]
    train_step(given, weights, config, {})
    assert [emulator.pyroute_emulator_calls(name.encode()) for name in waiting] == before
    assert emulator.pyroute_emulator_calls(b"cuLaunchKernelEx") > 0
