"""What importing and calling pyroute does to the process around it: nothing that a host program would notice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import pyroute
from pyroute import _backend
from pyroute._device import images

needs_core = pytest.mark.skipif(not _backend.HAS_CORE, reason="the compiled floor is not built")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; a hang is a failure after 60 s."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        check=False,
    )


def test_version_is_the_distributions():
    metadata = pytest.importorskip("importlib.metadata")
    try:
        installed = metadata.version("pyroute-moe")
    except metadata.PackageNotFoundError:
        pytest.skip("running from a source tree")
    assert pyroute.__version__ == installed


def test_public_names_exist_and_are_sorted():
    assert sorted(pyroute.__all__) == list(pyroute.__all__)
    for name in pyroute.__all__:
        assert getattr(pyroute, name) is not None


def test_import_loads_neither_torch_nor_cupy_and_starts_no_thread():
    done = run(
        """
        import sys, os
        before = len(os.listdir("/proc/self/task"))
        import pyroute
        heavy = {"torch", "cupy", "jax", "transformers", "rich", "safetensors", "scipy"} & set(sys.modules)
        assert not heavy, heavy
        # NumPy's BLAS starts its own threads on import; ours must add none
        import numpy
        after_numpy = len(os.listdir("/proc/self/task"))
        assert pyroute.backends()["numpy"].available
        assert len(os.listdir("/proc/self/task")) == after_numpy
        """,
        OPENBLAS_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr


def test_import_leaves_the_floating_point_environment_alone():
    done = run(
        """
        import numpy as np
        tiny = np.float32(1e-45)
        import pyroute
        assert tiny * np.float32(1) != 0 and 5e-324 != 0.0 and 5e-324 * 1.0 != 0.0
        """
    )
    assert done.returncode == 0, done.stderr


@needs_core
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "nonsense"])
def test_isa_override(isa):
    done = run("import pyroute; print(pyroute.backends()['cpu'].device)", PYROUTE_ISA=isa)
    assert done.returncode == 0, done.stderr
    available = _backend.core.isas()
    assert done.stdout.strip() == (isa if isa in available else available[-1])


def test_set_num_threads_rejects_nonsense():
    for bad in (0, -1, 10**9):
        with pytest.raises(ValueError, match=r"^set_num_threads: n must be in 1\.\.1024, got "):
            pyroute.set_num_threads(bad)
    for bad in (1.5, "2", None, True):
        with pytest.raises(TypeError, match=r"^set_num_threads: n must be an integer, got "):
            pyroute.set_num_threads(bad)


def test_backend_that_is_not_there_says_why():
    done = run(
        """
        import numpy as np
        from pyroute import _backend
        try:
            _backend.choose("f", "cuda", np.zeros(3))
        except RuntimeError as error:
            assert str(error).startswith("f: backend 'cuda' is not available: "), error
        else:
            raise AssertionError("it was there")
        """,
        PYROUTE_CUDA_DRIVER="/nowhere/libcuda.so.1",
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"^f: backend must be one of None, 'numpy', "):
        _backend.choose("f", "gpu", np.zeros(3))


def test_as_array_takes_arrays_and_nothing_else():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert _backend.as_array("f", "x", x) is x
    for view in (x.T, x[:, ::2], x[::-1], np.asfortranarray(x)):
        got = _backend.as_array("f", "x", view)
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, view)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32)
    assert not unaligned.flags.aligned or unaligned.ctypes.data % 4 == 0
    assert _backend.as_array("f", "x", unaligned).flags.aligned
    assert _backend.as_array("f", "x", memoryview(x)).shape == (2, 3)
    for bad in ([1.0, 2.0], 3.0, "text", None, {"a": 1}):
        with pytest.raises(TypeError, match=r"^f: x must be an array, got "):
            _backend.as_array("f", "x", bad)
    with pytest.raises(TypeError, match="without a mask"):
        _backend.as_array("f", "x", np.ma.masked_array(x))


FORK = """
    import os, sys, signal
    import numpy as np
    import pyroute
    pyroute.set_num_threads(2)
    x = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)
    once = pyroute.quantize_fp8(x).codes.tobytes()
    for depth in range(2):  # a child, and a child of the child
        child = os.fork()
        if child:
            signal.alarm(20)  # a hang becomes a death by SIGALRM
            _, status = os.waitpid(child, 0)
            assert pyroute.quantize_fp8(x).codes.tobytes() == once
            os._exit(0 if status == 0 else 1)
        assert pyroute.quantize_fp8(x).codes.tobytes() == once
    os._exit(0)
"""


@needs_core
def test_fork_after_parallel_work():
    done = run(FORK)
    assert done.returncode == 0, done.stderr


@needs_core
def test_sixteen_caller_threads():
    done = run(
        """
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np
        import pyroute
        config = pyroute.RouterConfig.preset("deepseek-v3")
        def job(seed):
            rng = np.random.default_rng(seed % 4)
            logits = rng.standard_normal((64 + seed % 4, 256)).astype(np.float32)
            x = rng.standard_normal((64 + seed % 4, 96)).astype(np.float32)
            gating = pyroute.topk_gating(logits, config)
            plan = pyroute.plan_routes(gating.topk_idx, 256)
            y = pyroute.unpermute(pyroute.permute(x, plan), plan, gating.topk_weights)
            return gating.topk_weights.tobytes() + y.tobytes()
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(job, range(320)))
        for seed, result in enumerate(results):
            assert result == results[seed % 4], seed
        """
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_sources_are_there_with_all_that_they_include():
    """What NVRTC reads lies in the package; a source tree has it in csrc."""
    csrc = images._sources()
    sources = sorted((csrc / "cuda").rglob("*.cu"))
    assert {path.stem for path in sources} >= {"permutation", "gating", "grouped_gemm"}
    seen, unread = set(), list(sources)
    while unread:
        path = unread.pop()
        seen.add(path)
        for name in re.findall(r'#include [<"](.*?)[>"]', path.read_text()):
            if name.startswith("emulator/"):
                continue
            places = [path.parent / name, csrc / name, csrc / "cuda" / "nvrtc" / name]
            found = next((place.resolve() for place in places if place.is_file()), None)
            assert found is not None, f"{path.name} includes {name}"
            if found not in seen:
                unread.append(found)
