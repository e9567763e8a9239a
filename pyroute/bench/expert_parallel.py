"""The model of ``pyroute.scaling`` against :class:`pyroute.pytorch.ExpertParallel` on this machine.

    torchrun --nproc-per-node 2 -m pyroute.bench.expert_parallel

measures what ``all_to_all_single`` of the group's backend costs for bytes of no meaning, puts its latency and bandwidth
into the model, and compares the model's dispatch and combine with those of the layer, in the same run.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from .. import set_num_threads
from ..placement import place_experts
from ..pytorch import ExpertParallel
from ..pytorch._expert_exchange import Arriving, Ranks
from ..router_config import RouterConfig
from ..scaling import Cluster, Layer, Link, layer_time
from .terminal import UsageError, duration, report_console, show_table, show_text, write_json

EXPERTS, TOP_K, INTERMEDIATE = 16, 4, 8  # narrow experts: their products are not what is measured
SIZES = ((16, 1024), (256, 1024), (1024, 1024), (1024, 4096), (4096, 1024))  # tokens of a rank, hidden
PROBES = tuple(2**n for n in range(12, 27, 2))  # bytes that a rank receives
ROUNDS = 9
THERE = ("the exchange of headers", "the dispatch of routes", "the dispatch of tokens")
BACK = "the combine of results"


def measure_link(rounds: int, probes: tuple[int, ...]) -> Link:
    """Of this group's ``all_to_all_single``, with the memory that the layer has: the line nearest in proportion."""
    world = dist.get_world_size()
    times = []
    for size in [probe // world for probe in probes]:
        send = torch.zeros(world * size, dtype=torch.uint8)
        with _Watch() as watch:
            for _ in range(rounds + 2):
                dist.barrier()
                watch.ranks.all_to_all("probe", send, [size] * world, [size] * world)
        times.append(_of_the_last(watch.seconds("probe")[2:]))
    out, measured = np.array(probes) * (1 - 1 / world), np.array(times)
    # least squares of (latency + bytes / bandwidth - time) / time
    latency, per_byte = np.linalg.lstsq(np.stack([1 / measured, out / measured], 1), np.ones(len(out)), rcond=None)[0]
    found = [1 / max(float(per_byte), 1e-15), max(0.0, float(latency))]
    dist.broadcast_object_list(found)
    return Link(found[0], found[1], f"measured, {dist.get_backend()}")


def measure_layer(tokens: int, hidden: int, payload: Any, rounds: int = ROUNDS) -> tuple[dict[str, float], list[int]]:
    """Seconds of the exchanges of dispatch and combine, without gradients; and the experts' loads."""
    torch.manual_seed(dist.get_rank())
    layer = ExpertParallel(EXPERTS, hidden, INTERMEDIATE, payload=payload)
    x = torch.randn(tokens, hidden)
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    weights = torch.full((tokens, TOP_K), 1 / TOP_K)
    with _Watch() as watch, torch.no_grad():
        for _ in range(rounds + 2):
            dist.barrier()
            layer(x, ids, weights)
    part = {what: _of_the_last(watch.seconds(what)[2:]) for what in (*THERE, BACK)}
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    dist.all_reduce(counts)
    return {"dispatch": sum(part[what] for what in THERE), "combine": part[BACK]}, counts.tolist()


class _Watch:
    """Exchanges of :class:`Ranks` one after the other, each timed by itself, in place of beside other work."""

    def __init__(self) -> None:
        self.ranks = Ranks(dist.group.WORLD)
        self._spans: list[tuple[str, float]] = []

    def __enter__(self) -> _Watch:
        self._start, spans = Ranks.all_to_all, self._spans
        start: Any = self._start

        def all_to_all(ranks: Ranks, what: str, *rest: Any) -> Arriving:
            begin = time.perf_counter()
            arriving: Arriving = start(ranks, what, *rest)
            arriving.wait()
            spans.append((what, time.perf_counter() - begin))
            return arriving

        setattr(Ranks, "all_to_all", all_to_all)  # noqa: B010 (a method, to mypy)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(Ranks, "all_to_all", self._start)  # noqa: B010

    def seconds(self, what: str) -> list[float]:
        return [seconds for name, seconds in self._spans if name == what]


def _of_the_last(seconds: list[float]) -> float:
    """The median over rounds of the rank that comes last to the exchange, which waits for nobody."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found.median())


def predict(link: Link, tokens: int, hidden: int, payload: Any, loads: Any) -> dict[str, float]:
    """What the model says, for ranks as the devices of one node."""
    world, wire = dist.get_world_size(), 4.0 if payload is None else 1 + 4 / 128
    layer = Layer(RouterConfig(EXPERTS, TOP_K), hidden, INTERMEDIATE, tokens, "device", wire, 4.0, back="expert")
    cluster, plan = Cluster(1, world, link, link, 1e12), place_experts(np.ones(EXPERTS), world)
    found = layer_time(cluster, layer, plan, np.asarray(loads))
    # headers and routes are exchanges of their own, of few bytes
    return {"dispatch": found.dispatch + 2 * link.latency, "combine": found.combine}


def run(sizes: Any = SIZES, rounds: int = ROUNDS, probes: tuple[int, ...] = PROBES) -> dict[str, Any]:
    """Both, for every size and payload; the same on every rank."""
    cases = [(*size, payload) for size in sizes for payload in (None, "fp8")]
    before = measure_link(rounds, probes)
    measured = [measure_layer(tokens, hidden, payload, rounds) for tokens, hidden, payload in cases]
    after = measure_link(rounds, probes)  # a shared machine is not the same for long: the mean of both
    bandwidth = 2 / (1 / before.bandwidth + 1 / after.bandwidth)
    link = Link(bandwidth, (before.latency + after.latency) / 2, before.source)
    lines = [
        {"tokens": tokens, "hidden": hidden, "payload": payload, "measured": seconds,
         "predicted": predict(link, tokens, hidden, payload, loads)}
        for (tokens, hidden, payload), (seconds, loads) in zip(cases, measured, strict=True)
    ]  # fmt: skip
    return {
        "world": dist.get_world_size(), "backend": dist.get_backend(), "bandwidth": link.bandwidth,
        "latency": link.latency, "torch": torch.__version__, "lines": lines,
    }  # fmt: skip


def show(console: Any, report: dict[str, Any]) -> None:
    console.print(f"[head]Expert parallelism[/]  {report['world']} ranks, {report['backend']}")
    text = f"all_to_all_single of bytes: {duration(report['latency'])} and {report['bandwidth'] / 1e9:.2f} GB/s"
    show_text(console, f"{text}, measured before and after", indent=2)
    rows = []
    for line in report["lines"]:
        measured, predicted = line["measured"], line["predicted"]
        cells = [
            part
            for name in ("dispatch", "combine")
            for part in (
                duration(measured[name]), duration(predicted[name]), f"{predicted[name] / measured[name]:.2f}"
            )
        ]  # fmt: skip
        rows.append((f"{line['tokens']} x {line['hidden']}", line["payload"] or "float32", *cells))
    header = ("tokens x hidden", "payload", "dispatch", "model", "ratio", "combine", "model", "ratio")
    show_table(console, header, rows, align="<<>>>>>>")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pyroute.bench.expert_parallel", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs")
    parser.add_argument("--record", action="store_true", help="append the results to benches/results")
    args = parser.parse_args(arguments)
    if "WORLD_SIZE" not in os.environ:
        parser.error("wants torchrun --nproc-per-node N -m pyroute.bench.expert_parallel")
    dist.init_process_group("gloo")
    try:
        set_num_threads(torch.get_num_threads())
        report = run(SIZES[:1], 3, PROBES[:4]) if args.quick else run()
        if dist.get_rank() == 0:
            if args.json:
                write_json(report, args.json)
            if args.record:
                from .suite import records

                machine = records.machine_file()
                file = machine.with_name(f"{machine.stem}-expert-parallel.jsonl")
                records.append([{"op": "expert_parallel", "case": f"{report['world']} ranks", **report}], path=file)
            if args.json != "-":
                show(report_console(), report)
    except UsageError as error:
        parser.error(str(error))
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
