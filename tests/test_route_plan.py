"""plan_routes gives the oracle's maps on every floor; RoutePlan writes other libraries' layouts."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import assert_same_bytes
from routes import assert_same_plan, checked_plan, random_ids

from pyroute import RoutePlan, permute, plan_routes, unpermute

# --- plan_routes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [1, 3, 7, 60, 96, 160, 384, 513, 1000])
@pytest.mark.parametrize("alignment", [1, 3, 128])
def test_any_number_of_experts(floor, num_experts, alignment, rng):
    """Not a power of two, more experts than slots, experts without tokens."""
    plan = checked_plan(random_ids(rng, 257, 5, num_experts, 0.1), num_experts, floor, alignment)
    assert plan.tokens_per_expert.tolist() == np.diff(plan.expert_offsets).tolist() or alignment > 1


def test_every_number_of_tokens(floor, rng):
    for num_tokens in range(131):
        checked_plan(random_ids(rng, num_tokens, 2, 5, 0.2), 5, floor, 4)


@pytest.mark.parametrize("top_k", range(1, 10))
def test_every_top_k_with_duplicates(floor, top_k, rng):
    plan = checked_plan(random_ids(rng, 33, top_k, 2), 2, floor)
    assert plan.num_rows == 33 * top_k


@pytest.mark.parametrize("num_tokens", [257, 70_000])
def test_duplicated_ids_leave_no_slot_unwritten(floor, num_tokens):
    ids = np.tile(np.array([[5, 88, 88, 65]]), (num_tokens, 1))
    plan = plan_routes(ids, 89, backend=floor.backend)
    assert np.sort(plan.token_to_row.ravel()).tolist() == list(range(num_tokens * 4))
    assert plan.row_to_token[plan.expert_offsets[88] :].tolist() == np.repeat(np.arange(num_tokens), 2).tolist()


def test_one_expert_takes_everything_in_order(floor):
    plan = checked_plan(np.zeros((2304, 1), np.int32), 3, floor)
    assert plan.row_to_token.tolist() == list(range(2304))


def test_nothing_routed(floor):
    plan = checked_plan(np.full((7, 3), -1), 4, floor, 16)
    assert plan.num_rows == 0
    assert permute(np.ones((7, 5), np.float32), plan, backend=floor.backend).shape == (0, 5)
    out = unpermute(np.ones((0, 5), np.float32), plan, np.ones((7, 3), np.float32), backend=floor.backend)
    assert_same_bytes(out, np.zeros((7, 5), np.float32))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_every_integer_type_gives_the_same_plan(floor, dtype, rng):
    ids = random_ids(rng, 50, 4, 100, 0.0 if dtype[0] == "u" else 0.2)
    assert_same_plan(plan_routes(ids.astype(dtype), 100, backend=floor.backend), checked_plan(ids, 100, floor))


def test_strided_ids(floor, rng):
    ids = random_ids(rng, 60, 8, 9, 0.1)
    before = ids.copy()
    read_only = ids.copy()
    read_only.flags.writeable = False
    for view in [ids[::2, ::-3], ids.T, np.asfortranarray(ids), np.broadcast_to(ids[:1], (5, 8)), read_only]:
        assert_same_plan(plan_routes(view, 9, backend=floor.backend), checked_plan(np.array(view), 9, floor))
    np.testing.assert_array_equal(ids, before)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        ("int64", 8),
        ("int64", -2),
        ("int64", 2**31 - 1),
        ("int64", 2**32),
        ("int64", 2**32 + 3),
        ("int64", -(2**63)),
        ("int32", -(2**31)),
        ("int32", 2**31 - 1),
        ("int16", 300),
        ("int8", -128),
        ("uint8", 255),
        ("uint32", 2**32 - 1),
        ("uint64", 2**64 - 1),
    ],
)
def test_a_bad_id_is_named_with_its_place(floor, dtype, bad):
    ids = np.zeros((1000, 3), dtype)
    ids[701, 2] = bad
    ids[800, 0] = bad
    expected = rf"plan_routes: topk_idx\[701, 2\] must be in 0..7, or -1 for not routed, got {bad}$"
    with pytest.raises(ValueError, match=expected):
        plan_routes(ids, 8, backend=floor.backend)


def test_rows_beyond_int32_are_refused(floor):
    ids = np.zeros((2, 1), np.int32)
    with pytest.raises(ValueError, match=r"plan_routes: .*2147483647 rows"):
        plan_routes(ids + np.arange(2)[:, None], 2, alignment=2**30 + 1, backend=floor.backend)
    with pytest.raises(ValueError, match="at most 2147483647 slots"):
        plan_routes(np.empty((2**31, 1), np.int8), 2, backend=floor.backend)  # never touched


def test_any_number_of_threads_gives_the_same_plan(cpu_floor, threads, rng):
    for num_tokens, num_experts in [(20_000, 256), (3, 1000), (50_000, 3)]:
        ids = random_ids(rng, num_tokens, 6, num_experts, 0.05)
        ours = plan_routes(ids, num_experts, alignment=16, backend="cpu")
        assert_same_plan(ours, plan_routes(ids, num_experts, alignment=16, backend="numpy"))


# --- exporters ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 4])
def small_plan(request):
    """Four tokens, three experts, expert 1 empty, one slot not routed."""
    return plan_routes(np.array([[2, 0], [0, -1], [2, 0], [0, 2]]), 3, alignment=request.param)


def test_torch_offsets(small_plan):
    expected = {1: [4, 4, 7], 4: [4, 4, 8]}[small_plan.alignment]
    assert_same_bytes(small_plan.to_torch_offsets(), np.array(expected, np.int32))


def test_deepgemm_layout(small_plan):
    m_indices, masked_m = small_plan.to_deepgemm()
    padding = [-1] * (small_plan.num_rows - 7)
    assert_same_bytes(m_indices, np.array([0, 0, 0, 0, 2, 2, 2, *padding], np.int32))
    assert_same_bytes(masked_m, np.array([4, 0, 3], np.int32))


def test_transformer_engine_row_id_map(small_plan):
    assert_same_bytes(small_plan.to_te_row_id_map("index"), np.array([4, 1, 5, 3, 0, -1, 2, 6], np.int32))
    expected = [
        [4, 0, -1, 2, 0, -1, 2],
        [1, -1, -1, 0, -1, -1, 1],
        [5, 2, -1, 2, 0, -1, 2],
        [6, 3, -1, 2, 0, -1, 2],
    ]
    assert_same_bytes(small_plan.to_te_row_id_map(), np.array(expected, np.int32))
    twice = plan_routes(np.array([[1, 1]]), 2)
    with pytest.raises(ValueError, match="map_type must be 'index' when"):
        twice.to_te_row_id_map()
    with pytest.raises(ValueError, match="map_type"):
        twice.to_te_row_id_map("dense")


@pytest.mark.parametrize("block", [1, 2, 3, 16])
def test_block_lists(floor, block, rng):
    """Against a loop over experts: flat slots in order, each expert padded with T * k to whole blocks."""
    for unrouted in (0.0, 0.3, 1.0):
        ids = random_ids(rng, 23, 3, 6, unrouted)
        lists = plan_routes(ids, 6, alignment=5, backend=floor.backend).to_block_lists(block)
        sorted_token_ids, expert_ids = [], []
        for e in range(6):
            mine = np.flatnonzero(ids.ravel() == e).tolist()
            blocks = -(-len(mine) // block)
            sorted_token_ids += mine + [69] * (blocks * block - len(mine))
            expert_ids += [e] * blocks
        assert_same_bytes(lists.sorted_token_ids, np.array(sorted_token_ids, np.int32))
        assert_same_bytes(lists.expert_ids, np.array(expert_ids, np.int32))
        assert_same_bytes(lists.num_tokens_post_padded, np.array([len(sorted_token_ids)], np.int32))


def test_block_lists_of_one_expert_are_written_whole(floor):
    lists = plan_routes(np.zeros((4, 1), np.int64), 1, backend=floor.backend).to_block_lists(8)
    assert lists.sorted_token_ids.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_dense_map(small_plan):
    expected = [[True, False, True], [True, False, False], [True, False, True], [True, False, True]]
    assert_same_bytes(small_plan.to_dense_map(), np.array(expected))


# --- mistakes -------------------------------------------------------------------------------------------------------

PLAN = plan_routes(np.array([[0, 1], [1, 0]]), 2, backend="numpy")
X = np.ones((2, 3), np.float32)


def plan_parts():
    return PLAN.tokens_per_expert, PLAN.expert_offsets, PLAN.row_to_token, PLAN.token_to_row


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "topk_idx must be integers", lambda: plan_routes(X, 2)),
        (TypeError, "topk_idx must be integers", lambda: plan_routes(X > 0, 2)),
        (TypeError, "topk_idx must be an array", lambda: plan_routes([[0]], 2)),
        (ValueError, "topk_idx must be of shape", lambda: plan_routes(np.zeros(3, int), 2)),
        (ValueError, "topk_idx must be of shape", lambda: plan_routes(np.zeros((3, 0), int), 2)),
        (ValueError, "num_experts must be in 1", lambda: plan_routes(np.zeros((3, 1), int), 0)),
        (TypeError, "num_experts must be an integer", lambda: plan_routes(np.zeros((3, 1), int), 2.0)),
        (ValueError, "alignment must be in 1", lambda: plan_routes(np.zeros((3, 1), int), 2, alignment=0)),
        (ValueError, "backend must be one of", lambda: plan_routes(np.zeros((3, 1), int), 2, backend="gpu")),
        (TypeError, "token_to_row must be int32", lambda: RoutePlan(*plan_parts()[:3], np.zeros((2, 2)))),
        (ValueError, "expert_offsets must be", lambda: RoutePlan(np.zeros(3, np.int32), *plan_parts()[1:])),
    ],
)
def test_a_mistake_is_one_sentence(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
