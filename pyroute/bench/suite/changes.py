"""``--compare OLD.json``: what became slower or faster since, beyond the noise that both runs measured."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..terminal import UsageError, duration
from .report import STEADY, Cell, print_table

LEAST = 0.05  # a change of less is none, however quiet the machine
SAME_WORK = ("op", "case", "column", "threads", "cache")


class Change(NamedTuple):
    """One column of one case in both runs; ``ratio`` is the new time over the old one."""

    key: tuple[Any, ...]
    before: float
    after: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """Slower, faster, or the same within the noise, alike for a factor and its inverse."""
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if 1 / self.ratio > 1 + self.noise else "same"

    def as_dict(self) -> dict[str, Any]:
        facts = {"before_s": self.before, "after_s": self.after, "noise": self.noise, "verdict": self.verdict}
        return {**dict(zip(SAME_WORK, self.key, strict=True)), **facts}


def read(path: str) -> list[dict[str, Any]]:
    """The lines of an earlier ``bench --json``."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise UsageError(f"--compare: cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"--compare: {path} is not JSON") from None
    lines = document.get("lines") if isinstance(document, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise UsageError(f"--compare: {path} was not written by pyroute bench --json")
    return lines


def spread(line: dict[str, Any]) -> float:
    """Half the distance of the 10th and the 90th percentile, over the median."""
    return float((line["p90_s"] - line["p10_s"]) / 2 / line["median_s"])


def find(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[Change]:
    """The columns that both runs timed, the greatest slowdown first."""
    before = {key_of(line): line for line in old if line.get("median_s")}
    both = [(before[key_of(line)], line) for line in new if line.get("median_s") and key_of(line) in before]
    changes = [
        Change(key_of(now), then["median_s"], now["median_s"], max(LEAST, spread(then) + spread(now)))
        for then, now in both
    ]
    return sorted(changes, key=lambda change: -change.ratio)


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in SAME_WORK)


def machine_changed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """A sentence where the machine itself was not the same: then no time says anything about the code."""
    told = []
    if any(line["limits"].get("steadiness", 1) < STEADY for line in (*old, *new) if line.get("limits")):
        told.append("in one run at least it was busy")
    for name, key in (("multiply-adds", "fma_gflops"), ("copying", "copy_gbs"), ("products", "bf16_tflops")):
        rates = [
            max((line["limits"].get(key) or 0.0 for line in lines if line.get("limits")), default=0.0)
            for lines in (old, new)
        ]
        if all(rates) and abs(rates[1] / rates[0] - 1) > LEAST:
            told.append(f"{name} {rates[0]:.0f} then, {rates[1]:.0f} now")
    return f"the machine was not the same: {', '.join(told)}" if told else ""


def show(changes: list[Change], note: str, path: str) -> None:
    rows = []
    for change in changes:
        if change.verdict == "same":
            continue
        op, case, column, *_ = change.key
        style = "bad" if change.verdict == "slower" else "good"
        texts = f"{op} {case}", column, duration(change.before), duration(change.after), f"{change.ratio:.2f}"
        rows.append([*map(Cell, texts), Cell(f"{change.noise:.0%}"), Cell.of(change.verdict, style)])
    same = sum(change.verdict == "same" for change in changes)
    notes = [f"{same} of {len(changes)} times are the same within their noise"] + [note] * bool(note)
    if not changes:
        notes = ["no column of these cases is in both"]
    header = ("case", "column", "then", "now", "ratio", "noise", "")
    print_table(f"against {path}", header, rows, notes, "<<>>>><")
