"""Lines of benches/results/<machine>.jsonl: what was measured, on what, when; appended, never rewritten."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import cores, cpu_model, describe_machine

_TREE = Path(__file__).resolve().parents[3]
ROOT = _TREE if (_TREE / "benches/results").is_dir() else Path.cwd()  # the source tree; where bench runs without one
# of what could change a time: not the records of the same hour, and their plots
CHANGES = ("status", "--porcelain", "-uno", "--", ".", ":!benches/results", ":!docs")


def common_facts() -> dict[str, Any]:
    """What all lines of one run share. The machine is named by its processor, not by its host."""
    machine = describe_machine()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if _git(*CHANGES) else ""),
        **{key: machine[key] for key in ("cpu", "cores", "compiler", "isa", "threads", "python", "numpy")},
    }


def machine_file() -> Path:
    best = (describe_machine()["isas"] or ["numpy"])[-1]
    kind = re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {cores()} cores {best}".lower())
    return ROOT / "benches/results" / f"{kind.strip('-')}.jsonl"


def append(lines: Sequence[dict[str, Any]], facts: dict[str, Any] | None = None, path: Path | None = None) -> Path:
    """Add a line per entry, with the common facts in front."""
    facts, path = facts or common_facts(), path or machine_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**facts, **line}) + "\n" for line in lines)
    return path


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:  # no git
        return "unknown" if arguments[0] == "rev-parse" else ""
    return result.stdout.strip() or "unknown" if arguments[0] == "rev-parse" else result.stdout.strip()
