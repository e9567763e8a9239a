"""Growth, threads, loads and sizes: the fit finds what is not a line, and every case runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pyroute.__main__ import main

BENCHES = Path(__file__).resolve().parent.parent / "benches"
pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="needs the source tree")


@pytest.fixture
def scaling(monkeypatch):
    from pyroute.bench.suite import harness, scaling

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
    assert main(["bench", "gate", "--scaling", "--quick", "--parts", "growth,threads", "--json", str(path)]) == 0
    lines = json.loads(path.read_text())["lines"]
    assert [line["case"] for line in lines] == ["growth with T", "growth with k", "growth with E", "threads"]
    assert all(len(line["median_s"]) == len(line["points"]) for line in lines)
    assert "worst distance from a line" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_was_measured(scaling, tmp_path, monkeypatch):
    def interrupted(op, args):
        raise KeyboardInterrupt

    monkeypatch.setitem(scaling.MEASURES, "sizes", interrupted)
    path = tmp_path / "lines.json"
    argv = ["bench", "gate", "--scaling", "--quick", "--parts", "threads,sizes", "--json", str(path)]
    assert main(argv) == 130
    assert len(json.loads(path.read_text())["lines"]) == 1


@pytest.mark.parametrize("argv", [["nothing"], ["--parts", "nothing"], ["--rounds", "0"]])
def test_bad_arguments_are_one_sentence(scaling, argv, capsys):
    assert main(["bench", "--scaling", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_for_every_size(scaling, tmp_path, capsys):
    target = tmp_path / "growth.html"
    argv = ["bench", "gate", "quantize", "--scaling", "--quick", "--parts", "growth", "--plot", str(target)]
    assert main(argv) == 0
    assert target.read_text().count("<svg") == 5  # T, k, E and T, H
    assert "experts per token k" in target.read_text()


def test_points_of_a_picture_lie_where_the_numbers_say(scaling):
    from pyroute.bench.suite.svg_scaling import panel

    times = {key: [1e-6, 1e-5, 1e-4] for key in ("median_s", "p10_s", "p90_s")}
    fit = {"start": 0.0, "slope": 1e-7, "worst": 0.0, "power": 1.0}
    line = {"op": "gate", "case": "growth with T", "x": [10.0, 100.0, 1000.0], "least_s": [], "fit": fit, **times}
    points = [
        tuple(map(float, p)) for p in re.findall(r'<circle class="ours" cx="([\d.]+)" cy="([\d.]+)"', panel(line))
    ]
    path = re.search(r'class="fit" d="M([^"]*)"', panel(line))[1]
    fitted = [tuple(map(float, p.split(","))) for p in path.split(" L")]
    for point, on_line in zip(points, (fitted[0], fitted[20], fitted[40]), strict=True):
        assert point == pytest.approx(on_line, abs=0.3)


def test_the_command_line_knows_what_scales(scaling):
    from pyroute.bench.suite import options

    assert tuple(scaling.cases.BUILD) == options.SCALED
    assert tuple(scaling.MEASURES) == options.PARTS


@pytest.mark.parametrize("op", ["gate", "permute", "unpermute", "quantize", "gemm", "layer"])
def test_the_least_work_doubles_with_the_tokens(scaling, op):
    s = scaling.cases.Sizes(T=64, k=4, E=8, H=256, I=128)
    (moved, flops), (moved2, flops2) = scaling.cases.least(op, s), scaling.cases.least(op, s._replace(T=128))
    assert flops2 == 2 * flops
    weights = {"gemm": 8 * 256 * 128, "layer": 3 * 8 * 256 * 128}.get(op, 0)
    assert moved2 - weights == 2 * (moved - weights)
