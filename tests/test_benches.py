"""The comparison with peers: what a peer does wrong is shown, and what was measured is kept."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from pyroute.__main__ import main
from pyroute.bench.suite import options

BENCHES = Path(__file__).resolve().parent.parent / "benches"
pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="needs the source tree")
pytest.importorskip("rich")

FAKE = """
import os
from pathlib import Path
from pyroute.bench.suite.peers import Work, column
import pyroute
NAME = "fake"
HERE = Path(__file__).parent
calls = 0

def version():
    return "1.2"

def gating(p):
    return pyroute.topk_gating(p.logits, p.config, bias=p.bias, backend="numpy")

@column("gate", "fake right")
def right(p):
    return Work(lambda: gating(p), lambda g: (g.topk_weights, g.topk_idx))

@column("gate", "fake wrong")
def wrong(p):
    return Work(lambda: gating(p), lambda g: (g.topk_weights * 1.01, g.topk_idx))

@column("gate", "fake raises")
def raises(p):
    raise NotImplementedError("no kernel for this\\nmachine")

@column("gate", "fake breaks later")
def breaks(p):
    def run():
        global calls
        calls += 1
        if calls > 4:
            raise FAULT
        return gating(p)
    return Work(run, lambda g: (g.topk_weights, g.topk_idx))

@column("gate", "fake alone", alone=True)
def alone(p):
    (HERE / "alone").write_text(str(os.getpid()))
    if (HERE / "crash").exists():
        os._exit(3)
    return Work(lambda: gating(p), lambda g: (g.topk_weights, g.topk_idx))

@column("gate", "fake does not apply")
def does_not_apply(p):
    return None
"""


@pytest.fixture
def benches(monkeypatch):
    """The modules of benches/, importable and with instant limits."""
    monkeypatch.syspath_prepend(str(BENCHES))
    from pyroute.bench.suite import harness, peers
    from pyroute.bench.suite import run as suite

    class Limits:
        threads = 1

        def as_dict(self):
            rates = {"fma_gflops": 100.0, "read_gbs": 10.0, "write_gbs": 10.0, "copy_gbs": 20.0}
            return {**rates, "isa": "avx2", "threads": 1, "steadiness": 1.0}

    monkeypatch.setattr(suite, "measure_limits", lambda quick: Limits())
    monkeypatch.setattr(harness, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(harness, "SAMPLE_SECONDS", 0.0)
    return peers


@pytest.fixture
def fake(benches, tmp_path, monkeypatch):
    """``fake(fault)``: the outcome of the gate rows with a peer whose last column breaks with the fault."""
    peers = benches

    def run(fault, *options):
        source = FAKE.replace("FAULT", fault)
        name = f"fake_peer_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        peer = load(peers, name)
        monkeypatch.setattr(peers, "load", lambda names=(): iter([peers.load_one("ours"), peer]))
        path = tmp_path / "out.json"
        code = main(["bench", "gate", "--quick", "--peers", "--case", "mixtral", "--json", str(path), *options])
        return code, json.loads(path.read_text())["lines"]

    return run


def load(peers, name):
    sys.modules.pop(name, None)
    peers._columns.pop(name, None)
    return peers.load_one(name, package="")


def by_column(lines):
    return {line["column"]: line for line in lines}


def test_faults_of_a_peer_are_shown(fake, capsys):
    code, lines = fake("RuntimeError('out of luck')")
    line, printed = by_column(lines), capsys.readouterr().out
    assert code == 0
    assert line["fake right"]["status"] == "ok"
    assert line["fake right"]["median_s"] > 0
    assert line["fake right"]["version"] == "1.2"
    assert line["fake wrong"]["status"] == "wrong answer"
    assert "median_s" not in line["fake wrong"]
    assert line["fake wrong"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert line["fake raises"]["note"] == "NotImplementedError: no kernel for this machine"
    assert line["fake breaks later"]["status"] == "failed"
    assert "fake does not apply" not in line
    for text in ("wrong answer", "no kernel for this machine", "out of luck"):
        assert text in printed


def test_a_column_that_disturbs_others_has_its_own_process(fake, tmp_path, capsys):
    _, lines = fake("RuntimeError")
    line = by_column(lines)["fake alone"]
    assert int((tmp_path / "alone").read_text()) != os.getpid()
    assert line["alone"] is True
    assert line["median_s"] > 0
    assert line["rounds"] == 3
    assert line["ratio_to_pyroute"] > 0
    assert "alone" not in by_column(lines)["fake right"]
    assert "fake alone: in a process of its own" in capsys.readouterr().out


def test_a_process_that_dies_is_a_failed_column(fake, tmp_path):
    (tmp_path / "crash").touch()
    code, lines = fake("RuntimeError")
    line = by_column(lines)
    assert code == 0
    assert line["fake alone"]["status"] == "failed"
    assert "terminated" in line["fake alone"]["note"]
    assert line["fake right"]["median_s"] > 0


def test_an_interrupted_run_keeps_what_was_measured(fake, capsys):
    code, lines = fake("KeyboardInterrupt")
    assert code == 130
    assert by_column(lines)["pyroute"]["median_s"] > 0
    assert "interrupted" in capsys.readouterr().out


def test_a_terminated_run_keeps_what_was_measured(fake):
    code, lines = fake("__import__('os').kill(os.getpid(), 15) or RuntimeError()")
    assert code == 130
    assert by_column(lines)["pyroute"]["median_s"] > 0


def test_the_json_is_there_after_every_case(benches, tmp_path, monkeypatch):
    from pyroute.bench.suite import run as suite

    path, real, seen = tmp_path / "out.json", suite.run_case, []

    def run_case(*given):
        seen.append(len(json.loads(path.read_text())["lines"]) if path.exists() else 0)
        return real(*given)

    monkeypatch.setattr(suite, "run_case", run_case)
    assert main(["bench", "gate", "--quick", "--rounds", "1", "--json", str(path)]) == 0
    assert seen[0] == 0 < seen[1] < seen[-1]
    (line, *_) = json.loads(path.read_text())["lines"]
    assert len(line["samples_s"]) == line["rounds"] == 1


def test_another_process_gets_only_what_can_be_sent(benches, monkeypatch):
    from pyroute.bench.suite import alone

    sent = []

    class Here:
        def __init__(self, *given, **more):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def submit(self, function, *given):
            sent.extend(given)
            raise RuntimeError("seen")

    monkeypatch.setattr(alone, "ProcessPoolExecutor", Here)
    known = {"model": None, "load": "random", "memory": 1, "quick": True, "threads": 1, "rounds": 1, "cold": False}
    args = argparse.Namespace(**known, run=main, json=None)
    peer = benches.load_one("ours")
    (cell,) = alone.measure(0, peer, peer.columns[:1], args)
    assert cell.note == "RuntimeError: seen"
    assert vars(sent[-1]) == known


@pytest.mark.parametrize(("width", "terminal"), [(38, True), (200, True), (38, False)])
def test_a_narrow_terminal_gets_paragraphs(benches, monkeypatch, width, terminal):
    import io

    from rich.console import Console

    from pyroute.bench.suite import report

    out = io.StringIO()
    console = Console(width=width, force_terminal=terminal, file=out, color_system=None)
    monkeypatch.setattr(report, "report_console", lambda: console)
    header = ("column", "median", "p10 - p90", "rate", "of limit", "/ pyroute", "error")
    texts = "pyroute FP8 both", "12.6 ms", "10.6 ms - 15.4 ms", "234.5 GFLOP/s", "97%", "1.08", "3e-02"
    report.print_table("gemm decode T=8", header, [[*map(report.Cell, texts)]], ["a note"])
    printed = out.getvalue()
    assert all(text in printed for text in texts)
    narrow = terminal and width == 38
    assert ("median 12.6 ms" in printed) == narrow
    assert not narrow or all(len(line) <= width for line in printed.splitlines())


def test_models_stand_in_the_summary(benches, tmp_path, capsys):
    import summary

    same = {"model": "mixtral", "load": "zipf", "share_of_limit": 0.5}
    lines = [
        recorded("pyroute", 2e-3, **same),
        recorded("pyroute avx2", 2.5e-3, **same),
        recorded("slow", 9e-3, **same),
        recorded("fast", 4e-3, **same),
    ]
    path = tmp_path / "lines.jsonl"
    facts = {"date": "2026-01-02T05:06", "cpu": "EPYC", "cores": 2, "compiler": "GCC", "commit": "abc"}
    path.write_text("".join(json.dumps({**facts, **line}) + "\n" for line in lines))
    assert summary.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "## Models, avx2, 2 threads" in printed
    assert "| mixtral gate a | zipf | 2 ms | 50% | fast 4 ms |" in printed


def test_records_are_appended(fake, tmp_path, monkeypatch):
    from pyroute.bench.suite import records

    path = tmp_path / "machine.jsonl"
    monkeypatch.setattr(records, "machine_file", lambda: path)
    for _ in range(2):
        fake("RuntimeError", "--record")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) % 2 == 0
    assert {"date", "commit", "cpu", "op", "case", "column", "version", "median_s", "p10_s", "p90_s", "limits"} <= set(
        lines[0]
    )


def test_a_peer_that_is_not_there_has_a_reason(benches):
    peers = benches
    peer = peers.load_one("not_there")
    assert peer.columns == ()
    assert "ModuleNotFoundError" in peer.problem


def test_numpys_products_run_when_they_are_named(benches):
    from pyroute.bench.suite import peers, run

    arrays = peers.load_one("numpy_arrays")
    for op in ("gate", "gemm", "dgrad", "wgrad", "layer", "training"):
        named = [column.name for column in run.wanted_columns(arrays, op, "torch,numpy")]
        assert named, op
        assert all(name.startswith("numpy") for name in named), op
        assert [column.name for column in run.wanted_columns(arrays, op, "")] == (named if op == "gate" else []), op


def test_every_row_runs_without_peers(benches, capsys):
    assert main(["bench", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "wrong answer" not in printed
    assert "failed" not in printed


@pytest.mark.parametrize("argv", [["nothing"], ["--rounds", "0"], ["--threads", "-1"]])
def test_bad_arguments_are_one_sentence(benches, argv, capsys):
    assert main(["bench", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("damage", ["a row exchanged", "one element", "not finite"])
def test_wrong_answers_are_found(benches, damage):
    from pyroute.bench.suite import products, shapes

    p = products.prefill("gemm", shapes.small(shapes.shape("deepseek-v2-lite", 64)))
    w = p.w8.dequantize()
    out = np.concatenate([p.a[64 * e : 64 * e + 64] @ w[e].T for e in range(8)])
    assert p.error(out) < 1e-5
    row = p.sample[3][0]
    if damage == "a row exchanged":
        out[row] = out[row + 1]
    elif damage == "one element":
        out[row, 5] += 0.1
    else:
        out[row, 5] = np.nan
    assert p.error(out) > 1e-4


def test_one_bad_row_among_many_counts_in_full(benches):
    from pyroute.bench.suite import problems

    exact = np.random.default_rng(1).normal(size=(4096, 64))
    rows = exact.copy()
    rows[1234] *= 1.5
    assert problems.worst_row(rows, exact) == pytest.approx(0.5)
    rows[1234, 0] = np.nan
    assert problems.worst_row(rows, exact) == np.inf


LIMITS = (1.0, 1.0, 1.0, 1.0)  # unused where a column gives the rate


def test_bars_of_bandwidth_compare_medians_of_one_run(benches):
    from pyroute.bench.suite import bars

    bar = bars.share("pyroute", "copy", 0.9)
    assert bar.text == "pyroute : copy bandwidth"
    assert bar.value(bars.Measured({"pyroute": 2.0, "machine copy": 1.5}, *LIMITS), None) == 0.75
    assert bar.value(bars.Measured({"pyroute": 2.0}, *LIMITS), None) is None


def recorded(column, median, **more):
    same = {
        "isa": "avx2",
        "threads": 2,
        "cache": "warm",
        "op": "gate",
        "case": "a",
        "date": "2026-01-02",
        "p10_s": 1e-3,
    }
    return {**same, "column": column, "median_s": median, "p90_s": 4e-3, "ratio_to_pyroute": 1.0, **more}


def test_the_summary_shows_the_latest_line_beside_its_peer(benches, tmp_path, capsys):
    import summary

    met = {"bar": "pyroute : best peer", "target": 2, "value": 3.0, "met": True}
    lines = [
        recorded("pyroute", 9e-3, bars=[{**met, "value": 1.0, "met": False}], date="2026-01-01T01:02"),
        recorded("pyroute", 2e-3, bars=[met]),
        recorded("other", 6e-3),
        recorded("other", 6e-3, date="2026-01-01T01:02"),
        {"op": "gate", "case": "growth with T", "column": "pyroute", "points": [], "fit": {"power": 0.9, "worst": 0.2}},
    ]
    path = tmp_path / "lines.jsonl"
    facts = {"date": "2026-01-02T05:06", "cpu": "EPYC", "cores": 2, "compiler": "GCC", "commit": "abc"}
    path.write_text("".join(json.dumps({**facts, **line}) + "\n" for line in lines))
    assert summary.main([str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "# EPYC, 2 cores, GCC"
    assert printed[2] == "Measured 2026-01-01 to 2026-01-02 at abc; written by `make readme`."
    assert printed[5] == "## avx2, 2 threads"
    assert printed[9] == "| gate a | pyroute 2 ms (1 ms to 4 ms) | other 6 ms | 3.00 | 2 | met |"
    assert printed[-1] == "| gate | 0.90, 20% |  |  |  |  |  |  |  |"
    assert "9 ms" not in "\n".join(printed)
    assert summary.main([str(path), "--since", "2027"]) == 2


def test_of_several_peers_the_fastest_counts(benches):
    from pyroute.bench.suite import bars

    bar = bars.faster("pyroute", ("slow", "fast", "missing"), 2)
    assert bar.value(bars.Measured({"pyroute": 1.0, "slow": 9.0, "fast": 1.5}, *LIMITS), None) == 1.5
    assert not bar.met(1.5)


def test_the_command_line_knows_the_rows_of_the_table(benches):
    from pyroute.bench.suite import bars, options

    assert tuple(dict.fromkeys(case.row for case in bars.cases())) == options.ROWS


@pytest.mark.parametrize("model", options.MODELS)
def test_every_operation_of_every_model_has_a_case(benches, model):
    from pyroute.bench.suite import models

    cases = models.cases(model, "zipf:1.2", 8 << 30)
    assert len({case.name for case in cases}) == len(cases)
    assert all(model in case.name and "zipf:1.2" in case.name for case in cases)
    assert [row for row in options.ROWS if row not in {case.row for case in cases}] == []
    sizes = []
    for case in cases:  # the shapes alone: nothing is drawn
        with pytest.raises(StopIteration):
            case.make(lambda s: sizes.append(s) or next(iter(())))
    assert {s.model for s in sizes} == {model}
    assert all(
        s.num_experts == s.of_experts or 12 * s.num_experts * s.hidden * s.intermediate <= 8 << 30 or not s.of_experts
        for s in sizes
    )


@pytest.mark.parametrize("load", ["random", "balanced", "zipf", "zipf:3", "one-hot", "half-empty"])
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-moe"])
def test_loads_spread_rows_as_they_say(benches, load, model):
    from pyroute.bench.suite import shapes

    s = shapes.shape(model, 512)._replace(load=load)
    counts = np.sort(shapes.gating(s).tokens_per_expert)[::-1]
    assert counts.sum() == 512 * s.top_k
    if load == "balanced" and s.config.num_groups == 1:  # eight neighbours are in two groups, which V3 may choose
        assert np.ptp(counts) <= 1
    if load == "one-hot":
        assert counts[0] == 512
    if load == "half-empty":
        assert np.count_nonzero(counts) <= s.num_experts // 2
    if load == "zipf:3":
        assert counts[0] > 4 * counts[s.num_experts // 4]


def test_fewer_experts_have_as_many_rows_each(benches):
    from pyroute.bench.suite import shapes

    s = shapes.shape("deepseek-v3", 4096)
    few = shapes.fitting(s, 4 << 30)
    assert few.num_experts == 16  # 2.8 of 4 GiB
    assert (few.hidden, few.intermediate) == (s.hidden, s.intermediate)
    assert few.tokens * few.top_k / few.num_experts == pytest.approx(4096 * 8 / 256, rel=0.05)
    assert few.name == f"deepseek-v3 T={few.tokens} {few.num_experts} of 256 experts"


@pytest.mark.parametrize("model", ["deepseek-v4", "kimi-k2", "llama4", "mixtral"])
def test_a_models_gate_has_a_right_answer_in_every_column(benches, model, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["bench", "gate", "--quick", "--rounds", "1", "--model", model, "--load", "zipf", "--json", str(path)]
    assert main(argv) == 0
    lines = json.loads(path.read_text())["lines"]
    assert {line["op"] for line in lines} == {"gate", "gate backward"}
    assert {line["status"] for line in lines} == {"ok"}


@pytest.mark.parametrize("load", ["uniform", "zipf:", "zipf:-1", "zipf:x", "balanced:2", "zipf:nan"])
def test_a_load_that_is_none_is_one_sentence(benches, load, capsys):
    assert main(["bench", "gate", "--load", load]) == 2
    assert "--load must be one of random, " in capsys.readouterr().err


def test_cost_at_the_rates_of_the_run(benches, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["bench", "prefill", "--quick", "--rounds", "1", "--model", "mixtral", "--cost", "--json", str(path)]
    assert main(argv) == 0
    document = json.loads(path.read_text())
    at = {one["device"]: one["tflops"] for one in document["cost"]["training"]["at"]}
    line = by_column([line for line in document["lines"] if line["op"] == "gemm"])["pyroute FP8"]
    assert at["this machine's GEMM, FP8"] == pytest.approx(line["flops"] / line["median_s"] / 1e12)
    assert "device hours" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["", "--model llama4", "--model mixtral --scaling"])
def test_cost_of_nothing_is_one_sentence(benches, more, capsys):
    assert main(["bench", "--cost", *more.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("seconds", "samples"), [(0.1, 9), (0.5, 7), (1.1, 3), (4.0, 2), (7.0, 1)])
def test_a_slow_column_has_fewer_samples(benches, monkeypatch, seconds, samples):
    from pyroute.bench.suite import harness

    cell = harness.Cell("one", "", "one", "float32", work=benches.Work(lambda: None), wake=False)
    monkeypatch.setattr(harness, "_time", lambda work, calls: seconds)
    harness.sample([cell], 1, 9, pause=0.0)
    assert len(cell.samples) == samples


def test_caches_are_emptied_with_everybodys_threads_asleep(benches, monkeypatch):
    """Read by pyroute's own threads, pyroute's alone would be awake for what follows."""
    from types import SimpleNamespace

    from pyroute.bench.suite import harness

    order = []
    core = SimpleNamespace(probe_read=lambda memory, threads: order.append((memory.nbytes, threads)))
    monkeypatch.setattr(harness, "_backend", SimpleNamespace(HAS_CORE=True, core=core))
    monkeypatch.setattr(harness, "_evictor", lambda: np.zeros(1 << 10, np.uint8))
    cell = harness.Cell(
        "one", "", "one", "float32", work=benches.Work(lambda: order.append("call")), wake=False, calls=9
    )
    harness.sample([cell], 2, 1, cold=True, pause=0.0)
    assert order == [(1 << 10, 1), "call"] * harness.COLD_CALLS
