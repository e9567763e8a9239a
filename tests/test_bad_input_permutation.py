"""Whatever is wrong with an argument of the permutation room: one sentence, and nothing written."""

from __future__ import annotations

import numpy as np
import pytest
from bad_input import (
    BACKENDS,
    DTYPES,
    FLOATS,
    HUGE,
    INTEGERS,
    Case,
    assert_refused,
    table,
    wrong_arrays,
    wrong_backends,
    wrong_choices,
    wrong_ids,
    wrong_integers,
    wrong_kinds,
    wrong_outputs,
    wrong_shapes,
)

import pyroute
from pyroute import RoutePlan

T, K, E, H = 4, 2, 3, 5
IDS = np.array([[0, 2], [1, -1], [2, 0], [0, 1]])
MOVED = [name for name, dtype in DTYPES.items() if dtype.itemsize in (1, 2, 4, 8) and not dtype.hasobject]


def plan(ids=IDS, alignment=2):
    return pyroute.plan_routes(ids, E, alignment=alignment, backend="numpy")


R = plan().num_rows


def routes():
    return {"topk_idx": IDS.copy(), "num_experts": E}


def tokens(dtype="float32"):
    return {"x": np.ones((T, H), DTYPES[dtype]), "plan": plan()}


def back():
    return {"rows": np.ones((R, H), np.float32), "plan": plan(), "topk_weights": np.ones((T, K), np.float32)}


def backward():
    return {**back(), "grad_y": np.ones((T, H), np.float32)}


def rows_gradient():
    return {"grad_rows": np.ones((R, H), np.float32), "plan": plan()}


def parts():
    p = plan()
    return {name: getattr(p, name) for name in RoutePlan.__match_args__}


PLANS = [
    *(
        Case(f"plan is {name}", {"plan": x}, TypeError, "plan must be a RoutePlan, got")
        for name, x in {"None": None, "ids": IDS, "tuple": tuple(parts().values()), "class": RoutePlan}.items()
    ),
    Case("plan of another batch", {"plan": plan(np.tile(IDS, (2, 1)))}, ValueError, " must be of shape"),
]
ROUTES = [
    *wrong_arrays("topk_idx", (T, K), INTEGERS, ".."),
    *wrong_ids("topk_idx", (T, K), E),
    *wrong_integers("num_experts", 1, 2**31 - 1),
    *wrong_integers("alignment", 1, 2**31 - 1),
    Case("no slots", {"topk_idx": np.zeros((T, 0), int)}, ValueError, "topk_idx must be of shape"),
    Case("endless tokens without slots", {"topk_idx": np.zeros((HUGE, 0), int)}, ValueError, "topk_idx must be"),
    Case("too many rows", {"alignment": 2**30}, ValueError, "alignment must be small enough for 2147483647 rows"),
]
MOVES = [
    *wrong_kinds("x", (T, H)),
    *(
        Case(f"x of {name}", {"x": np.zeros((T, H), dtype)}, TypeError, "x must be of a dtype")
        for name, dtype in DTYPES.items()
        if name not in MOVED and name != "f4,i4"
    ),
    *wrong_shapes("x", (T, H), "float32", "x."),
    *PLANS,
    *wrong_outputs("out", (R, H), "float32"),
    Case("fp8 into out", {"x": pyroute.quantize_fp8(np.ones((T, H), np.float32)), "out": np.ones((R, H))}, TypeError),
    Case("fp8 in tall blocks", {"x": pyroute.quantize_fp8(np.ones((T, H), np.float32), block=(2, 1))}, ValueError),
    Case(
        "fp8 of other tokens", {"x": pyroute.quantize_fp8(np.ones((T + 1, H), np.float32))}, ValueError, "x must be of"
    ),
]
SCALE_FORMATS = wrong_choices("scale_format")
WEIGHTS = wrong_arrays("topk_weights", (T, K), ("float32",), "xx", none_is_legal=True)
ROWS = wrong_arrays("rows", (R, H), FLOATS, "x.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        (pyroute.plan_routes, routes, ROUTES),
        (pyroute.permute, tokens, MOVES),
        (pyroute.permute_quantize, tokens, [*wrong_arrays("x", (T, H), FLOATS, "x."), *PLANS, *SCALE_FORMATS]),
        (pyroute.unpermute, back, [*ROWS, *WEIGHTS, *PLANS, *wrong_outputs("out", (T, H), "float32")]),
        (pyroute.permute_backward, rows_gradient, [*wrong_arrays("grad_rows", (R, H), FLOATS, "x."), *PLANS]),
        (
            pyroute.unpermute_backward,
            backward,
            [
                *ROWS[:-3],
                *wrong_arrays("grad_y", (T, H), ("float32",), "xx"),
                *wrong_arrays("topk_weights", (T, K), ("float32",), "xx"),
                *PLANS,
            ],
        ),
    ),
)
def test_refused(backend, function, legal, case):
    assert_refused(function, {**legal(), "backend": backend}, case)


@pytest.mark.parametrize(
    ("function", "legal", "case"),
    table(
        *(
            (function, legal, wrong_backends())
            for function, legal in (
                (pyroute.plan_routes, routes),
                (pyroute.permute, tokens),
                (pyroute.permute_quantize, tokens),
                (pyroute.unpermute, back),
                (pyroute.permute_backward, rows_gradient),
                (pyroute.unpermute_backward, backward),
            )
        )
    ),
)
def test_backend_refused(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", ["x", "row_to_token", "token_to_row"])
def test_out_may_not_lie_in_an_input(backend, source):
    """Writing over x would give other rows; writing over the maps would send the kernel anywhere."""
    ids = np.zeros((T, 1), np.int32)
    p = pyroute.plan_routes(ids, 1, backend="numpy")
    x = np.arange(T, dtype=np.int32).reshape(T, 1)
    out = {"x": x, "row_to_token": p.row_to_token.reshape(T, 1), "token_to_row": p.token_to_row}[source]
    case = Case("", {"out": out}, ValueError, "out must be memory that no input uses")
    assert_refused(pyroute.permute, {"x": x, "plan": p, "backend": backend}, case)
    assert_refused(pyroute.unpermute, {"rows": x, "plan": p, "backend": backend}, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_not_lie_between_the_columns_of_an_input(backend):
    """The input is read from a copy, but it is the caller's array that would be written."""
    memory = np.arange(100, dtype=np.float32)
    p = pyroute.plan_routes(np.zeros((T, 1), np.int32), 1, backend="numpy")
    x, out = memory[: T * 2 * H].reshape(T, 2 * H)[:, ::2], memory[1 : 1 + T * H].reshape(T, H)
    case = Case("", {"out": out}, ValueError, "out must be memory that no input uses")
    assert_refused(pyroute.permute, {"x": x, "plan": p, "backend": backend}, case)
    assert_refused(pyroute.unpermute, {"rows": x, "plan": p, "backend": backend}, case)
    gemm = {"a": x, "b": np.ones((1, H, H), np.float32), "expert_offsets": np.array([0, T]), "backend": backend}
    assert_refused(pyroute.grouped_gemm, gemm, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_the_same_name_but_another_type(backend):
    """Both dtypes are called void32: bytes written into the other one's fields would be converted."""
    x, out = np.zeros((T, 1), [("a", "f4")]), np.zeros((R, 1), [("b", "i4")])
    case = Case("", {"out": out}, TypeError, "out must be")
    assert_refused(pyroute.permute, {"x": x, "plan": plan(), "backend": backend}, case)


def made_by_hand():
    """One entry of one map at a time, wrong in every way that would let an op leave its arrays, or mix up tokens."""
    for field, places in {
        "tokens_per_expert": E,
        "expert_offsets": E + 1,
        "row_to_token": R,
        "token_to_row": T * K,
    }.items():
        for place in range(places):
            array = getattr(plan(), field)
            limit = {"row_to_token": T, "token_to_row": R}.get(field, R + 1)
            for value in {-2, -1, 0, limit, limit + 1, 2**31 - 1, -(2**31)} - {int(array.reshape(-1)[place])}:
                wrong = array.copy()
                wrong.reshape(-1)[place] = value
                yield Case(f"{field}[{place}] = {value}", {field: wrong}, ValueError)


def arrays_of_a_plan():
    for field, shape, dtype, fixed in (
        ("tokens_per_expert", (E,), "int32", "x"),
        ("expert_offsets", (E + 1,), "int64", "x"),
        ("row_to_token", (R,), "int32", "x"),
        ("token_to_row", (T, K), "int32", "xx"),
    ):
        for case in wrong_arrays(field, shape, (dtype,), fixed):
            if str(HUGE) not in case.name:
                yield Case(case.name, case.change, case.error)


HAND_MADE = [
    *made_by_hand(),
    *arrays_of_a_plan(),
    *wrong_integers("alignment", 1, 2**31 - 1),
    Case("another alignment", {"alignment": 3}, ValueError),
    Case("endless tokens without slots", {"token_to_row": np.zeros((HUGE, 0), np.int32)}, ValueError, "at least one"),
    Case("maps of another plan", {"token_to_row": plan(IDS[::-1]).token_to_row}, ValueError, "token_to_row must be"),
    Case("rows of another plan", {"row_to_token": plan(IDS[::-1]).row_to_token}, ValueError, "token_to_row must be"),
]


@pytest.mark.parametrize(("function", "legal", "case"), table((RoutePlan, parts, HAND_MADE)))
def test_plan_made_by_hand(function, legal, case):
    assert_refused(function, legal(), case)


@pytest.mark.parametrize("alignment", [1, 2, 5])
def test_a_copy_of_a_plan_is_a_plan(alignment):
    for ids in (IDS, IDS[:0], np.full((3, 2), -1), np.zeros((2, 2), int)):
        original = plan(ids, alignment)
        copy = RoutePlan(**{name: getattr(original, name) for name in RoutePlan.__match_args__})
        assert (
            pyroute.permute(np.ones((len(ids), H)), copy) == pyroute.permute(np.ones((len(ids), H)), original)
        ).all()


@pytest.mark.parametrize("case", wrong_integers("block", 1, 2**31 - 1), ids=lambda case: case.name)
def test_block_lists(case):
    assert_refused(plan().to_block_lists, {"block": 2}, case)


@pytest.mark.parametrize("case", wrong_choices("map_type"), ids=lambda case: case.name)
def test_row_id_map(case):
    assert_refused(plan().to_te_row_id_map, {}, case)
