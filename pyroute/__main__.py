"""``python -m pyroute``, or ``pyroute``: look at the installation, see it work, check it.

Exit status: 0 done, 1 ``check`` found a difference, 2 the command cannot be done as asked, 130 interrupted, 141 the
reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from . import __version__
from .bench.terminal import UsageError


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "positive number"  # argparse: "invalid positive number value: '0'"


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
    return parser


def run_info(args: argparse.Namespace) -> int:
    from .bench import info, terminal

    console = None if args.json == "-" else terminal.report_console()
    facts = info.collect(with_limits=args.limits)
    if args.json:
        terminal.write_json(facts, args.json)
    if console:
        info.show(console, facts)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a block character is no reason to die
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"pyroute {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyroute: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 141


if __name__ == "__main__":
    sys.exit(main())
