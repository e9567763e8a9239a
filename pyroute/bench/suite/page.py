"""``--plot report.html``: one page without scripts or foreign files, for a screen of any width and for paper.

A roofline, a picture of bars for every case, and the numbers as a table. Drawn as SVG by plain string work (svg.py), in
colours that a light and a dark page both show and that colour-blind readers tell apart.
"""

from __future__ import annotations

import html
from typing import Any

from ..terminal import UsageError, duration
from .svg import bars, roofline
from .svg_scaling import panel

STYLE = """
:root { --paper: #fff; --ink: #1c1e21; --soft: #5b6168; --line: #d9dce0; --ours: #1f6fb4; --other: #9aa3ad;
  --limit: #c8552b; --good: #22783c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e8eaed; --soft: #a2a9b1; --line: #33383e;
  --ours: #6cb4f0; --other: #77808a; --limit: #f0885c; --good: #6fcf8b; --bad: #ff8a80; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --ours: #1f6fb4; --other: #999;
  --limit: #c8552b; --good: #22783c; --bad: #b3261e; }
  figure, tr { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p, .facts { color: var(--soft); margin: .25rem 0; font-size: .9rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
.facts dt { color: var(--ink); } .facts dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .limit { stroke: var(--limit); fill: none; }
svg .limit-text, svg .machine { fill: var(--limit); }
.roof { max-width: 42rem; } svg .ours { fill: var(--ours); } svg .other { fill: var(--other); }
svg .spread { stroke: var(--ink); }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem; }
figure { margin: 0; } .panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
svg .fit { stroke: var(--other); fill: none; stroke-width: 1.5; } svg .limit { stroke-width: 1.5; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.met { color: var(--good); } .missed { color: var(--bad); font-weight: 600; }
"""


def write(path: str, facts: dict[str, Any], lines: list[dict[str, Any]], notes: list[str]) -> None:
    """The page of one run to a file; UsageError where that cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(facts, lines, notes))
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from None


def page(facts: dict[str, Any], lines: list[dict[str, Any]], notes: list[str]) -> str:
    growth = [line for line in lines if "fit" in line]
    lines = [line for line in lines if "points" not in line]
    timed = [line for line in lines if line.get("median_s")]
    title = f"pyroute {_version(lines or growth)} on {facts['cpu']}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<header><h1>{_text(title)}</h1>{_facts(facts, lines or growth)}{_paragraphs(notes)}</header>",
    ]
    if timed:
        parts += [_roofline(timed), _cases(timed), _bars_held(timed)]
    parts += [_growth(growth), _table(lines) if lines else "", "</body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _paragraphs(notes: list[str]) -> str:
    return "".join(f"<p>{_text(note)}</p>" for note in notes)


def _version(lines: list[dict[str, Any]]) -> str:
    return next((line["version"] for line in lines if str(line["column"]).startswith("pyroute")), "")


def limits(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The best of every limit over the run: what no time of it can beat."""
    names = ("fma_gflops", "read_gbs", "write_gbs", "copy_gbs")
    found = [line[key] for line in lines for key in ("limits", "limits_after") if line.get(key)]
    return {name: max((one[name] or 0.0 for one in found), default=0.0) for name in names}


def _facts(facts: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    best = limits(lines)
    rates = f"read {best['read_gbs']:.0f}, write {best['write_gbs']:.0f}, copy {best['copy_gbs']:.0f} GB/s"
    threads = lines[0]["threads"] if lines else facts["threads"]
    shown = {
        "measured": f"{facts['date']}, commit {facts['commit']}",
        "machine": f"{facts['cores']} cores, {facts['isa']}, {threads} threads",
        "limits": f"multiply-add {best['fma_gflops']:.0f} GFLOP/s, {rates}" if lines else "",
        "software": f"Python {facts['python']}, NumPy {facts['numpy']}, {facts['compiler']}",
    }
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in shown.items() if value)
    return f'<dl class="facts">{items}</dl>'


def _roofline(lines: list[dict[str, Any]]) -> str:
    ours = [line for line in lines if line["column"].startswith("pyroute") and line["flops"] and line["bytes"]]
    best = limits(lines)
    if not ours or not best["fma_gflops"]:
        return ""
    text = (
        "Operations a second against operations per byte that the work must move at least. Nothing can lie above the "
        "roof, except work whose data is still in a cache."
    )
    picture = f'<div class="roof">{roofline(ours, best)}</div>'
    return f"<section><h2>Roofline</h2><p>{_text(text)}</p>{picture}</section>"


def _cases(lines: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["op"], line["case"]), []).append(line)
    order = list(dict.fromkeys(op for op, _ in groups))
    sections, last = [], ""
    for (op, case), group in sorted(groups.items(), key=lambda entry: order.index(entry[0][0])):
        if op != last:
            sections.append(f'{"</div></section>" if last else ""}<section><h2>{_text(op)}</h2><div class="cases">')
            last = op
        sections.append(f"<figure><figcaption><p>{_text(case)}</p></figcaption>{bars(group)}</figure>")
    return "\n".join([*sections, "</div></section>"])


def _growth(lines: list[dict[str, Any]]) -> str:
    sections = []
    for op in dict.fromkeys(line["op"] for line in lines):
        panels = "".join(f"<figure>{panel(line)}</figure>" for line in lines if line["op"] == op)
        sections.append(f'<section><h2>{_text(op)}, growing</h2><div class="panels">{panels}</div></section>')
    return "\n".join(sections)


def _bars_held(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        for bar in line.get("bars", ()):
            verdict = {True: "met", False: "missed", None: "no time"}[bar["met"]]
            value = "" if bar["value"] is None else f"{bar['value']:.2f}"
            cells = f"{line['op']} {line['case']}", bar["bar"], f"{bar['target']:g}", value
            tail = f'<td class="{verdict}">{verdict}</td>'
            rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + tail + "</tr>")
    return _section("What it is held to", ("case", "bar", "target", "measured", ""), rows) if rows else ""


def _table(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        name = f"{line['op']} {line['case']}"
        cells = [name, line["column"]]
        if line.get("median_s"):
            share, ratio = line.get("share_of_limit"), line.get("ratio_to_pyroute")
            spread = f"{duration(line['p10_s'])} to {duration(line['p90_s'])}"
            error = line.get("error")
            cells += [duration(line["median_s"]), spread, "" if share is None else f"{share:.0%}"]
            cells += [
                "" if ratio is None else f"{ratio:.2f}",
                "" if error is None else f"{error:.0e}" if error else "exact",
            ]
        else:
            cells += [line["status"], line.get("note", ""), "", "", ""]
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    header = (
        "case",
        "column",
        "median",
        "10th to 90th percentile",
        "of the limit",
        "over pyroute's",
        "worst row's error",
    )
    return _section("All numbers", header, rows)


def _section(title: str, header: tuple[str, ...], rows: list[str]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "\n".join(rows)
    return (
        f'<section><h2>{_text(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )
