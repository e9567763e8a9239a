"""``pyroute bench --gpu`` without a GPU: every peer's calls against stand-ins with its signatures, and their faults."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import io
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gpu_stand_ins  # noqa: E402

from pyroute.__main__ import main  # noqa: E402
from pyroute.bench.suite import peers as registry  # noqa: E402
from pyroute.bench.suite.gpu import cases, clock, peers, problems, run  # noqa: E402

CPU = clock.Clock(torch.device("cpu"))
OURS_ALONE = {"permute_quantize", "tiles"}
COLUMNS = {  # of the peers: what each is measured at
    "torch": {"gate", "permute", "unpermute", "decode", "prefill", "dgrad", "wgrad", "layer", "training"},
    "DeepGEMM": {"decode", "prefill", "wgrad"},
    "cuBLAS": {"decode", "prefill", "dgrad", "wgrad"},
    "TransformerEngine": {"gate", "permute", "unpermute", "decode", "prefill"},
    "vLLM": {"gate", "permute", "unpermute", "layer"},
    "SGLang": {"gate", "decode", "prefill", "layer"},
    "SonicMoE": {"layer", "training"},
    "ScatterMoE": {"layer", "training"},
    "MegaBlocks": {"permute", "unpermute"},
    "grouped_gemm": {"decode", "prefill", "dgrad", "wgrad"},
    "CUTLASS": {"decode", "prefill"},
}


def forget():
    """The peers' modules, so that the next run imports them again."""
    for name in peers.MODULES:
        sys.modules.pop(f"{peers.__name__}.{name}", None)
        registry._columns.pop(f"{peers.__name__}.{name}", None)


@pytest.fixture
def stand_ins(monkeypatch):
    for name, module in gpu_stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for fault in ("damage", "error"):
        monkeypatch.setattr(gpu_stand_ins.Faults, fault, None)
    forget()
    yield gpu_stand_ins.Faults
    forget()


@pytest.fixture(autouse=True)
def instant(monkeypatch):
    monkeypatch.setattr(clock, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(run, "ceilings", lambda clock, quick: {"copy_gbs": 10.0, "bf16_tflops": 1.0})


def measured(*rows, with_peers=True):
    """Outcomes, why the run ended, and what was printed."""
    args = argparse.Namespace(
        rows=list(rows or cases.ROWS), quick=True, rounds=1, case="", peers=with_peers, model=None, load="random",
        columns="",
    )  # fmt: skip
    printed = io.StringIO()
    outcomes, ended = run.run(args, CPU, printed)
    return outcomes, ended, printed.getvalue()


def cells(outcomes):
    return [(outcome.problem.op, cell) for outcome in outcomes for cell in outcome.cells]


def test_every_peer_is_called_as_it_asks_and_right(stand_ins):
    outcomes, ended, printed = measured()
    assert ended == ""
    assert "missing" not in printed
    assert [(op, cell.name, cell.status, cell.note) for op, cell in cells(outcomes) if not cell.timed] == []
    found: dict[str, set[str]] = {}
    for op, cell in cells(outcomes):
        found.setdefault(cell.peer, set()).add(op)
    assert found.pop("pyroute") == {*COLUMNS["torch"], *OURS_ALONE}
    assert found == COLUMNS


DAMAGES = {
    "scaled": lambda t: t * 1.2,
    "a row exchanged": lambda t: t.roll(1, dims=0),
    "not a number": lambda t: t.float().fill_(float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_answers_are_seen_in_every_column(stand_ins, damage):
    stand_ins.damage = staticmethod(DAMAGES[damage])
    outcomes, ended, _ = measured()
    assert ended == ""
    for op, cell in cells(outcomes):
        direct = cell.peer in ("pyroute", "torch") or cell.name == "cuBLAS batched bfloat16"
        assert cell.status == ("ok" if direct else "wrong answer"), (op, cell.name, cell.error)
        assert cell.timed == direct


def test_what_a_peer_raises_is_its_result(stand_ins):
    stand_ins.error = NotImplementedError("no kernel for this\ncard")
    outcomes, ended, printed = measured("gate", "prefill", "layer")
    assert ended == ""
    for _, cell in cells(outcomes):
        if cell.peer not in ("pyroute", "torch") and cell.name != "cuBLAS batched bfloat16":
            assert (cell.status, cell.note) == ("failed", "NotImplementedError: no kernel for this card")
    assert "no kernel for this card" in printed
    assert {cell.status for _, cell in cells(outcomes) if cell.peer == "pyroute"} == {"ok"}


def test_peers_that_are_not_installed_are_named(monkeypatch):
    for name in gpu_stand_ins.modules():
        monkeypatch.setitem(sys.modules, name, None)
    forget()
    outcomes, ended, printed = measured("gate")
    forget()
    assert ended == ""
    missing = {line.split(": ")[1] for line in printed.splitlines() if line.startswith("missing: ")}
    assert missing == set(peers.MODULES) - {"torch_ops", "cublas"}
    assert {cell.peer for _, cell in cells(outcomes)} == {"pyroute", "torch"}


def test_without_peers_only_those_of_the_bars_are_loaded(stand_ins):
    outcomes, *_ = measured("prefill", with_peers=False)
    assert {cell.peer for _, cell in cells(outcomes)} == {"pyroute", "torch", "DeepGEMM"}


def test_a_lost_device_ends_the_run_and_keeps_what_there_is(stand_ins, monkeypatch):
    stand_ins.error = RuntimeError("an illegal memory access")
    real_wait = CPU.wait
    monkeypatch.setattr(CPU, "wait", lambda: real_wait() if stand_ins.error is None else broken())

    def broken():
        raise RuntimeError("the context is gone")

    stand_ins.error = None
    first, *_ = measured("gate")
    assert {cell.status for _, cell in cells(first)} == {"ok"}

    def permute_breaks(row, *others):
        stand_ins.error = RuntimeError("an illegal memory access") if row == "permute" else None
        return list(cases.ROWS[row](others[0], cases.Sizes(True), others[2]))

    monkeypatch.setattr(run, "problems", permute_breaks)
    outcomes, ended, printed = measured("gate", "permute", "prefill")
    assert {outcome.problem.op for outcome in outcomes} == {"gate"}
    assert "the GPU can do no more in this process" in ended
    assert "the context is gone" in ended
    assert "the rows above are what had been measured" in printed


def test_interrupted_it_keeps_what_there_is(stand_ins, monkeypatch):
    def interrupts(row, *others):
        if row == "permute":
            raise KeyboardInterrupt
        return list(cases.ROWS[row](others[0], cases.Sizes(True), others[2]))

    monkeypatch.setattr(run, "problems", interrupts)
    outcomes, ended, _ = measured("gate", "permute")
    assert ended == "interrupted"
    assert {outcome.problem.op for outcome in outcomes} == {"gate"}


def test_a_line_has_its_share_version_and_error(stand_ins):
    outcomes, *_ = measured("prefill")
    lines = {line["column"]: line for outcome in outcomes for line in outcome.lines()}
    assert lines["pyroute FP8"]["share_of_limit"] > 0
    assert lines["pyroute FP8"]["bars"][1]["value"] > 0
    assert lines["torch grouped_mm bfloat16"]["version"] == torch.__version__
    assert 0 < lines["DeepGEMM"]["error"] <= lines["DeepGEMM"]["tolerance"]


# --- graphs -----------------------------------------------------------------------------------------------------------


class FakeGraph:
    """What is captured runs at once; a replay runs it again, or nothing where it went past the graph."""

    def __init__(self, kept):
        self.kept = kept

    def replay(self):
        if self.kept is not None:
            self.kept()


@pytest.mark.parametrize("captured", [True, False])
def test_work_that_went_past_the_graph_has_no_time(monkeypatch, captured):
    out = torch.zeros(4)

    def work():
        out.copy_(torch.arange(4.0))
        return out

    class Context:
        def __init__(self, graph):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(work if captured else None))
    monkeypatch.setattr(torch.cuda, "graph", Context)
    real = clock.Clock(torch.device("cpu"))
    real.real = True
    monkeypatch.setattr(real, "wait", lambda: None)
    monkeypatch.setattr(real, "seconds", lambda call: (call(), 1e-6)[1])
    column = clock.Column("one", [work])
    (cell,) = clock.measure([column], real, 2, lambda name, got: problems.worst_row(got, torch.arange(4.0)))
    assert cell.status == ("ok" if captured else "wrong answer")
    assert captured or "replayed" in cell.note


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate():
    (problem,) = cases.gate(CPU, cases.Sizes(True), ())
    ours = problem.columns[0].first()
    weights, ids = (torch.from_numpy(np.array(part)) for part in (ours.topk_weights, ours.topk_idx))
    return problem, weights, ids


@pytest.mark.parametrize("damage", ["exchanged", "id", "shape", "negative", "nan"])
def test_a_gate_is_wrong_in_one_token(gate, damage):
    problem, weights, ids = gate
    weights, ids = weights.clone(), ids.clone()
    assert problem.check("somebody", (weights, ids)) < 1e-6
    if damage == "exchanged":  # the sum stays
        weights[7, :2] = weights[7, :2].flip(0)
    elif damage == "id":
        ids[7, 0] = next(e for e in range(256) if e not in ids[7].tolist())
    elif damage == "shape":
        weights, ids = weights[:-1], ids[:-1]
    elif damage == "negative":
        ids[7, 0] = -1
    else:
        weights[7, 0] = float("nan")
    assert not problem.check("somebody", (weights, ids)) < 1e-3


@pytest.mark.parametrize("which", range(4))
def test_a_step_is_wrong_in_one_gradient(which):
    (problem,) = cases.training(CPU, cases.Sizes(True), ())
    y, gradients = problem.columns[1].first()
    assert problem.check("", (y, gradients)) < 2e-2
    damaged = [g * 1.3 if i == which else g for i, g in enumerate(gradients)]
    assert problem.check("", (y, damaged)) > 0.2
    assert problem.check("", (y * 1.3, gradients)) > 0.2


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--plot x.html", "--scaling", "--cost", "--threads 2"])
def test_options_of_the_cpu_are_refused_in_one_sentence(option, capsys):
    assert main(["bench", "--gpu", *option.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert option.split()[0] in printed.err


FUSED_MOE = "vllm.model_executor.layers.fused_moe"


def parameters(module: str, name: str) -> list[str]:
    """Of a function, from the source of an installed package, which is not imported: that may need a GPU."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    source = Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    (function,) = (f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and f.name == name)
    return [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


@pytest.mark.parametrize(
    ("module", "name", "stand_in"),
    [
        ("vllm._custom_ops", "grouped_topk", "vllm._custom_ops"),
        (f"{FUSED_MOE}.fused_moe", "fused_experts", FUSED_MOE),
        (f"{FUSED_MOE}.moe_permute_unpermute", "moe_permute", f"{FUSED_MOE}.moe_permute_unpermute"),
        (f"{FUSED_MOE}.moe_permute_unpermute", "moe_unpermute", f"{FUSED_MOE}.moe_permute_unpermute"),
        (f"{FUSED_MOE}.config", "fp8_w8a8_moe_quant_config", f"{FUSED_MOE}.config"),
        ("sgl_kernel.moe", "moe_fused_gate", "sgl_kernel"),
        ("sgl_kernel.moe", "fp8_blockwise_scaled_grouped_mm", "sgl_kernel"),
    ],
)
def test_recorded_signatures_are_those_of_the_installed_package(module, name, stand_in):
    recorded = inspect.signature(getattr(gpu_stand_ins.modules()[stand_in], name))
    assert list(recorded.parameters) == parameters(module, name)
