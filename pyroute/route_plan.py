"""plan_routes gives every slot of every token its row; RoutePlan holds that map and writes other libraries' layouts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from . import _backend, _check
from . import _route_plan_contract as _contract
from ._array import permutation as _array
from ._device import route_plan as _device

Array = Any

MAX_ROWS = _contract.MAX_ROWS


class DeepGemmLayout(NamedTuple):
    """What DeepGEMM's grouped GEMMs read: ``m_indices`` for the contiguous layout, ``masked_m`` for the masked one."""

    m_indices: Array  # int32 [num_rows]: each row's expert, -1 on padding
    masked_m: Array  # int32 [num_experts]: true rows per expert


class BlockLists(NamedTuple):
    """What vLLM's and SGLang's fused MoE kernels read, as ``moe_align_block_size`` writes it."""

    sorted_token_ids: Array  # int32 [num_tokens_post_padded]: flat slots t * top_k + j, T * top_k on padding
    expert_ids: Array  # int32 [num_tokens_post_padded / block]: each block's expert
    num_tokens_post_padded: Array  # int32 [1]


@dataclasses.dataclass(frozen=True, eq=False)
class RoutePlan:
    """Rows of the expert-sorted matrix: by expert, then token, then slot; made by :func:`plan_routes`.

    Each expert's segment is padded at its end to a multiple of ``alignment`` rows; an expert without tokens has an
    empty segment. R, the number of rows, is ``expert_offsets[-1]``; on a GPU, where nothing waits to learn it, the
    least number that is enough for any ids, and rows from ``expert_offsets[-1]`` on are padding.

    Parameters
    ----------
    tokens_per_expert : int32 [num_experts]
        Slots routed to each expert, padding not counted.
    expert_offsets : int64 [num_experts + 1]
        First row of each expert's segment; the last entry is R.
    row_to_token : int32 [R]
        The token of each row, -1 on padding rows.
    token_to_row : int32 [num_tokens, top_k]
        The row of each slot, -1 where the slot is not routed.
    alignment : int

    Raises
    ------
    TypeError, ValueError
        In one sentence, when the maps do not describe one assignment: a plan made by hand is read in full. On a GPU its
        shapes are, and an entry that is no row or token counts as -1.
    """

    tokens_per_expert: Array
    expert_offsets: Array
    row_to_token: Array
    token_to_row: Array
    alignment: int = 1

    def __post_init__(self) -> None:
        for field, dtype, axes in _contract.MAPS:
            array = _backend.as_array("RoutePlan", field, getattr(self, field), (dtype,), axes)
            object.__setattr__(self, field, array)
        _backend.check_together("RoutePlan", *(getattr(self, field) for field, _, _ in _contract.MAPS))
        _check.integer("RoutePlan", "alignment", self.alignment, 1, MAX_ROWS)
        _contract.check_maps(self)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_to_row.shape[0])

    @property
    def top_k(self) -> int:
        """Slots per token."""
        return int(self.token_to_row.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.tokens_per_expert.shape[0])

    @property
    def num_rows(self) -> int:
        """R: rows of the expert-sorted matrix, padding included."""
        return int(self.row_to_token.shape[0])

    @property
    def has_padding(self) -> bool:
        """Whether any row is padding."""
        _with_values("has_padding", self)
        return self.num_rows > int(self.tokens_per_expert.sum())

    def _slot_experts(self) -> tuple[Array, Array]:
        """The routed slots as flat numbers t * top_k + j in ascending order, and the expert of each."""
        xp = _backend.array_module(self.token_to_row)
        rows = self.token_to_row.reshape(-1)
        slots = xp.flatnonzero(rows >= 0)
        return slots, xp.searchsorted(self.expert_offsets[1:], rows[slots], side="right")

    def to_torch_offsets(self) -> Array:
        """``offs`` of ``torch.nn.functional.grouped_mm``: each expert's end row, int32 [num_experts]."""
        if _on_gpu("to_torch_offsets", self):
            return _device.torch_offsets(self)
        return self.expert_offsets[1:].astype("int32")

    def to_deepgemm(self) -> DeepGemmLayout:
        """``(m_indices, masked_m)`` of DeepGEMM (m_grouped_fp8_gemm_nt_contiguous and ..._nt_masked).

        Its contiguous layout wants segments that start at multiples of 128 rows on Hopper: plan with ``alignment=128``.
        """
        if _on_gpu("to_deepgemm", self):
            return DeepGemmLayout(_device.row_experts(self), self.tokens_per_expert)
        xp = _backend.array_module(self.row_to_token)
        expert = xp.searchsorted(self.expert_offsets[1:], xp.arange(self.num_rows), side="right")
        m_indices = xp.where(self.row_to_token >= 0, expert, -1).astype(xp.int32)
        return DeepGemmLayout(m_indices, self.tokens_per_expert)

    def to_te_row_id_map(self, map_type: Literal["mask", "index"] = "mask") -> Array:
        """TransformerEngine's ``row_id_map``, as its ``moe_permute(..., map_type=)`` returns it.

        ``"mask"``: int32 [num_tokens, 2 * num_experts + 1]; per token its n rows from last to first, from column
        num_experts on the experts of those rows, and n in the last column (other entries are -1).
        ``"index"``: int32 [num_tokens * top_k], slot-major (entry ``j * num_tokens + t``), -1 where not routed.

        Raises
        ------
        ValueError
            "mask" for a token with one expert in two slots, which a mask cannot express.
        """
        _check.one_of("to_te_row_id_map", "map_type", map_type, ("mask", "index"))
        if map_type == "index":
            return _device.rows_by_slot(self) if _on_gpu("to_te_row_id_map", self) else self.token_to_row.T.reshape(-1)
        _with_values("to_te_row_id_map('mask')", self)
        xp = _backend.array_module(self.token_to_row)
        slots, experts = self._slot_experts()
        token = slots // self.top_k
        dense = xp.full((self.num_tokens, self.num_experts), -1, xp.int32)
        dense[token, experts] = self.token_to_row.reshape(-1)[slots]
        num_routed = (dense >= 0).sum(axis=1)
        if int(num_routed.sum()) != slots.size:
            expected = "'index' when a token has one expert in two slots"
            raise _check.value_error("to_te_row_id_map", "map_type", expected, "'mask'")
        order = xp.argsort(-dense, axis=1, kind="stable")  # rows rise with the expert, so this is last to first
        real = xp.arange(self.num_experts)[None, :] < num_routed[:, None]
        result = xp.full((self.num_tokens, 2 * self.num_experts + 1), -1, xp.int32)
        result[:, : self.num_experts] = xp.where(real, xp.take_along_axis(dense, order, axis=1), -1)
        result[:, self.num_experts : -1] = xp.where(real, order, -1)
        result[:, -1] = num_routed
        return result

    def to_block_lists(self, block: int) -> BlockLists:
        """vLLM's and SGLang's ``moe_align_block_size``: slots by expert, each expert padded to whole blocks.

        Independent of the plan's own alignment. Slots that are not routed are left out.
        """
        block = _check.integer("to_block_lists", "block", block, 1, MAX_ROWS)
        _with_values("to_block_lists", self)
        xp = _backend.array_module(self.token_to_row)
        slots, experts = self._slot_experts()
        order = xp.argsort(experts, kind="stable")
        slots, experts = slots[order], experts[order]
        blocks = -(-self.tokens_per_expert.astype(xp.int64) // block)
        first_slot = xp.cumsum(self.tokens_per_expert.astype(xp.int64)) - self.tokens_per_expert
        first_place = (xp.cumsum(blocks) - blocks) * block
        total = int(blocks.sum()) * block
        if total > MAX_ROWS:
            raise _check.value_error("to_block_lists", "block", "small enough for int32 lists", block)
        sorted_token_ids = xp.full(total, self.num_tokens * self.top_k, xp.int32)
        sorted_token_ids[first_place[experts] + xp.arange(slots.size) - first_slot[experts]] = slots
        which = xp.searchsorted(xp.cumsum(blocks), xp.arange(total // block), side="right")
        return BlockLists(sorted_token_ids, which.astype(xp.int32), xp.full(1, total, xp.int32))

    def to_dense_map(self) -> Array:
        """Megatron-LM's and TransformerEngine's ``routing_map``: bool [num_tokens, num_experts], True where routed.

        An expert in two slots of a token shows once.
        """
        if _on_gpu("to_dense_map", self):
            return _device.dense_map(self)
        xp = _backend.array_module(self.token_to_row)
        slots, experts = self._slot_experts()
        dense = xp.zeros((self.num_tokens, self.num_experts), xp.bool_)
        dense[slots // self.top_k, experts] = True
        return dense


def unchecked_plan(
    tokens_per_expert: Array, expert_offsets: Array, row_to_token: Array, token_to_row: Array, alignment: int
) -> RoutePlan:
    """A plan whose maps were made here a moment ago: reading them all again would cost more than making them."""
    plan = object.__new__(RoutePlan)
    fields = {
        "tokens_per_expert": tokens_per_expert, "expert_offsets": expert_offsets, "row_to_token": row_to_token,
        "token_to_row": token_to_row, "alignment": alignment,
    }  # fmt: skip
    object.__setattr__(plan, "__dict__", fields)
    return plan


def _on_gpu(function: str, plan: RoutePlan) -> bool:
    """Whether kernels write a layout of the plan."""
    return _backend.choose(function, None, plan.row_to_token) == "cuda"


def _with_values(function: str, plan: RoutePlan) -> None:
    """What depends on values can be had of NumPy and CuPy arrays, from a GPU by waiting for it."""
    if _check.is_device_array(plan.row_to_token):
        expected = "of NumPy or CuPy arrays, since this waits for their values"
        raise _check.type_error(function, "plan", expected, _check.describe(plan.row_to_token))


def plan_routes(topk_idx: Any, num_experts: int, *, alignment: int = 1, backend: str | None = None) -> RoutePlan:
    """Give every slot of every token its row in the expert-sorted matrix.

    Parameters
    ----------
    topk_idx : integer [num_tokens, top_k]
        Expert ids of any integer type. -1 is not routed. An id may appear twice in a token: each slot is its own row.
    num_experts : int
    alignment : int
        Each expert's segment is padded to a multiple of this many rows.

    Returns
    -------
    RoutePlan
        Rows ordered by expert, then token, then slot: a stable sort, the same on every backend.

    Raises
    ------
    ValueError
        For an id outside -1..num_experts-1 (the message has its value and place), and when the slots or the padded rows
        pass 2**31 - 1. On a GPU such an id is not routed, and the rows are those that any ids could need.

    Notes
    -----
    A counting sort: reads the ids twice and writes 4 bytes per slot and 4 per row.
    """
    num_experts = _check.integer("plan_routes", "num_experts", num_experts, 1, MAX_ROWS)
    alignment = _check.integer("plan_routes", "alignment", alignment, 1, MAX_ROWS)
    axes = (("num_tokens", None), ("top_k", None))
    ids = _backend.as_array("plan_routes", "topk_idx", topk_idx, _check.INTEGERS, axes)
    if ids.shape[1] == 0:
        expected = "of shape [num_tokens, top_k] with top_k at least 1"
        raise _check.value_error("plan_routes", "topk_idx", expected, list(ids.shape))
    if ids.size > MAX_ROWS:
        raise _check.value_error("plan_routes", "topk_idx", f"of at most {MAX_ROWS} slots", ids.size)

    try:
        match _backend.choose("plan_routes", backend, ids):
            case "cpu":
                parts = _backend.core.plan_routes(_signed(ids, num_experts), num_experts, alignment)
            case "cuda":
                _check.expert_ids("plan_routes", "topk_idx", ids, num_experts)
                parts = _device.plan_routes(ids, num_experts, alignment)
            case _:
                xp = _backend.array_module(ids)
                _check.expert_ids("plan_routes", "topk_idx", ids, num_experts)
                # int64 holds every id that passed, whatever the type they came in
                parts = _array.plan_routes(xp, ids.astype(xp.int64), num_experts, alignment)
    except IndexError:
        _check.expert_ids("plan_routes", "topk_idx", ids, num_experts)  # finds the bad id and raises
        raise
    except OverflowError as error:
        raise _check.value_error("plan_routes", "alignment", f"small enough for {MAX_ROWS} rows", error) from None
    return unchecked_plan(*parts, alignment)


def _signed(ids: Array, num_experts: int) -> Array:
    """int32 or int64 ids as they are, to be checked while they are counted; others checked and then widened."""
    if _check.DTYPE_NAMES[ids.dtype] in ("int32", "int64"):
        return ids
    _check.expert_ids("plan_routes", "topk_idx", ids, num_experts)
    return ids.astype("int32")
