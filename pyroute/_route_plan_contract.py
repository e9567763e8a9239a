"""What the maps of a RoutePlan have to be: all of it where their values can be looked at, else their shapes."""

from __future__ import annotations

from typing import Any

from . import _backend, _check

MAX_ROWS = 2**31 - 1  # row maps are int32

MAPS: tuple[tuple[str, str, tuple[_check.Axis, ...]], ...] = (
    ("tokens_per_expert", "int32", (("num_experts", None),)),
    ("expert_offsets", "int64", (("num_experts + 1", None),)),
    ("row_to_token", "int32", (("num_rows", None),)),
    ("token_to_row", "int32", (("num_tokens", None), ("top_k", None))),
)


def check_maps(plan: Any) -> None:
    """The maps of a plan made by hand describe one assignment, so that no op reads or writes outside its arrays.

    On a GPU shapes are checked, and values with PYROUTE_CHECK=1: entries that lead outside count as -1.
    """
    if plan.num_experts < 1 or plan.top_k < 1:
        sizes = f"{plan.num_experts} and {plan.top_k}"
        raise _check.value_error("RoutePlan", "token_to_row", "of at least one expert and one slot", sizes)
    on_gpu = not _check.has_values(plan.row_to_token)
    if on_gpu:
        _check_shapes(plan)
    seen: list[Any] = [_check.values(getattr(plan, field)) for field, _, _ in MAPS]
    if any(array is None for array in seen):
        return
    counts, offsets, tokens, slots = seen
    xp = _backend.array_module(tokens)
    ends = xp.cumsum(-(-counts.astype(xp.int64) // plan.alignment) * plan.alignment)
    if counts.min() < 0 or offsets.shape != (counts.size + 1,) or offsets[0] != 0 or (offsets[1:] != ends).any():
        expected = "the starts of the experts' tokens_per_expert rows, padded"
        raise _check.value_error("RoutePlan", "expert_offsets", expected, _check.first_few(offsets))
    num_rows = int(ends[-1])
    if tokens.size < num_rows or (tokens.size > num_rows and not on_gpu):
        least = f"num_rows >= {num_rows}" if on_gpu else f"num_rows={num_rows}"
        raise _check.value_error("RoutePlan", "row_to_token", f"of shape [{least}]", list(tokens.shape))
    _check_assignment(xp, plan.num_tokens, counts, offsets, tokens, slots)


def _check_shapes(plan: Any) -> None:
    """What can be checked of a plan on a GPU without waiting for it."""
    axes = (("num_experts + 1", plan.num_experts + 1),)
    _check.shape("RoutePlan", "expert_offsets", plan.expert_offsets, axes)
    for field in ("row_to_token", "token_to_row"):
        size = getattr(plan, field).size
        if size > MAX_ROWS:
            raise _check.value_error("RoutePlan", field, f"of at most {MAX_ROWS} entries", size)


def _check_assignment(xp: Any, num_tokens: int, counts: Any, offsets: Any, tokens: Any, slots: Any) -> None:
    """Both maps say the same; on a GPU rows past the last segment are padding too."""
    row = xp.arange(tokens.size)
    expert = xp.searchsorted(offsets[1:], row, side="right")
    is_real = row - offsets[expert] < xp.append(counts, 0)[expert]  # none of the expert behind the last one
    if (tokens[~is_real] != -1).any() or (tokens[is_real] < 0).any() or (tokens >= num_tokens).any():
        expected = "tokens, and -1 on the padding at the end of each segment"
        raise _check.value_error("RoutePlan", "row_to_token", expected, _check.first_few(tokens))
    token, slot = xp.nonzero(slots != -1)
    rows = slots[token, slot]
    if not (
        rows.size == int(is_real.sum())
        and (rows >= 0).all()
        and (rows < tokens.size).all()
        and (tokens[rows] == token).all()
        and xp.unique(rows).size == rows.size
    ):
        expected = "the rows that row_to_token gives each token, once each"
        raise _check.value_error("RoutePlan", "token_to_row", expected, _check.first_few(slots.reshape(-1)))
