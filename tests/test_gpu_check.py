"""tools/gpu_check.py: a stage that fails, hangs or cannot run says so, and the others go on."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools/gpu_check.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    codes = {
        "good": "print('fine')",
        "hangs": "import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', "
        "'import time; time.sleep(60)'])",
        "bad": "print('why it failed'); raise SystemExit(1)",
        "crashes": "import os; os.kill(os.getpid(), 11)",
        "absent": "print('no such thing here'); raise SystemExit(77)",
        "after": "print('ran')",
        "needing": "print('ran')",
    }
    needs = {"after": ("bad",), "needing": ("good",)}
    codes["without"] = "print('ran')"
    stages = tuple(
        module.Stage(
            name, 2, needs.get(name, ()), name != "absent", True, (sys.executable, "-c", code),
            "no_such_package" * (name == "without"),
        )
        for name, code in codes.items()
    )  # fmt: skip
    monkeypatch.setattr(module, "STAGES", stages)
    monkeypatch.setattr(module, "NAMES", tuple(codes))
    return module


def test_stages_fail_alone(gpu_check, tmp_path, capsys):
    start = time.monotonic()
    assert gpu_check.main(["--json", str(tmp_path / "out.json")]) == 1
    assert time.monotonic() - start < 30
    found = {s["stage"]: (s["status"], s["note"]) for s in json.loads((tmp_path / "out.json").read_text())["stages"]}
    assert found == {
        "good": ("ok", "fine"),
        "hangs": ("failed", "not done after 2 s; last: started"),
        "bad": ("failed", "why it failed"),
        "crashes": ("failed", "exit status -11: it printed nothing"),
        "absent": ("skipped", "no such thing here"),
        "after": ("skipped", "bad failed"),
        "needing": ("ok", "ran"),
        "without": ("skipped", "no_such_package is not installed"),
    }
    assert "total      2 ok, 3 failed, 3 skipped" in capsys.readouterr().out


def test_the_time_of_all_stages_has_an_end(gpu_check, capsys):
    assert gpu_check.main(["--seconds", "2", "--stage", "hangs,needing"]) == 1
    printed = capsys.readouterr().out
    assert "not done after 1 s" in printed
    assert "the 2 s are over: --stage needing" in printed


def test_what_is_known_is_written_after_every_stage(gpu_check, tmp_path, monkeypatch):
    """The machine may be gone before the last one."""
    file = tmp_path / "out.json"

    def interrupted(stage, *arguments):
        if stage.name == "bad":
            raise KeyboardInterrupt
        return run(stage, *arguments)

    run = gpu_check.run
    monkeypatch.setattr(gpu_check, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--json", str(file), "--stage", "good,bad"])
    assert [stage["stage"] for stage in json.loads(file.read_text())["stages"]] == ["good"]


def test_the_commands_of_the_docstring_name_every_stage(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lists = [word.split(",") for word in module.__doc__.split() if word.startswith("build,device,")]
    assert len(lists) == 2
    assert {name for stages in lists for name in stages} == set(module.NAMES)


def test_some_stages_without_a_gpu(gpu_check, capsys):
    assert gpu_check.main(["--emulated", "--stage", "good,absent"]) == 0
    printed = capsys.readouterr().out
    assert "absent     skipped" in printed
    assert "needs a GPU" in printed
    with pytest.raises(SystemExit):
        gpu_check.main(["--stage", "nothing"])
    assert "no stage nothing; there are good" in capsys.readouterr().err
