#!/usr/bin/env python3
"""Everything that has to hold on a GPU, in one command of under eight minutes: build, correctness, speed.

    python tools/gpu_check.py                    on a machine with a GPU; needs NumPy, ml_dtypes and pytest
    python tools/gpu_check.py --json out.json    the results and the end of every stage's output too, after each stage
    python tools/gpu_check.py --quick            fewer repeats, no sanitizer, small benchmarks
    python tools/gpu_check.py --stage exact      some stages
    python tools/gpu_check.py --emulated         without a GPU: the correctness stages on the emulated one

On a machine that is had for ten minutes at a time, what tells most first, then everything else:

    python tools/gpu_check.py --json first.json --stage build,device,probe,exact,graphs,repeats,bench
    python tools/gpu_check.py --json second.json --seconds 560 \\
        --stage build,device,tests,pytorch,cupy,memcheck,racecheck,initcheck,synccheck,nvrtc

It needs no network. Building takes cmake, a C++ compiler and pybind11 3; without them pyroute is taken as it is
installed. Without nvcc NVRTC compiles the kernels. PyTorch is needed for its own operations and the benchmarks, and
compute-sanitizer, CuPy and DeepGEMM (`pip install sgl-deep-gemm`, whose kernels need CUDA_HOME) are used where they are
there: a stage without what it needs is skipped and says so.

Every stage is a process of its own with its own time, prints one line, and says what it skipped and why. A stage whose
requirement failed is skipped; the others go on. Whatever a kernel does to the GPU ends with its process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HERE = str(ROOT / "tools/gpu_stages.py")
OUTPUT_KEPT = 6000  # characters of a stage's output in the JSON file


class Stage(NamedTuple):
    name: str
    seconds: int  # at most
    needs: tuple[str, ...]
    emulated: bool  # whether it also runs without a GPU
    quick: bool  # whether --quick runs it
    command: tuple[str, ...]
    package: str = ""  # that has to be there


def child(name: str) -> tuple[str, ...]:
    return (sys.executable, HERE, name)


def cases(module: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "tools/gpu_cases.py"), module)


# the script where there is one: `python -m pytest` would import the source tree before an installed package
_SCRIPT = Path(sys.executable).parent / "pytest"
# what the packages of that machine deprecate is no error of ours, nor is a plugin that they lack
OURS = ("-q", "-p", "no:cacheprovider", "-o", "addopts=-rfEs", "-W", "default")
PYTEST = (*((str(_SCRIPT),) if _SCRIPT.exists() else (sys.executable, "-m", "pytest")), *OURS)
WORKERS = ("-n", "8") if importlib.util.find_spec("xdist") else ()
# of what compilers make and of the emulator itself: they need no GPU, and minutes
NOT_THERE = tuple(f"--ignore-glob=*{name}" for name in ("_sass.py", "_layout.py", "_images.py", "_emulator*.py"))


def pytest(*arguments: str, seconds: int) -> tuple[str, ...]:
    """Stopped early enough to tell what failed until then. A test that hangs ends its process, with a stack."""
    if not importlib.util.find_spec("pytest_timeout"):
        return (*PYTEST, *arguments)
    until = (f"--session-timeout={seconds - 10}", f"--timeout={min(60, seconds - 10)}", "--timeout-method=thread")
    return (*PYTEST, *until, *arguments)


STAGES = (
    Stage("build", 240, (), True, True, child("build")),
    Stage("device", 60, ("build",), True, True, child("device")),
    Stage("probe", 90, ("device",), True, True, cases("gpu_probe")),
    Stage("exact", 120, ("device",), True, True, cases("gpu_exact")),
    Stage("graphs", 60, ("device",), True, True, pytest("tests/cuda/test_graph_capture.py", seconds=60)),
    Stage("repeats", 60, ("device",), True, True, child("repeats")),
    Stage("bench", 240, ("device",), True, True, child("bench"), "torch"),
    Stage(
        "tests", 200, ("device",), False, True,
        pytest(*WORKERS, *NOT_THERE, "--ignore-glob=*_pytorch.py", "--maxfail=25", "tests/cuda", seconds=200),
    ),
    Stage("pytorch", 120, ("device",), True, True, pytest("tests/cuda/test_pytorch.py", seconds=120), "torch"),
    Stage("cupy", 60, ("device",), False, True, child("cupy"), "cupy"),
    *(
        Stage(tool, 60, ("device",), False, False, child(tool))
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ),
    Stage("nvrtc", 90, ("device",), False, False, child("nvrtc")),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)


class Result(NamedTuple):
    stage: str
    status: str  # ok, failed, skipped
    seconds: float
    note: str  # one line
    output: str = ""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help=f"only these: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no sanitizer, small benchmarks")
    parser.add_argument("--emulated", action="store_true", help="on the emulated GPU; implies --quick")
    parser.add_argument("--seconds", type=int, default=480, help="of all stages together (480)")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--verbose", action="store_true", help="print what every stage prints, not only of failed ones")
    args = parser.parse_args(argv)
    names = [name for given in args.stage for name in given.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(NAMES)}")
    args.stage = names or list(NAMES)
    args.quick |= args.emulated
    return args


def environment(args: argparse.Namespace, folder: str) -> dict[str, str]:
    made = dict(os.environ, PYTHONUNBUFFERED="1")
    if built_in_place() or importlib.util.find_spec("pybind11"):  # else the installed package
        made["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    made["PYROUTE_TEST_DEVICE"] = "emulated" if args.emulated else "real"
    made["PYROUTE_GPU_CHECK"] = "quick" if args.quick else "full"
    made["PYROUTE_GPU_CHECK_FOLDER"] = folder
    made["PYROUTE_GPU_CHECK_PYTEST"] = json.dumps(PYTEST)
    if args.emulated:
        made["PYROUTE_EMULATOR_REQUIRED"] = "1"
    else:
        made.pop("PYROUTE_CUDA_DRIVER", None)
        made.setdefault("PYROUTE_CUDA_ARCHS", architectures())
    return made


@functools.cache
def architectures() -> str:
    """Those that the cards of this machine take, in CMake's words; empty where nobody says."""
    ask = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    numbers = sorted({int(text.replace(".", "")) for text in found if text.replace(".", "").isdigit()})
    return ";".join(dict.fromkeys(f"{number}a" if number >= 90 else "80" for number in numbers))


def built_in_place() -> bool:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return any((ROOT / f"pyroute/_cuda{suffix}").exists() for suffix in suffixes)


def run(stage: Stage, args: argparse.Namespace, folder: str, left: float) -> Result:
    """The stage in a process group of its own, which is ended when its time or that of all stages is up."""
    seconds_given = min(stage.seconds, int(left))
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment(args, folder), stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds_given)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may take its time to end a kernel
                    process.wait(30)
        output.seek(0)
        text = output.read()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    seconds = time.monotonic() - start
    if code is None:
        return Result(stage.name, "failed", seconds, f"not done after {seconds_given} s; last: {last}", text)
    if code == 77 or (code == 5 and stage.command[: len(PYTEST)] == PYTEST):  # pytest's 5: no tests
        return Result(stage.name, "skipped", seconds, last, text)
    status = "ok" if code == 0 else "failed"
    return Result(stage.name, status, seconds, last if code in (0, 1) else f"exit status {code}: {last}", text)


def check(args: argparse.Namespace, folder: str) -> list[Result]:
    """Stage after stage; what is known is written after each, for a machine that may be gone before the last."""
    results: dict[str, Result] = {}
    end = time.monotonic() + args.seconds
    for stage in STAGES:
        if stage.name not in args.stage:
            continue
        missing = [name for name in stage.needs if name in results and results[name].status != "ok"]
        if args.emulated and not stage.emulated:
            result = Result(stage.name, "skipped", 0, "needs a GPU")
        elif args.quick and not stage.quick:
            result = Result(stage.name, "skipped", 0, "not part of --quick")
        elif stage.package and not importlib.util.find_spec(stage.package):
            result = Result(stage.name, "skipped", 0, f"{stage.package} is not installed")
        elif missing:
            result = Result(stage.name, "skipped", 0, f"{missing[0]} {results[missing[0]].status}")
        elif end - time.monotonic() < 1:
            result = Result(stage.name, "skipped", 0, f"the {args.seconds} s are over: --stage {stage.name}")
        else:
            result = run(stage, args, folder, end - time.monotonic())
        results[stage.name] = result
        write(args, folder, list(results.values()))
        print(f"{result.stage:10} {result.status:8} {result.seconds:6.1f} s  {result.note}", flush=True)
        if result.output and (args.verbose or result.status == "failed"):
            print("".join(f"    {line}\n" for line in result.output.splitlines()[-60:]), end="", flush=True)
    return list(results.values())


def write(args: argparse.Namespace, folder: str, results: list[Result]) -> None:
    if not args.json:
        return
    found: dict[str, Any] = {
        name: json.loads(path.read_text())
        for name in ("device", "probe", "exact", "bench")  # of probe and exact what was not right
        if (path := Path(folder, f"{name}.json")).exists()
    }
    stages = [result._replace(output=result.output[-OUTPUT_KEPT:])._asdict() for result in results]
    content = json.dumps({"emulated": args.emulated, **found, "stages": stages}, indent=1) + "\n"
    Path(args.json).write_text(content)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = check(args, folder)
    counts = {status: sum(result.status == status for result in results) for status in ("ok", "failed", "skipped")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print(f"{'total':10} {summary}, {time.monotonic() - start:.0f} s{', emulated' if args.emulated else ''}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
