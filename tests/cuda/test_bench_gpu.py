"""``pyroute bench --gpu`` on the emulated GPU: what its options choose, and what is written."""

from __future__ import annotations

import argparse
import io
import json

import pytest

torch = pytest.importorskip("torch")

import tensors  # noqa: E402

from pyroute.bench.suite import options  # noqa: E402
from pyroute.bench.suite.gpu import clock, run  # noqa: E402
from pyroute.bench.terminal import UsageError  # noqa: E402


def measured(monkeypatch, *given):
    """The arguments, and the outcomes on small shapes."""
    tensors.emulate(monkeypatch.setattr)
    args = parsed(*given, "--quick")
    options.check(args, rounds=1, quick_rounds=1)
    args.rows = run.rows_of(args)
    return args, run.run(args, clock.Clock(tensors.DEVICE), io.StringIO())[0]


def parsed(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    options.add_bench(parser)
    return parser.parse_args(given)


def test_every_case_of_a_model(monkeypatch):
    _, outcomes = measured(monkeypatch, "--model", "mixtral", "--columns", "pyroute")
    moves = {"permute", "unpermute", "permute_quantize"}
    assert {outcome.problem.op for outcome in outcomes} == moves | {
        "gate", "decode", "prefill", "dgrad", "wgrad", "layer", "training", "tiles",
    }  # fmt: skip
    assert run.failures(outcomes) == []
    for outcome in outcomes:
        assert outcome.problem.case.startswith("mixtral ")
        assert outcome.bars == []
        assert all(cell.name.startswith("pyroute") for cell in outcome.cells)


def test_loads(monkeypatch):
    """Products of equal segments are left out, and refused where they are asked for."""
    _, outcomes = measured(monkeypatch, "--load", "zipf:1.5", "--columns", "pyroute")
    assert run.failures(outcomes) == []
    moves = {"permute", "unpermute", "permute_quantize"}
    assert {outcome.problem.op for outcome in outcomes} == moves | {"gate", "layer", "training"}
    assert all("zipf:1.5" in outcome.problem.case for outcome in outcomes)
    with pytest.raises(UsageError, match=r"takes --load for gate, permute, layer, training, not for decode$"):
        run.rows_of(parsed("gate", "decode", "--load", "one-hot"))
    with pytest.raises(UsageError, match="--load must be one of"):
        run.rows_of(parsed("--load", "heavy"))


def test_what_is_compared_and_written(monkeypatch, tmp_path, capsys):
    file = tmp_path / "new.json"
    args, outcomes = measured(monkeypatch, "gate", "--case", "deepseek", "--json", str(file), "--compare", "old")
    lines = [line for outcome in outcomes for line in outcome.lines()]
    ours = next(line for line in lines if line["column"] == "pyroute")
    old = [ours | {"median_s": ours["median_s"] / 10, "p10_s": 1e-9, "p90_s": 1e-9}]
    assert run.deliver(args, old, {"device": "emulated"}, lines)
    written = json.loads(file.read_text())
    assert [line["column"] for line in written["lines"]] == [line["column"] for line in lines]
    assert [change["verdict"] for change in written["changes"]] == ["slower"]
    assert "against old" in capsys.readouterr().out


@pytest.mark.parametrize("cases", [("gate", "--case", "nothing"), ("gate", "--columns", "nothing")])
def test_nothing_chosen(cases, monkeypatch):
    assert measured(monkeypatch, *cases)[1] == []
