"""The training example, quick: what it writes, what it compares, and that transformers' layer is the same function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree"),
    pytest.mark.filterwarnings("ignore"),  # torch's, transformers' and matplotlib's own
]

torch = pytest.importorskip("torch")
pytest.importorskip("rich")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = torch.get_num_threads()
    import train_moe_lm

    yield train_moe_lm
    torch.set_num_threads(before)
    sys.modules.pop("train_moe_lm", None)


def test_quick_run_writes_its_log_and_plot(example, tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path)])
    log = json.loads((tmp_path / "train_moe_lm.json").read_text())
    runs = log["runs"]
    assert set(runs) == set(example.variants())
    assert {"float32", "balanced", "bfloat16", "fp8"} <= set(runs)
    for name, run in runs.items():
        assert len(run["loss"]) == log["steps"] == 12
        assert run["loss"][-1] < run["loss"][0], name
        assert run["tokens_per_second"] > 0
    if "eager" in runs:
        assert max(example.curve_distance(runs, "float32", "eager")) < 1e-5
    assert 0 < max(example.curve_distance(runs, "bfloat16", "fp8")) < 0.05
    assert 0 < max(example.curve_distance(runs, "float32", "bfloat16")) < 0.05
    assert runs["balanced"]["fullest_expert"] < runs["float32"]["fullest_expert"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in runs)
    image = tmp_path / "train_moe_lm.png"
    if image.exists():
        assert image.read_bytes().startswith(b"\x89PNG")
    else:
        assert "no plot without matplotlib" in printed


@pytest.mark.parametrize("world", [2])
def test_experts_over_processes_have_the_same_curve(tmp_path, world):
    """Not to the byte: PyTorch's products of half a batch may round otherwise than those of a whole one, and gradients
    of the parts that every process has are sums of sums. Bounded as transformers' layers are, whose sums have another
    order too.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = [str(EXAMPLES / "train_moe_lm.py"), "--quick", "--expert-parallel", "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command + script, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "train_moe_lm_parallel.json").read_text())
    alone, parallel = (log["runs"][name] for name in ("balanced", "expert-parallel"))
    assert log["processes"] == world
    assert len(parallel["loss"]) == log["steps"] == 12
    assert parallel["loss"][-1] < parallel["loss"][0] - 0.3
    assert parallel["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert parallel["held_out_loss"] == pytest.approx(alone["held_out_loss"], abs=1e-5)
    assert torch.tensor(parallel["load"]).shape == (2, 8)
    assert f"over {world} processes" in done.stdout
    assert done.stdout.count("losses at most") == 1  # of one process


def test_without_torchrun_it_says_what_is_missing(example, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        example.main(["--quick", "--expert-parallel"])
    assert ended.value.code == 2
    assert "--expert-parallel wants torchrun --nproc-per-node N" in capsys.readouterr().err


def test_transformers_layer_is_the_same_function(example):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    layer = example.Block(example.QUICK).moe
    x = torch.randn(3, 7, example.QUICK["hidden"])
    theirs = example.transformers_layer(layer)
    assert (layer(x) - theirs(x)).abs().max() <= 1e-6 * theirs(x).abs().max()


def test_batches_are_the_same_for_whoever_asks(example):
    text = example.english_text()
    assert len(text) > 10**6
    first, second = (example.Batches(text, 16, 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.of_step(3), second.of_step(3), strict=True))
    x, y = first.of_step(3)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, first.of_step(4)[0])
