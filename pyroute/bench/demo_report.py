"""What ``pyroute demo`` prints: six short parts, 80 columns, each with a caption for someone new to the subject."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .info import show_limits
from .limits import Limits
from .terminal import bar, columns, duration, number_of_bytes, show_table, show_text, sparkline

if TYPE_CHECKING:
    from rich.console import Console

GROUP_COLUMNS = 32
BAR = 40


def show(console: Console, report: dict[str, Any]) -> None:
    _show_title(console, report)
    _show_experts(console, report)
    _show_balance(console, report["balance"])
    _show_stages(console, report)
    _show_memory(console, report)
    _show_errors(console, report["error"])
    _show_numpy(console, report)
    console.print(f"\n[note]{report['seconds']:.0f} s in all, on the public API alone: pyroute/bench/demo.py[/]")


def _heading(console: Console, title: str, caption: str) -> None:
    console.print(f"\n[head]{title}[/]")
    show_text(console, caption)
    console.print()


def _show_title(console: Console, report: dict[str, Any]) -> None:
    settings, text = report["settings"], report["text"]
    console.print(f"[head]One Mixture-of-Experts layer reads {settings['tokens']:,} words[/]")
    own = "its full size"
    if settings["scale"] > 1:
        own = f"narrowed from {settings['model_hidden']} and {settings['model_intermediate']} to fit a minute"
    show_text(
        console,
        f"The router of {settings['model']}: each word goes to {settings['top_k']} of {settings['num_experts']} "
        f"experts. Hidden size {settings['hidden']}, experts of {settings['intermediate']} ({own}). "
        f'The words are those of Python\'s manual: "{text["beginning"]} ..."',
    )
    console.print()
    show_text(
        console,
        "Nothing is learnt here: word vectors come from counting which words stand together, router and experts are "
        "drawn at random. Routing, arithmetic and times are those of a real layer.",
    )


def _show_experts(console: Console, report: dict[str, Any]) -> None:
    load = report["experts"]["tokens_per_expert"]
    settings = report["settings"]
    mean = sum(load) / len(load)
    _heading(
        console,
        "1  Which experts the words used",
        f"One column per expert, as high as its number of words: {max(load):,} for the busiest one, {mean:,.0f} on "
        "average. In front of a row stands the number of its first expert.",
    )
    groups = settings["num_groups"]
    per_row = len(load) // groups if groups > 1 and len(load) // groups <= 64 else GROUP_COLUMNS
    rows = [load[i : i + per_row] for i in range(0, len(load), per_row)]
    side_by_side = 2 if per_row <= GROUP_COLUMNS and len(rows) % 2 == 0 and console.width >= 78 else 1
    for i in range(0, len(rows), side_by_side):
        line = ""
        for j, row in enumerate(rows[i : i + side_by_side]):
            line += f"  {(i + j) * per_row:>3} [mark]{columns(row, low=0, high=max(load))}[/]"
        console.print(line)
    console.print()
    show_text(
        console, "Words that are used alike go to the same experts. Some experts, and words that mostly went there:"
    )
    console.print()
    rows = [
        (str(example["expert"]), f"{example['tokens']:,}", _as_many_as_fit(example["words"], console.width - 18))
        for example in report["experts"]["examples"]
    ]
    show_table(console, ("expert", "load", "words"), rows, align=">><")


def _as_many_as_fit(words: list[dict[str, Any]], width: int) -> str:
    text = ""
    for entry in words:
        longer = f"{text}, {entry['word']}" if text else entry["word"]
        if text and len(longer) > width:
            break
        text = longer
    return text


def _show_balance(console: Console, balance: dict[str, Any]) -> None:
    before, after = balance["before"], balance["after"]
    curve = [point["max_over_mean"] for point in balance["curve"]]
    _heading(
        console,
        "2  Balance",
        "An overloaded expert makes all others wait. A bias per expert, moved by a fixed step against its load, "
        "changes who is chosen and never how much a chosen expert counts. "
        f"{balance['steps']} steps of {balance['first_rate']:.2g}, shrinking to 0:",
    )
    rows = [
        ("busiest expert / mean", f"{before['max_over_mean']:.2f}", f"{after['max_over_mean']:.2f}"),
        ("variation of the load", f"{before['variation']:.2f}", f"{after['variation']:.2f}"),
    ]
    show_table(console, ("", "before", "after"), rows, align="<>>")
    line = sparkline(curve, min(60, console.width - 16), low=1.0)
    console.print(f"\n  {curve[0]:.2f} [mark]{line}[/] {curve[-1]:.2f}")


def _show_stages(console: Console, report: dict[str, Any]) -> None:
    _heading(
        console,
        "3  Where the time goes",
        "Rates count the least bytes or operations that a stage needs; the last column is the share of what this "
        "machine can do at best.",
    )
    show_limits(console, Limits(**report["limits"]))
    console.print()
    rows = []
    for stage in report["stages"]:
        share = stage["share_of_limit"]
        rows.append(
            (
                stage["what"],
                duration(stage["seconds"]) if stage["seconds"] else "",
                _rate(stage),
                "" if share is None else f"{100 * share:.0f} %",
                "" if share is None else f"[mark]{bar(share, 20)}[/]",
            )
        )
    show_table(console, ("stage", "time", "rate", "of limit", ""), rows, align="<>>><")


def _rate(stage: dict[str, Any]) -> str:
    if stage["gbs"] is None:  # too short to tell
        return ""
    return f"{stage['gflops']:.3g} GFLOP/s" if stage["flops"] else f"{stage['gbs']:.3g} GB/s"


def _show_memory(console: Console, report: dict[str, Any]) -> None:
    here, settings = report["memory"], report["settings"]
    full = here["full_size"]
    saved = 100 * (1 - here["fp8_over_float32"])
    _heading(
        console,
        "4  Memory of the expert weights",
        "FP8 keeps a byte per weight and one float32 scale per block of 128x128: "
        f"{saved:.2f} % less than float32, scales counted.",
    )
    rows = []
    for name, key in (("float32", "float32_bytes"), ("bfloat16", "bfloat16_bytes"), ("FP8 + scales", "fp8_bytes")):
        share = here[key] / here["float32_bytes"]
        rows.append(
            (name, number_of_bytes(here[key]), number_of_bytes(full[key]), f"[mark]{bar(share, BAR * 3 // 4)}[/]")
        )
    show_table(console, ("", "here", f"{settings['model']} layer", ""), rows, align="<>><")


def _show_errors(console: Console, error: dict[str, Any]) -> None:
    _heading(
        console,
        "5  Error against float64",
        f"Of {error['rows']} words' outputs: distance from the same layer in float64 with unrounded weights, "
        "relative to the output's length. The worst word counts, not the mean. (An FP8 value has four significant "
        "bits: each factor alone is off by up to 6 %.)",
    )
    rows = [
        (name, f"{error[key]['worst_row']:.2g}", f"{error[key]['median_row']:.2g}")
        for name, key in (("float32", "float32"), ("FP8 weights and activations", "fp8"))
    ]
    show_table(console, ("", "worst word", "median"), rows, align="<>>")


def _show_numpy(console: Console, report: dict[str, Any]) -> None:
    numpy = report["numpy"]
    if numpy is None:
        console.print()
        show_text(console, "This was the NumPy fallback. The compiled backend would stand beside it here.")
        return
    _heading(
        console,
        "6  The same calls on the NumPy fallback",
        f"For the first {numpy['tokens']:,} words, since NumPy is slow at some of it.",
    )
    isa = report["machine"]["isa"]
    rows = [
        (
            stage["what"],
            duration(stage["numpy_seconds"]),
            duration(stage["seconds"]),
            f"{stage['numpy_seconds'] / stage['seconds']:.2g} x",
        )
        for stage in numpy["stages"]
        if stage["seconds"] and stage["numpy_seconds"]
    ]
    show_table(console, ("stage", "NumPy", isa, "faster"), rows, align="<>>>")
    same = numpy["same_ids"] and numpy["same_weights"]
    verdict = "[good]the same expert ids and the same weights, bit for bit[/]" if same else "[bad]different ids[/]"
    console.print(f"\n  Both chose {verdict}.")
