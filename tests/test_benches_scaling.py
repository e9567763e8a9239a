"""Growth, threads, loads and sizes: the fit finds what is not a line, and every case runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

BENCHES = Path(__file__).resolve().parent.parent / "benches"
pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="needs the source tree")


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    import scaling

    from pyroute.bench.suite import harness

    monkeypatch.setattr(harness, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(harness, "SAMPLE_SECONDS", 0.0)
    return scaling


X = np.geomspace(10, 1000, 9)


def test_a_line_is_found(scaling):
    fit = scaling.Fit.of(X, 3e-6 + 2e-8 * X)
    assert fit.start == pytest.approx(3e-6)
    assert fit.slope == pytest.approx(2e-8)
    assert fit.worst < 1e-9


@pytest.mark.parametrize("power", [0.5, 1.5, 2.0])
def test_another_power_is_no_line(scaling, power):
    assert scaling.Fit.of(X, 1e-8 * X**power).worst > 0.25


def test_a_line_starts_at_zero_or_above(scaling):
    fit = scaling.Fit.of(X, 2e-8 * X - 1e-7)
    assert fit.start == 0
    assert fit.worst > 0.25


@pytest.mark.parametrize("load", ["balanced", "zipf", "one-hot"])
def test_loads_have_the_same_number_of_distinct_slots(scaling, load):
    s = scaling.cases.Sizes(T=50, k=4, E=16, load=load)
    ids = scaling.cases.ids(s)
    assert ids.shape == (50, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    used = np.bincount(ids.reshape(-1), minlength=16)
    assert (np.ptp(used) <= 1) == (load == "balanced")
    assert (np.count_nonzero(used) == 4) == (load == "one-hot")


def test_a_run_writes_its_lines(scaling, tmp_path, capsys):
    path = tmp_path / "lines.json"
    assert scaling.main(["--quick", "--ops", "gate", "--parts", "growth,threads", "--json", str(path)]) == 0
    lines = json.loads(path.read_text())["lines"]
    assert [line["case"] for line in lines] == ["growth with T", "growth with k", "growth with E", "threads"]
    assert all(len(line["median_s"]) == len(line["points"]) for line in lines)
    assert "worst distance from a line" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_was_measured(scaling, tmp_path, monkeypatch):
    def interrupted(op, args):
        raise KeyboardInterrupt

    monkeypatch.setitem(scaling.MEASURES, "sizes", interrupted)
    path = tmp_path / "lines.json"
    argv = ["--quick", "--ops", "gate", "--parts", "threads,sizes", "--json", str(path)]
    assert scaling.main(argv) == 130
    assert len(json.loads(path.read_text())["lines"]) == 1


@pytest.mark.parametrize("argv", [["--ops", "nothing"], ["--parts", "nothing"], ["--rounds", "0"]])
def test_bad_arguments_are_one_sentence(scaling, argv, capsys):
    assert scaling.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_plot_for_every_operation(scaling, tmp_path):
    pytest.importorskip("matplotlib")
    argv = ["--quick", "--ops", "gate,quantize", "--parts", "growth", "--json", str(tmp_path / "lines.json")]
    assert scaling.main([*argv, "--plot", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["scaling_gate.png", "scaling_quantize.png"]


@pytest.mark.parametrize("op", ["gate", "permute", "unpermute", "quantize", "gemm", "layer"])
def test_the_least_work_doubles_with_the_tokens(scaling, op):
    s = scaling.cases.Sizes(T=64, k=4, E=8, H=256, I=128)
    (moved, flops), (moved2, flops2) = scaling.cases.least(op, s), scaling.cases.least(op, s._replace(T=128))
    assert flops2 == 2 * flops
    weights = {"gemm": 8 * 256 * 128, "layer": 3 * 8 * 256 * 128}.get(op, 0)
    assert moved2 - weights == 2 * (moved - weights)
