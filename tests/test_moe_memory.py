"""What a layer holds: the process's own peak, in a fresh interpreter, and blocks that the next call takes again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from moe_problems import Problem

import pyroute
from pyroute import _backend

pytestmark = pytest.mark.skipif(not _backend.HAS_CORE, reason="the compiled floor is not built")

# 64 experts with 12 rows each: 132 MiB of float32 weights, 33 as FP8 codes, and rows of 1.5 to 2.1 MiB a buffer
PEAK = """
    import sys
    import numpy as np
    import pyroute

    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    num_tokens, top_k, num_experts, hidden, intermediate = 128, 6, 64, 512, 352
    rng = np.random.default_rng(1)
    x = rng.standard_normal((num_tokens, hidden), np.float32)
    idx = (np.arange(num_tokens)[:, None] + np.arange(top_k) * 11) % num_experts
    weights = rng.random(idx.shape, np.float32)
    small = np.ones((1, 8, hidden), np.float32), np.ones((1, hidden, 4), np.float32)
    pyroute.moe_forward(x[:1], idx[:1] * 0, weights[:1], *small)  # threads and code are there
    base = status("VmRSS")

    def matrices(rows, cols):
        shape = (num_experts, rows, cols)
        if sys.argv[1] == "float32":
            return np.full(shape, 0.01, np.float32)
        scales = np.ones((num_experts, -(-rows // 128), -(-cols // 128)), np.float32)
        return pyroute.Fp8Array(np.full(shape, 0x21, np.uint8), scales, (128, 128))

    layer = matrices(2 * intermediate, hidden), matrices(hidden, intermediate)
    held = status("VmRSS") - base
    pyroute.moe_forward(x, idx, weights, *layer)
    peak = status("VmHWM") - base
    print(held, peak)
"""


def peak(kind):
    """Bytes of the weights alone, and the highest that the process came to in a forward call, both over its start."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), kind],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "MALLOC_PERTURB_": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_of_an_fp8_layer():
    """Below 0.30 of the float32 layer's peak, weights included: nothing widens a weight matrix as a whole."""
    held, wide = peak("float32")
    assert held > 125 * 2**20
    held, narrow = peak("fp8")
    assert 30 * 2**20 < held < 36 * 2**20
    assert narrow < 0.30 * wide


@pytest.fixture
def one_thread():
    """Two threads may hold their workspaces at once in one call and one after the other in the next."""
    before = pyroute.get_num_threads()
    pyroute.set_num_threads(1)
    yield
    pyroute.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "fp8_training"])
def test_the_next_call_takes_the_same_memory(kind, one_thread):
    problem = Problem(kind, sizes=(600, 4, 9, 256, 192))
    y, saved = problem.forward("cpu", return_saved=True)
    grads = pyroute.moe_backward(problem.grad_y, saved)
    del y, saved
    for step in range(5):
        if step == 2:  # the gradients, kept from here on, may have taken blocks that a workspace had
            before = pyroute.cache_info()
        y, saved = problem.forward("cpu", return_saved=True)
        grads = pyroute.moe_backward(problem.grad_y, saved, out=grads)
        del y, saved
    after = pyroute.cache_info()
    assert after.fresh == before.fresh
    assert after.recycled > before.recycled
    assert after.in_use == before.in_use


def test_what_is_not_wanted_takes_no_memory():
    problem = Problem("float32", sizes=(10, 2, 9, 256, 512))
    _, saved = problem.forward("cpu", return_saved=True)
    pyroute.empty_cache()
    pyroute.moe_backward(problem.grad_y, saved, wanted=("x",))
    assert pyroute.cache_info().kept < problem.weights[1].nbytes
