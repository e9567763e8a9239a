"""The page and the comparison with an earlier run: what they say, and how a real browser shows the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from pyroute.__main__ import main
from pyroute.bench.suite import changes, page, svg

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMITS = {"isa": "avx2", "fma_gflops": 200.0, "read_gbs": 25.0, "write_gbs": 25.0, "copy_gbs": 40.0, "steadiness": 0.9}
FACTS = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "cpu": "A <CPU> & more", "cores": 2, "compiler": "GCC",
    "isa": "avx2", "threads": 2, "python": "3.11", "numpy": "2.0",
}  # fmt: skip


def line(column, median, *, op="gemm", case="8 x 64", **more):
    facts = {
        "op": op, "case": case, "column": column, "version": "1.0", "status": "ok", "error": 1e-3, "threads": 2,
        "cache": "warm", "median_s": median, "p10_s": 0.9 * median, "p90_s": 1.1 * median, "bytes": 10**6,
        "flops": 10**8, "share_of_limit": 0.5, "ratio_to_pyroute": 1.0, "limits": LIMITS, "limits_after": LIMITS,
    }  # fmt: skip
    return {**facts, **more}


BAR = {"bar": "pyroute : best peer", "target": 1, "value": 0.8, "met": False}
LINES = [
    line("pyroute", 2e-3, bars=[BAR]),
    line("a peer with a <very> long name & more of it than fits", 1.6e-3),
    line("broken", 0, status="failed", note="no <kernel>", median_s=None),
    line("pyroute", 5e-6, op="gate", case="deepseek-v3 T=1", flops=0),
]


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(str(path), FACTS, LINES, ["missing: somebody: ModuleNotFoundError"])
    return path


def test_the_page_is_whole_and_needs_nothing_else(written):
    text = written.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    shown = "".join(reader.text)
    for part in ("A <CPU> & more", "missing: somebody", "no <kernel>", "2 ms", "missed", "Roofline", "50%"):
        assert part in shown
    assert {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe"} == set()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_pictures_have_words_for_who_cannot_see_them():
    picture = svg.bars(LINES[:2])
    assert 'role="img"' in picture
    assert "pyroute 2 ms" in picture


def test_bars_are_as_long_as_their_times():
    widths = [float(w) for w in re.findall(r'<rect class="\w+" [^>]*width="([\d.]+)"', svg.bars(LINES[:2]))]
    assert widths[1] / widths[0] == pytest.approx(2 / 1.6, rel=1e-2)


def test_a_point_at_the_ridge_is_on_the_roof():
    limits = {"read_gbs": 25.0, "fma_gflops": 200.0}
    at_ridge = line("pyroute", 1e-3, flops=2 * 10**8, bytes=25 * 10**6)
    picture = svg.roofline([at_ridge], limits)
    x, y = (float(v) for v in re.search(r'<circle class="ours" cx="([\d.]+)" cy="([\d.]+)"', picture).groups())
    ridge_x, ridge_y = (float(v) for v in re.search(r"L([\d.]+),([\d.]+) H", picture).groups())
    assert (x, y) == pytest.approx((ridge_x, ridge_y), abs=0.2)


def test_a_page_of_nothing_is_still_a_page():
    reader = Reader()
    reader.feed(page.page(FACTS, [], ["interrupted"]))
    assert reader.open == []


def run_browser(*arguments, folder):
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
    command = [BROWSER, *quiet, f"--user-data-dir={folder}/profile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_a_browser_shows_it_without_scrolling_sideways(written, width, tmp_path):
    probe = """<script>
      const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
      const small = [...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().height < 8).length;
      document.body.dataset.found = JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide, small]);
    </script>"""
    copy = tmp_path / "probe.html"
    frame = tmp_path / "frame.html"
    copy.write_text(written.read_text().replace("</body>", probe + "</body>"))
    frame.write_text(
        f"<iframe id=f src=probe.html width={width} height=900 frameborder=0></iframe><script>f.onload = () => "
        "document.body.dataset.found = f.contentDocument.body.dataset.found</script>"
    )
    shown = run_browser("--allow-file-access-from-files", "--dump-dom", frame.as_uri(), folder=tmp_path)
    found = json.loads(re.search(r'data-found="([^"]*)"', shown).group(1).replace("&quot;", '"'))
    inner, scroll, wide, small = found
    assert inner == width
    assert scroll <= width
    assert wide == []
    assert small == 0


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
def test_a_browser_prints_it(written, tmp_path):
    target = tmp_path / "report.pdf"
    run_browser(f"--print-to-pdf={target}", "--no-pdf-header-footer", written.as_uri(), folder=tmp_path)
    assert target.read_bytes().startswith(b"%PDF")
    assert target.stat().st_size > 5000


# ---- --compare -----------------------------------------------------------------------------------------------------


def quiet_line(column, median, spread):
    return line(column, median, p10_s=median * (1 - spread), p90_s=median * (1 + spread))


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [
        (1.2, 0.01, "slower"),
        (1 / 1.2, 0.01, "faster"),
        (1.04, 0.001, "same"),  # under the least change
        (1.2, 0.15, "same"),  # both runs were noisier
        (1.35, 0.15, "slower"),
    ],
)
def test_only_what_is_beyond_the_noise_is_a_change(factor, spread, verdict):
    old, new = [quiet_line("pyroute", 1e-3, spread)], [quiet_line("pyroute", factor * 1e-3, spread)]
    (change,) = changes.find(old, new)
    assert change.verdict == verdict


def test_only_the_same_work_is_compared():
    assert changes.find([line("pyroute", 1.0, threads=1)], [line("pyroute", 2.0)]) == []
    assert changes.find([line("pyroute", 1.0, cache="cold")], [line("pyroute", 2.0)]) == []
    assert changes.find([LINES[2]], [line("broken", 1.0)]) == []


def test_another_machine_is_told():
    slow = line("pyroute", 1.0, limits={**LIMITS, "fma_gflops": 100.0})
    assert "multiply-adds 100 then, 200 now" in changes.machine_changed([slow], LINES)
    assert changes.machine_changed(LINES, LINES) == ""


def test_the_command_compares_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("pyroute.bench.suite.harness.PAUSE_SECONDS", 0.0)
    old, target = tmp_path / "old.json", tmp_path / "page.html"
    argv = ["bench", "gate", "--case", "mixtral", "--quick", "--rounds", "1"]
    assert main([*argv, "--json", str(old), "--plot", str(target)]) == 0
    assert "<svg" in target.read_text()
    document = json.loads(old.read_text())
    for each in document["lines"]:
        for key in ("median_s", "p10_s", "p90_s"):
            each[key] *= 1e-3
    old.write_text(json.dumps(document))
    capsys.readouterr()
    assert main([*argv, "--compare", str(old)]) == 1
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"lines": 3}'])
def test_an_old_file_that_is_none_is_one_sentence(tmp_path, content, capsys):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "gate", "--quick", "--compare", str(path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "--compare" in printed
