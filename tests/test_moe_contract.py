"""What the MoE layer promises besides its values: independence of the batch, exact zeros, untouched inputs, errors."""

import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_bytes
from moe_problems import ACTIVATIONS, BF16, KINDS, NAMES, WEIGHT_ON, Problem

import pyroute
from pyroute import _backend, _moe_parts

E4M3 = _backend.FLOAT8["e4m3"]


def results(problem, backend, **options):
    """y and every gradient, by name."""
    y, saved = problem.forward(backend, return_saved=True, **options)
    gradients = pyroute.moe_backward(problem.grad_y, saved)
    return {"y": y} | {name: value for name, value in gradients._asdict().items() if value is not None}


def assert_same_results(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert_same_bytes(got[name], expected[name])


def part(problem, tokens):
    """The same layer on some of the tokens, in the order given."""
    smaller = Problem.__new__(Problem)
    smaller.__dict__ = dict(problem.__dict__)
    for name in ("x", "grad_y", "topk_idx", "topk_weights"):
        setattr(smaller, name, np.ascontiguousarray(getattr(problem, name)[tokens]))
    return smaller


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_feel_its_batch(floor, kind, weight_on):
    problem = Problem(kind, "swiglu", weight_on, bias=True, sizes=(40, 2, 3, 150, 70))
    whole = results(problem, floor.backend)
    rng = np.random.default_rng(3)
    for tokens in ([0], [39], [7, 3], list(range(17)), list(rng.permutation(40)), [5] * 9):
        few = results(part(problem, tokens), floor.backend)
        for name in ("y", "x", "topk_weights"):
            assert_same_bytes(few[name], whole[name][tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_byte(cpu_floor, threads, kind):
    problem = Problem(kind, "swiglu_oai", "pre_down", bias=True, sizes=(70, 2, 3, 140, 150))
    got = results(problem, "cpu")
    pyroute.set_num_threads(1)
    assert_same_results(got, results(problem, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_agree(cpu_floor, kind):
    problem = Problem(kind, "geglu", "output", bias=True, sizes=(20, 3, 4, 137, 33))
    got = results(problem, "cpu")
    _backend.core.set_isa("scalar")
    assert_same_results(got, results(problem, "cpu"))


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_alignment_changes_no_byte(floor, kind, weight_on):
    problem = Problem(kind, "swiglu_oai", weight_on, bias=True)
    plain = results(problem, floor.backend)
    for alignment in (4, 16, 128):
        assert_same_results(results(problem, floor.backend, alignment=alignment), plain)
    _, saved = problem.forward(floor.backend, return_saved=True, alignment=16)
    assert (saved.plan.expert_offsets % 16 == 0).all()
    assert saved.plan.has_padding


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_working_in_parts_changes_no_byte(floor, kind, weight_on, monkeypatch):
    problem = Problem(kind, "swiglu_oai", weight_on, bias=True, sizes=(30, 3, 9, 21, 13))
    whole = results(problem, floor.backend, alignment=4)
    row = 26 * problem.dtype.itemsize
    for rows in (0, 1, 20, 50):  # one expert at a time, ..., several
        monkeypatch.setattr(pyroute.moe, "PART_BYTES", rows * row)
        assert_same_results(results(problem, floor.backend, alignment=4), whole)


def test_parts_are_runs_of_experts_that_fit(monkeypatch):
    plan = pyroute.plan_routes(np.array([[0], [0], [0], [2], [3], [3], [4], [4], [4], [4]]), 6, backend="numpy")
    problem = Problem(sizes=(10, 1, 6, 4, 2))
    _, saved = problem.forward("numpy", return_saved=True)

    parts = list(_moe_parts.parts(saved.layer, plan, 3 * 4 * 4))  # three rows
    assert [(part.experts.start, part.experts.stop) for part in parts] == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert [(part.rows.start, part.rows.stop) for part in parts] == [(0, 3), (3, 6), (6, 10), (10, 10)]


def test_memory_between_the_steps_is_bounded(monkeypatch):
    """Beyond y and one row of `hidden` per slot the forward pass holds a few parts, not [rows, 3 * intermediate]."""
    problem = Problem("float32", sizes=(2000, 4, 17, 32, 256))
    part, rows = 2**20, np.count_nonzero(problem.topk_idx >= 0)
    assert rows * 3 * 256 * 4 > 12 * part
    monkeypatch.setattr(pyroute.moe, "PART_BYTES", part)
    backend = "cpu" if _backend.HAS_CORE else "numpy"
    problem.forward(backend)
    tracemalloc.start()
    problem.forward(backend)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (rows + 2 * 2000) * 32 * 4 + 6 * part


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "fp8_training"])
@pytest.mark.parametrize("poisoned", ["x", "topk_weights", "grad_y"])
def test_nan_stays_in_its_token(floor, poisoned, kind, weight_on):
    problem = Problem(kind, "swiglu", weight_on, bias=True, sizes=(12, 2, 3, 21, 13))
    before = results(problem, floor.backend)
    token, others = 4, [t for t in range(12) if t != 4]
    problem.topk_idx[token] = (0, 1)
    before = results(problem, floor.backend)
    getattr(problem, poisoned)[token, 0] = np.nan
    after = results(problem, floor.backend)
    for name in ("y", "x", "topk_weights"):
        assert_same_bytes(after[name][others], before[name][others])
    if poisoned != "grad_y":
        assert np.isnan(after["y"][token].astype(np.float32)).any()
        assert_same_bytes(after["w_down"][2:], before["w_down"][2:])


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
def test_what_is_not_routed_counts_for_nothing(floor, weight_on):
    """NaN in an unrouted token, in the weight of an unrouted slot, and in an expert that nobody chose."""
    problem = Problem("float32", "swiglu", weight_on, bias=True)
    unrouted, last = problem.topk_idx < 0, problem.num_experts - 1
    assert unrouted[2].all()
    assert not (problem.topk_idx == last).any()
    before = results(problem, floor.backend)
    problem.x[2] = problem.grad_y[2] = np.nan
    problem.topk_weights[unrouted] = np.nan
    for array in (*problem.weights, *problem.biases):
        array[last] = np.nan
    after = results(problem, floor.backend, alignment=4)
    assert_same_results(after, before)
    for name in ("y", "x"):
        assert_same_bytes(after[name][2], np.zeros_like(after[name][2]))
    assert_same_bytes(after["topk_weights"][unrouted], np.zeros(unrouted.sum(), np.float32))
    for name in NAMES[2:]:
        assert_same_bytes(after[name][last], np.zeros_like(after[name][last]))


SHAPES = {  # tokens, top_k, experts, hidden, intermediate
    "no tokens": (0, 2, 3, 8, 4),
    "one of everything": (1, 1, 1, 1, 1),
    "one expert": (9, 1, 1, 7, 5),
    "k = E": (5, 6, 6, 9, 3),
    "odd": (13, 3, 7, 131, 129),
    "more experts than slots": (2, 2, 64, 16, 8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ordinary_edges(floor, shape, kind):
    tokens, top_k, num_experts, hidden, inner = sizes = SHAPES[shape]
    problem = Problem(kind, sizes=(tokens, top_k, num_experts + 1, hidden, inner), bias=True)
    if shape == "k = E":
        problem.topk_idx = np.tile(np.arange(6), (tokens, 1))
    got = results(problem, floor.backend)
    assert got["y"].shape == got["x"].shape == (tokens, hidden)
    assert got["topk_weights"].shape == (tokens, top_k)
    assert got["w_gate_up"].shape == (num_experts + 1, 2 * inner, hidden)
    assert got["w_down"].shape == (num_experts + 1, hidden, inner)
    for name, value in got.items():
        assert np.isfinite(value.astype(np.float32)).all(), name
    counts = np.bincount(problem.topk_idx[problem.topk_idx >= 0], minlength=num_experts + 1)
    for name in NAMES[2:]:
        assert not got[name][counts == 0].any()
    assert sizes[0] == 0 or counts[-1] == 0


def test_all_tokens_on_one_expert_and_none_at_all(floor):
    problem = Problem("float32", bias=True, sizes=(33, 2, 4, 16, 8))
    problem.topk_idx[:] = 1
    got = results(problem, floor.backend)
    assert np.count_nonzero(got["w_down"]) == np.count_nonzero(got["w_down"][1]) > 0
    problem.topk_idx[:] = -1
    for value in results(problem, floor.backend).values():
        assert not value.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0x7F, 0xFF], ids=["large", "nan"])
def test_fresh_memory_is_never_read(floor, kind, byte, monkeypatch):
    """Every new array holds 3.4e38 or NaN; a second iteration meets what the first one left."""
    problem = Problem(kind, "swiglu", "output", bias=True)
    expected = results(problem, floor.backend, alignment=8)
    empty, empty_like = np.empty, np.empty_like

    def fill(array):
        array.view(np.uint8).reshape(-1)[...] = byte
        return array

    monkeypatch.setattr(np, "empty", lambda *args, **options: fill(empty(*args, **options)))
    monkeypatch.setattr(np, "empty_like", lambda *args, **options: fill(empty_like(*args, **options)))
    for _ in range(2):
        assert_same_results(results(problem, floor.backend, alignment=8), expected)


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_read_only_and_backward_repeats(floor, kind, weight_on):
    problem = Problem(kind, "swiglu", weight_on, bias=True)
    arrays = [problem.x, problem.grad_y, problem.topk_idx, problem.topk_weights, *problem.biases]
    for w in problem.weights:
        arrays += [w.codes, w.scales] if isinstance(w, pyroute.Fp8Array) else [w]
    for array in arrays:
        array.flags.writeable = False
    before = [array.copy() for array in arrays]
    y, saved = problem.forward(floor.backend, return_saved=True)
    assert_same_bytes(y, problem.forward(floor.backend))
    saved.gate_up.flags.writeable = False
    first, second = (pyroute.moe_backward(problem.grad_y, saved) for _ in range(2))
    for name in NAMES:
        assert_same_bytes(getattr(first, name), getattr(second, name))
    for array, old in zip(arrays, before, strict=True):
        assert_same_bytes(array, old)


def test_layouts_of_the_inputs(floor):
    problem = Problem("float32", bias=True)
    expected = results(problem, floor.backend)
    strided = Problem("float32", bias=True)
    for name in ("x", "grad_y", "topk_idx", "topk_weights"):
        array = getattr(strided, name)
        wide = np.zeros((array.shape[0] * 2, array.shape[1] + 3), array.dtype)
        wide[::2, 2:-1] = array
        setattr(strided, name, wide[::2, 2:-1])
    strided.weights = [np.asfortranarray(w) for w in strided.weights]
    assert_same_results(results(strided, floor.backend), expected)
    for dtype in ("int8", "int16", "int32", "int64", ">i4"):
        problem.topk_idx = strided.topk_idx.astype(dtype)
        if dtype.startswith(">"):
            with pytest.raises(TypeError, match="topk_idx must be integers, got int32 of the other"):
                problem.forward(floor.backend)
            continue
        assert_same_results(results(problem, floor.backend), expected)


def test_routing_weights_of_other_types_are_rounded(floor):
    problem = Problem("bfloat16")
    problem.topk_weights = problem.topk_weights.astype(BF16)
    narrow = results(problem, floor.backend)
    problem.topk_weights = problem.topk_weights.astype(np.float64)
    assert_same_results(results(problem, floor.backend), narrow)
    assert narrow["topk_weights"].dtype == np.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numpy_alone_serves_the_layer(activation, monkeypatch):
    """backend="numpy" reaches every room: no compiled code runs."""
    problem = Problem("fp8", activation, bias=True)
    monkeypatch.setattr(_backend, "core", None)
    assert all(np.isfinite(value.astype(np.float32)).all() for value in results(problem, "numpy").values())


def test_true_means_float32_scales(floor):
    problem = Problem("fp8", scale_format="float32")
    expected = problem.forward(floor.backend)
    problem.options["quantize_activations"] = True
    assert_same_bytes(problem.forward(floor.backend), expected)
    problem.options["quantize_activations"] = "ue8m0"
    assert problem.forward(floor.backend).tobytes() != expected.tobytes()


def test_what_saved_holds(floor):
    problem = Problem("bfloat16", sizes=(10, 3, 4, 24, 16))
    problem.topk_idx[:] = np.arange(3)
    _, saved = problem.forward(floor.backend, return_saved=True)
    rows = 10 * 3
    assert saved.gate_up.shape == (rows, 32)
    assert saved.gate_up.dtype == BF16
    assert saved.nbytes == rows * (32 * 2 + 4 + 4) + 4 * 4 + 8 * 5
    assert saved.layer.x is problem.x
    assert saved.layer.w_down is problem.weights[1]


def call(**changes):
    """moe_forward on a small layer with some arguments replaced."""
    problem = Problem("float32", bias=True, sizes=(4, 2, 3, 8, 5))
    names = ("x", "topk_idx", "topk_weights", "w_gate_up", "w_down")
    arguments = dict(zip(names, problem.arguments, strict=True)) | problem.options | changes
    positional = [arguments.pop(name) for name in names]
    return pyroute.moe_forward(*positional, **arguments)


F32 = np.float32
INVALID = [
    ({"x": [[1.0]]}, TypeError, "x must be an array, got list"),
    ({"x": np.zeros((4, 8))}, TypeError, "x must be float32 or bfloat16, got float64"),
    ({"x": np.zeros(8, F32)}, ValueError, "x must be of shape [num_tokens, hidden], got [8]"),
    ({"topk_idx": np.zeros((4, 2))}, TypeError, "topk_idx must be integers, got float64"),
    ({"topk_idx": np.zeros((4, 2), bool)}, TypeError, "topk_idx must be integers, got bool"),
    ({"topk_idx": np.zeros((5, 2), int)}, ValueError, "topk_idx must be of shape [num_tokens=4, top_k], got [5, 2]"),
    ({"topk_idx": np.zeros((4, 0), int)}, ValueError, "top_k"),
    ({"topk_idx": np.full((4, 2), 3)}, ValueError, "moe_forward: topk_idx[0, 0] must be in"),
    ({"topk_idx": np.full((4, 2), -2)}, ValueError, "got -2"),
    ({"topk_weights": np.zeros((4, 2), int)}, TypeError, "topk_weights must be float32 or bfloat16 or"),
    ({"topk_weights": np.zeros((4, 3), F32)}, ValueError, "topk_weights must be of shape [num_tokens=4, top_k=2]"),
    ({"w_down": np.zeros((3, 7, 5), F32)}, ValueError, "w_down must be of shape [num_experts, hidden=8, intermediate]"),
    ({"w_down": np.zeros((3, 8, 5), np.float16)}, TypeError, "w_down must be float32 or bfloat16, got float16"),
    ({"w_down": np.zeros((3, 8, 5), E4M3)}, TypeError, "w_down must be float32 or bfloat16, got float8_e4m3fn"),
    (
        {"w_gate_up": np.zeros((3, 5, 8), F32)},
        ValueError,
        "w_gate_up must be of shape [num_experts=3, 2 * intermediate=10, hidden=8], got [3, 5, 8]",
    ),
    ({"activation": "relu2"}, ValueError, "w_gate_up must be of shape [num_experts=3, intermediate=5, hidden=8]"),
    (
        {"b_gate_up": np.zeros((3, 5), F32)},
        ValueError,
        "b_gate_up must be of shape [num_experts=3, 2 * interm",
    ),
    ({"b_gate_up": np.zeros((4, 10), F32)}, ValueError, "b_gate_up must be of shape [num_experts=3, 2 * interm"),
    ({"b_down": np.zeros((4, 8), F32)}, ValueError, "b_down must be of shape [num_experts=3, hidden=8], got [4, 8]"),
    ({"b_down": np.zeros((3, 8))}, TypeError, "b_down must be float32 or bfloat16, got float64"),
    ({"activation": "silu"}, ValueError, "activation must be one of 'swiglu'"),
    ({"limit": 3.0}, ValueError, "limit must be None with activation 'swiglu', got 3.0"),
    ({"alpha": 3.0}, ValueError, "alpha must be None with activation 'swiglu', got 3.0"),
    ({"weight_on": "inputs"}, ValueError, "weight_on must be one of 'output', 'pre_down', 'input', got 'inputs'"),
    ({"weight_on": 1}, TypeError, "weight_on must be one of"),
    (
        {"quantize_activations": True},
        ValueError,
        "quantize_activations must be False unless both weights are Fp8A",
    ),
    (
        {"quantize_activations": "e4m3"},
        ValueError,
        "quantize_activations must be one of False, True, 'float32', 'u",
    ),
    ({"quantize_activations": 1}, TypeError, "quantize_activations must be one of"),
    ({"alignment": 0}, ValueError, "alignment must be"),
    ({"alignment": 8.0}, TypeError, "alignment must be an integer, got float"),
    ({"return_saved": 1}, TypeError, "return_saved must be one of False, True, got int"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), INVALID, ids=[f"{m[:40]}" for _, _, m in INVALID])
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error) as raised:
        call(**changes)
    text = str(raised.value)
    assert message in text
    assert "\n" not in text


def test_a_backend_that_is_not_there_raises():
    with pytest.raises((RuntimeError, TypeError), match="moe_forward: backend"):
        call(backend="cuda")


def test_wrong_arguments_of_backward():
    _, saved = call(return_saved=True)
    with pytest.raises(TypeError, match="moe_backward: saved must be a MoeSaved, got None"):
        pyroute.moe_backward(np.zeros((4, 8), F32), None)
    with pytest.raises(ValueError, match=r"grad_y must be of shape \[num_tokens=4, hidden=8\], got \[4, 7\]"):
        pyroute.moe_backward(np.zeros((4, 7), F32), saved)
    with pytest.raises(TypeError, match="moe_backward: grad_y must be float32, got bfloat16"):
        pyroute.moe_backward(np.zeros((4, 8), BF16), saved)


EXAMPLE = Path(__file__).resolve().parent.parent / "examples/moe_layer.py"


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="needs the source tree")
def test_the_example_takes_a_step_downhill(capsys):
    names = runpy.run_path(str(EXAMPLE))
    assert "loss" in capsys.readouterr().out
    step = names["x"] - 1e-3 * names["grad_x"]
    gating = pyroute.topk_gating(step @ names["w_router"].T, names["config"])
    y = pyroute.moe_forward(step, gating.topk_idx, gating.topk_weights, names["w_gate_up"], names["w_down"])
    assert (y**2).sum() < (names["y"] ** 2).sum()
