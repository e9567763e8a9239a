"""Tokens that share rows of x, as the slots of one expert-parallel rank do: the bytes of a row for each."""

import ml_dtypes
import numpy as np
import pytest

import pyroute
from pyroute import _backend
from pyroute import moe as core
from pyroute._activation import activation_program
from pyroute._moe_arguments import check_layer

pytestmark = pytest.mark.skipif(not _backend.HAS_CORE, reason="shared in the compiled core alone")

ROWS, TOKENS, EXPERTS, HIDDEN, INNER = 11, 37, 5, 48, 24


def given_of(dtype, seed):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32).astype(dtype)

    x_row = random.integers(0, ROWS, TOKENS).astype(np.int32)
    ids = random.integers(-1, EXPERTS, (TOKENS, 1)).astype(np.int32)
    weights = random.random((TOKENS, 1), np.float32)
    return x_row, ids, weights, normal(ROWS, HIDDEN), normal(EXPERTS, 2 * INNER, HIDDEN), normal(EXPERTS, HIDDEN, INNER)


def layer_of(x, ids, weights, w_gate_up, w_down, weight_on, quantize, x_row):
    program = activation_program("moe_forward", "swiglu", None, None)
    given = (x, ids, weights, (w_gate_up, w_down), (None, None), None, program, weight_on, quantize, False, x_row)
    return check_layer("moe_forward", *given)


@pytest.mark.parametrize("weight_on", ["output", "pre_down"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_gradients(dtype, weight_on):
    x_row, ids, weights, x, *matrices = given_of(dtype, 0)
    grad_y = given_of(dtype, 1)[3]
    results = []
    for row in (x_row, None):
        of = [x, grad_y] if row is not None else [x[x_row], grad_y[x_row]]
        layer = layer_of(of[0], ids, weights, *matrices, weight_on, False, row)
        y, saved = core.forward_of(layer, 1, True, None)
        results.append([y, saved.gate_up, *pyroute.moe_backward(of[1], saved)[:4]])
    for shared, apart in zip(*results, strict=True):
        assert shared.shape == apart.shape
        assert shared.tobytes() == apart.tobytes()


def test_rows_are_quantised_once():
    x_row, ids, weights, x, *matrices = given_of(np.float32, 2)
    matrices = [pyroute.quantize_fp8(w, block=(128, 128)) for w in matrices]
    shared, apart = (
        core.forward_of(layer_of(rows, ids, weights, *matrices, "output", True, row), 1, False, None)
        for rows, row in ((x, x_row), (x[x_row], None))
    )
    assert shared.tobytes() == apart.tobytes()


@pytest.mark.parametrize(("place", "row"), [(0, ROWS), (TOKENS - 1, -2), (3, 2**31 - 1)])
def test_rows_that_x_does_not_have_are_not_read(place, row):
    x_row, ids, weights, x, *matrices = given_of(np.float32, 3)
    ids[place], x_row[place] = 0, row
    with pytest.raises(IndexError, match="a route map has an entry that is not a row"):
        core.forward_of(layer_of(x, ids, weights, *matrices, "output", False, x_row), 1, False, None)


def test_weights_on_the_input_need_a_row_for_every_token():
    x_row, ids, weights, x, *matrices = given_of(np.float32, 4)
    with pytest.raises(ValueError, match="with weights on the input x must have a row for every token"):
        core.forward_of(layer_of(x, ids, weights, *matrices, "input", False, x_row), 1, False, None)


def test_quantised_layers_do_not_share():
    x = np.zeros((1, 1), np.float32)
    assert core.shares_rows(x, False)
    assert not core.shares_rows(x, True)
