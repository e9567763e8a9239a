"""``pyroute cost``: sizes against what the models' authors publish, sums against hand counts, and its sentences."""

from __future__ import annotations

import json

import pytest

from pyroute.__main__ import main
from pyroute.bench import cost
from pyroute.bench.model_sizes import MODELS


def estimate(name="deepseek-v3", **changed):
    return cost.estimate(name, **changed)


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_parameters_are_those_that_the_authors_publish(model):
    assert model.total == pytest.approx(model.published_total, rel=0.015)
    # Qwen counts the embedding as active too, the others do not: 10 % of its smallest model
    assert model.active == pytest.approx(model.published_active, rel=0.02) or (
        model.active + model.embedding == pytest.approx(model.published_active, rel=0.03)
    )


def test_a_model_counted_by_hand():
    mixtral = MODELS["mixtral"]
    assert mixtral.expert == 3 * 4096 * 14336
    assert mixtral.attention.parameters == 4096 * 4096 * 2 + 4096 * 1024 * 2
    assert mixtral.total == 32 * (8 * mixtral.expert + mixtral.attention.parameters + 4096 * 8) + 2 * 32000 * 4096
    assert mixtral.total - mixtral.active == 32 * 6 * mixtral.expert + 32000 * 4096


def test_operations_and_memory():
    report, model = estimate(sequence=1), MODELS["deepseek-v3"]
    forward = report["flops_per_token"]["forward"]
    assert forward == 2 * model.active + 2 * 61 * 128 * (192 + 128)  # one token attends to itself
    assert report["training"]["flops"] == 3 * forward * 14.8e12
    weights = report["weights_bytes"]
    assert weights["float32"] == 4 * model.total
    assert weights["experts_fp8_over_float32"] == pytest.approx(0.25, rel=3e-4)
    assert weights["fp8"] < weights["bfloat16"] / 1.9


def test_published_hours_are_reproduced_by_the_rate_that_they_imply():
    report = estimate()
    implied = report["training"]["at"][0]
    assert implied["device_hours"] == pytest.approx(2.664e6)
    assert 300 < implied["tflops"] < 500  # of 1979 that an H800 multiplies in FP8
    assert report["published"]["all_dollars"] == pytest.approx(5.576e6)
    assert "published" not in estimate("mixtral")


def test_a_stated_rate_gives_hours_and_money():
    report = estimate("gpt-oss", rate=1000.0, price=3.0, tokens=1e12)
    (at,) = report["training"]["at"]
    assert at["device_hours"] == pytest.approx(report["training"]["flops"] / 1e15 / 3600)
    assert at["dollars"] == pytest.approx(3 * at["device_hours"])


@pytest.mark.slow
def test_this_machine_is_measured():
    steps: list[str] = []
    report = estimate("qwen3-moe", measured=cost.measure_rates("qwen3-moe", steps.append))
    assert len(steps) == cost.NUM_STEPS
    assert all(1e-4 < at["tflops"] < 1e4 for at in report["training"]["at"])


@pytest.mark.parametrize("name", MODELS)
def test_the_report_fits_80_columns(name, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["cost", "--model", name, "--no-measure", "--rate", "800"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert max(map(len, lines)) <= 80


def test_json(capsys):
    assert main(["cost", "--no-measure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "deepseek-v3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "gpt-5"), "--model must be one of deepseek-v3, "),
        (("--price", "0"), "must be positive and finite, got 0"),
        (("--rate", "nan"), "must be positive and finite, got nan"),
        (("--training-tokens", "many"), "must be a number, got 'many'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    pytest.importorskip("rich")
    try:
        status = main(["cost", "--no-measure", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert sentence in capsys.readouterr().err
