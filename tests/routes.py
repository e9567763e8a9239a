"""Random routes, and plans that are held to the oracle's."""

from __future__ import annotations

import numpy as np
from conftest import assert_same_bytes
from oracle import permutation as oracle

from pyroute import RoutePlan, plan_routes


def random_ids(rng, num_tokens, top_k, num_experts, unrouted=0.0):
    ids = rng.integers(0, num_experts, (num_tokens, top_k))
    ids[rng.random(ids.shape) < unrouted] = -1
    return ids


def checked_plan(ids, num_experts, floor, alignment=1) -> RoutePlan:
    """The floor's plan, held to the oracle's."""
    plan = plan_routes(ids, num_experts, alignment=alignment, backend=floor.backend)
    counts, offsets, row_to_token, token_to_row = oracle.plan(np.asarray(ids), num_experts, alignment)
    assert_same_bytes(plan.tokens_per_expert, np.array(counts, np.int32))
    assert_same_bytes(plan.expert_offsets, np.array(offsets, np.int64))
    assert_same_bytes(plan.row_to_token, np.array(row_to_token, np.int32))
    assert_same_bytes(plan.token_to_row, np.array(token_to_row, np.int32).reshape(np.shape(ids)))
    assert plan.has_padding == (-1 in row_to_token)
    return plan


def assert_same_plan(a: RoutePlan, b: RoutePlan) -> None:
    for field in ("tokens_per_expert", "expert_offsets", "row_to_token", "token_to_row"):
        assert_same_bytes(getattr(a, field), getattr(b, field))
