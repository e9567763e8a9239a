"""The README's first example runs as printed, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the source tree")


def test_the_first_example_runs():
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["y"].shape == names["x"].shape
    assert names["gating"].tokens_per_expert.sum() == 4096 * 8


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_measured_tables_are_those_of_the_records(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(README.parent / "benches"))
    import readme

    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_records_go_where_the_tables_look():
    from pyroute.bench.suite import records

    if README.parent not in Path(records.__file__).parents or "site-packages" in records.__file__:
        pytest.skip("an installed package writes where it is run")
    assert records.machine_file().parent == README.parent / "benches/results"


def test_a_changed_table_is_found(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(README.parent / "benches"))
    import readme

    written = readme.documents()
    monkeypatch.setattr(readme, "documents", lambda: {path: text + "x" for path, text in written.items()})
    assert readme.main(["--check"]) == 1
    assert capsys.readouterr().out.count("make readme") == len(written)
