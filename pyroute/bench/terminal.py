"""Words and small pictures for a terminal: units, bars and sparklines as plain strings, and rich where it is installed.

rich decides about colour (none in a pipe, none under ``NO_COLOR``) and width (``COLUMNS``, 80 in a pipe). Everything
that computes works without it; only showing a report needs it.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

READABLE = 88  # characters: longer lines tire the eye, however wide the terminal
RAMP = " ▁▂▃▄▅▆▇█"
PARTS = " ▏▎▍▌▋▊▉"
IN_ASCII = str.maketrans(RAMP[1:] + PARTS[1:], "12345678" + "1234567")
INSTALL_RICH = 'needs rich to draw its report: pip install "pyroute-moe[cli]" (or use --json)'


class UsageError(Exception):
    """What the user asked for cannot be done: one sentence, exit status 2."""


class Steps(Protocol):
    """Where a long command says what it is doing."""

    def __call__(self, what: str, *, begins: bool = True) -> None:
        """The step that begins now, or what goes on inside it."""


def _digits(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(IN_ASCII)
    return text.encode("ascii", "replace").decode("ascii"), error.end


# Where the encoding of standard output lacks the blocks of pictures: eighths in digits, "?" for what else it lacks.
codecs.register_error("pyroute_digits", _digits)


def has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def report_console() -> Console:
    """The console of a report on standard output; UsageError without rich."""
    if not has_rich():
        raise UsageError(INSTALL_RICH)
    from rich.console import Console
    from rich.theme import Theme

    # Names of the eight basic colours only: a terminal's own palette keeps them readable on light and on dark.
    class Report(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with status 1, which is what a failed check means
            raise BrokenPipeError

    theme = Theme({"head": "bold", "note": "dim", "good": "green", "bad": "bold red", "mark": "cyan"})
    return Report(theme=theme, highlight=False, emoji=False)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Steps]:
    """A progress bar on standard error for ``total`` steps; silent where that is no terminal or rich is missing."""
    if not (has_rich() and sys.stderr.isatty()):
        yield lambda what, *, begins=True: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    room = max(10, console.width - 38)  # for the text; longer text would squeeze the bar
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def step(what: str, *, begins: bool = True) -> None:
            nonlocal begun
            begun += begins
            bar.update(task, description=what[:room], completed=begun - 1)

        yield step


def show_rows(console: Console, rows: Sequence[tuple[str, str]], *, label_width: int = 14) -> None:
    """Labelled lines, the text wrapped under itself; no trailing blanks, so that a copied report stays clean."""
    from rich.text import Text

    narrow = console.width < 50  # then a label stands on its own line
    indent = " " * (4 if narrow else label_width + 4)
    for label, markup in rows:
        if narrow and label:
            console.print(f"  {label}")
        head = indent if narrow else f"  {label:<{label_width}}  "
        for line in Text.from_markup(markup).wrap(console, max(10, min(READABLE, console.width) - len(indent))):
            line.rstrip()
            console.print(Text(head).append_text(line))
            head = indent


def show_text(console: Console, markup: str, *, indent: int = 0) -> None:
    """A paragraph, wrapped without the blanks that rich leaves at the ends of lines."""
    from rich.text import Text

    for line in Text.from_markup(markup).wrap(console, max(10, min(READABLE, console.width) - indent)):
        line.rstrip()
        console.print(Text(" " * indent).append_text(line))


def show_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str, indent: int = 2
) -> None:
    """Columns under a dim header, one character of ``align`` (``<`` or ``>``) each; cells may hold rich markup."""
    from rich.text import Text

    cells = [[Text(cell, style="note") for cell in header]]
    cells += [[Text.from_markup(cell) for cell in row] for row in rows]
    widths = [max(row[i].cell_len for row in cells) for i in range(len(header))]
    for row in cells:
        line = Text(" " * indent)
        for cell, width, side in zip(row, widths, align, strict=True):
            blanks = Text(" " * (width - cell.cell_len))
            line.append_text(blanks + cell if side == ">" else cell + blanks)
            line.append("  ")
        line.rstrip()
        console.print(line)


def write_json(document: dict[str, Any], path: str) -> None:
    """The document as JSON to a file, or to standard output for ``-``."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def number_of_bytes(n: float) -> str:
    """Decimal units as memory is sold and bandwidth is counted: ``704.6 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def duration(seconds: float) -> str:
    """Three significant digits: ``14.2 ms``."""
    for factor, unit in ((1e9, "ns"), (1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def sparkline(values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None) -> str:
    """One character per bucket of values, the bucket's mean as the height of a block; ``low`` is one eighth."""
    count = min(width, len(values))
    means = []
    for i in range(count):
        bucket = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(bucket) / len(bucket))
    return columns(means, low=low, high=high)


def columns(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> str:
    """One block character per value: ``low`` (or less) is one eighth high, ``high`` is full."""
    if not values:
        return ""
    bottom = min(values) if low is None else low
    top = max(values) if high is None else high
    span = top - bottom
    heights = [0.0 if span <= 0 else (value - bottom) / span for value in values]
    return "".join(RAMP[1 + round(7 * min(1.0, max(0.0, height)))] for height in heights)


def bar(fraction: float, width: int) -> str:
    """A horizontal bar, in eighths of a character."""
    eighths = round(min(1.0, max(0.0, fraction)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (PARTS[rest] if rest else "")
