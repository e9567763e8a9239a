"""The stages of gpu_check.py that are no test files: each a function, run in a process of its own.

A stage prints what it did, last a line for the summary, and exits with 0, with 1 where something is wrong, or with 77
where it cannot run here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
REAL = os.environ.get("PYROUTE_TEST_DEVICE") == "real"
QUICK = os.environ.get("PYROUTE_GPU_CHECK") == "quick"
sys.path[:0] = [str(ROOT / "tests/cuda")]


def skip(why: str) -> NoReturn:
    print(why)
    raise SystemExit(77)


def program(name: str) -> str | None:
    """On the PATH, beside this Python, or where CUDA installs itself."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), f"{cuda}/bin", f"{cuda}/compute-sanitizer"]
    return shutil.which(name, path=os.pathsep.join(places))


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# --- build and device -------------------------------------------------------------------------------------------------


def build() -> None:
    """The extensions and the images for this card, in place; what is built already and newer than its sources stays."""
    start = time.monotonic()
    cmake = program("cmake")
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        import pyroute

        print(f"cmake or pybind11 is missing: pyroute as it is in {Path(pyroute.__file__).parent}")
        return
    nvcc = program("nvcc") if REAL else None
    how = nvcc or "none, kernels through NVRTC"
    if not built(cmake, nvcc):
        how = f"{nvcc} failed, kernels through NVRTC"
        if not nvcc or not built(cmake, None):
            print("the build failed")
            raise SystemExit(1)
    print(f"built in {time.monotonic() - start:.0f} s, nvcc: {how}")


def built(cmake: str, nvcc: str | None) -> bool:
    """All that a GPU needs, which leaves out what Cython compiles."""
    folder = ROOT / "build/gpu_check"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'pyroute'}", "--log-level=WARNING"]
    configure += ["-DPYROUTE_CUDA=ON", f"-DPYROUTE_NVCC={nvcc}"] if nvcc else ["-DPYROUTE_CUDA=OFF"]
    if nvcc and (archs := os.environ.get("PYROUTE_CUDA_ARCHS")):
        configure += [f"-DPYROUTE_CUDA_ARCHS={archs}"]
    if program("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]
    targets = ["_core", "_cuda", *(["cuda_kernels"] if nvcc else [])]
    make = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count()), "--target", *targets]
    return all(subprocess.run(command).returncode == 0 for command in (configure, make))


def device() -> None:
    """What this machine is, and that every kernel's image loads."""
    import emulated

    if why := emulated.build():
        print(why)
        raise SystemExit(1)
    import pyroute

    backend = pyroute.backends()["cuda"]
    query = (
        "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total,power.limit",
        "--format=csv,noheader",
    )
    facts: dict[str, Any] = {
        "cuda": backend._asdict(),
        "cupy": pyroute.backends()["cupy"]._asdict(),
        "python": platform.python_version(),
        "card": output_of("nvidia-smi", *query) if REAL else "emulated",
        "nvcc": (output_of(program("nvcc") or "nvcc", "--version").splitlines() or ["none"])[-1],
        "sanitizer": program("compute-sanitizer") or "none",
        "packages": {
            "numpy": version_of("numpy"),
            "torch": version_of("torch"),
            "cupy": version_of("cupy-cuda13x", "cupy-cuda12x", "cupy"),
            "deep_gemm": version_of("sgl-deep-gemm", "deep-gemm"),
        },
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    Path(os.environ["PYROUTE_GPU_CHECK_FOLDER"], "device.json").write_text(json.dumps(facts))
    if not backend.available:
        print(f"no CUDA kernels: {backend.reason}")
        raise SystemExit(1)
    print(f"{backend.device}, kernels: {backend.kernels}{load_images()}")


def load_images() -> str:
    """Every file of kernels for this card through the driver, whether or not a later stage calls it."""
    import ctypes

    import real

    from pyroute import _backend
    from pyroute._device import images

    version, capability = _backend.cuda.driver_version(), _backend.cuda.device_info(0)[1]
    if images.route(capability, version).how != "fatbins":  # the emulator has none, NVRTC takes minutes for all
        return ""
    sources, start = images._sources() / "cuda", time.monotonic()
    rooms = [path.relative_to(sources).with_suffix("").as_posix() for path in sorted(sources.rglob("*.cu"))]
    rooms = [room for room in rooms if capability == 90 or not room.startswith("sm90/")]
    for room in rooms:
        image, module = images.image(room, capability, version), ctypes.c_void_p()
        if result := real.driver().cuModuleLoadData(ctypes.byref(module), image):
            raise SystemExit(f"the kernels of {room} ({len(image)} bytes) do not load: CUDA error {result}")
    return f", {len(rooms)} images load in {time.monotonic() - start:.1f} s"


def version_of(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


# --- correctness ------------------------------------------------------------------------------------------------------


def repeats() -> None:
    """The same call gives the same bytes every time, whatever ran before it."""
    import gpu_exact

    print(gpu_exact.repeats(3 if QUICK and not REAL else 20 if QUICK else 100))


def nvrtc() -> None:
    """The tests of the moves and a product with the images that a machine without nvcc compiles for itself."""
    import tempfile

    chosen = ["tests/cuda/test_permutation.py", "tests/cuda/test_gating.py"]
    with tempfile.TemporaryDirectory() as cache:
        made = dict(os.environ, PYROUTE_CUDA_IMAGES="nvrtc", PYROUTE_CACHE_DIR=cache)
        code = "import pyroute; print(pyroute.backends()['cuda'])"
        found = subprocess.run([sys.executable, "-c", code], env=made, capture_output=True, text=True).stdout
        if "available=True" not in found:
            skip(f"no NVRTC for this driver: {found.strip()}")
        command = [*json.loads(os.environ["PYROUTE_GPU_CHECK_PYTEST"]), *chosen]
        raise SystemExit(subprocess.run(command, env=made, cwd=ROOT).returncode)


def cupy() -> None:
    """CuPy's arrays take the same kernels, on CuPy's current stream and from its pool."""
    import gpu_exact

    try:
        import cupy as module

        module.cuda.runtime.getDeviceCount()
    except Exception as error:  # not installed, or without a driver
        skip(f"no CuPy: {error}")
    print(gpu_exact.on_cupy(module))


def bench() -> None:
    """``pyroute bench --gpu``; without a GPU every case once on small shapes."""
    import argparse

    import torch

    from pyroute.bench.suite import options
    from pyroute.bench.suite.gpu import cases, clock, run

    if REAL and not torch.cuda.is_available():
        skip("PyTorch finds no GPU")
    if not REAL:
        import tensors

        tensors.emulate()
    parser = argparse.ArgumentParser()
    options.add_bench(parser)
    args = parser.parse_args([*cases.ROWS, *(["--quick"] if QUICK else [])])
    options.check(args, rounds=30, quick_rounds=2)
    device = torch.device("cuda", torch.cuda.current_device()) if REAL else torch.device("cpu")
    about = run.facts(device) if REAL else {}
    results = Path(os.environ["PYROUTE_GPU_CHECK_FOLDER"], "bench.json")
    lines: list[dict[str, Any]] = []

    def keep(outcome: run.Outcome) -> None:  # what is measured stays if the time is up
        lines.extend(outcome.lines())
        results.write_text(json.dumps({**about, "lines": lines}))

    outcomes, ended = run.run(args, clock.Clock(device), sys.stdout, keep)
    held = [bar["met"] for line in lines for bar in line.get("bars", ())]
    failed = run.failures(outcomes)
    print("\n".join(failed))
    met = f", {held.count(True)} of {len(held)} bars met" if REAL else ", untimed"
    print(f"{len(outcomes)} problems, {len(lines)} columns, {len(failed)} of pyroute's failed{met}")
    raise SystemExit(1 if failed or ended else 0)


def sanitized(tool: str) -> Callable[[], None]:
    def run() -> None:
        sanitizer = program("compute-sanitizer")
        if sanitizer is None:
            skip("compute-sanitizer is not installed")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "7", "--print-limit", "20"]
        made = dict(os.environ, PYROUTE_TEST_BAND="0")
        done = subprocess.run([*command, sys.executable, __file__, "small"], cwd=ROOT, env=made)
        print(f"{tool}: {'clean' if done.returncode == 0 else f'exit status {done.returncode}'}")
        raise SystemExit(1 if done.returncode else 0)

    return run


def small() -> None:
    """Every kernel once on little data: what the sanitizer's tools have time for."""
    import gpu_exact

    names = [name for name, call in gpu_exact.calls(small=True) if call() is not None]
    if REAL:
        import real

        real.finish()  # what the last kernels do belongs to this run
    print(f"ran {', '.join(names)}")


def stages() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from ((f.__name__, f) for f in (build, device, repeats, nvrtc, cupy, small, bench))
    yield from ((tool, sanitized(tool)) for tool in ("memcheck", "racecheck", "initcheck", "synccheck"))


if __name__ == "__main__":
    dict(stages())[sys.argv[1]]()
