"""Memory over time: thousands of mixed calls keep the process at its size, and a failed allocation leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pyroute import _backend

pytestmark = [
    pytest.mark.skipif(not _backend.HAS_CORE, reason="the compiled floor is not built"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
]

# Blocks of 16 KiB and more are mapped and unmapped one by one: otherwise the heap's fragments grow by 3 MiB over the
# first 5000 rounds, and freed memory would serve the calls that are meant to run out of it.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "16384",
    "MALLOC_ARENA_MAX": "1",  # a second arena has 64 MiB of address space in reserve
    "OPENBLAS_NUM_THREADS": "1",
    "PYROUTE_CACHE_LIMIT": "0",  # likewise
}

LAYER = """
    import numpy as np
    import pyroute

    def layer(seed, num_tokens, hidden=40, num_experts=8, intermediate=24):
        \"\"\"One forward and backward through every room; the bytes of all results.\"\"\"
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
        config = pyroute.RouterConfig(num_experts, top_k=2, renormalize="sum")
        x, logits = normal(num_tokens, hidden), normal(num_tokens, num_experts)
        gating = pyroute.topk_gating(logits, config, backend="cpu")
        plan = pyroute.plan_routes(gating.topk_idx, num_experts, backend="cpu")
        rows = pyroute.permute(x, plan, backend="cpu")
        codes = pyroute.quantize_fp8(rows, backend="cpu")
        y, saved = pyroute.moe_forward(
            x, gating.topk_idx, gating.topk_weights, normal(num_experts, 2 * intermediate, hidden),
            normal(num_experts, hidden, intermediate), return_saved=True, backend="cpu",
        )
        grads = pyroute.moe_backward(y, saved)
        grad_logits = pyroute.topk_gating_backward(grads.topk_weights, logits, gating, config, backend="cpu")
        results = (gating.topk_idx, rows, codes.codes, codes.scales, y, grads.x, grads.w_down, grad_logits)
        return b"".join(np.ascontiguousarray(a).tobytes() for a in results)
"""


def run(code: str) -> str:
    """What a fresh interpreter prints that runs LAYER and then ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LAYER) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **ENVIRONMENT},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_thousands_of_calls_keep_the_process_at_its_size():
    """Eight native ops a round, a size and a number of threads that change, wrong arguments in between."""
    growth = run(
        """
        import resource

        def resident():
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()

        def rounds(count):
            for i in range(count):
                pyroute.set_num_threads(1 + i % 3)
                layer(i, num_tokens=i * 7 % 60)
                try:
                    pyroute.topk_gating(np.zeros((3, 4), np.float32), pyroute.RouterConfig(8, top_k=2), backend="cpu")
                except ValueError:
                    pass

        rounds(300)
        before = resident()
        rounds(1200)
        print(resident() - before)
        """
    )
    assert int(growth) < 1 << 19


def test_a_failed_allocation_is_a_memory_error_and_the_next_call_is_right():
    """The limit on the address space rises in steps, so that other allocations of an op fail at each of them."""
    failures = run(
        """
        import resource

        def normal(*shape, rng=np.random.default_rng(0)):
            return rng.standard_normal(shape, dtype=np.float32)

        tokens, experts, hidden, intermediate = 400, 512, 32, 16
        config = pyroute.RouterConfig(experts, top_k=4, renormalize="sum")
        x, logits = normal(tokens, hidden), normal(tokens, experts)
        gating = pyroute.topk_gating(logits, config, backend="cpu")
        plan = pyroute.plan_routes(gating.topk_idx, experts, backend="cpu")
        rows = pyroute.permute(x, plan, backend="cpu")
        w = normal(experts, hidden, hidden)
        w_layer = normal(experts, 2 * intermediate, hidden), normal(experts, hidden, intermediate)
        ops = {
            "gating": lambda: pyroute.topk_gating_backward(
                gating.topk_weights, logits, gating, config, backend="cpu"
            ),
            "expert choice": lambda: pyroute.expert_choice_gating(logits, capacity=8, backend="cpu").token_weights,
            "permute": lambda: pyroute.permute(x, plan, backend="cpu"),
            "gemm": lambda: pyroute.grouped_gemm(rows, w, plan.expert_offsets, backend="cpu"),
            "wgrad": lambda: pyroute.grouped_gemm_wgrad(rows, rows, plan.expert_offsets, backend="cpu"),
            "layer": lambda: pyroute.moe_forward(x, gating.topk_idx, gating.topk_weights, *w_layer, backend="cpu"),
        }
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)

        def limited(op, room):
            with open("/proc/self/statm") as statm:
                size = int(statm.read().split()[0]) * resource.getpagesize()
            try:
                resource.setrlimit(resource.RLIMIT_AS, (size + room, hard))
                return op().tobytes()
            except MemoryError:
                return None
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

        pyroute.set_num_threads(2)
        for name, op in ops.items():
            expected = op().tobytes()  # the pool's threads are there from now on
            failures = room = 0
            while (result := limited(op, room)) is None:
                assert op().tobytes() == expected, name
                failures += 1
                room += max(32 << 10, room // 8)
            assert result == expected, name
            print(failures)
        """
    ).split()
    assert len(failures) == 6
    assert all(int(count) >= 1 for count in failures), failures
