"""What is wrong with a matrix that a kernel made, in words that lead to the line: which rows and columns of a tile,
what lies there instead, and, for operands whose elements say where they lay, what was read in whose place.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

POISON = 0x7F  # every byte of memory that nothing wrote, as tests/cuda/real.py and emulated.py leave it


def ranges(numbers: Iterable[int], most: int = 6) -> str:
    """``0-63, 128-191``; regular steps as ``0-120 by 8``."""
    given = sorted(set(map(int, numbers)))
    if len(given) > 2 and len(steps := {b - a for a, b in itertools.pairwise(given)}) == 1 and steps != {1}:
        return f"{given[0]}-{given[-1]} by {steps.pop()}"
    runs: list[list[int]] = []
    for number in given:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words) + (f" and {len(runs) - most} runs more" if len(runs) > most else "")


def difference(got: np.ndarray, want: np.ndarray, starts: np.ndarray | None = None) -> str | None:
    """None where all is equal (any zero is any zero), else one sentence. ``starts``: where experts' rows begin."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
    wrong = ~(got.astype(np.float32) == want.astype(np.float32))
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    words = [
        f"{wrong.sum()} of {wrong.size} wrong, first at {list(first)}: expected {want[first]} ({bits(want[first])}), "
        f"got {got[first]} ({bits(got[first])})",
        *where(wrong, starts),
        *instead(got, want, wrong),
    ]
    return "; ".join(words)


def bits(value: Any) -> str:
    return f"0x{int(np.asarray(value).view(f'u{value.dtype.itemsize}')):0{2 * value.dtype.itemsize}x}"


def where(wrong: np.ndarray, starts: np.ndarray | None) -> list[str]:
    """The places of a tile of 128 x 128 that are wrong, and of which experts."""
    words = []
    if wrong.ndim == 3:
        words.append(f"experts {ranges(np.flatnonzero(wrong.any((1, 2))))}")
        wrong = wrong.any(0)
    rows, cols = (np.flatnonzero(wrong.any(1 - axis)) for axis in (0, 1))
    within = rows
    if starts is not None:
        expert = np.searchsorted(starts, rows, side="right") - 1
        words.append(f"experts {ranges(expert)}")
        within = rows - starts[expert]
    words.append(f"rows of a tile: {ranges(within % 128)}; columns of a tile: {ranges(cols % 128)}")
    if len(tiles := set((within // 128).tolist())) < -(-wrong.shape[0] // 128):
        words.append(f"tiles down: {ranges(tiles)}")
    if len(tiles := set((cols // 128).tolist())) < -(-wrong.shape[1] // 128):
        words.append(f"tiles across: {ranges(tiles)}")
    box = wrong[np.ix_(rows, cols)]
    if not box.all():
        words.append(f"{box.mean():.0%} of the elements there")
    return words


def instead(got: np.ndarray, want: np.ndarray, wrong: np.ndarray) -> list[str]:
    """What the wrong elements have in common."""
    raw = np.ascontiguousarray(got).view(np.uint8).reshape(*got.shape, -1)
    found, expected = got[wrong].astype(np.float64), want[wrong].astype(np.float64)
    words = []
    for what, mask in (
        ("not written", (raw == POISON).all(-1)[wrong]),
        ("0", found == 0),
        ("NaN", np.isnan(found)),
        ("infinite", np.isinf(found)),
    ):
        if mask.any():
            words.append(f"{'all' if mask.all() else f'{mask.sum()}'} {what}")
    with np.errstate(all="ignore"):
        ratio = found[expected != 0] / expected[expected != 0]
    if len(ratio) > 1 and np.isfinite(ratio).all() and np.ptp(ratio) == 0 and ratio[0]:
        words.append(f"all {ratio[0]:g} times what was expected")
    return words


# --- elements that say where they lay ---------------------------------------------------------------------------------
# Every element of an operand has a number from 1 on. The other operand picks one element for each of the result, so
# that the result is a map of what was read; numbers come in digits that every type holds exactly.

DIGIT = 8  # e5m2 has these whole numbers too


class Axes(NamedTuple):
    """Of an operand, innermost last: names, extents, and how many elements have 16 bytes along the last."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: int


def digits_of(shape: tuple[int, ...]) -> list[np.ndarray]:
    """The numbers of an operand's elements, digit by digit."""
    numbers = np.arange(1, int(np.prod(shape)) + 1).reshape(shape)
    digits = []
    while numbers.any():
        digits.append((numbers % DIGIT).astype(np.float32))
        numbers = numbers // DIGIT
    return digits


def numbers_from(results: list[np.ndarray]) -> np.ndarray:
    """The numbers again; 0 where nothing was read, -1 where what came is no number: several elements, or none whole."""
    total, whole = np.zeros(results[0].shape, np.int64), np.ones(results[0].shape, bool)
    for place, digit in enumerate(results):
        value = digit.astype(np.float64)
        whole &= (value >= 0) & (value < DIGIT) & (value == np.floor(value))
        total += np.where(whole, np.nan_to_num(value), 0).astype(np.int64) * DIGIT**place
    return np.where(whole, total, -1)


def misread(got: np.ndarray, want: np.ndarray, axes: Axes) -> str | None:
    """None where every element came from its place, else what came from where."""
    wrong = got != want
    if not wrong.any():
        return None
    had, due = got[wrong], want[wrong]
    inside = (had > 0) & (had <= np.prod(axes.shape)) & (due > 0)
    keys: list[Any] = ["nothing" if h == 0 else "a mixture" if h < 0 else "what should be nothing" for h in had]
    at = np.stack(np.unravel_index(np.maximum(due - 1, 0), axes.shape), -1)
    came = np.stack(np.unravel_index(np.clip(had - 1, 0, np.prod(axes.shape) - 1), axes.shape), -1)
    for i in np.flatnonzero(inside):
        keys[i] = tuple((came[i] - at[i]).tolist())
    if len(set(keys)) > 4 and (swizzle := exchanged(at[inside], came[inside], axes)):
        return f"{len(due)} of {wrong.size} misread: {swizzle}"
    words = []
    common = collections.Counter(keys).most_common(4)
    for key, count in common:
        chosen = at[[k == key for k in keys]]
        places = ", ".join(f"{n} {ranges(chosen[:, i])}" for i, n in enumerate(axes.names))
        if isinstance(key, tuple):
            shifts = " ".join(f"{n}{d:+d}" for n, d in zip(axes.names, key, strict=True) if d)
            words.append(f"{places} read from {shifts} ({count})")
        else:
            words.append(f"{places} read as {key} ({count})")
    if (left := len(set(keys)) - len(common)) > 0:
        words.append(f"and {left} shifts more")
    return f"{len(due)} of {wrong.size} misread: {'; '.join(words)}"


def exchanged(at: np.ndarray, came: np.ndarray, axes: Axes) -> str:
    """The signature of a wrong swizzle: 16-byte chunks exchanged within a row by a number of the row's own."""
    if not len(at) or (at[:, :-1] != came[:, :-1]).any() or (at[:, -1] % axes.chunk != came[:, -1] % axes.chunk).any():
        return ""
    flips = collections.defaultdict(set)
    for row, a, c in zip(at[:, -2] % 8, at[:, -1] // axes.chunk, came[:, -1] // axes.chunk, strict=True):
        flips[int(row)].add(int(a ^ c))
    if any(len(found) > 1 for found in flips.values()):
        return f"16-byte chunks of {axes.names[-1]} exchanged within rows, not by one number a row"
    by = {row: found.pop() for row, found in sorted(flips.items())}
    return f"16-byte chunks of {axes.names[-1]} exchanged: chunk ^ {by} by {axes.names[-2]} % 8, a wrong swizzle"
