"""Ranks of ``torch.distributed`` over gloo, as processes on this machine, for tests.

They are forked from a server that has imported PyTorch and pyroute once: 0.1 s for a group instead of 4 s a process.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["numpy", "torch", "torch.distributed", "torch._dynamo", "pyroute.pytorch", "expert_parallel_ranks"]
)

TIMEOUT = 60.0  # of the group's collectives


class Outcome(NamedTuple):
    """What a rank returned, or the text of what it raised, or the exit status of one that did neither."""

    value: Any
    error: str
    exitcode: int | None
    seconds: float


def run_ranks(world: int, function: Callable[..., Any], *args: Any, store: Path | None = None,
              timeout: float = TIMEOUT, patience: float = 90.0) -> list[Outcome]:  # fmt: skip
    """``function(*args)`` on every rank of a group, whose store is the file ``store``, or in rank 0."""
    init = f"file://{store}" if store else f"tcp://127.0.0.1:{_free_port()}"
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _SERVER.Process(target=_rank, args=(send, rank, world, init, timeout, function, args), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    begin = time.monotonic()
    for process, (_, send) in zip(processes, pipes, strict=True):
        process.start()
        send.close()
    outcomes = [
        _outcome(process, receive, begin, patience) for process, (receive, _) in zip(processes, pipes, strict=True)
    ]
    for process in processes:
        process.kill()
        process.join()
    return outcomes


def values(outcomes: list[Outcome]) -> list[Any]:
    """What every rank returned."""
    errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    assert not errors, "\n".join(errors)
    return [outcome.value for outcome in outcomes]


def _outcome(process: Any, receive: Any, begin: float, patience: float) -> Outcome:
    value, error, seconds = None, "", time.monotonic() - begin
    try:
        if receive.poll(max(0.0, begin + patience - time.monotonic())):
            value, error, seconds = receive.recv()
        else:
            error = f"no answer in {patience:g} s"
    except EOFError:
        error = "died"
    process.join(5)
    return Outcome(value, error, process.exitcode, seconds)


def _rank(send: Any, rank: int, world: int, init: str, timeout: float, function: Any, args: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    begin, value, error = time.monotonic(), None, ""
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=limit)
        begin = time.monotonic()
        value = function(*args)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}\n{traceback.format_exc()}"
    send.send((value, error, time.monotonic() - begin))
    if not error:
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
