"""The command line as a user meets it: pipes, terminals, closed pipes, interrupts and wrong arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_bytes, guarded

import pyroute
from pyroute.__main__ import main
from pyroute.bench import limits, terminal
from pyroute.bench.demo_text import Text, text_states

pytest.importorskip("rich")


def environment(**extra: str) -> dict[str, str]:
    """Ours, without what would change a report's width or colour."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYROUTE_ISA")}
    env["PYTHONPATH"] = str(Path(pyroute.__file__).parent.parent)
    env["OPENBLAS_NUM_THREADS"] = env["OMP_NUM_THREADS"] = "1"  # tests run beside other work
    return {**env, **extra}


def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyroute", *arguments],
        capture_output=True,
        text=True,
        env=environment(**extra),
        timeout=120,
    )


def run_without_rich(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"""
        import sys
        sys.modules["rich"] = None
        from pyroute.__main__ import main
        sys.exit(main({list(arguments)!r}))
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment(), timeout=120
    )


# ---- info ----------------------------------------------------------------------------------------------------------


def test_info_names_every_backend_and_says_why_one_is_missing():
    result = run("info")
    assert (result.returncode, result.stderr) == (0, "")
    for name, info in pyroute.backends().items():
        (line,) = [
            line for line in result.stdout.splitlines() if line.strip().startswith(name + " ") and "avail" in line
        ]
        assert ("not available: " in line) == (not info.available)
    assert pyroute.__version__ in result.stdout
    assert "\x1b" not in result.stdout  # a pipe gets no colour
    assert not any(line != line.rstrip() for line in result.stdout.splitlines())


def test_info_json_needs_no_rich():
    facts = json.loads(run_without_rich("info", "--json").stdout)
    assert facts["machine"]["numpy"] == np.__version__
    assert set(facts["backends"]) == set(pyroute.backends())
    assert facts["backends"]["numpy"]["available"] is True
    assert all(info["available"] or info["reason"] for info in facts["backends"].values())


def test_info_limits(tmp_path):
    out = tmp_path / "info.json"
    result = run("info", "--limits", "--json", str(out))
    measured = json.loads(out.read_text())["limits"]
    assert measured["copy_gbs"] > 0.1
    assert 0 < measured["steadiness"] <= 1
    assert "copy" in result.stdout
    if pyroute.backends()["cpu"].available:
        assert measured["fma_gflops"] > 1
        assert measured["read_gbs"] > 0.1
        assert measured["write_gbs"] > 0.1
        assert "write" in result.stdout


def test_info_names_the_instruction_set_that_was_asked_for_and_is_not_there():
    if not pyroute.backends()["cpu"].available:
        pytest.skip("needs the compiled backend")
    assert "PYROUTE_ISA=sparc is not one of" in run("info", PYROUTE_ISA="sparc").stdout
    assert json.loads(run("info", "--json", PYROUTE_ISA="scalar").stdout)["machine"]["isa"] == "scalar"


# ---- demo ----------------------------------------------------------------------------------------------------------

SMALL = ("demo", "--tokens", "64")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run: what it printed, and its JSON."""
    out = tmp_path_factory.mktemp("demo") / "demo.json"
    result = run(*SMALL, "--json", str(out))
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout, json.loads(out.read_text())


def test_demo_prints_six_parts_in_80_columns(demo):
    text, report = demo
    parts = ["Which experts", "Balance", "Where the time goes", "Memory", "Error"]
    if report["numpy"]:
        parts.append("NumPy fallback")
    positions = [text.index(f"\n{i}  ") for i in range(1, len(parts) + 1)]
    assert positions == sorted(positions)
    assert all(part in text for part in parts)
    assert max(map(len, text.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text


def test_demo_routes_every_word_and_balances(demo):
    _, report = demo
    settings = report["settings"]
    assert (settings["num_experts"], settings["top_k"], settings["num_groups"]) == (256, 8, 8)
    assert pyroute.RouterConfig.from_string(settings["router"]) == pyroute.RouterConfig.preset("deepseek-v3")
    assert sum(report["experts"]["tokens_per_expert"]) == 64 * 8
    balance = report["balance"]
    assert len(balance["curve"]) == balance["steps"] + 1
    assert balance["curve"][0] == balance["before"]
    assert balance["before"]["max_over_mean"] > 2
    assert 1 <= balance["after"]["max_over_mean"] < balance["before"]["max_over_mean"]
    assert 0 <= balance["after"]["variation"] < balance["before"]["variation"]


def test_demo_examples_are_words_of_the_text_that_went_there(demo):
    _, report = demo
    load = report["experts"]["tokens_per_expert"]
    for example in report["experts"]["examples"]:
        assert example["tokens"] == load[example["expert"]]
        for word in example["words"]:
            assert word["word"].islower() or "_" in word["word"]
            assert 0.5 * word["seen"] <= word["drawn"] <= word["seen"]
            assert word["drawn"] <= example["tokens"]


def test_demo_times_are_plausible(demo):
    _, report = demo
    limits = report["limits"]
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert {"router", "gate", "plan", "permute", "gate_up", "activation", "down", "unpermute", "backward"} <= set(
        stages
    )
    for stage in stages.values():
        if stage["seconds"] == 0:
            assert stage["name"] == "activation"
            continue
        assert 0 < stage["seconds"] < 60
        assert stage["bytes"] > 0
        assert stage["gbs"] == pytest.approx(stage["bytes"] / stage["seconds"] / 1e9)
        if limits["fma_gflops"] is None:
            assert stage["share_of_limit"] is None
        elif stage["flops"]:  # a neighbour may slow the limits' own measurement down
            assert 0 < stage["flops"] / stage["seconds"] / 1e9 / limits["fma_gflops"] < 1.2
    flops = 2 * 64 * 8 * 3 * report["settings"]["hidden"] * report["settings"]["intermediate"]
    assert stages["gate_up"]["flops"] + stages["down"]["flops"] == stages["forward"]["flops"] == flops
    assert stages["backward"]["flops"] == 2 * flops


def test_demo_memory_and_errors(demo):
    _, report = demo
    memory = report["memory"]
    assert memory["float32_bytes"] == 4 * report["settings"]["parameters"] == 2 * memory["bfloat16_bytes"]
    assert 0.25 < memory["fp8_over_float32"] < 0.2502
    full = memory["full_size"]
    assert full["float32_bytes"] == 4 * 256 * 3 * 7168 * 2048
    assert full["fp8_bytes"] == 256 * 3 * (7168 * 2048 + 4 * 56 * 16)
    error = report["error"]
    assert error["rows"] == 64
    assert 0 < error["float32"]["median_row"] <= error["float32"]["worst_row"] < 1e-5
    assert 1e-3 < error["fp8"]["median_row"] <= error["fp8"]["worst_row"] < 0.15


def test_demo_numpy_beside_it(demo):
    _, report = demo
    if not pyroute.backends()["cpu"].available:
        assert report["numpy"] is None
        return
    numpy = report["numpy"]
    assert numpy["same_ids"] is True
    assert numpy["same_weights"] is True
    assert [stage["name"] for stage in numpy["stages"]] == [stage["name"] for stage in report["stages"]]


def test_demo_of_another_model_needs_no_rich_for_json():
    result = run_without_rich("demo", "--tokens", "16", "--model", "gpt-oss-20b", "--json", "--backend", "numpy")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["settings"]["num_experts"] == 32
    assert report["numpy"] is None
    assert report["error"]["float32"]["worst_row"] < 1e-5


def test_demo_full_size_that_does_not_fit_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("pyroute.bench.demo_layer.available_memory", lambda: 10**9)
    assert main(["demo", "--full-size", "--tokens", "64"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--full-size deepseek-v3 needs 11" in error
    assert "1 GB are available" in error


def test_the_same_seed_gives_the_same_states():
    ids = np.random.default_rng(0).integers(0, 300, 3000)
    text = Text(ids, [f"word{i}" for i in range(300)])
    first, again, other = (text_states(text, 32, 64, 16, seed) for seed in (1, 1, 2))
    assert first.hidden.tobytes() == again.hidden.tobytes() != other.hidden.tobytes()
    assert first.router.tobytes() == again.router.tobytes()
    assert np.sqrt((first.hidden**2).mean(axis=1)) == pytest.approx(1, rel=1e-5)
    assert first.hidden.dtype == first.router.dtype == np.float32


# ---- check ---------------------------------------------------------------------------------------------------------


def test_check_passes_here_and_counts():
    result = run("check", "--json")
    assert result.returncode == 0, result.stdout
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["failures"] == []
    assert len(report["checks"]) == 10
    for row in report["checks"]:
        assert all(count["differing"] == 0 for count in row["variants"].values())
        if pyroute.backends()["cpu"].available:
            assert all(count["elements"] > 1000 for name, count in row["variants"].items() if name != "numpy")


FAULTS = (  # one function of each row
    "topk_gating",
    "topk_gating_backward",
    "plan_routes",
    "unpermute",
    "unpermute_backward",
    "quantize_fp8",
    "dequantize_fp8",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "moe_forward",
)


@pytest.fixture
def two_presets(monkeypatch):
    if not pyroute.backends()["cpu"].available:
        pytest.skip("needs the compiled backend")
    monkeypatch.setattr(pyroute, "presets", lambda: ("deepseek-v3", "gpt-oss-20b"))  # the others cost seconds


def spoil(function, result):
    """Change the last element of a large result: its lowest bit, or where rounding is allowed far more than that."""
    for field in ("topk_weights", "row_to_token", "codes"):
        result = getattr(result, field, result)
    array = result[0] if isinstance(result, tuple) else result
    if array.size > 100:
        last = array.reshape(-1)[-1:]
        if function.startswith(("grouped", "moe")):
            last[...] += 0.01
        else:
            last.view(np.uint8)[0] ^= 1


def test_check_finds_one_wrong_element_in_every_op(two_presets, monkeypatch, capsys):
    def plant(function, good):
        def faulty(*args, **kwargs):
            result = good(*args, **kwargs)
            if kwargs.get("backend") == "cpu" and limits._backend.core.isa() == "scalar":
                spoil(function, result)
            return result

        monkeypatch.setattr(pyroute, function, faulty)

    for function in FAULTS:
        plant(function, getattr(pyroute, function))
    assert main(["check", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    for row in report["checks"]:
        differing = {name: count["differing"] for name, count in row["variants"].items() if count["differing"]}
        assert differing.keys() == {"scalar"}, row["op"]
    first = report["failures"][0]
    assert (first["op"], first["variant"], first["seed"]) == ("gating: choice and weights", "scalar", 0)
    assert first["differing"] == 1
    assert first["index"] is not None
    assert first["got"] != first["expected"]
    assert "deepseek-v3" in first["shape"]


def test_check_shows_the_first_difference(two_presets, monkeypatch, capsys):
    good = pyroute.z_loss
    monkeypatch.setattr(pyroute, "z_loss", lambda *a, backend, **k: good(*a, **k) + (1.0 if backend == "cpu" else 0.0))
    assert main(["check", "--seed", "3"]) == 1
    text = capsys.readouterr().out
    assert "There are differences" in text
    assert "gating: gradients, losses, z_loss" in text
    assert "seed 3" in text
    assert "2 differ" in text  # one per preset


# ---- the surroundings ----------------------------------------------------------------------------------------------


def test_without_rich_one_line_says_what_to_install():
    result = run_without_rich("info")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert 'pip install "pyroute-moe[cli]"' in result.stderr


def test_no_arguments_is_help():
    result = run()
    assert result.returncode == 0
    assert "info" in result.stdout


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("info", "--nonsense"), ("info", "--json", "/nonexistent/x.json")]
)
def test_a_mistake_is_one_sentence_and_exit_2(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("pyroute")
    assert result.stderr.count("\n") == 1


def test_narrow_terminal_keeps_its_width():
    lines = run("info", COLUMNS="40").stdout.splitlines()
    assert max(map(len, lines)) <= 40


def test_colour_only_where_a_terminal_shows_it():
    assert "\x1b[" in run("info", FORCE_COLOR="1").stdout
    assert "\x1b[3" not in run("info", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_an_ascii_terminal_gets_a_report():
    assert run("info", PYTHONIOENCODING="ascii").returncode == 0


def test_an_ascii_terminal_gets_pictures_in_digits():
    asked = ("placement", "zipf:1", "--devices", "7")
    done, blocks = run(*asked, PYTHONIOENCODING="ascii"), run(*asked, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0
    assert "12345678: from nothing" in done.stdout
    assert done.stdout == blocks.stdout.translate(terminal.IN_ASCII)
    assert "±".encode("latin-1", "pyroute_digits") + "±█".encode("ascii", "pyroute_digits") == b"\xb1?8"


def test_a_closed_pipe_is_silent():
    command = [sys.executable, "-m", "pyroute", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_interrupt_is_one_line_and_130():
    command = [sys.executable, "-m", "pyroute", "demo", "--json", "-"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:  # fmt: skip
        time.sleep(3)  # it takes ten times as long
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "pyroute: interrupted\n")


def test_progress_is_for_terminals_only():
    """On a terminal a bar on standard error; the report itself stays clean on standard output."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pyroute", "check", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment(TERM="xterm")) as process:
        os.close(theirs)
        report = process.stdout.read()
        shown = b""
        with contextlib.suppress(OSError):  # the terminal goes away with the process
            while chunk := os.read(ours, 1 << 16):
                shown += chunk
    os.close(ours)
    assert json.loads(report)["passed"] is True
    assert b"gating" in shown
    assert b"\x1b[" in shown


# ---- limits and pictures -------------------------------------------------------------------------------------------


def test_limits_without_the_compiled_backend(monkeypatch):
    monkeypatch.setattr(limits._backend, "HAS_CORE", False)
    measured = limits.measure_limits(quick=True)
    assert measured.copy_gbs > 0.1
    assert measured.fma_gflops is None
    assert measured.read_gbs is None
    assert measured.write_gbs is None


def test_share_of_a_limit():
    machine = limits.Limits(2, "avx2", 200.0, 100.0, 20.0, 10.0, 30.0, 15.0, 40.0, 20.0, 1, 1.0)
    assert machine.share(1.0, 20e9) == pytest.approx(0.5)
    assert machine.share(1.0, 20e9, reads=True) == pytest.approx(1.0)
    assert machine.share(2.0, 20e9, 300e9) == pytest.approx(0.75)
    assert dataclasses.replace(machine, fma_gflops=None).share(1.0, 1.0) is None


def test_probes_refuse_what_they_cannot_read():
    if not pyroute.backends()["cpu"].available:
        pytest.skip("needs the compiled backend")
    core = limits._backend.core
    small = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match="320 bytes"):
        core.probe_read(small, 1)
    with pytest.raises(ValueError, match="320 bytes"):
        core.probe_write(small, 1)
    with pytest.raises(ValueError, match="threads"):
        core.probe_read(np.zeros(4096, np.uint8), 0)
    with pytest.raises(ValueError, match="shape"):
        core.probe_copy(np.zeros(4096, np.uint8), np.zeros(8192, np.uint8), 1)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_copy_probe_copies_every_whole_block_and_nothing_else(cpu_floor, num_threads):
    for size in (320, 4096, 10_000, 1 << 16):
        source = guarded(np.random.default_rng(size).integers(1, 256, size).astype(np.uint8))
        destination = guarded(np.zeros(size, np.uint8))
        copied = limits._backend.core.probe_copy(destination, source, num_threads) // 2
        assert size - 320 < copied <= size
        to, at = (-array.ctypes.data % 64 for array in (destination, source))
        expected = np.zeros(size, np.uint8)
        expected[to : to + copied] = source[at : at + copied]
        assert_same_bytes(destination, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_write_probe_writes_every_whole_block_and_nothing_else(cpu_floor, num_threads):
    for size in (320, 4096, 10_000, 1 << 16):
        destination = guarded(np.zeros(size, np.uint8))
        written = limits._backend.core.probe_write(destination, num_threads)
        assert size - 320 < written <= size
        at = -destination.ctypes.data % 64
        expected = np.zeros(size, np.uint8)
        expected[at : at + written] = 255
        assert_same_bytes(destination, expected)


def test_pictures():
    assert terminal.sparkline([0, 1], 2) == "▁█"
    assert terminal.sparkline(list(range(100)), 10)[0] == "▁"
    assert len(terminal.sparkline(list(range(100)), 10)) == 10
    assert terminal.columns([5, 5, 5]) == "▁▁▁"
    assert terminal.bar(0.5, 10) == "█████"
    assert terminal.bar(2.0, 3) == "███"
    assert terminal.number_of_bytes(704_643_072) == "705 MB"
    assert terminal.number_of_bytes(45.1e9) == "45.1 GB"
    assert terminal.duration(0.0142) == "14.2 ms"
    assert terminal.duration(0.9999) == "1 s"


@pytest.mark.parametrize(
    "given", [["--scaling"], ["--parts", "growth"], ["--plot", "x.html"], ["--cost"], ["--threads", "2"]]
)
def test_what_only_the_cpu_suite_has_is_refused_with_gpu(given, capsys):
    """Before PyTorch or a GPU is looked for."""
    assert main(["bench", "--gpu", *given]) == 2
    assert capsys.readouterr().err == f"pyroute bench: bench --gpu does not take {given[0]}\n"
