"""The caller's side of moe_backward: arrays to write, gradients to add up, gradients not wanted; and the layer in one
native call against the same layer step by step."""

import itertools

import numpy as np
import pytest
from conftest import assert_same_bytes, poison
from moe_problems import ACTIVATIONS, KINDS, NAMES, WEIGHT_ON, Problem

import pyroute
from pyroute import _moe_parts

SUMMED = NAMES[2:]  # over calls; the others belong to one call's tokens


def step_by_step(problem, backend, part_bytes, **options):
    """y, saved rows and gradients, composed in Python of the other rooms' ops on this backend."""
    _, saved = problem.forward(backend, return_saved=True, **options)
    layer, plan = saved.layer, saved.plan
    y, gate_up = poison(problem.x.shape, problem.dtype), poison(saved.gate_up.shape, problem.dtype)
    _moe_parts.forward(layer, plan, gate_up, y, part_bytes)
    grads = poisoned(problem)
    _moe_parts.backward(layer, plan, gate_up, problem.grad_y, grads, False, part_bytes)
    return y, gate_up, grads


def poisoned(problem, names=NAMES):
    """Gradient arrays that hold 3.4e38."""
    layer = dict(zip(("w_gate_up", "w_down", "b_gate_up", "b_down"), (*problem.weights, *problem.biases), strict=True))
    layer |= {"x": problem.x, "topk_weights": problem.topk_weights}
    arrays = {}
    for name in NAMES:
        like = layer[name] if name in names else None
        arrays[name] = None if like is None else poison(like.shape, problem.dtype if name == "x" else np.float32)
    return pyroute.MoeGradients(**arrays)


def assert_same_gradients(got, expected):
    for name in NAMES:
        if getattr(expected, name) is None:
            assert getattr(got, name) is None
        else:
            assert_same_bytes(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_has_the_bytes_of_its_steps(cpu_floor, kind, weight_on, bias, monkeypatch):
    for sizes, alignment, rows in itertools.product(
        [(30, 3, 9, 21, 13), (70, 1, 3, 140, 9), (5, 2, 4, 9, 131)], (1, 4), (0, 7, 10**6)
    ):
        problem = Problem(kind, "swiglu_oai", weight_on, bias, sizes)
        problem.x[0, 0], problem.grad_y[-1, 0] = np.nan, np.inf
        part_bytes = rows * max(problem.weights[0].shape[1:]) * problem.dtype.itemsize
        monkeypatch.setattr(pyroute.moe, "PART_BYTES", part_bytes)
        y, saved = problem.forward("cpu", return_saved=True, alignment=alignment)
        expected = step_by_step(problem, "cpu", part_bytes, alignment=alignment)
        assert_same_bytes(y, problem.forward("cpu", alignment=alignment))
        assert_same_bytes(y, expected[0])
        assert_same_bytes(saved.gate_up, expected[1])
        assert_same_gradients(pyroute.moe_backward(problem.grad_y, saved), expected[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_call_knows_every_activation(cpu_floor, activation):
    problem = Problem("mixed", activation, "pre_down", True)
    y, saved = problem.forward("cpu", return_saved=True)
    expected = step_by_step(problem, "cpu", 2**20)
    assert_same_bytes(y, expected[0])
    assert_same_gradients(pyroute.moe_backward(problem.grad_y, saved), expected[2])


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_crowded_experts_are_cut_inside(cpu_floor, scale_format, monkeypatch):
    """Most rows at one expert: the parts of the forward pass begin and end within it."""
    problem = Problem("fp8", "swiglu", "output", True, (64, 2, 4, 150, 70), scale_format=scale_format)
    problem.topk_idx[5:60] = 1
    whole = problem.forward("cpu", alignment=2)
    for rows in (1, 3, 16, 100):
        monkeypatch.setattr(pyroute.moe, "PART_BYTES", rows * 150 * 2)
        assert_same_bytes(problem.forward("cpu", alignment=2), whole)


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "fp8_training"])
def test_out_is_written_and_returned(floor, kind, weight_on):
    problem = Problem(kind, "swiglu", weight_on, bias=True)
    _, saved = problem.forward(floor.backend, return_saved=True)
    expected = pyroute.moe_backward(problem.grad_y, saved)
    for names in (NAMES, ("x", "b_down"), ("topk_weights", "w_down"), ("w_gate_up", "b_gate_up")):
        out = poisoned(problem, names)
        got = pyroute.moe_backward(problem.grad_y, saved, out=out)
        assert_same_gradients(got, expected)
        assert all(getattr(got, name) is getattr(out, name) for name in names)
    again = pyroute.moe_backward(problem.grad_y, saved, out=expected)
    assert_same_gradients(got, again)
    assert all(getattr(again, name) is getattr(expected, name) for name in NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_y_is_written_into_out(floor, kind):
    problem = Problem(kind, bias=True)
    y, saved = problem.forward(floor.backend, return_saved=True)
    out = poison(y.shape, y.dtype)
    assert problem.forward(floor.backend, out=out) is out
    assert_same_bytes(out, y)
    out, again = problem.forward(floor.backend, out=poison(y.shape, y.dtype), return_saved=True)
    assert_same_bytes(out, y)
    assert_same_bytes(again.gate_up, saved.gate_up)


def wrong_y():
    x = Problem("float32").x
    yield x.tolist(), TypeError, "out must be an array, got list"
    yield x.astype(np.float64), TypeError, "out must be float32, got float64"
    yield x[:-1].copy(), ValueError, "out must be of shape [num_tokens=11, hidden=21], got [10, 21]"
    yield np.asfortranarray(x), ValueError, "out must be C-contiguous, aligned and writeable"
    for name in ("x", "w_down", "topk_weights"):
        yield name, ValueError, "out must be memory that no input uses"


@pytest.mark.parametrize(("out", "error", "message"), list(wrong_y()))
def test_wrong_out(floor, out, error, message):
    problem = Problem("float32")
    if isinstance(out, str) and out == "x":
        out = problem.x
    elif isinstance(out, str) and out == "w_down":
        out = problem.weights[1].reshape(-1)[: problem.x.size].reshape(problem.x.shape)
    elif isinstance(out, str):
        memory = np.zeros(problem.x.size, np.float32)
        memory[: problem.topk_weights.size] = problem.topk_weights.reshape(-1)
        problem.topk_weights = memory[: problem.topk_weights.size].reshape(problem.topk_weights.shape)
        out = memory.reshape(problem.x.shape)
    before = problem.x.copy(), problem.weights[1].copy()
    with pytest.raises(error) as raised:
        problem.forward(floor.backend, out=out)
    assert f"moe_forward: {message}" in str(raised.value)
    assert_same_bytes(problem.x, before[0])
    assert_same_bytes(problem.weights[1], before[1])


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "fp8_training"])
def test_gradients_add_up(floor, kind, weight_on, rng):
    """new = old + gradient in float32, one rounding; an expert without rows keeps its bytes."""
    problem = Problem(kind, "swiglu", weight_on, bias=True, sizes=(20, 3, 5, 21, 13))
    _, saved = problem.forward(floor.backend, return_saved=True, alignment=4)
    once = pyroute.moe_backward(problem.grad_y, saved)
    out = poisoned(problem)
    old = {}
    for name in SUMMED:
        values = rng.normal(size=getattr(out, name).shape).astype(np.float32)
        values[-1] = -0.0  # of the expert without rows; -0 + 0 would be +0
        values[0].reshape(-1)[0] = np.nan
        getattr(out, name)[...], old[name] = values, values
    got = pyroute.moe_backward(problem.grad_y, saved, out=out, accumulate=True)
    for name in ("x", "topk_weights"):
        assert_same_bytes(getattr(got, name), getattr(once, name))
    for name in SUMMED:
        assert getattr(got, name) is getattr(out, name)
        expected = old[name] + getattr(once, name)
        expected[np.isnan(expected)] = np.nan
        expected[-1] = old[name][-1]
        assert_same_bytes(getattr(got, name), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("weight_on", WEIGHT_ON)
def test_what_is_not_wanted_is_none_and_changes_nothing(floor, weight_on, bias):
    problem = Problem("mixed", "geglu", weight_on, bias)
    _, saved = problem.forward(floor.backend, return_saved=True)
    everything = pyroute.moe_backward(problem.grad_y, saved)
    subsets = [(), NAMES, *itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2), set(NAMES[:3])]
    for wanted in subsets:
        expected = everything._replace(**dict.fromkeys(set(NAMES) - set(wanted)))
        assert_same_gradients(pyroute.moe_backward(problem.grad_y, saved, wanted=wanted), expected)


def test_unwanted_gradients_are_not_accumulated(floor):
    problem = Problem("float32", bias=True)
    _, saved = problem.forward(floor.backend, return_saved=True)
    once = pyroute.moe_backward(problem.grad_y, saved)
    out = poisoned(problem, ("w_down",))
    out.w_down[...] = 0
    got = pyroute.moe_backward(problem.grad_y, saved, out=out, accumulate=True, wanted=("w_down", "x"))
    assert_same_gradients(got, once._replace(topk_weights=None, w_gate_up=None, b_gate_up=None, b_down=None))


def test_a_training_step_allocates_no_weight_gradients(monkeypatch):
    problem = Problem("float32", bias=True)
    _, saved = problem.forward(return_saved=True, backend=None)
    grads = pyroute.moe_backward(problem.grad_y, saved)
    sizes = []
    empty = pyroute._backend.empty
    monkeypatch.setattr(pyroute._backend, "empty", lambda shape, dtype: sizes.append(shape) or empty(shape, dtype))
    pyroute.moe_backward(problem.grad_y, saved, out=grads._replace(x=None, topk_weights=None))
    assert problem.weights[0].shape not in sizes
    assert problem.weights[1].shape not in sizes


def arguments():
    problem = Problem("float32", bias=True)
    _, saved = problem.forward("numpy", return_saved=True)
    return problem, saved


def wrong_outputs():
    problem, saved = arguments()
    out = poisoned(problem)
    read_only = out.w_down.copy()
    read_only.flags.writeable = False
    cases = [
        ({"out": tuple(out)}, TypeError, "out must be MoeGradients, got tuple"),
        ({"out": {"x": out.x}}, TypeError, "out must be MoeGradients, got dict"),
        ({"out": out._replace(w_down=out.w_down.tolist())}, TypeError, "out.w_down must be an array, got list"),
        ({"out": out._replace(w_down=out.w_down.astype("f8"))}, TypeError, "out.w_down must be float32, got float64"),
        ({"out": out._replace(w_down=out.w_gate_up)}, ValueError, "out.w_down must be of shape"),
        ({"out": out._replace(x=out.x[:-1])}, ValueError, "out.x must be of shape"),
        ({"out": out._replace(w_down=out.w_down[..., ::-1])}, ValueError, "out.w_down must be C-contiguous"),
        ({"out": out._replace(w_down=read_only)}, ValueError, "out.w_down must be C-contiguous, aligned and writeable"),
        ({"out": out._replace(w_down=saved.layer.w_down)}, ValueError, "out.w_down must be memory that no input uses"),
        ({"out": out._replace(x=saved.layer.x)}, ValueError, "out.x must be memory that no input uses"),
        ({"out": out._replace(x=problem.grad_y)}, ValueError, "out.x must be memory that no input uses"),
        ({"out": out, "wanted": ("x",)}, ValueError, "out.topk_weights must be None: it is not computed"),
        ({"accumulate": 1}, TypeError, "accumulate must be one of False, True, got int"),
        ({"accumulate": True}, ValueError, "out.w_gate_up must be an array to accumulate into, got None"),
        ({"wanted": "x"}, TypeError, "wanted must be a tuple of names, got str"),
        ({"wanted": ("y",)}, ValueError, "wanted must be one of 'x', 'topk_weights', .*, got 'y'"),
        ({"wanted": (1,)}, TypeError, "wanted must be one of"),
    ]
    shared = np.zeros(out.w_gate_up.size + out.w_down.size - 1, np.float32)
    overlapping = out._replace(
        w_gate_up=shared[: out.w_gate_up.size].reshape(out.w_gate_up.shape),
        w_down=shared[out.w_gate_up.size - 1 :].reshape(out.w_down.shape),
    )
    cases.append(({"out": overlapping}, ValueError, "out.w_down must be memory that no input uses"))
    return problem, saved, cases


PROBLEM, SAVED, WRONG = wrong_outputs()


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[message[:50] for _, _, message in WRONG])
def test_wrong_outputs(options, error, message):
    out = options.get("out")
    held = [a.copy() if isinstance(a, np.ndarray) else a for a in out] if isinstance(out, pyroute.MoeGradients) else []
    with pytest.raises(error, match=f"moe_backward: {message}"):
        pyroute.moe_backward(PROBLEM.grad_y, SAVED, **options)
    for array, before in zip(out or (), held, strict=False):
        if isinstance(array, np.ndarray):
            assert_same_bytes(array, before)


def test_a_gradient_of_no_bias_has_no_array(floor):
    problem = Problem("float32")
    _, saved = problem.forward(floor.backend, return_saved=True)
    out = poisoned(Problem("float32", bias=True))
    with pytest.raises(ValueError, match=r"out\.b_gate_up must be None: it is not computed"):
        pyroute.moe_backward(problem.grad_y, saved, out=out)
    assert pyroute.moe_backward(problem.grad_y, saved, wanted=("b_down",)) == (None,) * 6
