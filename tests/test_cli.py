"""The command line as a user meets it: pipes, terminals, closed pipes, interrupts and wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import pyroute
from pyroute.bench import limits, terminal

pytest.importorskip("rich")


def environment(**extra: str) -> dict[str, str]:
    """Ours, without what would change a report's width or colour."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYROUTE_ISA")}
    env["PYTHONPATH"] = str(Path(pyroute.__file__).parent.parent)
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


def test_info_names_the_instruction_set_that_was_asked_for_and_is_not_there():
    if not pyroute.backends()["cpu"].available:
        pytest.skip("needs the compiled backend")
    assert "PYROUTE_ISA=sparc is not one of" in run("info", PYROUTE_ISA="sparc").stdout
    assert json.loads(run("info", "--json", PYROUTE_ISA="scalar").stdout)["machine"]["isa"] == "scalar"


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


def test_a_closed_pipe_is_silent():
    command = [sys.executable, "-m", "pyroute", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# ---- limits and pictures -------------------------------------------------------------------------------------------


def test_limits_without_the_compiled_backend(monkeypatch):
    monkeypatch.setattr(limits._backend, "HAS_CORE", False)
    measured = limits.measure_limits(quick=True)
    assert measured.copy_gbs > 0.1
    assert measured.fma_gflops is None
    assert measured.read_gbs is None


def test_probes_refuse_what_they_cannot_read():
    if not pyroute.backends()["cpu"].available:
        pytest.skip("needs the compiled backend")
    core = limits._backend.core
    small = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match="320 bytes"):
        core.probe_read(small, 1)
    with pytest.raises(ValueError, match="threads"):
        core.probe_read(np.zeros(4096, np.uint8), 0)
    with pytest.raises(ValueError, match="shape"):
        core.probe_copy(np.zeros(4096, np.uint8), np.zeros(8192, np.uint8), 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_copy_probe_copies(threads):
    if not pyroute.backends()["cpu"].available:
        pytest.skip("needs the compiled backend")
    source = np.random.default_rng(0).integers(0, 256, 1 << 16).astype(np.uint8)
    for size in (320, 4096, 1 << 16):
        destination = np.zeros(size, np.uint8)
        copied = limits._backend.core.probe_copy(destination, source[:size].copy(), threads) // 2
        assert copied >= size - 320
        assert np.count_nonzero(destination) >= 0.9 * copied


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
