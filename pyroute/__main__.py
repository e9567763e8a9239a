"""``python -m pyroute``, or ``pyroute``: look at the installation, see it work, check it.

Exit status: 0 done, 1 ``check`` found a difference or ``bench --compare`` something slower, 2 the command cannot be
done as asked, 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from . import __version__, presets, set_num_threads
from .bench.suite import options
from .bench.terminal import UsageError


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    return _integer(text, 1)


def natural(text: str) -> int:
    return _integer(text, 0)


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def _integer(text: str, low: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if number < low:
        raise argparse.ArgumentTypeError(f"must be at least {low}, got {number}")
    return number


def build_parser() -> Parser:
    parser = Parser(prog="pyroute", description="Expert routing for Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"pyroute {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        sub.add_argument(
            "--json", metavar="FILE", nargs="?", const="-", help="write the results as JSON to FILE, '-' for stdout"
        )
        return sub

    info = command("info", "what is installed, which backends can run, and why the others cannot")
    info.add_argument("--limits", action="store_true", help="measure this machine's limits too (about two seconds)")
    info.set_defaults(run=run_info)

    demo = command("demo", "one MoE layer reads a text: which experts, how fast, how exact; under a minute")
    demo.add_argument("--model", metavar="NAME", choices=presets(), default="deepseek-v3", help="a preset of pyroute")
    demo.add_argument("--tokens", metavar="N", type=positive, help="words to read (4096; 1024 on the NumPy fallback)")
    demo.add_argument("--full-size", action="store_true", help="the model's own widths, for as long as that takes")
    demo.add_argument("--backend", choices=("cpu", "numpy"), help="the fastest one by default")
    demo.add_argument("--seed", metavar="N", type=natural, default=0, help="of everything that is drawn at random")
    demo.set_defaults(run=run_demo)

    check = command("check", "every backend against the reference on this machine, for a bug report")
    check.add_argument("--seed", metavar="N", type=natural, default=0, help="of the inputs")
    check.set_defaults(run=run_check)

    bench = command("bench", "times of every operation beside the machine's limits, bars and other libraries")
    options.add_bench(bench)
    bench.set_defaults(run=run_bench)

    cost = command("cost", "what a model costs: operations, memory, device hours and money, with every assumption")
    cost.add_argument("--model", metavar="NAME", default="deepseek-v3", help="a released model (deepseek-v3)")
    cost.add_argument("--training-tokens", metavar="N", type=positive_number, help="tokens to train on (14.8e12)")
    cost.add_argument("--price", metavar="USD", type=positive_number, default=2.0, help="of a device for an hour (2)")
    cost.add_argument("--rate", metavar="TFLOPS", type=positive_number, help="what a device of yours sustains")
    cost.add_argument("--sequence", metavar="N", type=positive, default=4096, help="tokens that attend (4096)")
    cost.add_argument("--no-measure", action="store_true", help="leave out this machine's own rates (a few seconds)")
    cost.set_defaults(run=run_cost)
    add_placement(command("placement", "where experts should live, from a recorded trace of their loads"))
    for sub in (demo, check, cost):
        sub.add_argument("--threads", metavar="N", type=positive, help="threads of the cpu backend")
    return parser


def add_placement(parser: argparse.ArgumentParser) -> None:
    trace = "tokens per expert [E], [L, E] or [steps, L, E]: .npy or JSON; or zipf:EXPONENT"
    parser.add_argument("trace", metavar="TRACE", help=trace)
    parser.add_argument("--devices", metavar="N", type=positive, required=True, help="that share the experts")
    parser.add_argument("--slots", metavar="N", type=positive, help="of all devices (experts, rounded up to devices)")
    parser.add_argument("--nodes", metavar="N", type=positive, default=1, help="each of which holds whole groups")
    parser.add_argument("--groups", metavar="N", type=positive, default=1, help="of the router")
    parser.add_argument("--plot", metavar="FILE", help="a heat map of the devices' loads: .svg, or a page")
    model = parser.add_argument_group("on a cluster", "times by the model of docs/scaling.md, every assumption printed")
    model.add_argument("--cluster", metavar="NAME", help="whose links and devices: h800")
    model.add_argument("--model", metavar="NAME", default="deepseek-v3", help="whose layers (deepseek-v3)")
    model.add_argument("--tokens", metavar="N", type=positive, default=4096, help="of a device at a time (4096)")
    model.add_argument("--total", metavar="N", type=positive, help="devices of a whole training run: its step, too")
    model.add_argument("--stages", metavar="N", type=positive, default=16, help="of its pipeline (16)")
    model.add_argument(
        "--batch", metavar="N", type=positive, default=15360 * 4096, help="tokens of a step (15360 x 4096)"
    )
    parser.set_defaults(run=run_placement)


def deliver(
    args: argparse.Namespace, make: Callable[[], dict[str, Any]], show: Callable[[Any, dict[str, Any]], None]
) -> dict[str, Any]:
    """Make a report, write it where ``--json`` says, and show it unless standard output is for the JSON."""
    from .bench import terminal

    console = None if args.json == "-" else terminal.report_console()  # raises before anything is measured
    if getattr(args, "threads", None):
        set_num_threads(args.threads)
    report = make()
    if args.json:
        terminal.write_json(report, args.json)
    if console:
        show(console, report)
    return report


def run_info(args: argparse.Namespace) -> int:
    from .bench import info

    deliver(args, lambda: info.collect(with_limits=args.limits), info.show)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from .bench import demo, demo_report, terminal

    def make() -> dict[str, Any]:
        options = demo.Options(args.model, args.tokens, args.full_size, args.seed, args.backend)
        with terminal.progress(demo.NUM_STEPS) as step:
            return demo.run(options, step)

    deliver(args, make, demo_report.show)
    return 0


def run_check(args: argparse.Namespace) -> int:
    from .bench import check, terminal

    def make() -> dict[str, Any]:
        with terminal.progress(check.NUM_CASES) as step:
            return check.run(args.seed, step)

    return 0 if deliver(args, make, check.show)["passed"] else 1


def run_bench(args: argparse.Namespace) -> int:
    from .bench import terminal

    if args.gpu:
        return run_gpu_bench(args)
    from .bench.suite.run import bench

    if args.json != "-":
        terminal.report_console()  # raises before anything is measured if nothing could be shown
    return bench(args)


def run_gpu_bench(args: argparse.Namespace) -> int:
    options.refuse_on_gpu(args)
    try:
        from .bench.suite.gpu.run import bench
    except ImportError as error:
        raise UsageError(f"bench --gpu needs PyTorch: {error}") from None
    return bench(args)


def run_cost(args: argparse.Namespace) -> int:
    from .bench import cost, terminal

    def make() -> dict[str, Any]:
        known = {"tokens": args.training_tokens, "price": args.price, "sequence": args.sequence, "rate": args.rate}
        cost.sizes_of(args.model)
        with terminal.progress(0 if args.no_measure else cost.NUM_STEPS) as step:
            measured = {} if args.no_measure else cost.measure_rates(args.model, step)
        return cost.estimate(args.model, **known, measured=measured)

    deliver(args, make, cost.show)
    return 0


def run_placement(args: argparse.Namespace) -> int:
    from .bench import placement_plot, placement_report, scaling_report

    def make() -> dict[str, Any]:
        sizes = {"num_slots": args.slots, "num_nodes": args.nodes, "num_groups": args.groups}
        machines = scaling_report.Options(
            args.cluster, args.model, args.tokens, args.total, args.stages, args.batch
        ).checked()
        trace = placement_report.read_trace(args.trace, args.model)
        report = placement_report.make(trace, args.devices, **sizes)
        if args.cluster:
            placement_report.add_cluster(report, trace, machines)
        return report

    report = deliver(args, make, placement_report.show)
    if args.plot:
        title = f"{report['experts']} experts in {report['slots']} slots on {report['devices']} devices"
        notes = report.get("scaling", {}).get("assumed", [])
        placement_plot.write(args.plot, placement_report.relative_loads(report), title, notes)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="pyroute_digits")  # a terminal without block characters is no reason to die
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"pyroute {args.command}: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"pyroute {args.command}: not enough memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyroute: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 141


if __name__ == "__main__":
    sys.exit(main())
