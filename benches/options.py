"""Options that compare.py and scaling.py share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pyroute
from pyroute.bench.terminal import UsageError


def parser(program: str, description: str, *, rounds: int, quick: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=program, description=description)
    made.add_argument("--threads", type=int, default=0, help="threads of everybody (default: all)")
    made.add_argument("--rounds", type=int, default=rounds, help="samples of each")
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", metavar="FILE", help="write the results, - for standard output")
    made.add_argument("--record", action="store_true", help="append to benches/results")
    return made


def check(args: argparse.Namespace, *, quick_rounds: int) -> argparse.Namespace:
    """The same with the defaults of this machine and of ``--quick`` filled in."""
    if args.threads < 0 or args.rounds < 1:
        raise UsageError("--threads and --rounds must be at least 1")
    args.threads = args.threads or pyroute.get_num_threads()
    args.rounds = quick_rounds if args.quick else args.rounds
    return args


def some_of(option: str, given: str, known: Sequence[str]) -> list[str]:
    """The names between the commas; all of them where there are none."""
    names = [name for name in given.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names or list(known)
