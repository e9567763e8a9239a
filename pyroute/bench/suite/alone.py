"""Columns that disturb whoever runs beside them, measured in a process of their own.

A library whose threads go on spinning after its calls takes a core from the next column, however long the pause before
it. The process builds the same problem, checks and samples those columns only, and ends; the machine's limits are
measured before and after it by the process that waits. Their ratios are therefore to columns of another minute.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from . import harness, models, peers, shapes


def measure(
    number: int, peer: peers.Peer, columns: Sequence[peers.Column], args: argparse.Namespace
) -> list[harness.Cell]:
    """Cells of these columns of one peer for the case of that number."""
    names = [column.name for column in columns]
    # what _measure needs: the command's own function is among the rest, and __main__ is another module there
    kept = ("model", "load", "memory", "quick", "threads", "rounds", "cold")
    asked = argparse.Namespace(**{name: getattr(args, name) for name in kept})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            return executor.submit(_measure, number, columns[0].module, names, asked).result()
        except Exception as error:  # it may also take its process with it
            failed: dict[str, Any] = {"status": "failed", "note": peers.reason(error), "alone": True}
            return [harness.Cell(peer.name, peer.version, column.name, column.kind, **failed) for column in columns]


def _measure(number: int, module: str, names: Sequence[str], args: argparse.Namespace) -> list[harness.Cell]:
    peer = peers.load_one(module, package="")
    problem = models.chosen(args)[number].make(shapes.small if args.quick else lambda s: s)
    cells = []
    for column in peer.columns:
        if column.op == problem.op and column.name in names:
            cell = harness.prepare(problem, peer, column, args.threads)
            cells += [cell] if cell else []
    harness.sample(cells, args.threads, args.rounds, cold=args.cold)
    for cell in cells:  # what can be sent back
        cell.work, cell.set_threads, cell.alone = None, harness.no_threads, True
    return cells
