"""Launching: the driver's interface, its failures as sentences, contexts, threads, forks, capture. On the emulated GPU.

What a process learns of its driver it keeps, so most tests are a program of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(emulated.REAL, reason="this is about the emulated driver")

# launch() runs a kernel that writes each of 256 words' neighbour; current() is the thread's context, as the driver says
PREPARE = """
import ctypes, os, sys
import numpy as np
import emulated
from emulated import to_device, to_host
from pyroute import _backend
cuda = _backend.cuda
x = np.arange(256, dtype=np.uint32)

def launch(device=0, stream=0, room="probes", kernel="probe_barrier", blocks=1, threads=256, **more):
    given, made = to_device(x), to_device(np.zeros(256, np.uint32))
    args = np.array([made.pointer, given.pointer, 0], np.uint64).tobytes()
    cuda.launch(device, stream, room, kernel, blocks, threads, args, **more)
    return to_host(made)

def right(made):
    return np.array_equal(made, np.roll(x, -1))

def sentence(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"

def current():
    context = ctypes.c_void_p()
    emulated.library().cuCtxGetCurrent(ctypes.byref(context))
    return context.value

"""


def run(code: str, **environment: str) -> str:
    """What a program of its own prints; a hang is a failure after 60 s."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)]), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cuda_headers() -> list[Path]:
    wheels = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/include")
    nvcc = shutil.which("nvcc") or "/usr/local/bin/nvcc"
    folders = [*wheels, Path("/usr/local/cuda/include"), *Path("/usr/local").glob("cuda-*/include")]
    folders += [Path(nvcc).resolve().parent.parent / "include"]
    return sorted({folder for folder in folders if (folder / "cuda.h").is_file()})


def test_declarations_are_those_of_cuda_h():
    headers, compiler = cuda_headers(), shutil.which("c++")
    if not headers or not compiler:
        pytest.skip("needs cuda.h and a C++ compiler")
    for folder in headers:
        command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-isystem{folder}"]
        done = subprocess.run([*command, str(HERE / "driver_layout.cpp")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_import_touches_no_driver_and_the_first_array_on_a_gpu_does():
    code = """
    def loaded():
        return "cuda_emulated" in open("/proc/self/maps").read()
    import pyroute
    pyroute.quantize_fp8(np.zeros((4, 128), np.float32))
    assert not loaded()
    _backend.choose("f", None, to_device(x))
    assert loaded()
    """
    assert run(code) == ""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYROUTE_CUDA_DRIVER": "/nowhere/libcuda.so.1"}, "no NVIDIA driver: /nowhere/libcuda.so.1: cannot open"),
        ({"PYROUTE_CUDA_DRIVER": "libm.so.6"}, "the NVIDIA driver is older than CUDA 12.0"),
        ({"PYROUTE_EMULATED_VERSION": "11080"}, "the NVIDIA driver supports CUDA 11.8, pyroute needs 12.0 or newer"),
        ({"PYROUTE_EMULATED_DEVICES": "0"}, "the NVIDIA driver finds no GPU"),
        (
            {"PYROUTE_EMULATOR_FAIL": "cuInit=803"},
            "the NVIDIA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        ),
        ({"PYROUTE_EMULATOR_FAIL": "cuDeviceGetName=1"}, "GPU 0 does not answer: CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_without_a_gpu_every_question_gets_the_sentence(environment, expected):
    code = """
    import pyroute
    print(pyroute.backends()["cuda"].reason)
    """
    assert run(code, **environment).startswith(expected)
    assert run("print(sentence(launch))", **environment).startswith(f"RuntimeError: {expected}")


def test_a_driver_that_fails_to_start_once_works_at_the_next_call():
    code = """
    assert "SYSTEM_DRIVER_MISMATCH" in sentence(launch)
    assert right(launch())
    assert cuda.why_no_device() == ""
    """
    assert run(code, PYROUTE_EMULATOR_FAIL="cuInit=803") == ""


def test_an_old_card_is_refused_by_name():
    code = """
    import pyroute
    print(pyroute.backends()["cuda"].reason)
    print(sentence(_backend.choose, "f", None, to_device(x)))
    print(sentence(launch))
    """
    reason, chosen, launched = run(code, PYROUTE_EMULATED_ARCH="75").splitlines()
    assert reason == "emulated sm_75 has compute capability 7.5, the kernels need 8.0 or newer"
    assert chosen == f"RuntimeError: f: backend 'cuda' is not available: {reason}"
    assert launched == "RuntimeError: emulated sm_75 has compute capability 7.5, pyroute's kernels need 8.0 or newer"


CALLED = (
    "cuCtxGetCurrent",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuLibraryLoadData",
    "cuLibraryGetKernel",
    "cuLaunchKernelEx",
)


@pytest.mark.parametrize("entry_point", CALLED)
@pytest.mark.parametrize("result", [2, 999])
def test_a_failure_anywhere_leaves_everything_as_it_was(entry_point, result):
    """In a thread without a context; the sentence names the kernel or the room, and the next call works."""
    code = f"""
    emulated.fail_next({entry_point!r}, {result})
    told = sentence(launch)
    assert current() is None
    assert right(launch())
    assert current() is None
    print(told)
    """
    told = run(code)
    if entry_point == "cuCtxGetCurrent":
        assert told == "nothing raised"  # as if no context were current
    elif result == 2:
        assert told.startswith("MemoryError: ")
        assert told.endswith(": the GPU is out of memory")
    else:
        assert told.startswith("RuntimeError: ")
        assert "CUDA error 999" in told


@pytest.mark.parametrize(
    ("entry_point", "result", "expected"),
    [
        ("cuLibraryLoadData", 209, "the kernels of probes were not built for emulated sm_90 (compute capability 9.0)"),
        ("cuKernelGetFunction", 209, "the kernels of probes were not built for emulated sm_90"),  # loading is lazy
        ("cuFuncLoad", 200, "the NVIDIA driver does not take the kernels of probes"),
        (
            "cuLibraryLoadData",
            200,
            "the NVIDIA driver does not take the kernels of probes, it is older than the compiler",
        ),
        (
            "cuLaunchKernelEx",
            700,
            "kernel probe_barrier of probes: a kernel failed, this one or an earlier one: CUDA_ERR",
        ),
        ("cuLaunchKernelEx", 701, "kernel probe_barrier of probes: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
    ],
)
def test_failures_with_sentences_of_their_own(entry_point, result, expected):
    assert run(f"emulated.fail_next({entry_point!r}, {result}); print(sentence(launch))").startswith(
        f"RuntimeError: {expected}"
    )


def test_what_cannot_be_launched():
    code = """
    print(sentence(launch, kernel="nothing"))
    print(sentence(launch, device=3))
    print(sentence(launch, shared_bytes=1 << 20))
    print(sentence(cuda.launch, 0, 0, "probes", "probe_warp", 1, 32, b"1234"))
    assert not launch(blocks=0).any()
    assert right(launch(shared_bytes=200 << 10))
    """
    nothing, device, shared, arguments = run(code).splitlines()
    assert nothing.startswith("RuntimeError: kernel nothing of probes: CUDA_ERROR_NOT_FOUND")
    assert device == "RuntimeError: there is no GPU 3, only 1"
    assert "probe_barrier of probes needs 1048576 bytes of shared memory, emulated sm_90 gives a block 2" in shared
    assert arguments == (
        "RuntimeError: kernel probe_warp of probes takes 24 bytes of arguments, not 4: it belongs to another build of "
        "pyroute"
    )


def test_images_that_are_not_found():
    code = """
    def nowhere(room, capability):
        raise RuntimeError(f"no {room} for {capability}")
    cuda.set_image_source(nowhere)
    print(sentence(launch))
    cuda.set_image_source(lambda room, capability: 7)
    print(sentence(launch))
    cuda.set_image_source(lambda room, capability: b"image")
    assert right(launch())
    assert current() is None
    """
    first, second = run(code).splitlines()
    assert first == "RuntimeError: no probes for 90"
    assert second.startswith("RuntimeError: ")


def test_the_callers_context_comes_back():
    code = """
    driver = emulated.library()
    contexts = [ctypes.c_void_p(), ctypes.c_void_p()]
    assert driver.cuInit(0) == 0
    for device, context in enumerate(contexts):
        assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    for context in contexts:
        driver.cuCtxSetCurrent(context)
        for device in (0, 1, 0):
            assert right(launch(device=device))
            assert current() == context.value
            assert sentence(launch, device=device, kernel="nothing") != "nothing raised"
            assert current() == context.value
    """
    assert run(code, PYROUTE_EMULATED_DEVICES="2") == ""


def test_many_threads_at_their_first_launch():
    """They wait for one image, whose source is Python code, without waiting for each other."""
    code = """
    import time
    from concurrent.futures import ThreadPoolExecutor
    calls = []
    def slow(room, capability):
        calls.append(room)
        time.sleep(0.2)
        return room.encode()
    cuda.set_image_source(slow)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: launch(room=f"room {i % 2}", device=i % 3), range(48)))
    assert all(map(right, made))
    assert len(calls) <= 16 and set(calls) == {"room 0", "room 1"}
    """
    assert run(code, PYROUTE_EMULATED_DEVICES="3") == ""


FORK = """
import signal, warnings
warnings.simplefilter("ignore")
def in_child(check):
    child = os.fork()
    if not child:
        os._exit(0 if check() else 1)
    signal.alarm(20)  # a hang becomes a death
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_of_a_process_that_used_the_gpu_is_told():
    code = """
    assert right(launch())
    def refused():
        told = sentence(launch)
        return told.startswith("RuntimeError: CUDA was initialised before this process") and not cuda.num_devices()
    in_child(refused)
    in_child(lambda: in_child(refused) is None and refused())
    assert right(launch())
    """
    assert run(FORK + textwrap.dedent(code)) == ""


def test_a_child_of_a_process_that_did_not_may_use_it():
    assert run(FORK + "in_child(lambda: right(launch()))\nassert right(launch())\n") == ""


def test_a_fork_while_other_threads_launch():
    code = """
    import threading
    cuda.set_image_source(lambda room, capability: b"image")
    stop = threading.Event()
    def busy(i):
        while not stop.is_set():
            launch(room=f"room {i}")
    threads = [threading.Thread(target=busy, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        in_child(lambda: sentence(launch).startswith(("RuntimeError: CUDA was", "nothing raised")))
    stop.set()
    for thread in threads:
        thread.join()
    """
    assert run(FORK + textwrap.dedent(code)) == ""


CAPTURE = """
driver = emulated.library()
assert cuda.num_devices() == 1
stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
driver.cuStreamCreate(ctypes.byref(stream), 0)
given, made = to_device(x), to_device(np.zeros(256, np.uint32))
args = np.array([made.pointer, given.pointer, 0], np.uint64).tobytes()
assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
cuda.launch(0, stream.value, "probes", "probe_barrier", 1, 256, args, shared_bytes=200 << 10)
assert not to_host(made).any()
assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
assert driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_uint64(0)) == 0
assert driver.cuGraphLaunch(executable, stream) == 0
assert right(to_host(made))
mode = ctypes.c_int(1)
driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
assert mode.value == 0
"""


@pytest.mark.parametrize("check", ["0", "1"])
def test_a_first_launch_may_be_captured(check):
    assert run(CAPTURE, PYROUTE_CHECK=check) == ""


def test_check_names_the_kernel_that_failed():
    code = """
    emulated.fail_next("cuStreamSynchronize", 719)
    print(sentence(launch))
    """
    expected = "RuntimeError: kernel probe_barrier of probes: a kernel failed, this one or an earlier one"
    assert run(code, PYROUTE_CHECK="1").startswith(expected)
    for off in ("", "0"):
        assert run(code, PYROUTE_CHECK=off) == "nothing raised"
    assert run("launch(); print(cuda.last_kernel())", PYROUTE_CHECK="1") == "probe_barrier of probes"
    assert run("launch(); print(cuda.last_kernel())", PYROUTE_CHECK="0") == ""
