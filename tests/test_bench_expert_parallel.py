"""The measured side of the scaling model: it runs on two ranks, leaves the layer as it was, predicts by its links."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from processes import run_ranks, values


def measure() -> dict:
    from pyroute.bench import expert_parallel
    from pyroute.pytorch._expert_exchange import Ranks

    before = Ranks.all_to_all
    found = expert_parallel.run(((8, 64),), 3, (2**10, 2**14, 2**16))
    assert Ranks.all_to_all is before
    return found


def predict_by_hand() -> dict:
    """Two ranks, every expert as often: a token's four experts miss a rank with (8 7 6 5) / (16 15 14 13)."""
    from pyroute.bench import expert_parallel
    from pyroute.scaling import Link

    return expert_parallel.predict(Link(1e6, 0.5), 10, 1024, None, np.ones(16))


def test_two_ranks_measure_and_predict(tmp_path):
    found = values(run_ranks(2, measure, store=tmp_path / "store"))
    (line,) = found[0]["lines"][:1]
    assert [entry["payload"] for entry in found[0]["lines"]] == [None, "fp8"]
    assert found[0]["world"] == 2
    assert found[0]["latency"] >= 0
    assert found[0]["bandwidth"] > 0
    for name in ("dispatch", "combine"):
        assert line["measured"][name] > 0
        assert line["measured"][name] == found[1]["lines"][0]["measured"][name]
        assert line["predicted"][name] == found[1]["lines"][0]["predicted"][name]


def test_the_prediction_by_hand(tmp_path):
    found, other = values(run_ranks(2, predict_by_hand, store=tmp_path / "store"))
    assert found == other
    reached = 1 - 8 * 7 * 6 * 5 / (16 * 15 * 14 * 13)
    dispatch, combine = 10 * reached * (4096 + 32), 10 * 2 * 4096
    assert found["dispatch"] == pytest.approx(3 * 0.5 + dispatch / 1e6)  # with headers and routes
    assert found["combine"] == pytest.approx(0.5 + combine / 1e6)


def test_without_torchrun_it_says_what_is_missing(monkeypatch, capsys):
    from pyroute.bench import expert_parallel

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        expert_parallel.main([])
    assert ended.value.code == 2
    assert "wants torchrun --nproc-per-node N" in capsys.readouterr().err
