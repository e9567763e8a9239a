"""``place_experts`` for all layers of DeepSeek-V3 beside DeepSeek's own balancer, on one thread.

    python benches/placement.py FOLDER [--record]

FOLDER holds the eplb.py of github.com/deepseek-ai/EPLB, which is no package; it needs torch. Times are taken in turns
in one process; every layer's largest device load is compared. ``--record`` adds lines to benches/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

import pyroute
from pyroute.bench.suite import records
from pyroute.placement import Placement, place_experts

LAYERS, EXPERTS = 58, 256
CASES = ((320, 32, 8), (320, 32, 1), (288, 32, 8), (288, 32, 1), (320, 64, 8))  # slots, devices, nodes and groups
KINDS = ("gamma 2", "gamma 0.5", "zipf 0.8")
ROUNDS = 3


def loads(kind: str) -> np.ndarray:
    rng, (name, number) = np.random.default_rng(0), kind.split()
    if name == "gamma":
        return rng.gamma(float(number), 100, (LAYERS, EXPERTS)).astype(np.float32)
    shares = 1e5 / np.arange(1, EXPERTS + 1) ** float(number)
    return np.stack([rng.permutation(shares) for _ in range(LAYERS)]).astype(np.float32)


def compare(eplb: Any, kind: str, slots: int, devices: int, nodes: int) -> list[dict[str, Any]]:
    x = loads(kind)
    weight, ours, theirs = torch.from_numpy(x), [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        other = eplb.rebalance_experts(weight, slots, nodes, nodes, devices)[0]
        theirs.append(time.perf_counter() - begin)
        for _ in range(5):
            begin = time.perf_counter()
            plan = place_experts(x, devices, num_slots=slots, num_nodes=nodes, num_groups=nodes)
            ours.append(time.perf_counter() - begin)
    beside = Placement(other.numpy(), devices, EXPERTS)
    worse = float((plan.device_loads(x).max(axis=1) / beside.device_loads(x).max(axis=1)).max())
    common = {"op": "placement", "case": f"{kind}, {slots} slots on {devices} devices, {nodes} nodes"}
    return [
        {**common, "column": column, "version": version, "median_s": statistics.median(times), "rounds": len(times),
         "p10_s": float(np.percentile(times, 10)), "p90_s": float(np.percentile(times, 90)),
         "balance": float(found.balance(x).mean()), "largest_over_theirs": ratio}
        for column, version, times, found, ratio in (
            ("pyroute", pyroute.__version__, ours, plan, worse), ("DeepSeek EPLB", "", theirs, beside, 1.0)
        )
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="that holds eplb.py")
    parser.add_argument("--record", action="store_true", help="append the results to benches/results")
    args = parser.parse_args()
    sys.path.insert(0, args.folder)
    import eplb

    torch.set_num_threads(1)
    print("| loads, slots | EPLB | pyroute | ratio | balance, EPLB | pyroute |\n|---|---:|---:|---:|---:|---:|")
    lines = []
    for case in CASES:
        for kind in KINDS:
            ours, theirs = compare(eplb, kind, *case)
            lines += [ours, theirs]
            ratio = theirs["median_s"] / ours["median_s"]
            times = f"{theirs['median_s'] * 1e3:.0f} ms | {ours['median_s'] * 1e3:.1f} ms | {ratio:.0f}"
            print(f"| {ours['case']} | {times} | {theirs['balance']:.4f} | {ours['balance']:.4f} |", flush=True)
            if ours["largest_over_theirs"] > 1 + 1e-6:
                raise SystemExit("a layer's largest device load is larger than EPLB's")
    if args.record:
        machine = records.machine_file()
        records.append(lines, path=machine.with_name(f"{machine.stem}-placement.jsonl"))


if __name__ == "__main__":
    main()
