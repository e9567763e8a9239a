"""Many small checks on a GPU of which one may hang or lose the context: they run in one process as long as that lives.

    python tools/gpu_cases.py gpu_exact          every case of the module's cases()
    python tools/gpu_cases.py gpu_exact --only 3 the third alone, in this process

A case is a function that returns None, or what was wrong. The process that runs them says which one it begins; the one
that watches it ends it when a case takes too long, starts another for the next case, and goes on. A family of cases
(what their names begin with) that ended two processes is left out from then on. What hung runs once more with kernels
that stop and tell what they waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
TRAP_SECONDS = 100  # NVRTC compiles a whole file of kernels first


class Case(NamedTuple):
    name: str  # "family: what"
    run: Callable[[], str | None]
    alone: bool = False  # in a process that has done nothing before

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]


class Found(NamedTuple):
    """A case that was not right."""

    name: str
    kind: str  # wrong, raised, hung, crashed
    what: str


# --- the process that runs them ---------------------------------------------------------------------------------------


def work(cases: list[Case], numbers: Iterable[int], trap: bool) -> int:
    if trap:
        import emulated

        emulated.trap_hangs()
    for count, number in enumerate(numbers):
        case = cases[number]
        if case.alone and count:
            return 0  # the next process begins with it
        say(begins=number)
        kind, what = "", ""
        try:
            kind, what = ("wrong", found) if (found := case.run()) else ("", "")
        except Exception as error:
            kind, what = "raised", f"{type(error).__name__}: {error}"
            if trap and (told := emulated.told_of_hangs()):
                what = f"{told}; {what}"
        lost = "can use this GPU no more" in what
        say(ends=number, kind="crashed" if lost else kind, what=what)
        if lost or case.alone:
            return 0
    return 0


def say(**words: int | str) -> None:
    print("\x1e" + json.dumps(words), flush=True)


# --- the process that watches -----------------------------------------------------------------------------------------


def watch(module: str, cases: list[Case], seconds: float) -> Iterator[Found]:
    """What was found of every case, in order; ``seconds`` for one."""
    number, deaths = 0, dict.fromkeys((case.family for case in cases), 0)
    while number < len(cases):
        if deaths[cases[number].family] >= 2:
            number += 1
            continue
        last = number - 1
        for kind, at, what in spoken(module, number, seconds):
            last = max(last, at)
            if kind in ("hung", "crashed"):
                deaths[cases[at].family] += 1
                if kind == "hung":
                    what = f"{what}; {second_look(module, at)}"
            if kind:
                yield Found(cases[at].name, kind, what)
            if deaths[cases[at].family] >= 2:
                break
        if last < number:  # a process that began nothing: neither would the next
            yield Found(cases[number].name, "crashed", "its process ended before the case began")
            return
        number = last + 1
    for family, count in deaths.items():
        if count >= 2:
            yield Found(family, "crashed", "two of them ended their process: the others of this family were left out")


def spoken(module: str, first: int, seconds: float) -> Iterator[tuple[str, int, str]]:
    """(kind, case, what) from one process that begins with case ``first``; kind is empty where all is right."""
    command = [sys.executable, str(HERE), module, "--first", str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=pump, daemon=True)
    reader.start()
    running, begun = None, 0.0
    try:
        end = time.monotonic() + max(seconds, 60)  # to import and to load
        while True:
            try:
                line = lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                if running is not None:
                    yield "hung", running, f"not done after {seconds:.0f} s"
                return
            if line is None:
                break
            if not line.startswith("\x1e"):
                print(line, end="", flush=True)
                continue
            said = json.loads(line[1:])
            end = time.monotonic() + seconds
            if "begins" in said:
                running, begun = said["begins"], time.monotonic()
                continue
            took = time.monotonic() - begun
            if took > 2:
                print(f"case {running} took {took:.1f} s", flush=True)
            running = None
            yield said["kind"], said["ends"], said["what"]
        if running is not None:
            yield "crashed", running, f"its process ended with status {process.wait()}"
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may take its time to end a kernel
            process.wait(30)
        reader.join(5)


def environment() -> dict[str, str]:
    return dict(os.environ, PYROUTE_CHECK="1")  # a kernel that fails is named, and so is what was launched last


def second_look(module: str, number: int) -> str:
    """What a case that hung waits for."""
    command = [sys.executable, str(HERE), module, "--only", str(number), "--trap"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRAP_SECONDS, env=environment())
    except subprocess.TimeoutExpired:
        return f"with trapping kernels not done after {TRAP_SECONDS} s either: not a wait of csrc/cuda/sm90/ring.cuh"
    told = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("\x1e")]
    ends = [said for said in told if "ends" in said]
    if not ends:
        return f"with trapping kernels it ended with status {done.returncode}: {done.stderr[-300:]}"
    return f"with trapping kernels: {ends[0]['what'] or 'it ends, and is right'}"


def report(module: str, cases: list[Case], seconds: float) -> str:
    """Runs all; the sentence for the summary, or SystemExit with it where something was found."""
    found = []
    for each in watch(module, cases, seconds):
        print(f"{each.kind.upper()} {each.name}\n    {each.what}", flush=True)
        found.append(each._asdict())
        if folder := os.environ.get("PYROUTE_GPU_CHECK_FOLDER"):
            Path(folder, f"{module.removeprefix('gpu_')}.json").write_text(json.dumps(found))
    if found:
        raise SystemExit(f"{len(found)} of {len(cases)} not right, first {found[0]['name']}: {found[0]['what']}")
    return f"{len(cases)} cases right"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_cases.py", description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("--first", type=int, help="run this one and what follows, here")
    parser.add_argument("--only", type=int, help="run this one, here")
    parser.add_argument("--trap", action="store_true", help="with kernels that stop where they would wait for ever")
    parser.add_argument("--seconds", type=float, default=15, help="for one case (15)")
    args = parser.parse_args(argv)
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests/cuda")]
    cases = importlib.import_module(args.module).cases()
    if args.only is not None:
        return work(cases, [args.only], args.trap)
    if args.first is not None:
        return work(cases, range(args.first, len(cases)), args.trap)
    print(report(args.module, cases, args.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
