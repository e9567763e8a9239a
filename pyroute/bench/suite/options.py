"""The options of ``pyroute bench``; importing this loads nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pyroute

from ..terminal import UsageError

LOADS = ("random", "balanced", "zipf", "one-hot", "half-empty")
# of the table: bars.py has the cases
ROWS = ("gate", "permute", "quantize", "decode", "prefill", "backward", "layer", "training")
# of --scaling: scaling_cases.py has the sizes
SCALED = ("gate", "permute", "unpermute", "quantize", "gemm", "layer")
PARTS = ("growth", "threads", "loads", "sizes")


# not a released model: as many experts as are spoken of, in Kimi K2's widths; experts, slots, hidden, intermediate
LIKE = {"kimi-k3-like": (896, 16, 7168, 2048)}
MODELS = (*pyroute.presets(), *LIKE)


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", metavar="OP", nargs="*", help=f"some of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--gpu", action="store_true", help="the CUDA kernels and their peers on the current GPU")
    parser.add_argument("--peers", action="store_true", help="other libraries beside pyroute, those that are installed")
    parser.add_argument("--model", metavar="NAME", choices=MODELS, help="every operation on this model's layer")
    parser.add_argument(
        "--load",
        default="random",
        metavar="HOW",
        help="of the model's experts: random, balanced, zipf[:EXPONENT], one-hot, half-empty",
    )
    parser.add_argument("--columns", default="", help="only columns whose name contains one of these, with commas")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--cold", action="store_true", help="empty the caches before every call")
    parser.add_argument("--plot", metavar="FILE.html", help="one page with pictures of everything that was measured")
    parser.add_argument("--compare", metavar="OLD.json", help="what became slower since; exit status 1 if anything did")
    parser.add_argument("--cost", action="store_true", help="what the --model costs at the rates just measured, too")
    parser.add_argument("--scaling", action="store_true", help="how times grow with sizes, threads and load instead")
    parser.add_argument("--parts", default="", help=f"of --scaling: some of {','.join(PARTS)}")
    parser.add_argument("--threads", metavar="N", type=int, default=0, help="threads of everybody (default: all)")
    parser.add_argument("--rounds", metavar="N", type=int, help="samples of each")
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs")
    parser.add_argument("--record", action="store_true", help="append the results to benches/results")


def load(text: str) -> str:
    """A load of the experts; UsageError for another word."""
    name, colon, exponent = text.partition(":")
    try:
        fine = name in LOADS and (not colon or (name == "zipf" and 0 < float(exponent) < 100))
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(f"--load must be one of {', '.join(LOADS)}, zipf with its exponent as zipf:1.5, got {text}")
    return text


def check(args: argparse.Namespace, *, rounds: int, quick_rounds: int) -> None:
    """Fill in the defaults of this machine and of ``--quick``."""
    if args.threads < 0 or (args.rounds is not None and args.rounds < 1):
        raise UsageError("--threads and --rounds must be at least 1")
    args.threads = args.threads or pyroute.get_num_threads()
    args.rounds = args.rounds or (quick_rounds if args.quick else rounds)


def refuse_on_gpu(args: argparse.Namespace) -> None:
    """What only the CPU's suite has, in one sentence; caches are always cold on a GPU."""
    if given := [f"--{name}" for name in ("scaling", "parts", "plot", "cost", "threads") if getattr(args, name)]:
        raise UsageError(f"bench --gpu does not take {', '.join(given)}")


def some_of(option: str, given: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """The names given, with commas between them or one by one; all of them where there are none."""
    names = [name for name in (given.split(",") if isinstance(given, str) else given) if name]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names or list(known)
