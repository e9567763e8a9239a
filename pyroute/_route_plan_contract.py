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


def _check_sizes(plan: Any) -> None:
    if plan.num_experts < 1 or plan.top_k < 1:
        sizes = f"{plan.num_experts} and {plan.top_k}"
        raise _check.value_error("RoutePlan", "token_to_row", "of at least one expert and one slot", sizes)


def check_shapes(plan: Any) -> None:
    """What can be checked of a plan on a GPU."""
    _check_sizes(plan)
    axes = (("num_experts + 1", plan.num_experts + 1),)
    _check.shape("RoutePlan", "expert_offsets", plan.expert_offsets, axes)
    for field in ("row_to_token", "token_to_row"):
        size = getattr(plan, field).size
        if size > MAX_ROWS:
            raise _check.value_error("RoutePlan", field, f"of at most {MAX_ROWS} entries", size)


def check_maps(plan: Any) -> None:
    """The maps of a plan made by hand describe one assignment, so that no op reads or writes outside its arrays."""
    xp = _backend.array_module(plan.row_to_token)
    counts, offsets, tokens, slots = (getattr(plan, field) for field, _, _ in MAPS)
    _check_sizes(plan)
    ends = xp.cumsum(-(-counts.astype(xp.int64) // plan.alignment) * plan.alignment)
    if counts.min() < 0 or offsets.shape != (counts.size + 1,) or offsets[0] != 0 or (offsets[1:] != ends).any():
        expected = "the starts of the experts' tokens_per_expert rows, padded"
        raise _check.value_error("RoutePlan", "expert_offsets", expected, _check.first_few(offsets))
    if tokens.size != int(ends[-1]):
        raise _check.value_error(
            "RoutePlan", "row_to_token", f"of shape [num_rows={int(ends[-1])}]", list(tokens.shape)
        )
    row = xp.arange(tokens.size)
    expert = xp.searchsorted(offsets[1:], row, side="right")
    is_real = row - offsets[expert] < counts[expert]
    if (tokens[~is_real] != -1).any() or (tokens[is_real] < 0).any() or (tokens >= plan.num_tokens).any():
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
