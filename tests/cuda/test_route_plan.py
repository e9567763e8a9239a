"""plan_routes on the GPU: the maps of the CPU floor, in rows that are enough for any ids; layouts; hostile ids."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import assert_same_bytes
from emulated import launched, memory, to_device, to_host
from routes import random_ids

from pyroute import RoutePlan, plan_routes
from pyroute._device.route_plan import most_rows

SEEDS = pytest.mark.parametrize("seed", range(4), indirect=True)
FIELDS = ("tokens_per_expert", "expert_offsets", "row_to_token", "token_to_row")


def on_host(plan) -> RoutePlan:
    """A plan of the GPU as the host would have made it; its rows past the last segment have to be -1."""
    parts = [to_host(getattr(plan, field)) for field in FIELDS]
    num_rows = int(parts[1][-1])
    assert (parts[2][num_rows:] == -1).all()
    parts[2] = parts[2][:num_rows]
    return RoutePlan(*parts, plan.alignment)


def assert_planned(ids, num_experts, alignment=1):
    """The plan on the GPU, held to the CPU floor's; ids that are not experts are not routed there."""
    plan = plan_routes(to_device(ids), num_experts, alignment=alignment)
    assert plan.num_rows == most_rows(ids.size, num_experts, alignment)
    wide = ids.astype(object)  # which no id wraps in
    expected = plan_routes(
        np.where((wide < num_experts) & (wide >= 0), wide, -1).astype(int), num_experts, alignment=alignment
    )
    for field in FIELDS:
        assert_same_bytes(getattr(on_host(plan), field), getattr(expected, field))
    memory.check()
    return plan


@pytest.mark.parametrize(
    "num_experts", [1, 2, 3, 7, 31, 32, 33, 60, 96, 160, 256, 384, 513, 1000, 1023, 1024, 1025, 2000]
)
@pytest.mark.parametrize("alignment", [1, 3, 128])
def test_any_number_of_experts(num_experts, alignment, rng):
    """Not a power of two, more experts than slots, experts without tokens; in one launch and in three."""
    assert_planned(random_ids(rng, 257, 5, num_experts, 0.1), num_experts, alignment)
    assert_planned(random_ids(rng, 1031, 5, num_experts, 0.1), num_experts, alignment)


def test_one_launch_for_a_few_slots(rng):
    launched()
    plan_routes(to_device(random_ids(rng, 128, 8, 256)), 256, alignment=64)
    assert launched() == ["plan_routes_small"]
    plan_routes(to_device(random_ids(rng, 4097, 1, 256)), 256)
    assert launched() == ["count_routes", "sum_chunks", "place_routes"]
    plan_routes(to_device(random_ids(rng, 128, 8, 1025)), 1025)
    assert launched() == ["count_routes_wide", "sum_chunks", "place_routes_wide"]


def test_every_number_of_tokens(rng):
    for num_tokens in [*range(70), 127, 128, 129, 511, 512, 513, 1024]:
        for num_experts in (5, 1025):
            assert_planned(random_ids(rng, num_tokens, 2, num_experts, 0.2), num_experts, 4)


@pytest.mark.parametrize("top_k", range(1, 33))
def test_every_top_k_with_duplicates(top_k, rng):
    assert_planned(random_ids(rng, 33, top_k, 2), 2)
    assert_planned(random_ids(rng, 4200 // top_k, top_k, 3, 0.1), 3, 2)


@SEEDS
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(500, 8), (2100, 64), (9000, 3), (700, 1500), (3000, 5000)])
def test_the_order_of_threads_and_blocks_does_not_matter(seed, num_tokens, num_experts, rng):
    assert_planned(random_ids(rng, num_tokens, 4, num_experts, 0.05), num_experts, 16)


@pytest.mark.parametrize("num_experts", [3, 1030])
def test_one_expert_takes_everything_in_order(num_experts):
    for num_tokens in (2304, 5000, 40_000):
        plan = on_host(assert_planned(np.full((num_tokens, 1), 1, np.int32), num_experts))
        assert plan.row_to_token.tolist() == list(range(num_tokens))


def test_duplicated_ids_leave_no_slot_unwritten():
    for num_tokens in (257, 20_000):
        plan = on_host(assert_planned(np.tile(np.array([[5, 88, 88, 65]]), (num_tokens, 1)), 89))
        assert np.sort(plan.token_to_row.ravel()).tolist() == list(range(num_tokens * 4))


def test_many_experts(rng):
    for num_tokens, num_experts in [(300, 20_000), (40_000, 33_000), (0, 50_000), (20, 100_001)]:
        assert_planned(random_ids(rng, num_tokens, 3, num_experts, 0.1), num_experts, 2)


def test_many_slots_in_chunks(rng):
    """More slots than the chunks' shortest length times their number."""
    assert_planned(random_ids(rng, 140_000, 4, 5, 0.1), 5, 128)


@pytest.mark.parametrize("num_experts", [4, 1100])
def test_nothing_routed(num_experts):
    for num_tokens in (0, 7, 3000):
        plan = on_host(assert_planned(np.full((num_tokens, 3), -1), num_experts, 16))
        assert plan.num_rows == 0


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_that_are_not_experts_are_not_routed(dtype, rng):
    """Of every integer type, the farthest ones too: they are never an index."""
    limits = np.iinfo(dtype)
    for num_experts in (100, 1200):
        for num_tokens in (50, 1500):
            ids = random_ids(rng, num_tokens, 4, min(num_experts, limits.max)).astype(dtype)
            for bad in (limits.min, limits.max, num_experts, 2**31, 2**32, 2**32 + 3, -2, -(2**31), -(2**32) + 1):
                if limits.min <= bad <= limits.max and not 0 <= bad < num_experts:
                    ids.ravel()[rng.integers(0, ids.size, 9)] = bad
            assert_planned(ids, num_experts, 8)


def test_ids_anywhere_in_memory(rng):
    ids = random_ids(rng, 301, 7, 40, 0.1)
    expected = plan_routes(ids, 40, alignment=8)
    for dtype in (np.int32, np.int64, np.int8):
        for given in (to_device(ids.astype(dtype), at="end"), to_device(ids.astype(dtype), offset=1)):
            plan = on_host(plan_routes(given, 40, alignment=8))
            for field in FIELDS:
                assert_same_bytes(getattr(plan, field), getattr(expected, field))


def test_rows_are_enough_for_any_ids():
    """The bound is reached: as many experts as can have tokens, each with one more than whole padded segments."""
    for num_slots, num_experts, alignment in [(8, 256, 128), (3, 3, 5), (13, 4, 4), (1, 1, 1), (0, 9, 7), (100, 7, 10)]:
        most = 0
        for used in range(1, min(num_slots, num_experts) + 1):
            counts = np.ones(used, int)
            counts[0] = num_slots - used + 1
            most = max(most, int((-(-counts // alignment) * alignment).sum()))
            for spread in range(used - 1):  # and any other split
                counts[spread + 1] += counts[spread] - 1
                counts[spread] = 1
                most = max(most, int((-(-counts // alignment) * alignment).sum()))
        assert most <= most_rows(num_slots, num_experts, alignment)
    assert most_rows(8, 256, 128) == 1024
    assert most_rows(65536, 256, 128) == 65536 + 256 * 127 - (256 * 127) % 128


def test_rows_beyond_int32_are_refused():
    ids = to_device(np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match=r"alignment must be .*2147483647 rows, got up to 2147483652 rows"):
        plan_routes(ids, 2, alignment=2**30 + 2)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_experts", "alignment"), [(23, 6, 5), (300, 70, 1), (0, 3, 4), (40, 1, 16)])
def test_layouts(num_tokens, num_experts, alignment, rng):
    ids = random_ids(rng, num_tokens, 3, num_experts, 0.3)
    ours = plan_routes(to_device(ids), num_experts, alignment=alignment)
    host = plan_routes(ids, num_experts, alignment=alignment)
    assert_same_bytes(to_host(ours.to_torch_offsets()), host.to_torch_offsets())
    m_indices, masked_m = to_host(ours.to_deepgemm())
    assert_same_bytes(m_indices[: host.num_rows], host.to_deepgemm().m_indices)
    assert (m_indices[host.num_rows :] == -1).all()
    assert_same_bytes(masked_m, host.to_deepgemm().masked_m)
    assert_same_bytes(to_host(ours.to_te_row_id_map("index")), host.to_te_row_id_map("index"))
    assert_same_bytes(to_host(ours.to_dense_map()), host.to_dense_map())


def test_what_waits_for_values_says_so(rng):
    plan = plan_routes(to_device(random_ids(rng, 9, 2, 4)), 4)
    calls = (lambda: plan.has_padding, lambda: plan.to_te_row_id_map(), lambda: plan.to_block_lists(4))
    for name, call in zip(("has_padding", r"to_te_row_id_map\('mask'\)", "to_block_lists"), calls, strict=True):
        with pytest.raises(TypeError, match=f"{name}: plan must be of NumPy or CuPy arrays, since this waits"):
            call()


# --- made by hand ---------------------------------------------------------------------------------------------------


def test_a_plan_made_by_hand_is_checked_by_shape(rng):
    parts = [getattr(plan_routes(random_ids(rng, 9, 2, 4), 4), field) for field in FIELDS]
    plan = RoutePlan(*map(to_device, parts))
    assert (plan.num_tokens, plan.top_k, plan.num_experts, plan.num_rows) == (9, 2, 4, 18)
    for broken, match in [
        ([parts[0][:3], *parts[1:]], r"expert_offsets must be of shape \[num_experts \+ 1=4\]"),
        ([parts[0], parts[1].astype(np.int32), *parts[2:]], "expert_offsets must be int64"),
        ([*parts[:3], parts[3].reshape(-1)], r"token_to_row must be of shape \[num_tokens, top_k\]"),
        ([parts[0][:0], parts[1][:1], *parts[2:]], "token_to_row must be of at least one expert and one slot"),
    ]:
        with pytest.raises((TypeError, ValueError), match="RoutePlan: " + match):
            RoutePlan(*map(to_device, broken))


def test_layouts_of_hostile_offsets_stay_inside():
    offsets = np.array([5, -(2**63), 2**62, -1, 7], np.int64)
    rows, slots = np.array([0, 3, -7, 2**31 - 1], np.int32), np.array([[0, 2**31 - 1], [-5, 1]], np.int32)
    plan = RoutePlan(*map(to_device, (np.zeros(4, np.int32), offsets, rows, slots)))
    assert set(to_host(plan.to_deepgemm().m_indices)) <= {-1, 0, 1, 2, 3}
    plan.to_dense_map()
    memory.check()
